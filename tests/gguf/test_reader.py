"""Headers: those that other tools write, and those that are broken on purpose."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shimpy.errors import GgufError
from shimpy.gguf import parser, reader
from shimpy.gguf.header import GgufArray, TruncatedHeaderError
from shimpy.gguf.parser import MAX_HEADER_BYTES
from shimpy.gguf.reader import check_data, parse_header, read_header
from tests.gguf.build import Gguf, dense_tensors, llama, small_model, string, tensor_row, value

# The machine may be busy with other things.
busy = settings(deadline=None)

METADATA = llama() | {
    "general.name": "Tiny",
    "tokenizer.ggml.tokens": ["<s>", "ä", "日本", ""],
    "tokenizer.ggml.scores": [0.0, -1.5, 2.0, 3.0],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.add_bos_token": True,
}
VALID = Gguf(metadata=METADATA, tensors=dense_tensors()).header()


def test_a_file_without_tensors_may_end_with_its_header(tmp_path: Path) -> None:
    """Nothing is missing of it, though the padding behind its header is."""
    path = tmp_path / "m.gguf"
    path.write_bytes(Gguf(metadata=METADATA | {"x": "y"}, tensors=[]).header())
    assert read_header(path).tensors == ()


def test_header_of_the_gguf_package_is_read_as_written(tmp_path: Path) -> None:
    """Its writer is the reference: values, shapes, types and the place of the data agree."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_float64("x.f64", 0.1)
    writer.add_int8("x.i8", -5)
    writer.add_uint64("x.u64", 1 << 63)
    writer.add_bool("x.yes", val=True)
    writer.add_token_list(["a", "日本", "\u2581<PRE>"])
    writer.add_token_scores([1.0, 2.0, 3.0])
    norm = np.arange(64, dtype=np.float32)
    writer.add_tensor("output_norm.weight", norm)
    writer.add_tensor("blk.0.attn_q.weight", np.ones((32, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)

    assert header.version == 3
    assert header.metadata["llama.block_count"] == 1
    assert header.metadata["x.f64"] == 0.1
    assert header.metadata["x.i8"] == -5
    assert header.metadata["x.u64"] == 1 << 63
    assert header.metadata["x.yes"] is True
    tokens = header.get_array("tokenizer.ggml.tokens")
    assert tokens is not None
    assert tokens.values() == ("a", "日本", "\u2581<PRE>")
    assert tokens.contains_text("日本")
    assert not tokens.contains_text("日")
    scores = header.get_array("tokenizer.ggml.scores")
    assert scores is not None
    assert list(scores) == [1.0, 2.0, 3.0]
    by_name = {tensor.name: tensor for tensor in header.tensors}
    query = by_name["blk.0.attn_q.weight"]
    assert (query.shape, query.type.name, query.n_bytes) == ((64, 32), "F16", 64 * 32 * 2)
    start = header.data_offset + by_name["output_norm.weight"].offset
    assert path.read_bytes()[start : start + norm.nbytes] == norm.tobytes()
    assert header.file_bytes == path.stat().st_size


def test_version_2_is_read_as_version_3() -> None:
    two = parse_header(
        Gguf(metadata=METADATA, tensors=dense_tensors(), version=2).header(), name="x"
    )
    three = parse_header(VALID, name="x")
    assert (two.version, two.tensors) == (2, three.tensors)
    assert two.metadata["general.name"] == "Tiny"


def test_digest_covers_the_header_and_nothing_else() -> None:
    one = parse_header(VALID, name="x").shards[0]
    other = parse_header(VALID + b"data", name="y").shards[0]
    assert one.sha256 == other.sha256 == hashlib.sha256(VALID).hexdigest()
    assert one.header_bytes == len(VALID)


def test_alignment_of_the_file_is_obeyed() -> None:
    model = Gguf(
        metadata=METADATA | {"general.alignment": 128}, tensors=dense_tensors(), alignment=128
    )
    header = parse_header(model.header(), name="x")
    assert header.alignment == 128
    assert header.data_offset % 128 == 0
    assert check_data(header, model.size()).file_bytes == model.size()


def test_array_outlives_the_file(tmp_path: Path) -> None:
    """Nothing stays mapped: a model's file can be replaced while its header is still in use."""
    path = Gguf(metadata=METADATA, tensors=dense_tensors()).write(tmp_path / "m.gguf")
    tokens = read_header(path).get_array("tokenizer.ggml.tokens")
    path.write_bytes(b"")
    assert tokens is not None
    assert tokens.values() == ("<s>", "ä", "日本", "")


def test_scalar_where_an_array_is_meant_is_no_array() -> None:
    header = parse_header(VALID, name="x")
    assert header.get_array("general.name") is None
    assert isinstance(header.metadata["tokenizer.ggml.tokens"], GgufArray)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("nothing.here", "missing"),
        ("general.name", "not an integer"),
        ("tokenizer.ggml.tokens", "array of 4"),
    ],
)
def test_wrong_or_missing_key_is_named(key: str, words: str) -> None:
    with pytest.raises(GgufError, match=words) as caught:
        parse_header(VALID, name="m.gguf").get_int(key)
    assert key in str(caught.value)
    assert "m.gguf" in str(caught.value)


