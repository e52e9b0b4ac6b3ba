"""Who holds which memory: a hardware snapshot, corrected for what it can't know. Pure.

A snapshot says what is free now. It misses what a worker that is still loading will take, what a
loaded one has not touched yet, and mapped weights, which the system counts as available though a
model is using them. And it
can't know what comes back when a resident leaves, or gives up its parked caches: these show as
taken (they are shared memory to the kernel), and are there for whoever wants the RAM.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import msgspec
from msgspec.structs import replace

from shimpy.placement.hardware import Hardware
from shimpy.placement.placement import Rung
from shimpy.scheduler.states import Phase, Resident

HOST = "CPU"


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """Memory of one resident, in bytes."""

    # Per device, by llama.cpp's name; without the host.
    devices: dict[str, int]
    # Host memory that a snapshot shows as taken once the model has used all of it.
    host: int
    # Mapped weights: needed by the model, and available in the system's words, page-locked or not.
    mapped: int


def use_of(resident: Resident) -> Use:
    """Return what a resident really took, or what was predicted while it loads."""
    rung = resident.rung
    devices = {device.name: device.total_bytes for device in rung.devices}
    is_mapped = not rung.host.locked if resident.ready is None else resident.ready.is_mapped
    mapped = rung.host.weights_bytes if is_mapped else 0
    host = rung.host.total_bytes - mapped
    if resident.ready is None:
        return Use(devices=devices, host=host, mapped=mapped)
    real: Counter[str] = Counter()
    for buffer in resident.ready.memory:
        taken = buffer.context_bytes + buffer.compute_bytes
        if buffer.device != HOST or not is_mapped:
            taken += buffer.model_bytes
        real[buffer.device] += taken
    devices |= {
        device.name: real[device.name] + device.overhead_bytes
        for device in rung.devices
        if device.name in real
    }
    if HOST in real:
        host = real[HOST] + rung.host.overhead_bytes
    return Use(devices=devices, host=host, mapped=mapped)


class Ledger:
    """The memory of one snapshot, shared out among residents and claims during one pass."""

    def __init__(self, hardware: Hardware, residents: Collection[Resident]) -> None:
        """`residents` may change during the pass: those started since the snapshot load."""
        self._hardware = hardware
        self.residents = residents
        self._claimed: Counter[str] = Counter()
        # The largest margin of RAM of those that claim.
        self._claimed_margin = 0
        # What models on their way to another placement will take, by the model's name, and
        # whether it is kept whatever comes.
        self._held: dict[str, tuple[Rung, bool]] = {}

    @property
    def has_returning(self) -> bool:
        """Whether some memory is about to come back, or will as soon as it is wanted."""
        return any(r.phase is Phase.STOPPING or r.parked_bytes for r in self.residents)

    def present(self) -> Hardware:
        """Return what a worker could take at this moment: beside what is parked too."""
        return self._hardware_with(gone=frozenset(), claimed=Counter(), is_parked_kept=True)

    @property
    def spare_ram(self) -> int:
        """What `remaining` leaves of the RAM, the margins of all who take some kept; bytes."""
        rungs = [r.rung for r in self.residents] + [rung for rung, _ in self._held.values()]
        margins = [self._claimed_margin, *(rung.host.margin_bytes for rung in rungs)]
        return max(0, self.remaining().host.available_bytes - max(margins))

    def remaining(
        self, *, without: Iterable[Resident] = (), beside: Iterable[Rung] = ()
    ) -> Hardware:
        """Return what is left when stopping workers and those in `without` have gone.

        Parked caches count as given up. Memory that was claimed for earlier requests in this pass,
        or is held, is not part of it, nor is that of the rungs `beside`.
        """
        claimed = self._claimed + self._held_bytes()
        for rung in beside:
            claimed += _need(rung)
        return self._hardware_with(gone=self._gone(without), claimed=claimed)

    def at_most(self) -> Hardware:
        """Return what there is when every resident has gone, whoever may have claimed it."""
        return self._hardware_with(
            gone=frozenset(r.worker for r in self.residents), claimed=Counter()
        )

    def unpinned(self, *, without: Iterable[Resident] = ()) -> Hardware:
        """Return what there is at most when all but the pinned ones, and `without`, have gone.

        A pinned one that loads may be in the snapshot already: it is not counted twice.
        """
        gone = self._gone(without) | {r.worker for r in self.residents if not r.is_pinned}
        held = self._held_bytes(firm_only=True)
        return self._hardware_with(gone=gone, claimed=held, is_loading_seen=True)

    def shortfall(self, margins: Mapping[str, int]) -> dict[str, int]:
        """Return by how much other programs have eaten into the margins, in bytes per device.

        Only of devices with less than half of the margin left. Stopping workers count as gone,
        and what is held as taken.
        """
        change = self._change(self._gone(()))
        change.subtract(self._held_bytes())
        free = {gpu.name: gpu.free_bytes for gpu in self._hardware.gpus}
        free[HOST] = self._hardware.host.available_bytes
        left = {name: n_bytes + change[name] for name, n_bytes in free.items()}
        return {
            name: margin - left[name]
            for name, margin in margins.items()
            if name in left and left[name] < margin // 2
        }

    def hold(self, key: str, rung: Rung, *, firmly: bool = False) -> None:
        """Keep a rung's memory for a model that is between two placements."""
        self._held[key] = rung, firmly

    def let_go(self, key: str) -> None:
        """Keep nothing for a model any more."""
        self._held.pop(key, None)

    def claim(self, rung: Rung, *, after: Iterable[Resident] = ()) -> None:
        """Keep a rung's memory from later requests, but for what leaves with `after`."""
        need = _need(rung)
        for resident in after:
            if resident.phase is not Phase.STOPPING:
                use = use_of(resident)
                need.subtract({**use.devices, HOST: use.host + use.mapped})
        self._claimed_margin = max(self._claimed_margin, rung.host.margin_bytes)
        self._claimed += need  # Counter addition drops what is not positive

    def _held_bytes(self, *, firm_only: bool = False) -> Counter[str]:
        held: Counter[str] = Counter()
        for rung, is_firm in self._held.values():
            if is_firm or not firm_only:
                held += _need(rung)
        return held

    def _gone(self, without: Iterable[Resident]) -> frozenset[int]:
        stopping = {r.worker for r in self.residents if r.phase is Phase.STOPPING}
        return frozenset(stopping | {r.worker for r in without})

    def _change(
        self,
        gone: frozenset[int],
        *,
        is_loading_seen: bool = False,
        is_parked_kept: bool = False,
    ) -> Counter[str]:
        """Return what the snapshot's figures are to be changed by.

        `is_loading_seen`: what loads is in the snapshot already. `is_parked_kept`: nobody gives up
        what is parked.
        """
        change: Counter[str] = Counter()
        for resident in self.residents:
            use = use_of(resident)
            change[HOST] -= resident.untouched_bytes
            if not is_parked_kept:
                change[HOST] += resident.parked_bytes
            if resident.worker in gone:
                change.update({**use.devices, HOST: use.host})
            elif resident.phase is Phase.LOADING:
                if is_loading_seen:
                    continue
                change.subtract({**use.devices, HOST: use.host + use.mapped})
            else:
                change.subtract({HOST: use.mapped})
        return change

    def _hardware_with(
        self,
        *,
        gone: frozenset[int],
        claimed: Counter[str],
        is_loading_seen: bool = False,
        is_parked_kept: bool = False,
    ) -> Hardware:
        change = self._change(gone, is_loading_seen=is_loading_seen, is_parked_kept=is_parked_kept)
        kept: Counter[str] = Counter()
        for resident in self.residents:
            if resident.worker not in gone:
                use = use_of(resident)
                kept.update({**use.devices, HOST: use.host + use.mapped})
                # What heavy work may still claim, or has claimed: the snapshot can't tell.
                kept.update({d.name: d.workspace_bytes for d in resident.rung.devices})
        change.subtract(claimed)
        kept.update(claimed)

        def left(name: str, free: int, total: int) -> int:
            # Compute buffers that were never touched show as free: our own books bound the rest.
            return max(0, min(free + change[name], total - kept[name]))

        hardware = self._hardware
        gpus = tuple(
            replace(gpu, free_bytes=left(gpu.name, gpu.free_bytes, gpu.total_bytes))
            for gpu in hardware.gpus
        )
        host = hardware.host
        available = left(HOST, host.available_bytes, host.total_bytes)
        return replace(hardware, gpus=gpus, host=replace(host, available_bytes=available))


def rung_fits(rung: Rung, hardware: Hardware) -> bool:
    """Whether a rung that was weighed for other hardware fits on this one."""
    here = rung_on(rung, hardware)
    return not here.host.missing_bytes and not any(device.missing_bytes for device in here.devices)


def rung_on(rung: Rung, hardware: Hardware) -> Rung:
    """Return a rung with the free bytes of other hardware; its `fits` and `reason` as they were."""
    free = {gpu.name: gpu.free_bytes for gpu in hardware.gpus}
    return replace(
        rung,
        devices=tuple(
            replace(device, free_bytes=free.get(device.name, 0)) for device in rung.devices
        ),
        host=replace(rung.host, available_bytes=hardware.host.available_bytes),
    )


def _need(rung: Rung) -> Counter[str]:
    need = Counter({device.name: device.most_bytes for device in rung.devices})
    need[HOST] = rung.host.total_bytes
    return need
