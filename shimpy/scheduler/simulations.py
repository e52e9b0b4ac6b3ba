"""Exact figures of what loads take: asked of llama.cpp in a short-lived process, or observed.

What a load really took wins over what was simulated, and both over formulas; both are kept.

Blocking, for threads. Everything is bounded: the time of a simulation, what is remembered, and
how often one that failed is tried. Whoever plans goes on with formulas where there is no figure.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from shimpy.errors import DiskFullError, RegistryError
from shimpy.gguf.arch import ModelShape
from shimpy.logs import get_logger
from shimpy.placement.figures import NO_FIGURES, Setup, use_from_buffers
from shimpy.placement.hardware import Hardware
from shimpy.placement.memory import MemoryUse, Use
from shimpy.placement.placement import Placement, Plan, PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.placement.search import setup_of
from shimpy.placement.speeds import Speeds
from shimpy.protocol.messages import BufferUse, Load, Simulated
from shimpy.registry.disk import write_file
from shimpy.registry.model import Model
from shimpy.scheduler.loads import simulated_load
from shimpy.units import MIB

SIMULATE_ARGV: Final = (sys.executable, "-m", "shimpy.engine", "--simulate")
FILE_NAME: Final = "simulations.json"
# All simulations for one decision together. One takes 0.5 s, most of it the process's start.
TIMEOUT_S: Final = 6.0
# How often a plan is made again with what was learnt from the one before.
ROUNDS: Final = 4
# After a failure a model is not simulated again for this long.
_RETRY_S: Final = 600.0
# A simulation takes a driver's context on the card, 330 MiB on an H200, while it runs.
_ROOM_BYTES: Final = 768 * MIB
# Of the RAM that is available; above it, a placement without a GPU is simulated too.
_TIGHT: Final = 0.75
_MAX_ROWS: Final = 4096
_MAX_MODELS: Final = 256
_MAX_SETUPS: Final = 256
_VERSION: Final = 2

_log = get_logger("simulations")


class _File(msgspec.Struct):
    """The cache on disk.

    A row is by the hash of its question: weights, KV and computation of each GPU, then the host.
    """

    version: int
    rows: dict[str, list[int]]


Runner = Callable[[Sequence[Load], float], Iterator[Simulated]]


class Simulations:
    """Knows exact figures of models, and plans with them."""

    def __init__(
        self,
        path: Path | None,
        *,
        speeds: Speeds | None = None,
        run: Runner | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`path` is the file that keeps figures; None: they are kept in memory alone.

        `speeds` are those that were measured on this machine; plans take the fastest known.
        """
        self._path = path
        self._speeds = speeds
        self._run = run or run_simulation
        self._clock = clock
        self._timeout_s = timeout_s
        # Held while a simulation runs: two at once would take twice the VRAM.
        self._lock = threading.Lock()
        self._known: OrderedDict[ModelShape, dict[Setup, MemoryUse]] = OrderedDict()
        self._rows: dict[str, list[int]] | None = None
        self._failed: dict[str, float] = {}

    def deadline(self) -> float:
        """Return the time, on this object's clock, by which a decision of now has to be there."""
        return self._clock() + self._timeout_s

    def plan(self, shape: ModelShape, hardware: Hardware, options: PlanOptions) -> Plan:
        """Plan with the figures and the speeds that are known; never waits."""
        if self._speeds is None:
            return self._plan_by_ladder(shape, hardware, options)
        return self._speeds.plan(self._plan_by_ladder, shape, hardware, options)

    def _plan_by_ladder(self, shape: ModelShape, hardware: Hardware, options: PlanOptions) -> Plan:
        return plan_model(shape, hardware, options, self._known.get(shape, NO_FIGURES))

    def plan_exactly(self, model: Model, hardware: Hardware, options: PlanOptions) -> Plan:
        """Plan, simulate what the plan is in doubt of, and plan again, until it is exact.

        Where there is no simulation or no time for it, formulas decide, as the rungs tell.

        Raises:
            InvalidOptionError: as `plan_model`.
        """
        assert model.shape is not None, "only models that can be used are planned"
        if self._speeds is not None:
            self._speeds.refresh()
        until_s = self.deadline()
        plan = self.plan(model.shape, hardware, options)
        for _ in range(ROUNDS):
            if not self.learn(model, plan.doubts, hardware, until_s=until_s):
                break
            plan = self.plan(model.shape, hardware, options)
        return plan

    def learn(
        self,
        model: Model,
        setups: Sequence[Setup],
        hardware: Hardware,
        *,
        until_s: float | None = None,
    ) -> bool:
        """Find out what setups of a model take; return whether anything is known now that was not.

        `hardware` is as it is at this moment: where a card has too little room for a simulation,
        there is none.
        """
        shape = model.shape
        known = self._known.get(shape, NO_FIGURES) if shape is not None else NO_FIGURES
        wanted = [setup for setup in setups if setup not in known]
        if shape is None or not wanted or not hardware.library:
            return False
        until_s = self.deadline() if until_s is None else until_s
        if not self._lock.acquire(timeout=max(0.0, until_s - self._clock())):
            return False
        try:
            return self._learn(model, shape, wanted, hardware, until_s)
        finally:
            self._lock.release()

    def observe(
        self,
        model: Model,
        placement: Placement,
        memory: Sequence[BufferUse],
        hardware: Hardware,
    ) -> bool:
        """Take what a load really took in place of any forecast; return whether that is news.

        It is kept as a simulation's figures are, so that plans after a restart know it too.
        """
        shape, setup = model.shape, setup_of(placement)
        use = use_from_buffers(setup.devices, memory) if memory else None
        if shape is None or use is None:
            return False
        with self._lock:
            known = self._known.get(shape, NO_FIGURES)
            if known.get(setup) == use:
                return False
            self._know(shape, {setup: use})
            key = _key(model, setup, hardware)
            if key and self._kept(key) != use:
                self._keep({key: use})
        return True

    def _learn(
        self,
        model: Model,
        shape: ModelShape,
        wanted: Sequence[Setup],
        hardware: Hardware,
        until_s: float,
    ) -> bool:
        keys = {setup: key for setup in wanted if (key := _key(model, setup, hardware))}
        found = {setup: use for setup, key in keys.items() if (use := self._kept(key))}
        rest = [
            setup
            for setup, key in keys.items()
            if setup not in found and not self._failed_lately(key) and _has_room(setup, hardware)
        ]
        if rest and until_s > self._clock():
            fresh = self._simulate(model, rest, until_s - self._clock())
            for setup in rest:
                if setup not in fresh:
                    self._failed[keys[setup]] = self._clock()
            self._keep({keys[setup]: use for setup, use in fresh.items()})
            found |= fresh
        if found:
            self._know(shape, found)
        return bool(found)

    def _know(self, shape: ModelShape, found: dict[Setup, MemoryUse]) -> None:
        # A new table: planners in other threads go on reading the old one.
        table = {**self._known.get(shape, NO_FIGURES), **found}
        self._known[shape] = dict(list(table.items())[-_MAX_SETUPS:])
        self._known.move_to_end(shape)
        if len(self._known) > _MAX_MODELS:
            self._known.popitem(last=False)

    def _failed_lately(self, key: str) -> bool:
        now = self._clock()
        self._failed = {k: at for k, at in self._failed.items() if now - at < _RETRY_S}
        return key in self._failed

    def _simulate(
        self, model: Model, setups: Sequence[Setup], timeout_s: float
    ) -> dict[Setup, MemoryUse]:
        started_s = self._clock()
        found: dict[Setup, MemoryUse] = {}
        for answer in self._run([simulated_load(model, setup) for setup in setups], timeout_s):
            setup = setups[answer.index]
            use = None if answer.error else use_from_buffers(setup.devices, answer.memory)
            if use is None:
                _log.info("not_simulated", model=str(model.name), reason=answer.error)
            else:
                found[setup] = use
        took_s = round(self._clock() - started_s, 2)
        _log.info("simulated", model=str(model.name), n=len(setups), n_known=len(found), s=took_s)
        return found

    # --- what is kept ---------------------------------------------------------------------

    def _kept(self, key: str) -> MemoryUse | None:
        if self._rows is None:
            self._rows = _read_rows(self._path)
        row = self._rows.get(key)
        return None if row is None else _from_row(row)

    def _keep(self, uses: dict[str, MemoryUse]) -> None:
        if not uses or self._path is None:
            return
        # What another process has found out since is kept too.
        rows = (self._rows or {}) | _read_rows(self._path)
        rows |= {key: _to_row(use) for key, use in uses.items()}
        self._rows = dict(list(rows.items())[-_MAX_ROWS:])
        data = msgspec.json.encode(_File(version=_VERSION, rows=self._rows))
        try:
            write_file(self._path, data)
        except (RegistryError, DiskFullError) as error:
            _log.warning("simulations_not_kept", reason=error.message)


