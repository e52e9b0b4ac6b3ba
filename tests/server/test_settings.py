"""Whose word counts: the request's, then the model's, then the daemon's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shimpy.chat.messages import ChatMessage
from shimpy.config import Config
from shimpy.names import ModelName
from shimpy.placement.placement import PlanOptions
from shimpy.registry.model import Model
from shimpy.registry.settings import ModelSettings, Turn
from shimpy.scheduler.scheduler import with_defaults
from shimpy.server.native.settings import changed
from shimpy.server.options import Options
from shimpy.server.requests import ChatPrompt, GenerationRequest, PlainPrompt
from shimpy.server.settings import keep_alive_of, options_of, plan_options, with_settings


def _model(**settings: Any) -> Model:
    return Model(
        name=ModelName("m"),
        files=(Path("/m.gguf"),),
        size_bytes=1,
        modified_s=0.0,
        digest="d",
        source="/",
        shape=None,
        settings=ModelSettings(**settings),
    )


def _chat(*turns: tuple[Any, str], **fields: Any) -> GenerationRequest:
    messages = tuple(ChatMessage(role=role, content=text) for role, text in turns)
    return GenerationRequest(model="m", prompt=ChatPrompt(messages=messages, **fields))


def _turns(request: GenerationRequest) -> list[tuple[str, str]]:
    assert isinstance(request.prompt, ChatPrompt)
    return [(message.role, message.content) for message in request.prompt.messages]


def test_a_request_wins_over_its_models_parameters() -> None:
    request = GenerationRequest(
        model="m", prompt=PlainPrompt(text="x"), options=Options(temperature=0.1)
    )
    model = _model(parameters={"temperature": 0.9, "top_k": 5, "stop": ["a"]})
    options = with_settings(request, model).options
    assert (options.temperature, options.top_k, options.stop) == (0.1, 5, ("a",))


def test_a_model_without_settings_changes_nothing() -> None:
    request = _chat(("user", "x"))
    assert with_settings(request, _model()) is request


def test_parameters_from_elsewhere_that_make_no_sense_are_left_out() -> None:
    """Another tool's store is no reason for a failed request."""
    settings = ModelSettings(parameters={"top_k": "many", "nope": 1, "top_p": 7, "seed": 3})
    assert options_of(settings) == Options(seed=3)


def test_the_system_message_comes_first_unless_there_is_one() -> None:
    model = _model(system="S", messages=(Turn("user", "a"), Turn("assistant", "b")))
    opening = [("user", "a"), ("assistant", "b")]
    assert _turns(with_settings(_chat(("user", "x")), model)) == [
        ("system", "S"), *opening, ("user", "x"),
    ]  # fmt: skip
    for role in ("system", "developer"):
        own = _chat((role, "mine"), ("user", "x"))
        assert _turns(with_settings(own, model)) == [(role, "mine"), *opening, ("user", "x")]


def test_an_answer_that_goes_on_is_not_opened_again() -> None:
    """The context holds the messages already; Ollama repeats its system message there too."""
    model = _model(system="S", messages=(Turn("user", "a"),))
    request = with_settings(_chat(("user", "x"), context=(1, 2)), model)
    assert _turns(request) == [("system", "S"), ("user", "x")]


def test_an_empty_conversation_stays_empty() -> None:
    """It asks to load the model."""
    assert _turns(with_settings(_chat(), _model(system="S"))) == []


def test_an_empty_system_message_is_none() -> None:
    assert _turns(with_settings(_chat(("user", "x")), _model(system=""))) == [("user", "x")]


def test_a_raw_prompt_is_left_alone() -> None:
    request = GenerationRequest(model="m", prompt=PlainPrompt(text="x"))
    model = _model(system="S", messages=(Turn("user", "a"),), parameters={"seed": 1})
    assert with_settings(request, model).prompt == request.prompt


@pytest.mark.parametrize(
    ("asked", "model", "config", "n_ctx", "cpu_moe"),
    [
        ({}, {}, {}, None, "auto"),
        ({}, {}, {"n_ctx": 1, "cpu_moe": "on"}, 1, "on"),
        ({}, {"cpu_moe": 3}, {"n_ctx": 1, "cpu_moe": "on"}, 1, 3),
        ({}, {"parameters": {"num_ctx": 2}, "cpu_moe": "off"}, {"n_ctx": 1, "n_cpu_moe": 9},
         2, "off"),
        ({"n_ctx": 3, "cpu_moe": "on"}, {"parameters": {"num_ctx": 2}, "cpu_moe": "off"},
         {"n_ctx": 1}, 3, "on"),
    ],
)  # fmt: skip
def test_who_decides_how_a_model_is_loaded(
    asked: dict[str, Any], model: dict[str, Any], config: dict[str, Any],
    n_ctx: int | None, cpu_moe: Any,
) -> None:  # fmt: skip
    options = with_defaults(plan_options(_model(**model), PlanOptions(**asked)), Config(**config))
    assert (options.n_ctx, options.cpu_moe) == (n_ctx, cpu_moe)


def test_layers_on_the_gpu_may_be_set_to_none() -> None:
    model = _model(parameters={"num_gpu": 4})
    assert plan_options(model).n_gpu_layers == 4
    assert plan_options(model, PlanOptions(n_gpu_layers=0)).n_gpu_layers == 0


def test_who_decides_how_long_a_model_stays() -> None:
    assert keep_alive_of(_model(), None) is None
    assert keep_alive_of(_model(keep_alive_s=7.0), None) == 7.0
    assert keep_alive_of(_model(keep_alive_s=7.0), 0.0) == 0.0


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("cpu_moe", True, {"cpu_moe": "on"}),
        ("cpu_moe", "12", {"cpu_moe": 12}),
        ("CPU_MOE", 0, {"cpu_moe": 0}),
        ("keep_alive", "1h", {"keep_alive_s": 3600.0}),
        ("keep_alive", 90, {"keep_alive_s": 90.0}),
        ("keep_alive", -1, {"keep_alive_s": -1.0}),
        ("n_ctx", 4096, {"parameters": {"num_ctx": 4096}}),
        ("stop", "a", {"parameters": {"stop": ["a"]}}),
        ("stop", [], {"parameters": {"stop": []}}),
        ("alias", "Big, small:q4", {"aliases": ("big:latest", "small:q4")}),
        ("aliases", [], {"aliases": ()}),
        ("messages", [{"role": "user", "content": "x"}], {"messages": (Turn("user", "x"),)}),
    ],
)
def test_values_as_people_and_programs_write_them(
    key: str, value: Any, expected: dict[str, Any]
) -> None:
    assert changed(ModelSettings(), {key: value}, []) == ModelSettings(**expected)


def test_what_is_set_and_unset_at_once_is_set() -> None:
    before = ModelSettings(parameters={"seed": 1, "top_k": 2}, keep_alive_s=1.0)
    after = changed(before, {"seed": 5}, ["seed", "top_k", "keep_alive"])
    assert after == ModelSettings(parameters={"seed": 5})
