"""llama.cpp's /completion and /infill, byte for byte, against the real llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.server.harness import Running, running_app
from tests.synthetic import CHAIN_TEXT, write_bert, write_chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

CODE = "total = 0\n    for x in xs:\n        total += x\n    return total\n\nprint(1)"
_TIMES = re.compile(rb'"((?:prompt|predicted)_\w*(?:ms|second))":[0-9.e+-]+')


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Several models: nobody has to name the default."""
    folder: Path = tmp_path_factory.mktemp("llamacpp")
    write_chain(folder / "chain.gguf")
    write_chain(folder / "endless.gguf", CODE, endless=True, n_ctx_train=1024)
    write_bert(folder / "bert.gguf")
    state = tmp_path_factory.mktemp("state")
    async with running_app(folder, state, default_model="chain") as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def coder(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    """Writes code of several lines, whatever the gap."""
    folder: Path = tmp_path_factory.mktemp("coder")
    write_chain(folder / "coder.gguf", CODE)
    async with running_app(folder, tmp_path_factory.mktemp("state"), n_ctx=512) as running:
        yield running


def _named(app: Running, body: dict[str, Any]) -> dict[str, Any]:
    """Name a model where there are several."""
    return {"model": app.services.config.default_model} | body


async def _post(app: Running, path: str, **body: Any) -> Any:
    answer = await app.client.post(path, json=_named(app, body))
    assert answer.status_code == 200, answer.text
    return answer.json()


async def _chunks(app: Running, path: str, **body: Any) -> list[dict[str, Any]]:
    answer = await app.client.post(path, json=_named(app, body) | {"stream": True})
    assert answer.status_code == 200, answer.text
    lines = answer.text.strip().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


async def test_a_whole_completion(app: Running) -> None:
    body = {"model": "chain", "prompt": "hi", "n_predict": 1, "temperature": 0, "seed": 7}
    body |= {"stop": ["never"]}
    await app.client.post("/completion", json=body)
    answer = await app.client.post("/completion", json=body)
    assert answer.headers["content-type"] == "application/json; charset=utf-8"
    assert _TIMES.sub(rb'"\1":T', answer.content) == (
        b'{"index":0,"content":"Once","tokens":[],"id_slot":-1,"stop":true,"model":"chain",'
        b'"tokens_predicted":1,"tokens_evaluated":2,"generation_settings":{"seed":7,'
        b'"temperature":0.0,"top_k":40,"top_p":0.9,"min_p":0.0,"typical_p":1.0,"repeat_last_n":64,'
        b'"repeat_penalty":1.0,"presence_penalty":0.0,"frequency_penalty":0.0,"mirostat":0,'
        b'"mirostat_tau":5.0,"mirostat_eta":0.1,"top_n_sigma":0.0,"xtc_probability":0.0,'
        b'"xtc_threshold":0.1,"dynatemp_range":0.0,"dynatemp_exponent":1.0,"ignore_eos":false,'
        b'"stop":["never"],"max_tokens":1,"n_predict":1,'
        b'"n_keep":0,"logit_bias":[],"n_probs":0,"grammar":""},"prompt":"hi","has_new_line":false,'
        b'"truncated":false,"stop_type":"limit","stopping_word":"","tokens_cached":3,"timings":'
        b'{"cache_n":1,"prompt_n":1,"prompt_ms":T,"prompt_per_token_ms":T,"prompt_per_second":T,'
        b'"predicted_n":1,"predicted_ms":T,"predicted_per_token_ms":T,"predicted_per_second":T}}'
    )


async def test_a_streamed_completion(app: Running) -> None:
    body = {"model": "chain", "prompt": "hi", "n_predict": 1, "stream": True}
    body |= {"response_fields": ["stop", "content"]}
    answer = await app.client.post("/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.content == (
        b'data: {"index":0,"content":"Once","tokens":[],"stop":false,"id_slot":-1,'
        b'"tokens_predicted":1,"tokens_evaluated":2}\n\n'
        b'data: {"stop":true,"content":""}\n\n'
    )


async def test_the_text_is_whole_either_way(app: Running) -> None:
    whole = await _post(app, "/completion", prompt="hi")
    assert whole["content"] == CHAIN_TEXT
    assert (whole["stop_type"], whole["stopping_word"]) == ("eos", "")
    chunks = await _chunks(app, "/completion", prompt="hi")
    assert "".join(chunk["content"] for chunk in chunks) == CHAIN_TEXT
    assert [chunk["stop"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-2]["tokens_predicted"] <= chunks[-1]["tokens_predicted"]


async def test_prompts_in_all_their_forms(app: Running) -> None:
    """Text, tokens, both in one, and lists of such."""
    text = "hi there"
    ids = (await _post(app, "/tokenize", content=text))["tokens"]
    n_plain = (await _post(app, "/completion", prompt=text, n_predict=1))["tokens_evaluated"]
    for prompt, n_bos in (
        (ids, 0),
        ([*ids[:1], *ids[1:]], 0),
        (["hi", *ids[1:]], 1),
        ({"prompt_string": text}, 1),
    ):
        one = await _post(app, "/completion", prompt=prompt, n_predict=1)
        assert abs(one["tokens_evaluated"] - (len(ids) + n_bos)) <= 2, prompt
    assert n_plain == len(ids) + 1
    several = await _post(app, "/completion", prompt=[text, ids, [ids[0], "x"]], n_predict=1)
    assert [one["index"] for one in several] == [0, 1, 2]
    assert [one["content"] for one in several] == ["Once"] * 3
    assert [one["prompt"] for one in several] == [text, "", "x"]


async def test_several_answers_to_a_prompt(app: Running) -> None:
    answers = await _post(app, "/completion", prompt="hi", n_cmpl=3, n_predict=2)
    assert len(answers) == 3
    chunks = await _chunks(app, "/completion", prompt=["hi", "ho"], n=2, n_predict=1)
    assert sorted(chunk["index"] for chunk in chunks if chunk["stop"]) == [0, 1, 2, 3]


async def test_a_stop_word_is_named_and_not_shown(app: Running) -> None:
    word = CHAIN_TEXT.split()[2]
    whole = await _post(app, "/completion", prompt="hi", stop=[word, ""])
    assert (whole["stop_type"], whole["stopping_word"]) == ("word", word)
    assert word not in whole["content"]


async def test_tokens_and_their_probabilities(app: Running) -> None:
    whole = await _post(app, "/completion", prompt="hi", n_predict=3, n_probs=2, return_tokens=True)
    assert len(whole["tokens"]) == 3
    shown = (await _post(app, "/detokenize", tokens=whole["tokens"]))["content"]
    assert shown == whole["content"]
    probabilities = whole["completion_probabilities"]
    assert [one["id"] for one in probabilities] == whole["tokens"]
    assert all(len(one["top_logprobs"]) == 2 for one in probabilities)
    first = probabilities[0]
    assert bytes(first["bytes"]).decode() == first["token"] == "Once"
    assert first["logprob"] <= 0
    chunks = await _chunks(
        app,
        "/completion",
        prompt="hi",
        n_predict=3,
        n_probs=1,
        return_tokens=True,
        timings_per_token=True,
    )
    assert [id_ for chunk in chunks for id_ in chunk["tokens"]] == whole["tokens"]
    assert sum(len(chunk.get("completion_probabilities", [])) for chunk in chunks) == 3
    assert all(chunk["timings"]["predicted_n"] > 0 for chunk in chunks)


async def test_the_answer_can_follow_a_schema_or_a_grammar(app: Running) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    whole = await _post(app, "/completion", prompt="hi", json_schema=schema)
    assert isinstance(json.loads(whole["content"])["n"], int)
    grammar = 'root ::= "yes" | "no"'
    whole = await _post(app, "/completion", prompt="hi", grammar=grammar, json_schema=schema)
    assert whole["content"] in {"yes", "no"}
    assert whole["generation_settings"]["grammar"] == grammar


@pytest.mark.parametrize("biases", [{"q": 100}, [["q", 100], ["x", False]]])
async def test_a_bias_can_name_a_text(app: Running, biases: Any) -> None:
    whole = await _post(app, "/completion", prompt="hi", n_predict=1, logit_bias=biases)
    assert whole["content"] == "q"


async def test_tokens_can_be_banned_by_their_id(app: Running) -> None:
    plain = await _post(app, "/completion", prompt="hi", n_predict=1, return_tokens=True)
    (token,) = plain["tokens"]
    for biases in ({str(token): False}, [[token, False]]):
        whole = await _post(app, "/completion", prompt="hi", n_predict=1, logit_bias=biases)
        assert not whole["content"].startswith("Once")
        assert whole["generation_settings"]["logit_bias"] == [{"bias": False, "token": token}]


async def test_further_samplers_are_taken(app: Running) -> None:
    fields = {
        "top_n_sigma": 1.5,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.2,
        "dynatemp_range": 0.5,
        "dynatemp_exponent": 2.0,
    }
    body = fields | {"samplers": ["top_k", "infill"], "dry_multiplier": 0.8}
    whole = await _post(app, "/completion", prompt="hi", n_predict=5, **body)
    assert fields.items() <= whole["generation_settings"].items()
    assert whole["content"].startswith("Once")


async def test_the_end_can_be_ignored(app: Running) -> None:
    n_text = (await _post(app, "/completion", prompt="hi"))["tokens_predicted"]
    whole = await _post(app, "/completion", prompt="hi", ignore_eos=True, n_predict=n_text + 20)
    assert whole["stop_type"] == "limit"
    assert whole["tokens_predicted"] == n_text + 20


# --- infill -----------------------------------------------------------------------------------


async def test_what_llama_vim_sends(coder: Running) -> None:
    """Its request for a completion, and the fields that it reads."""
    fields = ["content", "timings/prompt_n", "timings/predicted_ms", "truncated", "tokens_cached"]
    answer = await _post(
        coder,
        "/infill",
        input_prefix="def f(xs):\n",
        input_suffix="\n\nprint(f([1]))\n",
        input_extra=[{"text": "x = 1\n", "time": [1, 2], "filename": "a.py"}],
        prompt="    ",
        n_predict=100,
        n_indent=4,
        top_k=40,
        top_p=0.99,
        stream=False,
        samplers=["top_k", "top_p", "infill"],
        cache_prompt=True,
        t_max_prompt_ms=500,
        t_max_predict_ms=5000,
        response_fields=fields,
    )
    assert list(answer) == fields
    # What is less indented ends it, the blank line too.
    assert answer["content"] == CODE.split("\n\n", maxsplit=1)[0] + "\n"
    assert answer["timings/prompt_n"] > 10


async def test_the_warm_up_of_editors_generates_nothing(coder: Running) -> None:
    body = {
        "input_prefix": "",
        "input_suffix": "",
        "input_extra": [{"text": "x = 1\n" * 20, "filename": "a.py"}],
        "prompt": "",
        "n_predict": 0,
        "samplers": [],
        "cache_prompt": True,
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1,
        "lora": [{"id": 0, "scale": 0.5}],
    }
    answer = await _post(coder, "/infill", **body)
    assert (answer["content"], answer["tokens_predicted"]) == ("", 0)
    assert await _post(coder, "/infill", **body, response_fields=[""]) == {}
    again = await _post(coder, "/infill", **body | {"n_predict": 1})
    assert again["timings"]["cache_n"] > 20


async def test_a_time_limit_counts_from_the_first_new_line(app: Running) -> None:
    """This model would go on until the context is full."""
    chunks = await _chunks(app, "/completion", model="endless", prompt="", t_max_predict_ms=0.001)
    text = "".join(chunk["content"] for chunk in chunks)
    assert text.startswith("total = 0\n")
    assert chunks[-1]["stop_type"] == "limit"
    assert chunks[-1]["has_new_line"]
    assert not chunks[-1]["truncated"]
    full = await _post(app, "/completion", model="endless", prompt="", options={"num_ctx": 256})
    assert full["truncated"]


async def test_the_repository_is_in_the_prompt(coder: Running) -> None:
    alone = await _post(coder, "/infill", input_prefix="a", input_suffix="b", n_predict=1)
    extra = [{"text": "some text"}]
    within = await _post(
        coder, "/infill", input_prefix="a", input_suffix="b", input_extra=extra, n_predict=1
    )
    assert within["tokens_evaluated"] > alone["tokens_evaluated"] + 9


@pytest.mark.parametrize(
    "body",
    [
        {"input_extra": [{"text": "word " * 100, "filename": f"{i}.py"} for i in range(40)]},
        {"input_prefix": "word " * 3000},
        {"input_suffix": "word " * 3000},
        {"input_prefix": "wörd " * 3000, "input_suffix": "x" * 9000, "prompt": "y"},
        {"prompt": "", "input_prefix": "é" * 700},
    ],
    ids=["files", "prefix", "suffix", "both", "bytes"],
)
async def test_what_is_over_the_context_is_cut(coder: Running, body: dict[str, Any]) -> None:
    """A context of 512 tokens, with a quarter for the answer."""
    given = {"input_prefix": "a", "input_suffix": "b", "n_predict": 200}
    answer = await _post(coder, "/infill", **given | body)
    assert answer["content"].startswith("total")
    assert 200 < answer["tokens_evaluated"] <= 512 - 128


async def test_a_model_without_the_tokens_is_told_of(app: Running) -> None:
    answer = await app.client.post("/infill", json={"model": "bert", "input_prefix": "x"})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["code"], error["type"]) == (400, "not_supported_error")


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/completion", {"model": "nix"}, 404, "nix"),
        ("/completion", {"model": "bert"}, 400, "does not support generate"),
        ("/completion", {"prompt": 5}, 400, '"prompt" must be'),
        ("/completion", {"prompt": [[True]]}, 400, '"prompt[0][0]"'),
        ("/completion", {"prompt": []}, 400, '"prompt" may hold'),
        ("/completion", {"prompt": [999_999]}, 400, "not in the vocabulary"),
        ("/completion", {"prompt": {"prompt_string": "", "multimodal_data": ["x"]}}, 400, "multi"),
        ("/completion", {"temperature": -1}, 400, '"temperature"'),
        ("/completion", {"n_probs": 50}, 400, '"n_probs" must be from 0 to 20'),
        ("/completion", {"n_probs": 1, "post_sampling_probs": True}, 400, "post_sampling_probs"),
        ("/completion", {"n_cmpl": 1000}, 400, "64"),
        ("/completion", {"n_cmpl": 0}, 400, "answers"),
        ("/completion", {"logit_bias": [["x"]]}, 400, "logit_bias"),
        ("/completion", {"logit_bias": {"x": True}}, 400, "logit_bias"),
        ("/completion", {"logit_bias": [[None, 1]]}, 400, "logit_bias"),
        ("/completion", {"logit_bias": {"9" * 30: 1}}, 400, "logit_bias"),
        ("/completion", {"json_schema": {"type": "nope"}}, 400, "JSON schema"),
        ("/completion", {"json_schema": False}, 400, "json_schema"),
        ("/completion", {"grammar": "root ::= nope"}, 400, "grammar"),
        ("/completion", {"stop": 5}, 400, '"stop"'),
        ("/infill", {"prompt": ["x"]}, 400, '"prompt" must be a string'),
        ("/infill", {"input_extra": [{"filename": "x"}]}, 400, "input_extra[0].text"),
        ("/infill", {"input_prefix": []}, 400, "input_prefix"),
    ],
)
async def test_errors_have_llamacpps_form(
    app: Running, path: str, body: dict[str, Any], status: int, words: str
) -> None:
    for stream in (False, True):
        given = {"model": "chain", "n_predict": 1, "stream": stream} | body
        answer = await app.client.post(path, json=given)
        assert answer.status_code == status, answer.text
        error = answer.json()["error"]
        assert error["code"] == status
        assert error["type"]
        assert words in error["message"]


async def test_a_prompt_over_the_context_says_by_how_much(coder: Running) -> None:
    answer = await coder.client.post("/completion", json={"prompt": "word " * 1000})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "exceed_context_size_error"
    assert error["n_prompt_tokens"] > error["n_ctx"] == 512
