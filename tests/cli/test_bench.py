"""`shimpy bench` as it is typed: real workers, one thread, tiny models."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import click
import pytest
from click.testing import CliRunner, Result
from msgspec.structs import replace

from shimpy.bench import plot
from shimpy.bench.candidates import Candidate
from shimpy.bench.measure import Bench
from shimpy.bench.results import Measurement
from shimpy.cli import bench, holders
from shimpy.cli.plan import command as plan_command
from shimpy.client import Client
from shimpy.errors import ShimpyError, UnsupportedError, UserError
from tests.bench.support import measurement, report
from tests.daemon import running_daemon

pytestmark = pytest.mark.slow
QUICK = ("--prompt", "16", "--predict", "4", "--repeat", "1", "--streams", "1")


@pytest.fixture
def model(tmp_path: Path, mixtral_model: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    return Path(shutil.copy(mixtral_model, folder / "mixtral.gguf"))


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("SHIMPY_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SHIMPY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SHIMPY_STORES", "none")
    monkeypatch.setenv("SHIMPY_N_THREADS", "1")
    # Nothing answers there: no daemon of whoever runs the tests is asked.
    monkeypatch.setenv("SHIMPY_HOST", "127.0.0.1:9")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(bench.command, [str(argument) for argument in arguments])


def test_a_daemons_models_are_unloaded_and_it_plans_with_what_was_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    with (
        running_daemon(tmp_path / "home", model.parent) as daemon,
        Client(daemon.url) as client,
    ):
        monkeypatch.setenv("SHIMPY_HOST", daemon.url)
        client.load("mixtral")
        done = run(model, *QUICK, "--json", data, "--plot", picture, "--unload")
        assert done.exit_code == 0, done.output
        assert f"The daemon at {daemon.url} holds mixtral:latest" in done.stderr
        assert client.ps()["models"] == []
        client.load("mixtral")
        assert client.plan({"model": "mixtral"})["reason"].startswith("measured: ")
    lines = done.stdout.splitlines()
    assert lines[0].startswith("mixtral:latest on ")
    assert sum(line.startswith("*") for line in lines) == 2
    assert any("1 thread, plain attention, micro-batch 512" in line for line in lines)
    measurements = json.loads(data.read_text())["measurements"]
    threads = [m["n_threads"] for m in measurements]
    assert threads[:3] == [1, 1, 1]
    assert set(threads[3:]) <= {os.cpu_count()}
    assert all(m["decode_per_s"]["median"] > 0 for m in measurements)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "3 speeds are kept in" in done.stderr
    plan = CliRunner().invoke(plan_command, [str(model), "--json"])
    assert json.loads(plan.stdout)["reason"].startswith("measured: ")


class Holder:
    """A daemon's client, with one model loaded."""

    def __init__(self, *_: object) -> None:
        self.unloaded: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def ps(self) -> dict[str, Any]:
        return {"models": [{"name": "some:model"}]}

    def unload(self, name: str) -> None:
        self.unloaded.append(name)


def test_a_daemon_keeps_its_models_where_nobody_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shimpy.client.Client", Holder)
    holders.make_room(unload=False)
    said = capsys.readouterr().err
    assert "holds some:model" in said
    assert "`shimpy bench --unload` has them unloaded first" in said


def test_a_model_that_stays_in_use_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shimpy.client.Client", Holder)
    monkeypatch.setattr(holders, "_UNLOAD_S", 0.0)
    with pytest.raises(ShimpyError, match="some:model is still in use"):
        holders.make_room(unload=True)


def test_json_on_stdout_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    bench._show(report(measurement(0, 60)), Path("-"), None)
    assert len(json.loads(capsys.readouterr().out)["measurements"]) == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(click.FileError, match="No such file"):
        bench._show(report(measurement(0, 60)), tmp_path / "none" / "x.json", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--streams", "1,x"), "no list of numbers"),
        (("--streams", "0"), "no list of numbers"),
        (("--budget", "much"), "not a size"),
        (("--json", "nowhere/x.json"), "there is no folder nowhere"),
        (("--plot", "nowhere/x.png"), "there is no folder nowhere"),
    ],
)
def test_a_bad_option_is_named(model: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run(model, *arguments)
    assert done.exit_code == 2
    assert message in done.output


def test_what_cannot_be_varied_is_refused(model: Path) -> None:
    error = run(model, *QUICK, "--n-cpu-moe", "0,1").exception
    assert isinstance(error, UserError)
    assert "no GPU" in str(error)


def test_an_embedding_model_is_refused(bert_model: Path) -> None:
    done = run(bert_model)
    assert done.exit_code == 2
    assert "computes embeddings" in done.output


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda _name: None)
    done = run(model, *QUICK, "--plot", "x.png")
    assert isinstance(done.exception, UnsupportedError)
    assert done.stdout == ""


def test_a_model_that_fails_is_told_and_is_a_failure(model: Path) -> None:
    with model.open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.truncate()
    done = run(model, *QUICK)
    assert isinstance(done.exception, ShimpyError)
    assert "incomplete" in str(done.exception)


def test_ctrl_c_ends_it_with_its_worker_and_shows_what_there_is(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_workers: Callable[[], list[int]],
) -> None:
    measure = Bench.measure

    async def interrupted(self: Bench, candidate: Candidate) -> Measurement:
        if candidate.label == "flash attention":
            self = replace(self, on_step=interrupt_at_work)
        return await measure(self, candidate)

    def interrupt_at_work(what: str) -> None:
        if what == "1 stream":
            assert own_workers()
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Bench, "measure", interrupted)
    done = run(model, *QUICK, "--predict", "400", "--no-keep")
    # What click makes of an abort.
    assert done.exit_code == 1
    assert not own_workers()
    assert "1 thread, plain attention" in done.stdout
    assert "flash attention" not in done.stdout
    assert not (tmp_path / "home" / "state" / "speeds").exists()


def test_a_daemon_elsewhere_takes_nothing_here() -> None:
    assert holders.is_local("http://127.0.0.1:11435")
    assert holders.is_local("unix:/run/shimpy.sock")
    assert not holders.is_local("https://models.example:443")
