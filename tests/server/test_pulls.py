"""Who shares a pull, who waits, and how it ends; the work itself is made up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from shimpy.errors import QueueFullError, ShimpyError, StoppingError
from shimpy.registry.attempts import Stop
from shimpy.registry.manifest import Manifest, ManifestFile
from shimpy.registry.pull import Event, Report, Step
from shimpy.registry.reference import Reference, parse_reference
from shimpy.server import pulls as pulls_module
from shimpy.server.judging import PlanJudge
from shimpy.server.pulls import Pulls


class Puller:
    """Waits for `go` in each pull, or until it is stopped; then does what `act` says."""

    def __init__(self, act: Callable[[], None] | None = None) -> None:
        self.go = threading.Event()
        self.begun: list[str] = []
        self._changed = threading.Condition()
        self.act = act

    def pull(
        self, reference: Reference, *, judge: PlanJudge, force: bool, report: Report, stop: Stop
    ) -> Manifest:
        with self._changed:
            self.begun.append(str(reference))
            self._changed.notify_all()
        report(Step(status="begun"))
        while not self.go.wait(0.01):
            stop.check()
        if self.act is not None:
            self.act()
        file = ManifestFile(name="x.gguf", size_bytes=1, digest=f"sha256:{'0' * 64}")
        return Manifest(name=str(reference).partition(":")[0], files=(file,))

    async def wait_begun(self, count: int) -> None:
        """Wait until so many pulls have begun."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.begun) >= count, 10)

        assert await asyncio.to_thread(wait)


class Desk:
    """Pulls of made-up work."""

    def __init__(self, tasks: asyncio.TaskGroup, puller: Puller) -> None:
        self.puller = puller
        self.installed: list[str] = []
        self.pulls = Pulls(
            puller,  # type: ignore[arg-type]
            tasks=tasks,
            make_judge=self._judge,
            on_installed=self._note,
        )
        self.tasks = tasks

    async def _judge(self) -> None:
        return None

    async def _note(self, manifest: Manifest) -> None:
        self.installed.append(manifest.name)

    def follow(self, name: str) -> AsyncIterator[Event | Manifest]:
        return self.pulls.follow(parse_reference(name))

    def start(self, name: str) -> asyncio.Task[list[Event | Manifest]]:
        async def collect() -> list[Event | Manifest]:
            return [event async for event in self.follow(name)]

        return self.tasks.create_task(collect())


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    async with asyncio.TaskGroup() as tasks:
        desk = Desk(tasks, Puller())
        yield desk
        desk.puller.go.set()
        await desk.pulls.close()


async def test_those_who_ask_for_one_model_share_its_pull(desk: Desk) -> None:
    followers = [desk.start("x") for _ in range(3)]
    await desk.puller.wait_begun(1)
    desk.puller.go.set()
    ends = [(await follower)[-1] for follower in followers]
    assert [end.name for end in ends if isinstance(end, Manifest)] == ["x"] * 3
    assert desk.puller.begun == ["x:latest"]
    assert desk.installed == ["x"]


async def test_more_than_may_run_wait_and_say_so(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    followers = [desk.start(f"m{i}") for i in range(pulls_module.MAX_RUNNING + 1)]
    await desk.puller.wait_begun(pulls_module.MAX_RUNNING)
    desk.puller.go.set()
    told = await followers[-1]
    assert told[0] == Step(status="waiting for one of 4 pulls to end")
    assert isinstance(told[-1], Manifest)


async def test_too_many_are_refused(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulls_module, "MAX_WAITING", -3)
    first = desk.start("a")
    await desk.puller.wait_begun(1)
    with pytest.raises(QueueFullError, match="1 pulls run or wait"):
        await anext(desk.follow("b"))
    desk.puller.go.set()
    await first


async def test_a_pull_that_all_have_left_ends_before_it_begins_again(desk: Desk) -> None:
    follower = desk.follow("x")
    assert await anext(follower) == Step(status="begun")
    await follower.aclose()  # type: ignore[attr-defined]
    again = desk.start("x")
    await desk.puller.wait_begun(2)
    desk.puller.go.set()
    assert isinstance((await again)[-1], Manifest)


async def test_a_waiting_pull_that_all_have_left_never_begins(desk: Desk) -> None:
    running = [desk.start(f"m{i}") for i in range(pulls_module.MAX_RUNNING)]
    await desk.puller.wait_begun(pulls_module.MAX_RUNNING)
    waiting = desk.follow("late")
    await anext(waiting)
    await waiting.aclose()  # type: ignore[attr-defined]
    desk.puller.go.set()
    await asyncio.gather(*running)
    await desk.pulls.close()
    assert "late:latest" not in desk.puller.begun


async def test_closing_stops_all_and_takes_no_more(desk: Desk) -> None:
    follower = desk.follow("x")
    await anext(follower)
    await desk.pulls.close()
    with pytest.raises(StoppingError, match="what came is kept"):
        await anext(follower)
    with pytest.raises(StoppingError):
        await anext(desk.follow("y"))


async def test_a_thread_that_does_not_end_is_left_behind(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulls_module, "_FAREWELL_S", 0.01)
    deaf = threading.Event()
    desk.puller.go.set()
    desk.puller.act = deaf.wait  # type: ignore[assignment]
    follower = desk.follow("x")
    await anext(follower)
    await desk.pulls.close()
    with pytest.raises(StoppingError):
        await anext(follower)
    deaf.set()


@pytest.mark.parametrize(
    ("raised", "said"),
    [(ShimpyError("no luck"), "no luck"), (RuntimeError("a bug"), "for a reason in the log")],
)
async def test_failures_reach_all_who_follow(desk: Desk, raised: Exception, said: str) -> None:
    def act() -> None:
        raise raised

    desk.puller.act = act
    followers = [desk.follow("x"), desk.follow("x")]
    for follower in followers:
        assert await anext(follower) == Step(status="begun")
    desk.puller.go.set()
    for follower in followers:
        with pytest.raises(ShimpyError, match=said):
            await anext(follower)
    assert desk.installed == []
