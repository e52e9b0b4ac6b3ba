"""The worker as the daemon sees it: a real process, a real llama.cpp, small real models."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimpy.protocol.messages import (
    Cancel,
    Embed,
    Embedded,
    Fim,
    Hello,
    Load,
    LoadFailed,
    Sampling,
    SetThreads,
    Text,
    Tokenize,
    Tokenized,
)
from tests.engine.worker import TIMEOUT_S, Worker
from tests.synthetic import CHAIN_TEXT, write_chain

ARCHITECTURES = ["llama", "mixtral", "deepseek", "qwen3moe"]
# Different lengths, some with a prefix in common.
PROMPTS = [
    "Hello wörld 日本 🙂",
    "The fox",
    "The fox said that it is the end of the story, " * 6,
    "The fox said that it is the end of the story, " * 6 + "and left.",
    "x",
    "Once upon a time there was a question. " * 12,
    "\n\n",
    "def main():\n    return 0\n" * 9,
]
# On a CPU, flash attention computes batches of 64 tokens and more by another kernel, whose
# logits differ by about 0.01 from those of small batches: enough to change a token now and
# then, whoever batches. Without it sums differ in their last bits, which an F16 cache rounds now
# one way and now the other: logprobs by up to 0.006. With one of F32 they agree to 0.00002, and
# the two likeliest tokens of each step here are 0.0003 apart at least. (0.025 at a single one of
# mixtral's, for which two experts are as likely; its likeliest token is 2.7 ahead.)
EXACT = {"flash_attn": "off", "kv_type": "f32"}


@pytest.fixture(scope="module")
def chain(chain_model: Path) -> Iterator[Worker]:
    """A worker that says CHAIN_TEXT to any prompt; tests take request numbers of their own."""
    with Worker.serving(chain_model) as worker:
        yield worker


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_eight_streams_at_once_equal_the_same_eight_alone(
    arch: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{arch}_model")
    with Worker.serving(model, **EXACT) as worker:
        alone = [
            worker.generate(100 + i, prompt, n_predict=40, no_cache=True)
            for i, prompt in enumerate(PROMPTS)
        ]
        for i, prompt in enumerate(PROMPTS):
            worker.submit(i, prompt, n_predict=40)
        together = worker.finish(*range(len(PROMPTS)))
    assert [told.text for told in together] == [told.text for told in alone]
    assert len({told.text for told in alone}) == len(PROMPTS)


def test_streams_that_do_not_fit_together_give_way_and_still_say_the_same(
    llama_model: Path,
) -> None:
    """The cache holds two of the eight at their full length: they are preempted and resumed."""
    prompts = [f"Story {i}: " + "it was the fox and the end. " * 2 for i in range(8)]
    with Worker.serving(llama_model, n_ctx=256, **EXACT) as worker:
        alone = [
            worker.generate(100 + i, prompt, n_predict=90, no_cache=True)
            for i, prompt in enumerate(prompts)
        ]
        for i, prompt in enumerate(prompts):
            worker.submit(i, prompt, n_predict=90)
        together = worker.finish(*range(8))
    assert [told.text for told in together] == [told.text for told in alone]


def test_the_text_is_exact_to_the_byte(chain: Worker) -> None:
    told = chain.generate(1, "Say it")
    assert told.text == CHAIN_TEXT
    assert told.done.reason == "stop"
    assert told.done.n_generated == told.n_tokens + 1


def test_characters_arrive_whole(chain_model: Path, chain: Worker) -> None:
    """The model's tokens are cut inside of characters; frames are not."""
    chain.submit(2, "Say it", stop=["🙂 fox said"])
    (told,) = chain.finish(2)
    assert told.text == CHAIN_TEXT.partition("🙂 fox said")[0]
    assert told.done.stop_string == "🙂 fox said"
    assert "\ufffd" not in told.text


def test_requests_have_their_own_ends(chain: Worker) -> None:
    stops = [["日本"], ["wörld”"], [" time"], [], ["naïve 🙂", "end."]]
    for i, stop in enumerate(stops):
        chain.submit(10 + i, f"Prompt {i}", stop=stop)
    told = chain.finish(*range(10, 15))
    for each, stop in zip(told, stops, strict=True):
        expected = min((CHAIN_TEXT.partition(s)[0] for s in stop), key=len, default=CHAIN_TEXT)
        assert each.text == expected


