from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shimpy.errors import InvalidOptionError
from shimpy.protocol.messages import Sampling
from shimpy.server.ollama.options import parse_options
from shimpy.server.options import Options

# The machine may be busy with other tests.
busy = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def test_ollamas_names_map_to_ours() -> None:
    given = {"num_predict": 5, "num_ctx": 2048, "num_gpu": 3, "num_keep": 2, "stop": ["a", ""]}
    options = parse_options(given | {"temperature": 0, "top_k": 7.0, "seed": None, "unknown": []})
    assert options == Options(
        n_predict=5, n_ctx=2048, n_gpu_layers=3, n_keep=2, stop=("a",), temperature=0, top_k=7
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_ctx", "4096", 'option "num_ctx" must be of type integer'),
        ("num_ctx", 4096.5, 'option "num_ctx" must be of type integer'),
        ("seed", True, 'option "seed" must be of type integer'),
        ("temperature", "hot", 'option "temperature" must be of type float32'),
        ("stop", "x", None),
        ("stop", [1], 'option "stop" must be an array of strings'),
        ("use_mmap", 1, 'option "use_mmap" must be of type boolean'),
        ("top_p", 1.5, 'option "top_p" must be from 0 to 1, not 1.5'),
        ("num_ctx", -1, 'option "num_ctx" must be from 1 to'),
        ("num_predict", 10**400, 'option "num_predict" must be from -2 to'),
        ("temperature", 10**400, 'option "temperature" must be from 0 to'),
        ("logit_bias", {"x": 1}, 'option "logit_bias" must map token ids to numbers'),
        ("logit_bias", {"9" * 5000: 1}, 'option "logit_bias" must map token ids to numbers'),
        ("logit_bias", {"1": "a"}, 'option "logit_bias" must map token ids to numbers'),
    ],
)
def test_types_are_checked_with_ollamas_words(name: str, value: Any, message: str | None) -> None:
    if message is None:
        assert parse_options({name: value}).stop == (value,)
        return
    with pytest.raises(InvalidOptionError) as caught:
        parse_options({name: value})
    assert message in caught.value.message
    assert caught.value.option == name


def test_zero_context_and_negative_layers_mean_automatic() -> None:
    assert parse_options({"num_ctx": 0, "num_gpu": -1}) == Options()


def test_options_win_over_defaults_field_by_field() -> None:
    defaults = Options(temperature=0.1, top_k=3, stop=("x",))
    merged = Options(temperature=0.0, stop=()).over(defaults)
    assert merged == Options(temperature=0.0, top_k=3, stop=())


def test_nothing_set_is_ollamas_sampling() -> None:
    assert Options().sampling() == Sampling()


@pytest.mark.parametrize(("seed", "expected"), [(-1, None), (0, 0), (7, 7), (2**32 + 5, 5)])
def test_a_negative_seed_is_random(seed: int, expected: int | None) -> None:
    assert Options(seed=seed).sampling().seed == expected


def test_ways_to_say_off_are_understood() -> None:
    sampling = Options(repeat_penalty=0.0, top_k=-1).sampling()
    assert sampling.repeat_penalty == 1.0
    assert sampling.top_k == 0


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
keys = st.sampled_from(
    ["temperature", "top_k", "seed", "stop", "num_ctx", "logit_bias", "mirostat", "use_mmap"]
)


@busy
@given(st.dictionaries(keys, values))
def test_any_options_give_a_sampling_for_the_worker(given_options: dict[str, Any]) -> None:
    try:
        sampling = parse_options(given_options).sampling()
    except InvalidOptionError:
        return
    encoded = msgspec.msgpack.encode(sampling)
    assert msgspec.msgpack.decode(encoded, type=Sampling) == sampling