def test_number_where_a_text_is_meant() -> None:
    with pytest.raises(GgufError, match=r"llama.block_count is 2, not a string"):
        parse_header(VALID, name="x").get_str("llama.block_count")


# --- prefixes --------------------------------------------------------------------------------


@busy
@given(st.integers(0, len(VALID) - 1))
def test_every_prefix_asks_for_more(length: int) -> None:
    """A reader over the network holds a prefix: it must learn that more bytes would help."""
    with pytest.raises(TruncatedHeaderError) as caught:
        parse_header(VALID[:length], name="m.gguf")
    assert length < caught.value.needed_bytes <= len(VALID)
    assert "m.gguf" in str(caught.value)


def test_fetching_what_is_asked_for_comes_to_an_end() -> None:
    length, rounds = 0, 0
    while (needed := _needed_bytes(VALID[:length])) is not None:
        assert needed > length
        length, rounds = needed, rounds + 1
    assert length == len(VALID)
    assert rounds < len(VALID)


def _needed_bytes(prefix: bytes) -> int | None:
    try:
        parse_header(prefix, name="x")
    except TruncatedHeaderError as error:
        return error.needed_bytes
    return None


def test_prefix_needs_no_data() -> None:
    header = parse_header(VALID, name="x")
    assert header.shards[0].file_bytes is None
    assert header.file_bytes == header.shards[0].required_bytes


# --- broken files ----------------------------------------------------------------------------

ROW = ("token_embd.weight", (64, 10), 1, 0)


def _with_row(*rows: tuple[str | bytes, tuple[int, ...], int, int]) -> bytes:
    body = b"".join(tensor_row(*row) for row in rows)
    return Gguf(metadata=llama(), n_tensors=len(rows)).header() + body


def _with_pair(pair: bytes) -> bytes:
    return Gguf(n_pairs=1).header() + pair


