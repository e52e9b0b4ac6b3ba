"""What a request has to be told, worked out by the simplest means: one at a time, no cache."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field
from typing import Any

from shimpy.protocol.messages import Submit, Text
from tests.fake_backend import BOS, CONTROL, EOS, FakeBackend, FakeSampler


@dataclass
class Expected:
    """The outcome of a request; `code` is that of a Failed, None: it is Done."""

    text: str = ""
    n_prompt: int = 0
    n_generated: int = 0
    reason: str = "stop"
    stop_string: str | None = None
    tokens: list[int] = field(default_factory=list)
    code: str | None = None


def expect(submit: Submit, **shape: Any) -> Expected:
    """Generate token by token, looking at the whole text anew each time."""
    backend = FakeBackend(**shape)
    (part,) = submit.prompt
    assert isinstance(part, Text)
    ids = [BOS, *part.text.encode()]
    if len(ids) >= backend.n_ctx:
        if not submit.truncate:
            return Expected(code="context_exceeded")
        n_block = (backend.n_ctx - submit.n_keep) // 2
        while len(ids) >= submit.n_keep + 2 * n_block:
            del ids[submit.n_keep : submit.n_keep + n_block]
    if submit.sampling.grammar == "bad":
        return Expected(code="invalid_option")
    return _generate(backend, submit, ids)


def _generate(backend: FakeBackend, submit: Submit, ids: list[int]) -> Expected:
    sampler = FakeSampler(backend, submit.sampling, ids)
    expected = Expected(n_prompt=len(ids), tokens=list(ids))
    data = b""
    n_max = 10 * backend.n_ctx
    n_max = n_max if submit.n_predict < 0 else min(n_max, submit.n_predict)
    while expected.n_generated < n_max:
        if len(expected.tokens) == backend.n_ctx:
            if not (submit.shift and backend.can_shift):
                break
            n_keep = min(submit.n_keep, backend.n_ctx // 2)
            n_drop = (backend.n_ctx - n_keep) // 2
            del expected.tokens[n_keep : n_keep + n_drop]
        if submit.sampling.grammar == "explode" and expected.n_generated == 2:
            return Expected(code="worker", text=_whole(data))
        backend.see(expected.tokens)
        token, _ = sampler.sample(0)
        expected.n_generated += 1
        if token == EOS:
            return _close(expected, "stop", _whole(data), submit.stop)
        expected.tokens.append(token)
        data += backend.piece(token, special=submit.show_special)
        text = _whole(data)
        if token == CONTROL and not submit.show_special and "<ctl>" in submit.stop:
            expected.text, expected.stop_string = _whole(data), "<ctl>"
            return expected
        if first_stop(text, submit.stop)[1] is not None:
            return _close(expected, "stop", text, submit.stop)
    return _close(expected, "length", _whole(data), submit.stop)


def _close(expected: Expected, reason: str, text: str, stops: list[str]) -> Expected:
    expected.text, expected.stop_string = first_stop(text, stops)
    expected.reason = "stop" if expected.stop_string is not None else reason
    return expected


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Cut the text where a stop string is complete first, at the longest that ends there."""
    found = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    end, _, stop = min(found)
    return text[: end - len(stop)], stop


def _whole(data: bytes) -> str:
    """Decode all but a character that is not complete yet."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)
