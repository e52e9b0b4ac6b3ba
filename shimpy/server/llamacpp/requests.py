"""llama.cpp's bodies as requests in no dialect: checked here, and only here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import msgspec
from msgspec.structs import replace

from shimpy.chat.fim import ContextFile
from shimpy.errors import InvalidOptionError
from shimpy.server.embedding import EmbeddingRequest
from shimpy.server.llamacpp.limits import Limits
from shimpy.server.llamacpp.options import parse_sampling
from shimpy.server.llamacpp.wire import CompletionBody, EmbeddingBody, InfillBody
from shimpy.server.ollama.options import parse_options
from shimpy.server.ollama.wire import parse_keep_alive
from shimpy.server.options import Options
from shimpy.server.requests import (
    GapPrompt,
    GenerationRequest,
    MixedPrompt,
    PlainPrompt,
    Prompt,
    TokenPrompt,
)

_MAX_TOKEN = 2**31
_MAX_PROMPTS = 2048
# embd_normalize: as the model gives it, and Euclid's length of 1.
_AS_IS, _EUCLIDEAN = -1, 2


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a request for text asks for, and how it wants the answer."""

    # One for each prompt.
    requests: tuple[GenerationRequest, ...]
    n: int
    stream: bool
    limits: Limits
    return_tokens: bool
    timings_per_token: bool
    wants_probabilities: bool
    # Empty: all.
    response_fields: tuple[str, ...]
    # Amounts that are added to all tokens of a text.
    text_biases: Mapping[str, float]

    @property
    def model(self) -> str:
        """The model's name."""
        return self.requests[0].model

    def with_biases(self, biases: Mapping[int, float]) -> Asked:
        """Return the same with more tokens' logits changed."""
        changed = tuple(
            replace(
                one,
                options=replace(
                    one.options, logit_bias={**(one.options.logit_bias or {}), **biases}
                ),
            )
            for one in self.requests
        )
        return replace(self, requests=changed, text_biases={})


def parse_completion(body: CompletionBody, model: str) -> Asked:
    """Return what POST /completion asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    return _asked(body, model, _prompts(body.prompt))


def parse_infill(body: InfillBody, model: str) -> Asked:
    """Return what POST /infill asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    if body.prompt is not None and not isinstance(body.prompt, str):
        raise InvalidOptionError('"prompt" must be a string', option="prompt")
    prompt = GapPrompt(
        prefix=body.input_prefix or "",
        suffix=body.input_suffix or "",
        middle=body.prompt or "",
        context=tuple(
            ContextFile(text=extra.text, filename=_one_line(extra.filename or ""))
            for extra in body.input_extra or []
        ),
    )
    return _asked(body, model, [prompt])


def parse_embedding(body: EmbeddingBody, model: str) -> EmbeddingRequest:
    """Return what POST /embedding asks for.

    Raises:
        UserError: the message names what is wrong.
    """
    given = body.input if body.content is None else body.content
    if given is None or given == []:
        raise InvalidOptionError(
            '"content" is required: a text or a list of texts', option="content"
        )
    inputs: list[str | tuple[int, ...]] = []
    for prompt in _prompts(given, "content"):
        match prompt:
            case PlainPrompt(text=text):
                inputs.append(text)
            case TokenPrompt(ids=ids):
                inputs.append(ids)
            case _:
                raise InvalidOptionError(
                    '"content" can\'t mix text and tokens in one input', option="content"
                )
    normalize = _EUCLIDEAN if body.embd_normalize is None else body.embd_normalize
    if normalize not in {_AS_IS, _EUCLIDEAN}:
        raise InvalidOptionError(
            f"embd_normalize must be {_AS_IS} (none) or {_EUCLIDEAN} (a length of 1), not "
            f"{normalize}",
            option="embd_normalize",
        )
    return EmbeddingRequest(
        model=model,
        inputs=tuple(inputs),
        options=parse_options(body.options),
        keep_alive_s=parse_keep_alive(body.keep_alive),
        truncate=False,
        normalize=normalize == _EUCLIDEAN,
    )


def _asked(body: CompletionBody, model: str, prompts: list[Prompt]) -> Asked:
    if body.post_sampling_probs:
        raise InvalidOptionError(
            "post_sampling_probs is not supported: n_probs gives the probabilities before sampling",
            option="post_sampling_probs",
        )
    options, text_biases = parse_sampling(body)
    if body.return_tokens and options.n_logprobs is None:
        # They come with the ids.
        options = Options(n_logprobs=0).over(options)
    keep_alive_s = parse_keep_alive(body.keep_alive)
    requests = tuple(
        GenerationRequest(
            model=model,
            prompt=prompt,
            options=options,
            output_format=_schema(body),
            grammar=body.grammar or None,
            keep_alive_s=keep_alive_s,
        )
        for prompt in prompts
    )
    n = body.n if body.n_cmpl is None else body.n_cmpl
    return Asked(
        requests=requests,
        n=1 if n is None else n,
        stream=bool(body.stream),
        limits=Limits(
            n_indent=max(0, body.n_indent or 0),
            max_predict_s=max(0.0, body.t_max_predict_ms or 0.0) / 1000,
        ),
        return_tokens=bool(body.return_tokens),
        timings_per_token=bool(body.timings_per_token),
        wants_probabilities=bool(body.n_probs),
        response_fields=tuple(body.response_fields or ()),
        text_biases=text_biases,
    )


def _schema(body: CompletionBody) -> Literal["json"] | Mapping[str, Any] | None:
    if body.json_schema is None or body.grammar:
        return None
    if body.json_schema is False:
        raise InvalidOptionError('"json_schema" false allows no answer', option="json_schema")
    # The empty schema allows any document.
    return {} if body.json_schema is True else body.json_schema


def _prompts(given: Any, name: str = "prompt") -> list[Prompt]:
    """Return the prompts in llama.cpp's forms.

    A list with a token in it is one prompt, of tokens and texts; any other list is a list of
    prompts.
    """
    if not isinstance(given, list) or any(is_token(item) for item in given):
        return [_prompt(given, name)]
    if not 0 < len(given) <= _MAX_PROMPTS:
        raise InvalidOptionError(
            f'"{name}" may hold 1 to {_MAX_PROMPTS} prompts, not {len(given)}', option=name
        )
    return [_prompt(item, f"{name}[{i}]") for i, item in enumerate(given)]


def _prompt(given: Any, where: str) -> Prompt:
    if given is None or isinstance(given, str):
        return PlainPrompt(text=given or "")
    if isinstance(given, dict) and isinstance(given.get("prompt_string"), str):
        if given.get("multimodal_data"):
            raise InvalidOptionError(
                f'"{where}.multimodal_data" is not supported: only text is', option=where
            )
        return PlainPrompt(text=given["prompt_string"])
    if not isinstance(given, list):
        raise InvalidOptionError(
            f'"{where}" must be a text, tokens, or a list of both', option=where
        )
    if all(is_token(item) for item in given):
        return TokenPrompt(ids=tuple(given))
    return MixedPrompt(pieces=tuple(_piece(item, f"{where}[{i}]") for i, item in enumerate(given)))


def _piece(item: Any, where: str) -> str | tuple[int, ...]:
    if isinstance(item, str):
        return item
    if is_token(item):
        return (item,)
    raise InvalidOptionError(f'"{where}" must be a text or the id of a token', option=where)


def is_token(item: Any) -> bool:
    """Whether a value may be the id of a token, as far as one can tell without the model."""
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < _MAX_TOKEN


def _one_line(filename: str) -> str:
    """Return a file's name that can't pass for its text."""
    return " ".join(filename.split("\n"))