def needs_check(plan: Plan) -> bool:
    """Whether a plan is to be checked before its model is loaded.

    On a CPU formulas do where there is room enough: nothing hangs on some MiB more or less.
    """
    if not plan.doubts or plan.chosen is None:
        return bool(plan.doubts)
    if plan.chosen.devices:
        return True
    host = plan.chosen.host
    return host.total_bytes + host.margin_bytes > host.available_bytes * _TIGHT


def run_simulation(
    loads: Sequence[Load], timeout_s: float, argv: Sequence[str] = SIMULATE_ARGV
) -> Iterator[Simulated]:
    """Yield what a short-lived process finds out; fewer than were asked for when it fails."""
    environ = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        done = subprocess.run(  # noqa: S603 -- our own interpreter
            argv,
            input=msgspec.json.encode(list(loads)),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            check=False,
            env=environ,
        )
        output = done.stdout
    except subprocess.TimeoutExpired as error:
        output = error.output or b""
        _log.warning("simulation_too_slow", after_s=round(timeout_s, 2))
    except OSError as error:
        _log.warning("simulation_not_started", reason=str(error))
        return
    for line in output.splitlines():
        # The last one may be cut short.
        with contextlib.suppress(msgspec.DecodeError):
            answer = msgspec.json.decode(line, type=Simulated)
            if 0 <= answer.index < len(loads):
                yield answer