BROKEN = {
    "web page": (b"<!DOCTYPE html>\n<html><head>", "web page"),
    "html in capitals": (b"\n <HTML>", "web page"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "json": (b'{"error": "not found"}', "JSON"),
    "pytorch": (b"PK\x03\x04" + bytes(60), "PyTorch"),
    "ggjt": (b"tjgg" + bytes(60), "before GGUF"),
    "safetensors": (struct.pack("<Q", 20) + b'{"__metadata__":{}}', "safetensors"),
    "zeros": (bytes(4096), "zeros"),
    "noise": (b"\x93NUMPY" + bytes(64), "not a GGUF file"),
    "version 1": (Gguf(version=1).header(), "version 1"),
    "version 4": (Gguf(version=4).header(), "version 4"),
    "version 0": (Gguf(version=0).header(), "big-endian|version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "absurd tensors": (Gguf(n_tensors=1 << 60).header(), f"{1 << 60} tensors"),
    "absurd pairs": (Gguf(n_pairs=(1 << 64) - 1).header(), f"{(1 << 64) - 1} metadata pairs"),
    "overlong key": (_with_pair(struct.pack("<Q", 1 << 62)), f"claims {1 << 62} bytes"),
    "empty key": (_with_pair(string("") + value(1)), "empty"),
    "overlong string": (
        _with_pair(string("a") + struct.pack("<IQ", 8, 1 << 40)),
        f"claims {1 << 40} bytes",
    ),
    "absurd array": (
        _with_pair(string("a") + struct.pack("<IIQ", 9, 4, 1 << 61)),
        f"array a of {1 << 61}",
    ),
    "absurd strings": (
        _with_pair(string("a") + struct.pack("<IIQ", 9, 8, 1 << 61)),
        f"array a of {1 << 61}",
    ),
    "overlong string in array": (
        _with_pair(string("a") + struct.pack("<IIQQ", 9, 8, 1, 1 << 63)),
        "strings of a",
    ),
    "nested array": (
        _with_pair(string("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(64)),
        "unknown type 9",
    ),
    "unknown value type": (_with_pair(string("a") + struct.pack("<I", 77) + bytes(8)), "type 77"),
    "key twice": (
        Gguf(n_pairs=2).header() + (string("a") + value(1)) * 2,
        "'a'.*there twice",
    ),
    "alignment zero": (Gguf(metadata={"general.alignment": 0}).header(), "alignment is 0"),
    "alignment 24": (Gguf(metadata={"general.alignment": 24}).header(), "alignment is 24"),
    "alignment text": (Gguf(metadata={"general.alignment": "32"}).header(), "alignment is '32'"),
    "tensor twice": (
        _with_row(ROW, ("token_embd.weight", (64, 10), 1, 1280)),
        "two tensors of the name token",
    ),
    "unknown tensor type": (_with_row(("a", (32,), 99, 0)), "a is of the unknown type 99"),
    "removed tensor type": (_with_row(("a", (32,), 31, 0)), "Q4_0_4_4.*no more"),
    "too many dimensions": (_with_row(("a", (1,) * 5, 0, 0)), "a has 5 dimensions"),
    "absurd dimensions": (_with_row(("a", (1 << 40, 1 << 40), 0, 0)), "impossible shape"),
    "half a block": (_with_row(("a", (100,), 12, 0)), "100 elements.*256.*Q4_K"),
    "unaligned offset": (_with_row(("a", (32,), 0, 7)), "a starts at 7"),
    "overlap": (_with_row(ROW, ("b", (32,), 0, 64)), "b starts at 64.*1280 follows"),
    "overlong tensor name": (_with_row(("a" * 64, (32,), 0, 0)), "claims 64 bytes"),
}


@pytest.mark.parametrize(("content", "words"), BROKEN.values(), ids=BROKEN.keys())
def test_broken_file_is_one_clear_error(content: bytes, words: str, tmp_path: Path) -> None:
    """The message names the file and says what is wrong with it."""
    path = tmp_path / "broken.gguf"
    path.write_bytes(content + bytes(4096))
    with pytest.raises(GgufError, match=words) as caught:
        read_header(path)
    assert str(path) in str(caught.value)


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").touch()
    with pytest.raises(GgufError, match="empty"):
        read_header(tmp_path / "m.gguf")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="No such file"):
        read_header(tmp_path / "m.gguf")


def test_file_that_shrinks_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = small_model(tmp_path / "m.gguf")
    map_file = mmap.mmap

    def shrink_and_map(number: int, size: int, *, access: int) -> mmap.mmap:
        os.truncate(path, 10)
        return map_file(number, size, access=access)

    monkeypatch.setattr(reader.mmap, "mmap", shrink_and_map)
    with pytest.raises(GgufError, match="shrank"):
        read_header(path)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to would block for ever."""
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(GgufError, match="pipe"):
        read_header(tmp_path / "m.gguf")


@busy
@given(cut=st.integers(1, 4000))
def test_file_cut_anywhere_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also within the data: llama.cpp would find out only after having loaded the rest."""
    model = Gguf(metadata=METADATA, tensors=dense_tensors())
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    model.write(path)
    os.truncate(path, model.size() - cut)
    required = parse_header(VALID, name="x").shards[0].required_bytes
    if model.size() - cut >= required:  # only padding is gone
        assert read_header(path).file_bytes == model.size() - cut
    else:
        with pytest.raises(GgufError, match=r"incomplete|ends at byte"):
            read_header(path)


def test_missing_data_is_counted(tmp_path: Path) -> None:
    path = small_model(tmp_path / "m.gguf")
    os.truncate(path, path.stat().st_size - 1024)
    with pytest.raises(GgufError, match=r"output.weight ends there, 1\.0 KiB are missing"):
        read_header(path)


def test_sparse_file_of_absurd_size_costs_nothing(tmp_path: Path) -> None:
    """Counts that such a file's size would allow are refused by the header's own limit."""
    path = tmp_path / "m.gguf"
    count = 1 << 36
    path.write_bytes(_with_pair(string("a") + struct.pack("<IIQ", 9, 8, count)))
    os.truncate(path, 1 << 40)
    with pytest.raises(GgufError, match=f"at most {MAX_HEADER_BYTES}"):
        read_header(path)


@busy
@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.binary(min_size=1, max_size=9)), max_size=6
    ),
    st.integers(0, len(VALID)),
)
def test_mutated_header_never_fails_otherwise(
    patches: list[tuple[int, bytes]], length: int
) -> None:
    """Whatever the bytes, the outcome is a header or a GgufError, soon."""
    mutated = bytearray(VALID)
    for position, patch in patches:
        mutated[position : position + len(patch)] = patch
    for content in (bytes(mutated), bytes(mutated[:length]), bytes(mutated) + bytes(8192)):
        _check_outcome(content)


def _check_outcome(content: bytes) -> None:
    try:
        header = parse_header(content, name="fuzz")
    except GgufError as error:
        if "fuzz" not in str(error):
            raise
        return
    assert header.header_bytes <= len(content)
    arrays = [item for item in header.metadata.values() if isinstance(item, GgufArray)]
    assert all(len(array.values()) == len(array) for array in arrays)


