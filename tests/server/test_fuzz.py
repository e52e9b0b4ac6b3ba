"""Whatever a client sends, it gets an answer that says what was wrong: never a 500."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.scheduler.workshop import FAKE_ENGINE
from tests.server.harness import Running, running_app
from tests.synthetic import write_chain

pytestmark = pytest.mark.slow

PATHS = [
    "/api/generate",
    "/api/chat",
    "/api/show",
    "/api/embed",
    "/api/embeddings",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/completion",
    "/infill",
    "/tokenize",
    "/detokenize",
    "/apply-template",
    "/embedding",
    "/v1/rerank",
]

WORDS = """
    chain json 5m user assistant high aGk= function_call tool_use tool_result any enabled
    {{.Prompt}}
"""
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(WORDS.split())
)
KEYS = (
    "model name prompt suffix system template context stream raw format keep_alive images options "
    "think truncate shift logprobs top_logprobs max_tokens temperature top_p top_k messages tools "
    "role content tool_calls function arguments type parameters properties num_ctx stop seed input "
    "dimensions verbose num_predict logit_bias items enum pattern $ref n best_of echo tool_choice "
    "response_format json_schema schema text effort reasoning summary output call_id instructions "
    "previous_response_id include max_output_tokens encoding_format tool_call_id mode "
    "stop_sequences thinking tool_use_id source is_error input_schema output_config budget_tokens "
    "input_prefix input_suffix input_extra filename n_predict n_probs n_cmpl grammar n_indent "
    "t_max_predict_ms response_fields return_tokens min_p mirostat content_tokens tokens "
    "add_special with_pieces query documents texts top_n embd_normalize prompt_string"
)
keys = st.sampled_from(KEYS.split())
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner), max_leaves=12
)
bodies = st.dictionaries(keys, values, max_size=8)


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(debug=False) as made:
        yield made


@pytest.fixture(scope="module")
def app(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder: Path = tmp_path_factory.mktemp("fuzz")
    write_chain(folder / "chain.gguf")
    context = running_app(folder, folder, engine_argv=FAKE_ENGINE)
    running = runner.run(context.__aenter__())
    yield running
    runner.run(context.__aexit__(None, None, None))


@settings(
    deadline=None,
    max_examples=300,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(path=st.sampled_from(PATHS), body=bodies, is_usable=st.booleans())
def test_no_body_gives_a_500(
    runner: asyncio.Runner, app: Running, path: str, body: dict[str, Any], is_usable: bool
) -> None:
    if is_usable:
        # Past the first check, so that the later ones are reached.
        body = body | {"model": "chain"}
    answer: httpx.Response = runner.run(app.client.post(path, json=body))
    assert answer.status_code < 500, answer.text
    if answer.status_code >= 400:
        assert msgspec.json.decode(answer.content)["error"]


@settings(deadline=None, max_examples=100)
@given(path=st.sampled_from(PATHS), data=st.binary(max_size=60))
def test_no_bytes_give_a_500(runner: asyncio.Runner, app: Running, path: str, data: bytes) -> None:
    answer: httpx.Response = runner.run(app.client.post(path, content=data))
    # `{}` is a request: the only model there is continues nothing.
    assert answer.status_code < 500, answer.text
    assert answer.status_code >= 400 or data.strip() == b"{}", answer.text
