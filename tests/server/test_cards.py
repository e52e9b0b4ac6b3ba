from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from shimpy.errors import UserError
from shimpy.names import parse_model_name
from shimpy.registry.model import Model
from shimpy.registry.settings import ModelSettings
from shimpy.server.cards import ModelCards, make_card
from tests.synthetic import write_chain


def _model(path: Path, digest: str = "d") -> Model:
    return Model(
        name=parse_model_name("m"),
        files=(path,),
        size_bytes=1,
        modified_s=0.0,
        digest=digest,
        source="",
        shape=None,
    )


def test_a_card_has_what_prompts_need(chain_model: Path) -> None:
    card = make_card(_model(chain_model))
    assert (card.bos_text, card.eos_text) == ("<s>", "</s>")
    assert {"prefix", "suffix", "middle"} <= card.fim_roles
    assert "<|im_start|>" in card.control_tokens
    assert card.template.family == ""


def test_a_model_without_vocabulary_texts_has_a_card_too(bert_model: Path) -> None:
    card = make_card(_model(bert_model))
    assert not card.fim_roles
    assert card.template.family


def test_a_template_of_a_request_is_compiled_or_refused(chain_model: Path) -> None:
    card = make_card(_model(chain_model))
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert card.compile_template(source).source == source
    with pytest.raises(UserError, match="template"):
        card.compile_template("{% for")


def test_why_a_template_is_not_used_is_known(tmp_path: Path, chain_model: Path) -> None:
    broken = make_card(_model(write_chain(tmp_path / "broken.gguf", chat_template="{% for")))
    assert (broken.template.family, bool(broken.template.problem)) == ("chatml", True)
    ours = make_card(_model(chain_model))
    assert ours.template.problem == ""
    settings = ModelSettings(template="{{ .Nope }}")
    theirs = make_card(replace(_model(chain_model), settings=settings))
    assert theirs.template.source == ours.template.source
    assert "does not print the user's message" in theirs.template.problem


async def test_cards_are_kept_for_the_models_used_last(chain_model: Path) -> None:
    cards = ModelCards(limit=2)
    first = await cards.get(_model(chain_model, "a"))
    await cards.get(_model(chain_model, "b"))
    assert await cards.get(_model(chain_model, "a")) is first
    await cards.get(_model(chain_model, "c"))
    assert await cards.get(_model(chain_model, "a")) is first
    assert len(cards._cards) == 2
