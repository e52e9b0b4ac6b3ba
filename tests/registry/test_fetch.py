"""One file over the real huggingface_hub client, from a hub that fails."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shimpy.errors import DiskFullError, NotFoundError, RemoteError
from shimpy.registry.attempts import Retries, Stop, StoppedError
from shimpy.registry.blobs import Blobs, DigestMismatchError
from shimpy.registry.fetch import Fetcher, working_key
from shimpy.registry.hub import fetch_repository
from shimpy.registry.reference import UrlReference
from shimpy.registry.remote import RemoteFile, TransientError
from shimpy.registry.web import Web
from tests.hub_server import Fault, HubServer
from tests.hubs import hub

__all__ = ["hub"]

DATA = random.Random(1).randbytes(3_000_000)
QUICK = Retries(most=3, first_pause_s=0.001)


@pytest.fixture
def web() -> Iterator[Web]:
    client = Web()
    yield client
    client.close()


class Fetch:
    """Fetches one file, and remembers how it got on."""

    def __init__(self, server: HubServer, root: Path) -> None:
        server.add("org/repo", {"x.gguf": DATA})
        self.hub = server
        self.blobs = Blobs(root)
        self.progress: list[int] = []

    @property
    def file(self) -> RemoteFile:
        return next(f for f in fetch_repository("org/repo").files if f.name == "x.gguf")

    def run(self, file: RemoteFile | None = None) -> bytes:
        """Fetch and return what the blob holds."""
        fetcher = Fetcher(blobs=self.blobs, retries=QUICK)
        digest = fetcher.fetch(file or self.file, stop=Stop(), on_progress=self.progress.append)
        return self.blobs.path(digest).read_bytes()

    def begin(self, n_bytes: int) -> RemoteFile:
        """Leave the beginning of the file behind, as a pull that was cut short does."""
        file = self.file
        with self.blobs.begin(file.digest) as writer:
            writer.write(DATA[:n_bytes])
        return file

    @property
    def is_empty(self) -> bool:
        return not list(self.blobs.stored())


@pytest.fixture
def fetch(hub: HubServer, tmp_path: Path) -> Fetch:
    return Fetch(hub, tmp_path)


def test_a_file_comes_whole_with_its_digest(fetch: Fetch) -> None:
    assert fetch.run() == DATA
    assert fetch.progress[-1] == len(DATA)
    assert fetch.hub.sent() == len(DATA)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    fetch.run()
    tokens = {seen.where: seen.token for seen in fetch.hub.seen}
    assert tokens == {"api": "Bearer hf_good", "resolve": "Bearer hf_good", "storage": ""}


@pytest.mark.parametrize("n_drops", [1, 3, 6])
def test_a_line_that_drops_is_resumed(fetch: Fetch, n_drops: int) -> None:
    """However often: each time it has come further."""
    fetch.hub.faults = [Fault(drop_after=1_200_000 // n_drops + 1_050_000)] * n_drops
    retries = Retries(most=2, first_pause_s=0.001)
    digest = Fetcher(blobs=fetch.blobs, retries=retries).fetch(
        fetch.file, stop=Stop(), on_progress=fetch.progress.append
    )
    assert fetch.blobs.path(digest).read_bytes() == DATA
    assert fetch.hub.sent() == pytest.approx(len(DATA), abs=2_000_000)
    assert any(seen.range.startswith("bytes=") for seen in fetch.hub.seen)


def test_a_line_that_always_drops_early_is_given_up(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(drop_after=1000)] * 10
    with pytest.raises(RemoteError, match="given up after 3 attempts"):
        fetch.run()
    assert fetch.is_empty
    assert len(fetch.hub.faults) == 7
    assert fetch.blobs.begun_bytes(fetch.file.digest) > 0


def test_a_server_that_stalls_is_asked_again(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(stall_after=1_500_000)]
    assert fetch.run() == DATA


def test_a_server_that_ignores_ranges_is_read_past_what_is_here(fetch: Fetch) -> None:
    file = fetch.begin(1_000_000)
    fetch.hub.faults = [Fault(ignore_range=True)]
    assert fetch.run(file) == DATA
    assert fetch.progress[0] == 1_000_000
    assert fetch.progress == sorted(fetch.progress)


def test_a_body_that_ends_early_as_if_whole_is_completed(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(end_after=2_000_000)]
    assert fetch.run() == DATA


def test_a_file_that_is_shorter_than_listed_is_refused(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(shorter_by=10)]
    with pytest.raises(RemoteError, match=r"listing says 3000000 bytes, its server 2999990"):
        fetch.run()
    assert fetch.is_empty


def test_another_file_under_the_same_address_is_noticed_by_its_mark(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(where="resolve", etag="f" * 64)]
    with pytest.raises(RemoteError, match="another file now than its listing says"):
        fetch.run()
    assert fetch.blobs.begun_bytes(fetch.file.digest) == 0


def test_what_is_not_what_the_listing_says_is_thrown_away(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(flip=True)]
    with pytest.raises(DigestMismatchError, match=r"x.gguf came whole, but is not what"):
        fetch.run()
    assert fetch.is_empty
    assert not list(fetch.blobs.leftovers())


def test_a_damaged_beginning_costs_a_second_try_and_no_more(fetch: Fetch) -> None:
    """What an earlier pull left may be bad; the server is not to blame for it."""
    file = fetch.file
    with fetch.blobs.begin(file.digest) as writer:
        writer.write(b"x" * 1_000_000)
    assert fetch.run(file) == DATA


def test_a_beginning_longer_than_the_file_is_no_beginning(fetch: Fetch) -> None:
    file = fetch.file
    with fetch.blobs.begin(file.digest) as writer:
        writer.write(b"x" * (len(DATA) + 1))
    assert fetch.run(file) == DATA


def test_a_later_pull_goes_on_where_one_stopped(fetch: Fetch) -> None:
    file = fetch.begin(2_000_000)
    fetch.hub.seen.clear()
    assert fetch.run(file) == DATA
    assert fetch.hub.sent() == 1_000_000


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(fetch: Fetch, status: int) -> None:
    fetch.hub.faults = [Fault(where="resolve", status=status)] * 2
    assert fetch.run() == DATA


def test_a_server_that_stays_busy_is_given_up_with_its_answer(fetch: Fetch) -> None:
    fetch.hub.faults = [Fault(where="resolve", status=503)] * 3
    with pytest.raises(RemoteError, match=r"3 attempts.*503 Service Unavailable"):
        fetch.run()


@pytest.mark.parametrize(
    ("status", "headers", "error", "said"),
    [
        (404, {"X-Error-Code": "EntryNotFound"}, NotFoundError, "the file is gone"),
        (403, {"X-Error-Message": "Not for you."}, RemoteError, r"Not for you \(403 Forbidden\)"),
        (401, {"X-Error-Code": "GatedRepo"}, RemoteError, "is gated: .*HF_TOKEN"),
        (451, {}, RemoteError, "451"),
    ],
)
def test_a_refusal_is_told_in_the_hubs_words_and_not_repeated(
    fetch: Fetch, status: int, headers: dict[str, str], error: type[Exception], said: str
) -> None:
    fetch.hub.faults = [Fault(where="resolve", status=status, headers=headers)]
    with pytest.raises(error, match=said):
        fetch.run()
    assert fetch.hub.count("resolve") == 1


def test_a_full_disk_is_told_and_what_came_is_kept(fetch: Fetch, tmp_path: Path) -> None:
    n_writes = 0

    def fill(step: str) -> None:
        nonlocal n_writes
        n_writes += step == "blob: write"
        if n_writes == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    fetch.blobs = Blobs(tmp_path, hook=fill)
    with pytest.raises(DiskFullError, match="no room on the disk"):
        fetch.run()
    assert fetch.is_empty
    begun = fetch.blobs.begun_bytes(fetch.file.digest)
    assert 0 < begun < len(DATA)
    fetch.blobs = Blobs(tmp_path)
    fetch.hub.seen.clear()
    assert fetch.run() == DATA
    assert fetch.hub.sent() == len(DATA) - begun


def test_stopping_ends_a_read_that_hangs_and_keeps_what_came(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its time limit."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 60.0)
    fetch.hub.faults = [Fault(stall_after=1_500_000)]
    file, stop, raised, hangs = fetch.file, Stop(), [], threading.Event()

    def on_progress(n_bytes: int) -> None:
        if n_bytes == 1_500_000:
            hangs.set()

    def work() -> None:
        try:
            Fetcher(blobs=fetch.blobs).fetch(file, stop=stop, on_progress=on_progress)
        except StoppedError as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert hangs.wait(10)
    stop.set()
    thread.join(10)
    assert raised
    assert fetch.blobs.begun_bytes(file.digest) == 1_500_000
    assert fetch.is_empty


def test_stopping_ends_a_pause_between_attempts(fetch: Fetch) -> None:
    stop = Stop()
    stop.set()
    with pytest.raises(StoppedError):
        Retries().give_up_or_wait(TransientError("x", retry_after_s=60), 1, stop)


def test_pauses_grow_and_respect_the_servers_wish() -> None:
    retries = Retries(first_pause_s=1.0)
    assert 0.7 < retries.pause_s(1, None) < 1.3
    assert 2.9 < retries.pause_s(3, None) < 5.1
    assert retries.pause_s(1, 7.0) == 7.0
    assert retries.pause_s(20, None) == 60.0
    assert retries.pause_s(1, 4000.0) == 60.0


def test_a_small_file_of_the_repository_itself_is_checked_as_git_does(fetch: Fetch) -> None:
    fetch.hub.repos["org/repo"].files["x.gguf"].is_lfs = False
    file = fetch.file
    assert (file.digest, len(file.git_oid)) == ("", 40)
    assert fetch.run(file) == DATA
    fetch.hub.faults = [Fault(where="resolve", flip=True)]
    with pytest.raises(DigestMismatchError, match="git object"):
        fetch.run(file)


# --- files that nobody knows the digest of ----------------------------------------------------


@pytest.fixture
def plain(fetch: Fetch, web: Web) -> RemoteFile:
    fetch.hub.plain["x.gguf"] = DATA
    return web.describe(UrlReference(url=f"{fetch.hub.url}/files/x.gguf"))


def test_a_plain_file_gets_its_digest_when_it_is_here(fetch: Fetch, plain: RemoteFile) -> None:
    assert (plain.size_bytes, plain.digest) == (len(DATA), "")
    assert fetch.run(plain) == DATA
    assert not list(fetch.blobs.leftovers())


def test_a_plain_file_is_resumed_while_its_mark_stays(fetch: Fetch, plain: RemoteFile) -> None:
    fetch.hub.faults = [Fault(where="file", drop_after=2_000_000)] * 3
    fetch.hub.seen.clear()
    assert fetch.run(plain) == DATA
    assert fetch.hub.sent("file") < 2 * len(DATA)


def test_a_plain_file_is_resumed_by_a_later_pull(fetch: Fetch, plain: RemoteFile) -> None:
    fetch.hub.faults = [Fault(where="file", drop_after=500_000)] * 3
    with pytest.raises(RemoteError, match="given up"):
        fetch.run(plain)
    begun = fetch.blobs.begun_bytes(working_key(plain))
    assert begun > 0
    fetch.hub.faults.clear()
    fetch.hub.seen.clear()
    assert fetch.run(plain) == DATA
    assert fetch.hub.sent("file") == len(DATA) - begun


def test_a_plain_file_that_changes_is_begun_anew(fetch: Fetch, plain: RemoteFile) -> None:
    fetch.hub.faults = [
        Fault(where="file", drop_after=2_000_000),
        Fault(where="file", etag="changed"),
    ]
    changed = DATA[::-1]

    def swap(n_bytes: int) -> None:
        if n_bytes >= 1_000_000:
            fetch.hub.plain["x.gguf"] = changed

    fetcher = Fetcher(blobs=fetch.blobs, retries=QUICK)
    digest = fetcher.fetch(plain, stop=Stop(), on_progress=swap)
    assert fetch.blobs.path(digest).read_bytes() == changed


def test_a_plain_file_that_shrinks_is_begun_anew(fetch: Fetch, web: Web) -> None:
    """The server can't give what lies behind the new end; its 416 is no failure."""
    fetch.hub.plain["x.gguf"] = DATA
    url = f"{fetch.hub.url}/files/x.gguf"
    described = web.describe(UrlReference(url=url))
    file = RemoteFile(path="x.gguf", size_bytes=None, digest="", open=described.open, url=url)
    fetch.hub.faults = [Fault(where="file", drop_after=2_000_000)]

    def shrink(n_bytes: int) -> None:
        if n_bytes >= 1_000_000:
            fetch.hub.plain["x.gguf"] = DATA[:500_000]

    fetcher = Fetcher(blobs=fetch.blobs, retries=QUICK)
    digest = fetcher.fetch(file, stop=Stop(), on_progress=shrink)
    assert fetch.blobs.path(digest).read_bytes() == DATA[:500_000]


def test_a_server_that_sends_more_than_it_said_is_cut_off(fetch: Fetch, web: Web) -> None:
    fetch.hub.plain["x.gguf"] = DATA
    url = f"{fetch.hub.url}/files/x.gguf"
    described = web.describe(UrlReference(url=url))
    file = RemoteFile(path="x.gguf", size_bytes=1_000_000, digest="", open=described.open, url=url)
    fetch.hub.faults = [Fault(where="file", end_after=len(DATA))]
    with pytest.raises(RemoteError, match="sends more than"):
        fetch.run(file)
    assert fetch.is_empty


def test_a_server_that_does_not_tell_the_size_is_read_to_the_end(fetch: Fetch, web: Web) -> None:
    fetch.hub.plain["x.gguf"] = DATA
    url = f"{fetch.hub.url}/files/x.gguf"
    described = web.describe(UrlReference(url=url))
    file = RemoteFile(path="x.gguf", size_bytes=None, digest="", open=described.open, url=url)
    fetch.hub.faults = [Fault(where="file", end_after=len(DATA))]
    assert fetch.run(file) == DATA
