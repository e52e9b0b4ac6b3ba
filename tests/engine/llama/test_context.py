"""Batches, slots and the KV cache: the same text however it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from shimpy.engine.backend import Chunk, DecodeStatus
from shimpy.engine.llama import LlamaBackend
from shimpy.engine.llama import memory as memory_module
from shimpy.engine.llama.context import Row
from shimpy.errors import LoadError, UnsupportedError, WorkerError
from shimpy.protocol.messages import BufferUse
from tests.engine.llama.running import (
    GREEDY,
    generate_ids,
    go_on,
    load,
    loaded,
    logits,
    prefill,
    prompt_ids,
    run_apart,
)
from tests.synthetic import CHAIN_TEXT, write_llama

PROMPTS = ("Hello", "The quick brown fox", "x", "日本 and so on, at some length, for a while")


# Kernels for other batch sizes add up in another order: logits of these models, which spread over
# some tens, then differ by up to 0.01. What another slot holds would change them by more than 1.
ATOL = 0.02


def alone(backend: LlamaBackend, ids: list[int], chosen: Sequence[int]) -> list[Row]:
    """Return the logits after a prompt and after each chosen token, nothing else in the cache."""
    assert backend.kv_remove(0, 0, -1)
    prefill(backend, ids)
    rows = [logits(backend)]
    for pos, token in enumerate(chosen, len(ids)):
        prefill(backend, [token], start=pos)
        rows.append(logits(backend))
    assert backend.kv_remove(0, 0, -1)
    return rows


def check_together(backend: LlamaBackend) -> None:
    """Prompts side by side, then a token of each in every batch: the logits are those alone."""
    ids = [prompt_ids(backend, prompt) for prompt in PROMPTS]
    texts = [generate_ids(backend, prompt, n=40) for prompt in PROMPTS]
    assert len({tuple(text) for text in texts}) == len(PROMPTS)
    assert all(len(set(text)) > 10 for text in texts)
    expected = [alone(backend, *one) for one in zip(ids, texts, strict=True)]
    chunks = [Chunk(slot, 0, tokens, True) for slot, tokens in enumerate(ids)]
    for step in range(len(texts[0])):
        # Every other step by what the one before was filled with.
        if step > 1 and step % 2:
            status = backend.decode_next([text[step - 1] for text in texts])
        else:
            status = backend.decode(chunks)
        assert status == DecodeStatus.OK
        for slot, rows in enumerate(expected):
            np.testing.assert_allclose(logits(backend, slot), rows[step], atol=ATOL)
        chunks = [
            Chunk(slot, len(tokens) + step, [texts[slot][step]], True)
            for slot, tokens in enumerate(ids)
        ]


@pytest.mark.parametrize(
    "model", ["llama_model", "mixtral_model", "deepseek_model", "qwen3moe_model"]
)
def test_slots_batched_compute_what_they_compute_alone(
    model: str, request: pytest.FixtureRequest
) -> None:
    with loaded(request.getfixturevalue(model)) as backend:
        check_together(backend)


def test_rows_are_in_the_order_of_the_chunks_that_want_them(llama: LlamaBackend) -> None:
    a, b, c = (prompt_ids(llama, text) for text in PROMPTS[:3])
    expected = []
    for ids in (a, c):
        prefill(llama, ids, slot=3)
        expected.append(logits(llama))
        llama.kv_remove(3, 0, -1)
    # The order of the chunks, not that of the slots; the one between wants nothing.
    batch = [Chunk(2, 0, a, True), Chunk(0, 0, b, False), Chunk(1, 0, c, True)]
    assert llama.decode(batch) == DecodeStatus.OK
    for row, alone in enumerate(expected):
        np.testing.assert_allclose(logits(llama, row), alone, atol=1e-4)


def test_padding_changes_no_logits_and_leaves_nothing_behind(llama: LlamaBackend) -> None:
    ids = [prompt_ids(llama, text) for text in PROMPTS[:3]]
    longest = max(map(len, ids)) + 3
    batch = [Chunk(slot, 0, one, True, longest - len(one)) for slot, one in enumerate(ids)]
    assert llama.decode(batch) == DecodeStatus.OK
    padded = [logits(llama, row).copy() for row in range(3)]
    later = [Chunk(slot, len(one), [65], True) for slot, one in enumerate(ids)]
    assert llama.decode(later) == DecodeStatus.OK
    after = [logits(llama, row).copy() for row in range(3)]
    for slot, one in enumerate(ids):
        prefill(llama, one, slot=3)
        np.testing.assert_allclose(padded[slot], logits(llama), atol=ATOL)
        prefill(llama, [65], slot=3, start=len(one))
        np.testing.assert_allclose(after[slot], logits(llama), atol=ATOL)
        llama.kv_remove(3, 0, -1)


def test_a_prompt_in_parts_gives_the_same_logits(llama: LlamaBackend) -> None:
    ids = prompt_ids(llama, PROMPTS[3])
    prefill(llama, ids, slot=0)
    whole = logits(llama)
    assert llama.decode([Chunk(1, 0, ids[:7], False)]) == DecodeStatus.OK
    assert llama.decode([Chunk(1, 7, ids[7:8], False)]) == DecodeStatus.OK
    prefill(llama, ids[8:], slot=1, start=8)
    np.testing.assert_allclose(logits(llama), whole, atol=1e-4)


def test_a_copied_prefix_gives_the_same_text(llama: LlamaBackend) -> None:
    """Also from a slot that has gone on: only the prefix is shared."""
    ids = prompt_ids(llama, PROMPTS[3])
    expected = generate_ids(llama, ids, slot=0)
    llama.kv_copy(0, 1, len(ids) - 1)
    prefill(llama, ids[-1:], slot=1, start=len(ids) - 1)
    assert go_on(llama, slot=1, pos=len(ids)) == expected


def test_a_copy_replaces_what_the_target_held(llama: LlamaBackend) -> None:
    """Two cells of one position would both be attended to."""
    ids = prompt_ids(llama, PROMPTS[3])
    expected = generate_ids(llama, ids, slot=0)
    prefill(llama, prompt_ids(llama, PROMPTS[1]), slot=1)
    llama.kv_copy(0, 1, len(ids) - 1)
    llama.kv_remove(1, len(ids) - 1, -1)
    prefill(llama, ids[-1:], slot=1, start=len(ids) - 1)
    assert go_on(llama, slot=1, pos=len(ids)) == expected


def test_a_copy_to_itself_changes_nothing(llama: LlamaBackend) -> None:
    ids = prompt_ids(llama, PROMPTS[1])
    expected = generate_ids(llama, ids, slot=0)
    llama.kv_remove(0, len(ids) - 1, -1)
    llama.kv_copy(0, 0, len(ids) - 1)
    prefill(llama, ids[-1:], slot=0, start=len(ids) - 1)
    assert go_on(llama, slot=0, pos=len(ids)) == expected


def test_slots_with_cells_of_their_own_compute_what_one_computes_alone(
    apart: LlamaBackend,
) -> None:
    check_together(apart)
    assert (apart.n_ctx, apart.kv_unified) == (512, False)
    # Each has as many tokens as all of them had together.
    filler = [65] * 512
    for slot in range(4):
        assert apart.kv_remove(slot, 0, -1)
        assert apart.decode([Chunk(slot, 0, filler, False)]) == DecodeStatus.OK
    assert apart.decode([Chunk(0, 512, [65], False)]) == DecodeStatus.KV_FULL


def test_a_prefix_is_copied_between_slots_with_cells_of_their_own(apart: LlamaBackend) -> None:
    """In place of what the other held, and from one that has gone on."""
    ids = prompt_ids(apart, PROMPTS[3])
    expected = generate_ids(apart, ids, slot=0)
    prefill(apart, prompt_ids(apart, PROMPTS[1]), slot=2)
    assert apart.kv_copy(0, 2, len(ids) - 1)
    assert apart.kv_remove(0, 0, -1)
    prefill(apart, ids[-1:], slot=2, start=len(ids) - 1)
    assert go_on(apart, slot=2, pos=len(ids)) == expected


def test_slots_exchange_what_they_hold(apart: LlamaBackend) -> None:
    """Also with an empty one, and in the middle of a text."""
    first, second = (prompt_ids(apart, text) for text in PROMPTS[1:3])
    expected = [generate_ids(apart, ids, slot=0) for ids in (first, second)]
    apart.kv_remove(0, 0, -1)
    prefill(apart, first[:-1], slot=0)
    prefill(apart, second[:-1], slot=3)
    assert apart.kv_exchange(0, 3)
    assert apart.kv_exchange(0, 1)
    prefill(apart, first[-1:], slot=3, start=len(first) - 1)
    assert go_on(apart, slot=3, pos=len(first)) == expected[0]
    prefill(apart, second[-1:], slot=1, start=len(second) - 1)
    assert go_on(apart, slot=1, pos=len(second)) == expected[1]
    prefill(apart, first, slot=0)
    assert go_on(apart, slot=0, pos=len(first)) == expected[0]


def test_a_removed_tail_is_forgotten(llama: LlamaBackend) -> None:
    ids = prompt_ids(llama, PROMPTS[1])
    expected = generate_ids(llama, ids, slot=0)
    assert llama.kv_remove(0, len(ids) - 1, -1)
    prefill(llama, ids[-1:], slot=0, start=len(ids) - 1)
    assert go_on(llama, slot=0, pos=len(ids)) == expected


def test_removing_one_slot_leaves_the_others(llama: LlamaBackend) -> None:
    ids = prompt_ids(llama, PROMPTS[1])
    expected = generate_ids(llama, ids, slot=0)
    prefill(llama, ids[:-1], slot=1)
    llama.kv_copy(1, 2, len(ids) - 1)
    assert llama.kv_remove(1, 0, -1)
    prefill(llama, ids[-1:], slot=2, start=len(ids) - 1)
    assert go_on(llama, slot=2, pos=len(ids)) == expected


@pytest.mark.parametrize("kv_unified", [True, False])
def test_shifted_positions_say_what_fresh_ones_say(tmp_path: Path, kv_unified: bool) -> None:
    """With one layer a key knows its token and its position, nothing else: moved is fresh."""
    model = write_llama(tmp_path / "one.gguf", n_layer=1)
    with loaded(model, kv_type="f32", kv_unified=kv_unified) as backend:
        dropped, kept = (prompt_ids(backend, PROMPTS[1]), prompt_ids(backend, PROMPTS[3]))
        expected = generate_ids(backend, kept, slot=0)
        prefill(backend, dropped + kept, slot=1)
        assert backend.can_shift
        assert backend.kv_remove(1, 0, len(dropped))
        backend.kv_shift(1, len(dropped), -1, -len(dropped))
        assert backend.kv_remove(1, len(kept) - 1, -1)
        prefill(backend, kept[-1:], slot=1, start=len(kept) - 1)
        assert go_on(backend, slot=1, pos=len(kept)) == expected


def test_a_full_cache_changes_nothing(llama: LlamaBackend) -> None:
    ids = prompt_ids(llama, PROMPTS[1])
    expected = generate_ids(llama, ids, n=8, slot=0)
    llama.kv_remove(0, len(ids) - 1, -1)
    filler = [65] * llama.n_ctx
    assert llama.decode([Chunk(1, 0, filler[: llama.n_ctx - len(ids)], False)]) == DecodeStatus.OK
    assert llama.decode([Chunk(2, 0, filler[:100], True)]) == DecodeStatus.KV_FULL
    llama.kv_remove(1, 0, -1)
    prefill(llama, ids[-1:], slot=0, start=len(ids) - 1)
    assert go_on(llama, slot=0, pos=len(ids), n=8) == expected


@pytest.mark.parametrize(
    ("chunks", "said"),
    [
        ([], "0 tokens"),
        ([Chunk(0, 0, [], True)], "0 tokens"),
        ([Chunk(0, 0, [65] * 513, False)], "513 tokens"),
        ([Chunk(0, 0, [65] * 510, False, 3)], "513 tokens"),
        ([Chunk(4, 0, [65], True)], r"slots \[4\]"),
        ([Chunk(-1, 0, [65], True)], r"slots \[-1\]"),
        ([Chunk(0, i, [65], True) for i in range(5)], "5 tokens.*room for 4"),
        ([Chunk(0, 0, [512], True)], r"refused.*invalid token\[0\] = 512"),
        ([Chunk(0, 0, [-1], True)], "refused"),
        ([Chunk(0, 7, [65], True), Chunk(0, 3, [65], True)], "positions are not continuous"),
    ],
    ids=[
        "nothing",
        "no tokens",
        "too long",
        "padded too long",
        "slot",
        "no slot",
        "rows",
        "token",
        "no token",
        "gap",
    ],
)
def test_a_batch_that_llama_cpp_would_abort_on_is_refused(
    llama_model: Path, chunks: list[Chunk], said: str
) -> None:
    """The worker lives on: the process prints what it generates afterwards."""
    out = run_apart(
        f"""
        import re
        from pathlib import Path
        from shimpy.errors import WorkerError
        backend = load(Path(sys.argv[1]))
        try:
            backend.decode({chunks!r})
        except WorkerError as error:
            print(re.search({said!r}, error.message) is not None)
        assert backend.kv_remove(0, 0, -1)
        print(len(generate_ids(backend, "Hello", n=8)))
        """,
        llama_model,
    )
    assert out.split() == ["True", "8"]


@pytest.mark.parametrize(
    ("chunks", "n_tokens"),
    [
        ([Chunk(0, 0, [65], True), Chunk(1, 0, [65], True)], 1),
        ([Chunk(0, 0, [65, 66], True)], 1),
        ([Chunk(0, 0, [65], False)], 1),
        ([Chunk(0, 0, [65], True), Chunk(1, 0, [65], False)], 2),
    ],
)
def test_what_can_t_come_next_is_refused(
    llama: LlamaBackend, chunks: list[Chunk], n_tokens: int
) -> None:
    """llama.cpp would write over what is not there."""
    assert llama.decode(chunks) == DecodeStatus.OK
    with pytest.raises(WorkerError, match=f"{n_tokens} tokens can't come next"):
        llama.decode_next([67] * n_tokens)
    for chunk in chunks:
        assert llama.kv_remove(chunk.slot, 0, -1)
    assert len(generate_ids(llama, "Hello", n=8)) == 8


def test_logits_that_were_not_asked_for_are_an_error(llama: LlamaBackend) -> None:
    """llama.cpp would abort."""
    sampler = llama.make_sampler(GREEDY, [])
    assert llama.decode([Chunk(0, 0, [65, 66], False)]) == DecodeStatus.OK
    with pytest.raises(WorkerError, match="output 0"):
        sampler.sample(0)
    prefill(llama, [67], start=2)
    with pytest.raises(WorkerError, match="output 1"):
        sampler.sample(1)
    sampler.sample(0)
    sampler.close()


@pytest.mark.parametrize("slot", [-1, 4, 300])
def test_slots_that_are_none_are_refused(llama: LlamaBackend, slot: int) -> None:
    with pytest.raises(WorkerError, match=f"no slot {slot}"):
        llama.kv_remove(slot, 0, -1)
    with pytest.raises(WorkerError, match=f"no slot {slot}"):
        llama.kv_copy(0, slot, 1)
    with pytest.raises(WorkerError, match=f"no slot {slot}"):
        llama.kv_shift(slot, 0, -1, 1)


def test_an_encoder_generates_nothing(bert_model: Path) -> None:
    with pytest.raises(LoadError, match="embeddings only"):
        load(bert_model)
    with loaded(bert_model, embedding=True) as backend:
        with pytest.raises(UnsupportedError):
            backend.decode([Chunk(0, 0, [5], True)])
        with pytest.raises(UnsupportedError):
            backend.make_sampler(GREEDY, [])


@pytest.mark.parametrize("kv_type", ["f32", "bf16", "q8_0", "q4_0"])
def test_kv_types_are_what_is_asked_for(chain_model: Path, kv_type: str) -> None:
    with loaded(chain_model, n_ctx=1024, kv_type=kv_type) as backend:
        (use,) = backend.memory()
        bytes_per_32 = {"f32": 128, "bf16": 64, "q8_0": 34, "q4_0": 18}[kv_type]
        # One layer, one head of 32, keys and values.
        assert use.context_bytes == 1024 * 2 * bytes_per_32
        assert len(generate_ids(backend, "x", n=100)) > 20


def test_memory_is_weights_and_cache(llama_model: Path) -> None:
    with loaded(llama_model, n_ctx=1000) as backend:
        (use,) = backend.memory()
        assert use.device == "CPU"
        # Rounded up to 256; 2 layers, 2 heads of 16, keys and values of 2 bytes.
        assert backend.n_ctx == 1024
        assert use.context_bytes == 1024 * 2 * 2 * 16 * 2 * 2
        assert 0.9 < use.model_bytes / llama_model.stat().st_size < 1.05
        assert use.compute_bytes > 0


def test_fewer_rows_of_logits_are_reserved_for_fewer_slots(tmp_path: Path) -> None:
    """n_outputs_max follows the slots: a micro-batch of rows would be 64 MiB here."""
    path = write_llama(tmp_path / "vocab.gguf", n_vocab=32768)
    with loaded(path, n_ctx=1024, n_slots=2) as backend:
        (use,) = backend.memory()
        assert use.compute_bytes < 512 * 32768 * 4 / 8


def test_without_the_symbol_the_log_tells_the_memory(
    llama_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loaded(llama_model) as backend:
        (exact,) = backend.memory()
        monkeypatch.setattr(memory_module, "_SYMBOL", "llama_no_such_symbol")
        (logged,) = backend.memory()
    assert logged.device == exact.device

    def mib(use: BufferUse) -> list[float]:
        return [n / 2**20 for n in (use.model_bytes, use.context_bytes, use.compute_bytes)]

    np.testing.assert_allclose(mib(logged), mib(exact), atol=0.02)


def test_threads_can_be_changed_between_steps(llama: LlamaBackend) -> None:
    expected = generate_ids(llama, "Hello")
    llama.set_threads(2)
    assert generate_ids(llama, "Hello") == expected
    llama.set_threads(1)
    with pytest.raises(WorkerError, match="0 threads"):
        llama.set_threads(0)


def test_a_context_of_one_token_is_made(llama_model: Path) -> None:
    with loaded(llama_model, n_ctx=1) as backend:
        assert backend.n_ctx == 256
        assert len(generate_ids(backend, "Hello", n=4)) == 4


def test_the_chain_says_its_text(chain: LlamaBackend) -> None:
    for prompt in ("", "Hello", "日本 🙂", CHAIN_TEXT):
        ids = generate_ids(
            chain, [chain.bos_id, *chain.tokenize(prompt, parse_special=True)], n=100
        )
        assert chain.is_eog(ids[-1])
        assert b"".join(chain.piece(t, special=False) for t in ids).decode() == CHAIN_TEXT


def test_two_models_live_side_by_side(llama: LlamaBackend, chain: LlamaBackend) -> None:
    expected = generate_ids(llama, "Hello", n=8)
    generate_ids(chain, "Hello", n=8)
    assert generate_ids(llama, "Hello", n=8) == expected


def test_close_may_be_called_again(chain_model: Path) -> None:
    backend = load(chain_model)
    backend.close()
    backend.close()
