from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from shimpy.errors import GgufError, RemoteError
from shimpy.gguf.arch import describe_model
from shimpy.gguf.reader import read_header
from shimpy.registry.attempts import Retries, Stop
from shimpy.registry.hub import fetch_repository
from shimpy.registry.preview import fetch_header
from shimpy.registry.remote import RemoteFile
from tests.hub_server import Fault, HostedFile, HubServer
from tests.hubs import hub
from tests.shapes import deepseek_moe_16b, write_gguf
from tests.synthetic import write_deepseek, write_preset

__all__ = ["hub"]

RETRIES = Retries(most=3, first_pause_s=0.001)


def files(server: HubServer, *paths: Path) -> list[RemoteFile]:
    server.add("org/repo", {path.name: path for path in paths})
    return list(fetch_repository("org/repo").files)


def preview(remote: list[RemoteFile]) -> object:
    return fetch_header(remote, lambda read: RETRIES.run(read, Stop()))


@pytest.fixture(scope="module")
def big_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its header has 1.9 MB; the weights are a hole of tens of MB."""
    path = tmp_path_factory.mktemp("big") / "big-Q8_0.gguf"
    return write_preset(path, "dense-200m", header_only=True, n_layer=2, n_vocab=50_000)


def test_the_shape_is_the_same_as_that_of_the_whole_file(hub: HubServer, big_model: Path) -> None:
    header = preview(files(hub, big_model))
    assert describe_model(header) == describe_model(read_header(big_model))  # type: ignore[arg-type]


def test_little_more_than_the_header_is_read(hub: HubServer, big_model: Path) -> None:
    header_bytes = read_header(big_model).header_bytes
    assert header_bytes > 1_000_000
    preview(files(hub, big_model))
    assert hub.sent() <= 2 * header_bytes + 600_000
    # No byte twice.
    ranges = [seen.range for seen in hub.seen if seen.where == "storage"]
    starts = [int(text.removeprefix("bytes=").split("-")[0]) for text in ranges]
    ends = [int(text.split("-")[1]) + 1 for text in ranges]
    assert starts == [0, *ends[:-1]]


def test_of_a_real_models_file_less_than_a_hundredth_is_read(
    hub: HubServer, tmp_path: Path
) -> None:
    """DeepSeek-MoE 16B in Q4_K_M: its header, and a hole of 10 GiB."""
    path = write_gguf(tmp_path / "x-Q4_K_M.gguf", deepseek_moe_16b(), "Q4_K_M")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        repo = hub.add("org/repo", {})
        repo.files[path.name] = HostedFile(data)
        # Its digest would take a while, and nobody compares it here.
        vars(repo.files[path.name]).update(sha256="0" * 64, git_oid="0" * 40)
        header = preview(list(fetch_repository("org/repo").files))
        assert describe_model(header).n_expert == 64  # type: ignore[arg-type]
        assert hub.sent() < len(data) / 100
        hub.repos.clear()


def test_a_split_models_shards_are_put_together(hub: HubServer, tmp_path: Path) -> None:
    first = write_deepseek(tmp_path / "x.gguf", split_max_tensors=12)
    shards = sorted(first.parent.glob("*.gguf"))
    assert len(shards) > 2
    header = preview(files(hub, *shards))
    assert describe_model(header) == describe_model(read_header(first))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(ignore_range=True),
        Fault(drop_after=100_000),
        Fault(status=503),
        Fault(where="resolve", status=429),
        Fault(end_after=50_000),
    ],
    ids=["ignores ranges", "drops", "is busy", "wants fewer", "ends early"],
)
def test_a_failing_server_is_asked_again(hub: HubServer, big_model: Path, fault: Fault) -> None:
    remote = files(hub, big_model)
    hub.faults = [fault]
    header = preview(remote)
    assert describe_model(header) == describe_model(read_header(big_model))  # type: ignore[arg-type]


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(
    hub: HubServer, big_model: Path
) -> None:
    remote = files(hub, big_model)
    hub.faults = [Fault(ignore_range=True)] * 10
    preview(remote)
    assert hub.sent() < big_model.stat().st_size / 2


def test_what_is_no_gguf_says_so(hub: HubServer, tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!DOCTYPE html><html>" + "x" * 1000)
    with pytest.raises(GgufError, match="web page"):
        preview(files(hub, path))


def test_a_file_shorter_than_its_tensors_is_refused_before_its_bytes(
    hub: HubServer, tmp_path: Path, llama_model: Path
) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(llama_model.read_bytes()[:-1000])
    with pytest.raises(GgufError, match="incomplete"):
        preview(files(hub, path))


def test_a_file_that_ends_in_its_header_is_refused(
    hub: HubServer, tmp_path: Path, llama_model: Path
) -> None:
    path = tmp_path / "stub.gguf"
    path.write_bytes(llama_model.read_bytes()[:2000])
    with pytest.raises(GgufError, match="truncated"):
        preview(files(hub, path))


def test_a_listing_that_disagrees_with_the_server_is_told(hub: HubServer, big_model: Path) -> None:
    remote = files(hub, big_model)
    hub.faults = [Fault(shorter_by=5)]
    with pytest.raises(GgufError, match="its listing says"):
        preview(remote)


def test_a_dead_server_is_given_up(hub: HubServer, big_model: Path) -> None:
    remote = files(hub, big_model)
    hub.faults = [Fault(where="resolve", status=503)] * 3
    with pytest.raises(RemoteError, match="3 attempts"):
        preview(remote)
