"""What the daemon keeps of a model's file beyond its shape: its metadata and its chat template.

Made from the header in a thread (reading and trying out a template take some tens of
milliseconds each), then kept for the models that were used last.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from shimpy.chat.fim import FimOrder, FimRole
from shimpy.chat.template import ChatTemplate
from shimpy.chat.vocabulary import FIM_ORDER_KEY, control_tokens, fim_order, fim_roles
from shimpy.errors import GgufError, UserError
from shimpy.gguf.header import Header
from shimpy.gguf.reader import read_files
from shimpy.logs import get_logger
from shimpy.registry.model import Model

_log = get_logger("registry")

# A card is some hundred kilobytes; more models than this are rarely used in turn.
MAX_CARDS = 32


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a model's header that requests need; immutable."""

    template: ChatTemplate
    # Texts of the vocabulary's control tokens.
    control_tokens: tuple[str, ...]
    # Texts of the start and the end token; "": there is none.
    bos_text: str
    eos_text: str
    # Which fill-in-the-middle tokens the vocabulary has.
    fim_roles: frozenset[FimRole]
    fim_order: FimOrder = "prefix-first"
    # The prompt of a model that ranks by one, with {query} and {document} in it; "": it has none.
    rank_prompt: str = ""

    def compile_template(self, source: str) -> ChatTemplate:
        """Return another template for this model; takes some tens of milliseconds.

        Raises:
            UserError: it can't be used.
        """
        return ChatTemplate.compile(
            source,
            control_tokens=self.control_tokens,
            bos_text=self.bos_text,
            eos_text=self.eos_text,
            strict=True,
        )


class ModelCards:
    """Cards by the model's digest and its template; it belongs to the event loop's thread."""

    def __init__(self, *, limit: int = MAX_CARDS) -> None:
        self._limit = limit
        self._cards: OrderedDict[tuple[str, str | None], ModelCard] = OrderedDict()

    async def get(self, model: Model) -> ModelCard:
        """Return the card of a usable model; reads its header when it is not kept.

        Raises:
            GgufError: the file can't be read any more.
        """
        key = (model.digest, model.settings.template)
        card = self._cards.get(key)
        if card is None:
            card = await asyncio.to_thread(make_card, model)
            if card.template.problem:
                _log.warning("template_unused", model=str(model.name), reason=card.template.problem)
            self._cards[key] = card
            while len(self._cards) > self._limit:
                self._cards.popitem(last=False)
        self._cards.move_to_end(key)
        return card


def make_card(model: Model) -> ModelCard:
    """Return a model's card; blocking."""
    header = read_files(model.files)
    vocabulary = header.get_array("tokenizer.ggml.tokens")
    texts = [] if vocabulary is None else [str(token) for token in vocabulary]
    tokens = control_texts(header, texts)
    bos_text, eos_text = (token_text(header, texts, role) for role in ("bos", "eos"))
    template = ChatTemplate.compile(
        header.get_str("tokenizer.chat_template", ""),
        control_tokens=tokens,
        arch=header.get_str("general.architecture", ""),
        name=str(model.name),
        bos_text=bos_text,
        eos_text=eos_text,
        tool_source=header.get_str("tokenizer.chat_template.tool_use", "") or None,
    )
    card = ModelCard(
        template=template,
        control_tokens=tuple(tokens),
        bos_text=bos_text,
        eos_text=eos_text,
        fim_roles=fim_roles(texts, header.metadata),
        fim_order=fim_order(header.get_str(FIM_ORDER_KEY, "")),
        rank_prompt=header.get_str("tokenizer.chat_template.rerank", ""),
    )
    if model.settings.template:
        try:
            return replace(card, template=card.compile_template(model.settings.template))
        except UserError as error:
            # One that came with the model from elsewhere may be beyond us; the file's own is not.
            template.problem = error.message
    return card


def control_texts(header: Header, texts: Sequence[str]) -> list[str]:
    """Return those of the vocabulary's texts that are control tokens."""
    types = header.get_array("tokenizer.ggml.token_type")
    kinds = None if types is None else [_int(header, kind) for kind in types]
    return control_tokens(texts, kinds)


def token_text(header: Header, texts: Sequence[str], role: str) -> str:
    """Return the text of the start ("bos") or end ("eos") token; "": there is none."""
    index = header.metadata.get(f"tokenizer.ggml.{role}_token_id")
    return texts[index] if isinstance(index, int) and 0 <= index < len(texts) else ""


def _int(header: Header, value: object) -> int:
    if not isinstance(value, int):
        raise GgufError(f"{header.name}: tokenizer.ggml.token_type holds {value!r}")
    return value
