"""The bodies of shimpy's own routes."""

from __future__ import annotations

from typing import Any, cast, get_args

import msgspec

from shimpy.errors import InvalidOptionError
from shimpy.placement.placement import CpuMoe, PlanOptions
from shimpy.protocol.messages import KvType, LoadMode
from shimpy.server.planning import Supposition
from shimpy.units import parse_bytes

Size = int | str
_CPU_MOE = ("auto", "on", "off")


class PlanBody(msgspec.Struct):
    """POST /api/plan: a model and what to suppose; sizes are bytes or text such as "24GiB"."""

    model: str | None = None
    name: str | None = None
    # One card each; an empty list: none. Left out: this machine's.
    vram: Size | list[Size] | None = None
    ram: Size | None = None
    n_ctx: int | None = None
    n_slots: int | None = None
    n_gpu_layers: int | None = None
    # The experts of so many layers in RAM; wins over cpu_moe.
    n_cpu_moe: int | None = None
    cpu_moe: str | int | bool | None = None
    kv_type: str | None = None
    load_mode: str | None = None


def parse_supposition(body: PlanBody) -> Supposition:
    """Return what a plan is to suppose.

    Raises:
        InvalidOptionError: a size or an option that can't be; the message names it.
    """
    cards = body.vram if isinstance(body.vram, list) or body.vram is None else [body.vram]
    options = PlanOptions(
        n_ctx=body.n_ctx,
        n_slots=body.n_slots,
        n_gpu_layers=body.n_gpu_layers,
        cpu_moe=body.n_cpu_moe if body.n_cpu_moe is not None else _cpu_moe(body.cpu_moe),
        kv_type=_one_of(KvType, "kv_type", body.kv_type),
        load_mode=_one_of(LoadMode, "load_mode", body.load_mode),
    )
    return Supposition(
        vram_bytes=None if cards is None else [_size("vram", card) for card in cards],
        ram_bytes=None if body.ram is None else _size("ram", body.ram),
        options=options,
    )


def _size(name: str, value: Size) -> int:
    try:
        size = parse_bytes(value) if isinstance(value, str) else value
    except ValueError as error:
        raise InvalidOptionError(f"{name}: {error}", option=name) from None
    if size < 0:
        raise InvalidOptionError(f"{name} must be at least 0, not {size}", option=name)
    return size


def _cpu_moe(value: str | int | bool | None) -> CpuMoe:  # noqa: FBT001 - the wire's own type
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, int):
        return value
    if value not in _CPU_MOE:
        raise InvalidOptionError(
            f"cpu_moe must be auto, on, off or a number of layers, not {value!r}", option="cpu_moe"
        )
    return cast("CpuMoe", value)


def _one_of(kind: Any, name: str, value: str | None) -> Any:
    """Return a value of one of the literals that `kind` is made of, or None."""
    if value is not None and value not in get_args(kind):
        raise InvalidOptionError(
            f"{name} must be one of {', '.join(get_args(kind))}, not {value!r}", option=name
        )
    return value
