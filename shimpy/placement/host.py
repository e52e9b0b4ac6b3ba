"""Reads what memory and processors the host leaves to a new process.

The kernel's own figure is bounded by each control group that the process is in, of version 1
or 2, since a container sees the whole machine's MemAvailable but is killed at its own limit.
"""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec
import psutil  # type: ignore[import-untyped]

from shimpy.placement.hardware import Host

# cgroup v1 writes "no limit" as a number near 2**63, rounded down to a page.
_V1_UNLIMITED: Final = 1 << 60


def _memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _memlock() -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def _affinity() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(psutil.cpu_count(logical=False) or os.cpu_count() or 1))


class HostSources(msgspec.Struct, frozen=True, kw_only=True):
    """Where the host's facts are read; tests put their own in place."""

    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    # Total and available bytes of the machine.
    memory: Callable[[], tuple[int, int]] = _memory
    # RLIMIT_MEMLOCK in bytes; None: unlimited.
    memlock: Callable[[], int | None] = _memlock
    # Numbers of the logical processors that the process may run on.
    affinity: Callable[[], frozenset[int]] = _affinity


class _Group(msgspec.Struct, frozen=True):
    """A control group's limit and what counts against it."""

    limit_bytes: int
    used_bytes: int


def probe_host(sources: HostSources, *, reserve_bytes: int = 0) -> Host:
    """Return the host's memory and cores as a new process may use them."""
    total, available = sources.memory()
    for group in _memory_groups(sources):
        total = min(total, group.limit_bytes)
        available = min(available, group.limit_bytes - group.used_bytes)
    return Host(
        total_bytes=total,
        available_bytes=max(0, available - reserve_bytes),
        lockable_bytes=sources.memlock(),
        n_cores=_count_cores(sources),
    )


def _memory_groups(sources: HostSources) -> Iterator[_Group]:
    """Yield the control groups that bound this process's memory, from its own to the root."""
    for folder in _group_folders(sources, "memory"):
        limits = [
            limit
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes")
            if (limit := _read_int(folder / name)) is not None and limit < _V1_UNLIMITED
        ]
        used = _read_int(folder / "memory.current")
        if used is None:
            used = _read_int(folder / "memory.usage_in_bytes")
        if limits and used is not None:
            yield _Group(min(limits), max(0, used - _reclaimable(folder)))


def _reclaimable(folder: Path) -> int:
    """Return a group's page cache, which the kernel drops before it runs out of memory."""
    stat = {}
    for line in _read(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdigit():
            stat[name] = int(value)
    # Version 1 counts sub-groups only in the total_* figures.
    return sum(
        stat.get(f"total_{name}", stat.get(name, 0)) for name in ("active_file", "inactive_file")
    )


def _group_folders(sources: HostSources, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's control group and of its parents.

    /proc/self/cgroup has `0::/path` for version 2 and `5:cpu,memory:/path` for version 1. In a
    container the path may be the host's, which is not mounted; then the root is the group.
    """
    for line in _read(sources.proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root = sources.sys / "fs" / "cgroup"
        elif controller in controllers.split(","):
            root = sources.sys / "fs" / "cgroup" / controller
        else:
            continue
        folder = root / path.lstrip("/")
        while folder != root and root in folder.parents:
            yield folder
            folder = folder.parent
        yield root


def _count_cores(sources: HostSources) -> int:
    """Return the physical cores that the process may use: affinity and quota both bind."""
    n_cores = float(_physical_cores(sources, sources.affinity()))
    for folder in _group_folders(sources, "cpu"):
        quota = _quota(folder)
        if quota is not None:
            n_cores = min(n_cores, math.ceil(quota))
    return max(1, int(n_cores))


def _physical_cores(sources: HostSources, processors: frozenset[int]) -> int:
    """Return how many cores these logical processors are; unknown ones count as one each."""
    cores = set()
    for number in processors:
        topology = sources.sys / "devices" / "system" / "cpu" / f"cpu{number}" / "topology"
        core = _read(topology / "core_id").strip()
        package = _read(topology / "physical_package_id").strip()
        cores.add((package, core) if core else ("", f"cpu{number}"))
    return len(cores)


def _quota(folder: Path) -> float | None:
    """Return the processors' worth of time that a group may use; None: no limit."""
    quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota = _read(folder / "cpu.cfs_quota_us").strip()
        period = _read(folder / "cpu.cfs_period_us").strip()
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    """Return a small file's text; empty where there is none that can be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
