"""An engine without threads: submit, step, and read what each request was told."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shimpy.engine.intake import Intake
from shimpy.engine.loop import Engine
from shimpy.engine.parked import ParkedPrefixes
from shimpy.engine.prefix_store import PrefixStore
from shimpy.engine.prefixes import SavedPrefixes
from shimpy.protocol.messages import (
    Delta,
    Done,
    Embedded,
    Events,
    Failed,
    Load,
    Prefilled,
    PrefixNews,
    PromptPart,
    Shutdown,
    Stats,
    Submit,
    Text,
    ToDaemon,
    Tokenized,
    TokenLogprob,
    ToWorker,
)
from tests.fake_backend import FakeBackend


@dataclass
class Told:
    """All that a request was told, put together."""

    text: str = ""
    n_tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prefilled: list[Prefilled] = field(default_factory=list)
    ends: list[Done | Failed | Embedded | Tokenized] = field(default_factory=list)

    @property
    def end(self) -> Done | Failed | Embedded | Tokenized:
        assert len(self.ends) == 1, self.ends
        return self.ends[0]

    @property
    def done(self) -> Done:
        assert isinstance(self.end, Done), self.end
        return self.end

    @property
    def failed(self) -> Failed:
        assert isinstance(self.end, Failed), self.end
        return self.end

    def hear(self, event: Delta | Prefilled | Done | Failed | Embedded | Tokenized) -> None:
        assert not self.ends, f"{event} after the end {self.ends}"
        match event:
            case Delta():
                assert event.text or event.logprobs, "a Delta of nothing"
                self.text += event.text
                self.n_tokens += event.n_tokens
                self.logprobs += event.logprobs
            case Prefilled():
                assert not self.prefilled, "prefilled twice"
                assert not self.text, "prefilled after the first text"
                self.prefilled.append(event)
            case _:
                self.ends.append(event)


class Rig:
    """One engine on a fake model, driven by hand; its clock stands unless it is set."""

    def __init__(
        self,
        backend: FakeBackend | None = None,
        *,
        embeds: bool = False,
        prefixes: Path | PrefixStore | None = None,
        parked_bytes: int = 0,
    ) -> None:
        """`prefixes`: where they are saved and restored from, or the folder.

        `parked_bytes`: what idle slots hold slows down the others, and so much may be parked.
        """
        self.backend = backend or FakeBackend()
        self.now = 0.0
        self.told: dict[int, Told] = defaultdict(Told)
        self.stats: list[Stats] = []
        self.news: list[PrefixNews] = []
        self.n_frames = 0
        # Whether steps that are alike follow each other at once, as in the worker.
        self.goes_on = False
        self.intake = Intake(send=self.hear, clock=lambda: self.now)
        self.intake.serve(self.backend, embeds=embeds)
        store = self._open(prefixes) if isinstance(prefixes, Path) else prefixes
        whole, can_cut = self.backend.state_is_whole, self.backend.can_split
        saved = SavedPrefixes(whole=whole, can_cut=can_cut) if store is None else store.saved
        self.parked = ParkedPrefixes(
            self.backend, saved, limit=parked_bytes, available=lambda: 1 << 40
        )
        self.engine = Engine(
            self.backend,
            inbox=self.intake.inbox,
            # A test may listen in.
            send=lambda message: self.hear(message),  # noqa: PLW0108 - looked up at each call
            clock=lambda: self.now,
            embeds=embeds,
            prefixes=store,
            parked=self.parked if parked_bytes else None,
            attends_idle=bool(parked_bytes) and self.backend.kv_unified,
        )

    def _open(self, prefixes: Path) -> PrefixStore:
        return PrefixStore(load_of(prefixes), self.backend, send=self.hear)

    def hear(self, message: ToDaemon) -> None:
        self.n_frames += 1
        match message:
            case Events():
                for event in message.events:
                    self.told[event.request].hear(event)
                if message.stats is not None:
                    self.stats.append(message.stats)
            case Failed() | Embedded() | Tokenized():
                self.told[message.request].hear(message)
            case PrefixNews():
                self.news.append(message)
            case _:
                raise AssertionError(message)

    def send(self, message: ToWorker) -> None:
        self.intake.on_message(message)

    def submit(self, request: int, prompt: str | list[PromptPart], **options: Any) -> None:
        parts = [Text(prompt, parse_special=True)] if isinstance(prompt, str) else prompt
        self.send(Submit(request, parts, **options))

    def step(self, n: int = 1) -> None:
        for _ in range(n):
            self.engine.step(goes_on=self.goes_on)

    @property
    def is_busy(self) -> bool:
        return bool(self.engine._generations or self.engine._embeddings or self.engine._texts) or (
            not self.intake.inbox.empty()
        )

    def rest(self) -> None:
        """Let the engine be idle for so long that all is copied that may be."""
        batcher = self.engine._batcher
        while batcher.quiet_s is not None and (park := batcher.next_copy()) is not None:
            self.engine._park(park)

    def finish(self) -> None:
        for _ in range(100_000):
            if not self.is_busy:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def end(self, *, save_s: float = 2.0) -> None:
        """Let the engine end as the worker does; what runs is cancelled."""
        self.send(Shutdown(save_s=save_s))
        self.engine.run()
        self.parked.close()


def load_of(prefixes: Path, *, limit: int = 1 << 30, digest: str = "d" * 64) -> Load:
    """A model's Load: the model is this very file."""
    return Load(
        path=__file__,
        n_ctx=0,
        prefix_dir=str(prefixes),
        prefix_cache_bytes=limit,
        digest=digest,
    )
