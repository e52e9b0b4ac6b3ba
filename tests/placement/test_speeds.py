"""Speeds on the disk: whole or not there, of this machine alone, and no more than so many."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from shimpy.bench.keep import MAX_SPEEDS, merge_speeds
from shimpy.placement import speeds as module
from shimpy.placement.measured import Speed, shape_key, spot_of
from shimpy.placement.placement import PlanOptions
from shimpy.placement.planner import plan_model
from shimpy.placement.speeds import (
    VERSION,
    SpeedFile,
    Speeds,
    machine_name,
    read_speed_file,
    speed_path,
)
from shimpy.registry.disk import write_file
from tests.placement.machines import machine, model

MOE, CARD = model(), machine(8)
_TICKS = itertools.count(1)


def a_speed(decode: float = 50.0, n_ubatch: int | None = None) -> Speed:
    chosen = plan_model(MOE, CARD, PlanOptions(n_ubatch=n_ubatch)).chosen
    assert chosen is not None
    return Speed(spot=spot_of(chosen.placement), prefill_per_s=1000, decode_per_s=decode)


def put(folder: Path, *speeds: Speed, version: int = VERSION) -> Path:
    file = SpeedFile(
        version=version,
        model="a",
        shape=shape_key(MOE),
        machine=machine_name(CARD),
        measured_s=0.0,
        speeds=speeds,
    )
    path = speed_path(folder, file.shape, file.machine)
    write_file(path, msgspec.json.encode(file))
    # Two writes within one tick of the file system's clock would look like one.
    os.utime(folder, ns=(0, next(_TICKS)))
    return path


def test_what_is_written_is_found_for_this_model_on_this_machine(tmp_path: Path) -> None:
    put(tmp_path, a_speed())
    speeds = Speeds(tmp_path)
    assert speeds.of(MOE, CARD) == ()
    speeds.refresh()
    assert speeds.of(MOE, CARD) == (a_speed(),)
    assert speeds.of(model(n_layer=4), CARD) == ()
    # The same card with less free memory is the same machine; another card is another.
    (gpu,) = CARD.gpus
    assert speeds.of(MOE, machine(3)) == (a_speed(),)
    other = replace(CARD, gpus=(replace(gpu, description="another card"),))
    assert speeds.of(MOE, other) == ()
    assert speeds.of(MOE, machine(8, 8)) == ()


def test_a_plan_uses_them(tmp_path: Path) -> None:
    put(tmp_path, a_speed(61))
    speeds = Speeds(tmp_path)
    speeds.refresh()
    plan = speeds.plan(plan_model, MOE, CARD, PlanOptions())
    assert plan.reason.startswith("measured: 61 tok/s with experts of")


def test_a_new_measurement_is_seen_and_a_removed_folder_too(tmp_path: Path) -> None:
    folder = tmp_path / "speeds"
    speeds = Speeds(folder)
    speeds.refresh()
    put(folder, a_speed(1))
    speeds.refresh()
    path = put(folder, a_speed(2))
    speeds.refresh()
    assert [speed.decode_per_s for speed in speeds.of(MOE, CARD)] == [2]
    path.unlink()
    folder.rmdir()
    speeds.refresh()
    assert speeds.of(MOE, CARD) == ()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.write_bytes(path.read_bytes()[:-9]), id="cut short"),
        pytest.param(lambda path: path.write_bytes(b"\xff\xfe"), id="no text"),
        pytest.param(lambda path: path.write_bytes(b"[]"), id="of another form"),
        pytest.param(lambda path: (path.unlink(), path.mkdir()), id="a folder"),
        pytest.param(lambda path: put(path.parent, a_speed(), version=99), id="version"),
        pytest.param(lambda path: put(path.parent, a_speed(0.0)), id="no speed at all"),
    ],
)
def test_a_file_that_cannot_be_used_counts_as_not_there(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    path = put(tmp_path, a_speed())
    damage(path)
    assert read_speed_file(path) is None
    speeds = Speeds(tmp_path)
    speeds.refresh()
    assert speeds.of(MOE, CARD) == ()


def test_a_machine_is_its_cards_processor_and_library() -> None:
    assert machine_name(CARD).startswith("a card (CUDA); 8 cores of ")
    assert "llama-cpp-python " in machine_name(CARD)
    assert machine_name(machine()).startswith("no GPU; ")


def test_an_unknown_processor_and_library_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_name: str) -> str:
        raise module.PackageNotFoundError

    monkeypatch.setattr(module, "version", missing)
    module._library.cache_clear()
    try:
        assert "unknown version" in machine_name(CARD)
    finally:
        module._library.cache_clear()


def test_new_speeds_replace_old_ones_of_the_same_placement_and_the_oldest_go() -> None:
    old = [
        Speed(
            spot=replace(a_speed().spot, n_ubatch=n),
            prefill_per_s=1,
            decode_per_s=1,
        )
        for n in range(MAX_SPEEDS)
    ]
    new = [replace(old[3], decode_per_s=2), a_speed(n_ubatch=512)]
    merged = merge_speeds(new, old)
    assert len(merged) == MAX_SPEEDS
    assert merged[:2] == tuple(new)
    assert len({speed.spot for speed in merged}) == MAX_SPEEDS
    assert old[-1] not in merged