def test_the_number_of_tokens_is_limited(chain: Worker) -> None:
    told = chain.generate(20, "Say it", n_predict=5)
    assert (told.done.reason, told.done.n_generated, told.n_tokens) == ("length", 5, 5)
    assert CHAIN_TEXT.startswith(told.text)


def test_a_prompt_over_the_context_is_refused_with_both_numbers(chain: Worker) -> None:
    failed = chain.generate(21, "x y z " * 2000).failed
    assert (failed.code, failed.n_ctx) == ("context_exceeded", 1024)
    assert failed.n_prompt > 1024
    assert f"{failed.n_prompt} tokens" in failed.message
    assert "1024" in failed.message


def test_the_next_turn_finds_the_last_one_in_the_cache(chain: Worker) -> None:
    first = chain.generate(30, "You are a fox. Say it.", return_tokens=True)
    second = chain.generate(31, "You are a fox. Say it." + first.text + "Again")
    assert second.done.n_cached >= first.done.n_prompt
    assert second.done.n_cached < second.done.n_prompt
    assert second.text == CHAIN_TEXT


def test_tokens_are_made_and_read(chain: Worker) -> None:
    text = "Hello wörld 日本 🙂\n x"
    chain.send(Tokenize(40, text, add_special=True))
    (told,) = chain.finish(40)
    assert isinstance(told.end, Tokenized)
    chain.send(Tokenize(41, ids=told.end.ids))
    (back,) = chain.finish(41)
    assert isinstance(back.end, Tokenized)
    assert back.end.text == "<s>" + text


def test_fill_in_the_middle_parts_are_the_models_own_tokens(chain: Worker) -> None:
    parts = [Fim("prefix"), Text("def f("), Fim("suffix"), Text("return 0"), Fim("middle")]
    told = chain.generate(42, parts, n_predict=1, return_tokens=True)
    chain.send(Tokenize(43, ids=told.done.tokens))
    (named,) = chain.finish(43)
    assert isinstance(named.end, Tokenized)
    assert named.end.text.startswith("<s><|fim_prefix|>def f(<|fim_suffix|>return 0<|fim_middle|>")


def test_a_cancelled_stream_ends_and_the_others_go_on(models_dir: Path) -> None:
    words = " ".join(f"word{i}" for i in range(40))
    model = write_chain(models_dir / "endless.gguf", words, endless=True)
    with Worker.serving(model, n_ctx=2048) as worker:
        worker.submit(1, "Say it", n_predict=1500)
        worker.submit(2, "Say it", n_predict=1500)
        worker.hear_until(lambda: worker.told[1].n_tokens > 20)
        worker.send(Cancel(1))
        cancelled, other = worker.finish(1, 2)
    assert cancelled.done.reason == "cancelled"
    assert 20 < cancelled.done.n_generated < 1500
    assert (other.done.reason, other.done.n_generated) == ("length", 1500)


def test_a_shared_prefix_is_prefilled_once(llama_model: Path) -> None:
    prefix = "The fox said that it is the end of the story, " * 40
    with Worker.serving(llama_model, n_ctx=4096, **EXACT) as worker:
        for i in range(8):
            worker.submit(i, f"{prefix}{i}", n_predict=3)
        told = worker.finish(*range(8))
    n_prompt = told[0].done.n_prompt
    assert [each.done.n_cached for each in told[:1]] == [0]
    assert all(n_prompt - 4 <= each.done.n_cached < n_prompt for each in told[1:])


def test_a_seed_repeats_and_another_differs(deepseek_model: Path) -> None:
    def sampling(seed: int | None) -> Sampling:
        return Sampling(temperature=1.5, top_k=0, top_p=1.0, seed=seed)

    with Worker.serving(deepseek_model, **EXACT) as worker:
        texts = [
            worker.generate(i, "Once", sampling=sampling(seed), n_predict=30).text
            for i, seed in enumerate([7, 7, 8, None, None])
        ]
    assert texts[0] == texts[1]
    assert len(set(texts[1:])) == 4


def test_a_bad_grammar_hits_its_request_alone(chain: Worker) -> None:
    chain.submit(50, "Say it")
    chain.submit(51, "Say it", sampling=Sampling(grammar="root ::= ("))
    good, bad = chain.finish(50, 51)
    assert good.text == CHAIN_TEXT
    assert bad.failed.code == "invalid_option"


