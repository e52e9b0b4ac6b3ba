"""Embeddings of whole texts, many in a batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shimpy.engine.backend import Chunk
from shimpy.engine.llama import LlamaBackend
from shimpy.errors import ContextExceededError, UnsupportedError, WorkerError
from tests.engine.llama.running import generate_ids, loaded, prefill, prompt_ids, run_apart
from tests.synthetic import write_bert, write_llama, write_nomic_bert

TEXTS = ["hello world", "a", "the quick brown fox jumps over the lazy dog " * 5, "日本"]


def inputs(backend: LlamaBackend, texts: list[str]) -> list[list[int]]:
    return [prompt_ids(backend, text) + backend.end_ids for text in texts]


def vectors(
    backend: LlamaBackend, ids: list[list[int]], *, normalize: bool = True
) -> npt.NDArray[np.float32]:
    data = backend.embed(ids, normalize=normalize)
    return np.frombuffer(data, "<f4").reshape(len(ids), backend.n_embd)


@pytest.fixture(params=["bert", "nomic", "cls", "decoder", "mean decoder"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "embed.gguf"
    match request.param:
        case "bert":
            return write_bert(path)
        case "nomic":
            return write_nomic_bert(path)
        case "cls":
            return write_bert(path, pooling="cls")
        case "decoder":
            return write_llama(path)
        case _:
            return write_llama(path, pooling="mean")


def test_texts_in_a_batch_embed_as_they_do_alone(model: Path) -> None:
    with loaded(model, embedding=True) as backend:
        ids = inputs(backend, TEXTS)
        batched = vectors(backend, ids)
        alone = np.concatenate([vectors(backend, [one]) for one in ids])
        np.testing.assert_allclose(batched, alone, atol=2e-3)
        np.testing.assert_allclose(np.linalg.norm(batched, axis=1), 1, atol=1e-5)
        # Different texts point elsewhere, or equality would mean nothing.
        similar = batched @ batched.T
        assert np.abs(similar[~np.eye(len(TEXTS), dtype=bool)]).max() < 0.99


@pytest.mark.parametrize("flash_attn", ["auto", "off"])
def test_states_of_a_generating_context_are_the_embeddings(
    llama_model: Path, flash_attn: str
) -> None:
    """Taken between steps of a generation, which must not notice."""
    with (
        loaded(llama_model, embedding=True, flash_attn=flash_attn) as reference,
        loaded(llama_model, flash_attn=flash_attn) as backend,
    ):
        expected_text = generate_ids(backend, "a story", n=8)
        prompts = [prompt_ids(backend, text) for text in TEXTS[:3]]
        expected = vectors(reference, prompts)
        assert backend.kv_remove(0, 0, -1)
        for slot, ids in enumerate(prompts):
            prefill(backend, ids, slot=slot)
            assert backend.kv_remove(slot, len(ids) - 1, -1)
        chunks = [Chunk(slot, len(ids) - 1, ids[-1:], True) for slot, ids in enumerate(prompts)]
        data = backend.embed_last(chunks, normalize=True)
        states = np.frombuffer(data, "<f4").reshape(len(prompts), backend.n_embd)
        np.testing.assert_allclose(states, expected, atol=2e-3)
        assert generate_ids(backend, "a story", n=8, slot=3) == expected_text
        with pytest.raises(WorkerError, match="single tokens"):
            backend.embed_last([Chunk(3, 0, prompts[0], True)], normalize=True)


def test_more_texts_than_a_batch_takes_are_all_embedded(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend:
        texts = [f"{'word ' * (i % 40)}{i}" for i in range(150)]
        ids = inputs(backend, texts)
        together = vectors(backend, ids)
        picked = [0, 63, 64, 101, 149]
        alone = np.concatenate([vectors(backend, [ids[i]]) for i in picked])
        np.testing.assert_allclose(together[picked], alone, atol=2e-3)


def test_only_the_length_is_normalised_away(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend:
        ids = inputs(backend, TEXTS)
        plain, normal = vectors(backend, ids, normalize=False), vectors(backend, ids)
        lengths = np.linalg.norm(plain, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.1
        np.testing.assert_allclose(plain / lengths, normal, atol=1e-5)


def test_no_inputs_give_no_vectors(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend:
        assert backend.embed([], normalize=True) == b""


@pytest.mark.parametrize(
    ("n_ctx", "n_batch", "longest"), [(4096, 4096, 512), (4096, 200, 256), (100, 2048, 256)]
)
def test_an_encoder_takes_no_more_than_its_positions(
    bert_model: Path, n_ctx: int, n_batch: int, longest: int
) -> None:
    """llama.cpp aborts beyond them, and beyond its micro-batch."""
    said = run_apart(
        """
        from pathlib import Path
        from shimpy.errors import ContextExceededError
        path, n_ctx, n_batch = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
        backend = load(path, embedding=True, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=128)
        longest = [5] * backend.n_ctx
        assert len(backend.embed([longest, longest, [5]], normalize=True)) == 3 * backend.n_embd * 4
        try:
            backend.embed([[5], longest + [5]], normalize=True)
        except ContextExceededError as error:
            print(backend.n_ctx, error.n_prompt, error.n_ctx)
        """,
        bert_model,
        n_ctx,
        n_batch,
    )
    assert said.split() == [str(longest), str(longest + 1), str(longest)]


def test_a_decoder_takes_a_batch_at_most(llama_model: Path) -> None:
    with loaded(llama_model, embedding=True, n_ctx=1024, n_batch=300, n_ubatch=9) as backend:
        assert backend.n_ctx == 320
        assert len(vectors(backend, [[65] * 320, [66]])) == 2
        with pytest.raises(ContextExceededError, match="321 tokens; the context is 320"):
            backend.embed([[65] * 321], normalize=True)


def test_an_empty_input_is_an_error(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend, pytest.raises(ContextExceededError):
        backend.embed([[5], []], normalize=True)


def test_a_token_that_is_none_is_an_error(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend:
        with pytest.raises(WorkerError, match="refused"):
            backend.embed([[5, 512]], normalize=True)
        assert len(vectors(backend, [[5]])) == 1


def test_a_generating_model_embeds_nothing(llama: LlamaBackend) -> None:
    with pytest.raises(UnsupportedError, match="not for embeddings"):
        llama.embed([[65]], normalize=True)
    assert generate_ids(llama, "Hello", n=2)


def test_memory_and_threads_are_the_embedders(bert_model: Path) -> None:
    with loaded(bert_model, embedding=True) as backend:
        backend.set_threads(2)
        (use,) = backend.memory()
        assert use.model_bytes > 0.9 * bert_model.stat().st_size
        assert use.compute_bytes > 0