@busy
@given(st.binary(max_size=400))
def test_noise_never_fails_otherwise(noise: bytes) -> None:
    for content in (noise, b"GGUF\x03\0\0\0" + noise):
        with pytest.raises(GgufError, match="fuzz"):
            parse_header(content + b"\xff", name="fuzz")


# --- split models ----------------------------------------------------------------------------


def _write_shards(folder: Path, n_shards: int = 3, **changes: int) -> list[Path]:
    paths = []
    for i in range(n_shards):
        metadata = {"split.no": i, "split.count": n_shards, "split.tensors.count": n_shards}
        model = Gguf(
            metadata=(METADATA if i == 0 else {}) | metadata | changes,
            tensors=[(f"blk.{i}.attn_q.weight", (64, 64), "F16")],
        )
        paths.append(model.write(folder / f"m-{i + 1:05d}-of-{n_shards:05d}.gguf"))
    return paths


@pytest.mark.parametrize("given_shard", [0, 2], ids=["first", "last"])
def test_split_model_is_read_as_one(given_shard: int, tmp_path: Path) -> None:
    paths = _write_shards(tmp_path)
    header = read_header(paths[given_shard])
    assert header.metadata["general.name"] == "Tiny"
    assert [(t.name, t.shard) for t in header.tensors] == [
        (f"blk.{i}.attn_q.weight", i) for i in range(3)
    ]
    assert header.file_bytes == sum(path.stat().st_size for path in paths)
    assert [shard.name for shard in header.shards] == [str(path) for path in paths]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path)
    paths[1].unlink()
    with pytest.raises(GgufError, match=r"1 of the model's 3 shards.*m-00002-of-00003.gguf"):
        read_header(paths[0])


def test_incomplete_shard_is_named(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path)
    os.truncate(paths[2], paths[2].stat().st_size - 4096)
    with pytest.raises(GgufError, match=r"m-00003-of-00003.gguf: the file is incomplete"):
        read_header(paths[0])


def test_renamed_shard_is_told_from_a_whole_model(tmp_path: Path) -> None:
    first = _write_shards(tmp_path)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(GgufError, match="one of 3 shards"):
        read_header(first)


def test_shards_in_the_wrong_order(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path)
    paths[1].rename(tmp_path / "x")
    paths[2].rename(paths[1])
    (tmp_path / "x").rename(paths[2])
    with pytest.raises(GgufError, match="shard 3 inside, 2 by name"):
        read_header(paths[0])


def test_shards_of_different_models(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path, **{"split.tensors.count": 7})
    with pytest.raises(GgufError, match=r"7 tensors.*hold 3"):
        read_header(paths[0])


def test_shards_of_another_count(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path, **{"split.count": 4})
    with pytest.raises(GgufError, match="has 4 shards, its name says 3"):
        read_header(paths[0])


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    for i in range(2):
        Gguf(
            metadata=METADATA if i == 0 else {"split.no": 1},
            tensors=[("output_norm.weight", (64,), "F32")],
        ).write(tmp_path / f"m-0000{i + 1}-of-00002.gguf")
    with pytest.raises(GgufError, match=r"output_norm.weight is in .*m-00001-of-00002.gguf too"):
        read_header(tmp_path / "m-00001-of-00002.gguf")


@pytest.mark.parametrize("name", ["m-00000-of-00002.gguf", "m-00003-of-00002.gguf"])
def test_senseless_shard_number(name: str, tmp_path: Path) -> None:
    small_model(tmp_path / name)
    with pytest.raises(GgufError, match="cannot be"):
        read_header(tmp_path / name)


# --- speed -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_vocabulary_is_skipped_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """200,000 tokens and as many merges: their texts are never made while a header is read."""
    n = 200_000
    vocabulary = {
        "tokenizer.ggml.tokens": [f"token{i}" for i in range(n)],
        "tokenizer.ggml.scores": [0.5] * n,
        "tokenizer.ggml.token_type": [1] * n,
        "tokenizer.ggml.merges": [f"a{i} b{i}" for i in range(n)],
    }
    path = Gguf(metadata=llama() | vocabulary, tensors=dense_tensors()).write(tmp_path / "m.gguf")
    n_strings = 0
    parse_string = parser._Parser._parse_string

    def count(self: parser._Parser, what: str, which: object, max_bytes: int) -> str:
        nonlocal n_strings
        n_strings += 1
        return parse_string(self, what, which, max_bytes)

    monkeypatch.setattr(parser._Parser, "_parse_string", count)
    tokens = read_header(path).get_array("tokenizer.ggml.tokens")
    assert n_strings < 100
    assert tokens is not None
    assert len(tokens) == n
    assert tokens.contains_text("token199999")