def test_a_grammar_holds_the_answer(deepseek_model: Path) -> None:
    sampling = Sampling(grammar='root ::= ("fox" | "end") "!"', seed=3)
    with Worker.serving(deepseek_model) as worker:
        told = worker.generate(1, "Say it", sampling=sampling)
    assert told.text in ("fox!", "end!")
    assert told.done.reason == "stop"


def test_a_context_may_shift(llama_model: Path) -> None:
    with Worker.serving(llama_model, n_ctx=256) as worker:
        ended = worker.generate(1, "Once upon a time")
        shifted = worker.generate(2, "Once upon a time", shift=True, n_predict=600)
    assert ended.done.reason == "length"
    assert ended.done.n_prompt + ended.done.n_generated == 256
    assert (shifted.done.reason, shifted.done.n_generated) == ("length", 600)
    assert shifted.text.startswith(ended.text[:100])


def test_threads_can_be_set_while_it_runs(llama_model: Path) -> None:
    with Worker.serving(llama_model, **EXACT) as worker:
        alone = worker.generate(1, "Once upon a time", n_predict=40).text
        worker.submit(2, "Once upon a time", n_predict=40, no_cache=True)
        worker.send(SetThreads(2))
        worker.send(SetThreads(1))
        assert worker.finish(2)[0].text == alone


def test_vectors_have_length_one_and_batches_do_not_matter(bert_model: Path) -> None:
    texts = ["the fox", "the end of the story", "a", "once upon a time " * 9]
    with Worker.serving(bert_model, embedding=True) as worker:
        worker.send(Embed(1, [[Text(text)] for text in texts]))
        for i, text in enumerate(texts):
            worker.send(Embed(10 + i, [[Text(text)]]))
        together, *alone = worker.finish(1, *range(10, 14))
        refused = worker.generate(99, "hi").failed
    vectors = [vector for told in alone for vector in vectors_of(told.end)]
    assert refused.code == "unsupported"
    for one, other in zip(vectors_of(together.end), vectors, strict=True):
        assert sum(x * x for x in one) == pytest.approx(1.0, abs=1e-5)
        assert one == pytest.approx(other, abs=1e-3)


def vectors_of(end: object) -> list[list[float]]:
    assert isinstance(end, Embedded)
    values = struct.unpack(f"<{len(end.data) // 4}f", end.data)
    return [list(values[i : i + end.n_embd]) for i in range(0, len(values), end.n_embd)]


def test_a_long_text_is_cut_or_refused(bert_model: Path) -> None:
    long = [[Text("once upon a time " * 2000)]]
    with Worker.serving(bert_model, embedding=True) as worker:
        worker.send(Embed(1, long))
        worker.send(Embed(2, long, truncate=False))
        cut, refused = worker.finish(1, 2)
    assert isinstance(cut.end, Embedded)
    assert refused.failed.code == "context_exceeded"


def test_a_file_that_is_no_model_says_why(tmp_path: Path) -> None:
    page = tmp_path / "page.gguf"
    page.write_text("<html>not found</html>")
    with Worker.start() as worker:
        assert isinstance(worker.receive(), Hello)
        worker.send(Load(str(page), n_ctx=256))
        failed = worker.receive()
        assert isinstance(failed, LoadFailed)
        assert "page.gguf" in failed.message
        assert worker.process.wait(TIMEOUT_S) == 1


def test_memory_and_slots_are_reported(llama_model: Path) -> None:
    with Worker.start() as worker:
        ready = worker.load(llama_model, n_ctx=1024, n_slots=5)
    assert (ready.n_ctx, ready.n_slots, ready.bos_text) == (1024, 5, "<s>")
    assert sum(use.model_bytes for use in ready.memory) > 100_000
    assert sum(use.context_bytes for use in ready.memory) > 100_000


def test_the_process_ends_with_its_daemon_in_mid_stream(models_dir: Path) -> None:
    words = " ".join(f"word{i}" for i in range(30))
    model = write_chain(models_dir / "endless2.gguf", words, endless=True)
    with Worker.start() as worker:
        worker.load(model)
        worker.submit(1, "Say it", shift=True)
        worker.hear_until(lambda: worker.told[1].n_tokens > 5)
        worker.connection.close()
        assert worker.process.wait(TIMEOUT_S) == 0