def _key(model: Model, setup: Setup, hardware: Hardware) -> str:
    """Return a hash of everything that figures depend on; empty: a device is not there."""
    gpus = {gpu.name: gpu for gpu in hardware.gpus}
    if not all(name in gpus for name in setup.devices):
        return ""
    cards = [
        (gpu.name, gpu.backend, gpu.description, gpu.total_bytes)
        for gpu in (gpus[name] for name in setup.devices)
    ]
    facts = msgspec.json.encode((model.digest, hardware.library, cards, setup))
    return hashlib.sha256(facts).hexdigest()[:32]


def _has_room(setup: Setup, hardware: Hardware) -> bool:
    """Whether a simulation can't take the memory that somebody else is about to take."""
    return all(gpu.free_bytes >= _ROOM_BYTES for gpu in hardware.gpus if gpu.name in setup.devices)


def _read_rows(path: Path | None) -> dict[str, list[int]]:
    if path is None:
        return {}
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_File)
    except (OSError, msgspec.DecodeError):
        return {}
    if kept.version != _VERSION:
        return {}
    # Three figures for each device; anything else was not written here.
    return {key: row for key, row in kept.rows.items() if row and len(row) % 3 == 0}


def _to_row(use: MemoryUse) -> list[int]:
    parts = (*use.gpus, use.host)
    return [n for part in parts for n in (part.weights_bytes, part.kv_bytes, part.compute_bytes)]


def _from_row(row: Sequence[int]) -> MemoryUse:
    *gpus, host = (
        Use(weights_bytes=weights, kv_bytes=kv, compute_bytes=compute)
        for weights, kv, compute in zip(row[::3], row[1::3], row[2::3], strict=True)
    )
    return MemoryUse(gpus=tuple(gpus), host=host)
