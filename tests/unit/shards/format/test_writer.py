"""Tar shards: their bytes, their sizes, their indexes, and that only whole ones have a name."""

import hashlib
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.detect.types import Person
from shards.format.index import SCHEMA, index_path, read_index, rows_sha256
from shards.format.sample import Sample
from shards.format.writer import ShardWriter
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_file


def sample(key: str, size: int = 100, **more: object) -> Sample:
    image = (key.encode() * size)[:size]
    digest = hashlib.sha256(image).hexdigest()
    return Sample(key, image, "jpg", 4, 3, f"source/{key}", image_sha256=digest, **more)  # type: ignore[arg-type]


def write(
    folder: Path, samples: list[Sample], *, shard_bytes: int = 10**9, shard_samples: int = 10**6
) -> ShardWriter:
    writer = ShardWriter(folder, shard_bytes=shard_bytes, shard_samples=shard_samples)
    for item in samples:
        writer.add(item)
    writer.close()
    return writer


def test_the_bytes_of_a_tar_never_change(tmp_path: Path) -> None:
    person = Person((0.25, 0.0, 0.75, 1.0), 0.9)
    samples = [sample("a", 513, captions=("é", "two"), label="x", persons=(person,)), sample("b" * 64, 0)]
    [entry] = write(tmp_path, samples).entries
    assert (entry.name, entry.samples, entry.bytes) == ("000000.tar", 2, 10240)
    # If these change, every data set that is packed again gets another identity.
    assert entry.sha256 == "393d048f3b687fe3c408731ed2fdd0f70d0ca7e8cd720fec59e45fbcceecf116"
    assert entry.rows_sha256 == "6d93b211cf31ea0c8d167c70ab5160157e2c204728553fcbc87a810363b27533"


def test_tar_lists_picture_json_and_text_of_each_sample_in_order(tmp_path: Path) -> None:
    write(tmp_path, [sample("b"), sample("a"), sample("c-1")])
    listed = subprocess.check_output(["tar", "tf", tmp_path / "000000.tar"], text=True).split()
    assert listed == [
        f"{key}.{extension}" for key in ("b", "a", "c-1") for extension in ("jpg", "json", "txt")
    ]


def test_headers_hold_no_time_no_owner_and_no_extension(tmp_path: Path) -> None:
    write(tmp_path, [sample("x" * 64, label="ä")])
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert tar.pax_headers == {}
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.type, member.pax_headers) == (0o644, tarfile.REGTYPE, {})
    data = (tmp_path / "000000.tar").read_bytes()
    assert len(data) % tarfile.RECORDSIZE == 0
    assert data.endswith(bytes(1024))


def test_the_index_points_at_the_pictures_and_samples(tmp_path: Path) -> None:
    samples = [sample(key, size) for key, size in (("a", 1), ("b", 512), ("c", 513), ("d", 0))]
    write(tmp_path, samples)
    data = (tmp_path / "000000.tar").read_bytes()
    rows = read_index(index_path(tmp_path, "000000.tar")).to_pylist()
    assert [row["key"] for row in rows] == ["a", "b", "c", "d"]
    end = 0
    for row, item in zip(rows, samples):
        assert data[row["image_offset"] :][: row["image_length"]] == item.image
        assert row["sample_offset"] == end  # no gap between samples
        assert data[end:].startswith(f"{item.key}.jpg\0".encode())
        end += row["sample_length"]
    assert data[end:] == bytes(len(data) - end)


def test_the_index_keeps_every_column_and_its_type(tmp_path: Path) -> None:
    persons = (Person((0.1, 0.2, 0.3, 0.4), 0.5, {"b": 1, "a": [2]}), Person((0, 0, 1, 1), 1.0))
    write(tmp_path, [sample("a", captions=("one", "zwei"), label="joy", persons=persons), sample("b")])
    table = read_index(index_path(tmp_path, "000000.tar"))
    assert table.schema.equals(SCHEMA)
    first, second = table.to_pylist()
    assert (first["width"], first["height"], first["label"], first["captions"]) == (
        4,
        3,
        "joy",
        ["one", "zwei"],
    )
    assert first["persons"] == [
        {"box": [0.1, 0.2, 0.3, 0.4], "score": 0.5, "labels": '{"a":[2],"b":1}'},
        {"box": [0.0, 0.0, 1.0, 1.0], "score": 1.0, "labels": "{}"},
    ]
    assert first["image_sha256"] == hashlib.sha256(b"a" * 100).hexdigest()
    assert (second["label"], second["captions"], second["persons"]) == (None, [], [])


def test_entries_state_the_hashes_of_the_written_files(tmp_path: Path) -> None:
    entries = write(tmp_path, [sample(f"k{i}", captions=("c",)) for i in range(5)], shard_samples=2).entries
    assert [(e.name, e.samples) for e in entries] == [("000000.tar", 2), ("000001.tar", 2), ("000002.tar", 1)]
    for entry in entries:
        index = index_path(tmp_path, entry.name)
        assert entry.sha256 == sha256_file(tmp_path / entry.name)
        assert entry.bytes == (tmp_path / entry.name).stat().st_size
        assert entry.index_sha256 == sha256_file(index)
        assert entry.rows_sha256 == rows_sha256(read_index(index).to_pylist())


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 30_000), min_size=1, max_size=12),
    shard_bytes=st.sampled_from([10_240, 20_480, 50_000, 100_000]),
)
def test_no_shard_is_larger_than_asked_unless_one_sample_is(
    sizes: list[int], shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("writer")
    entries = write(
        folder, [sample(f"k{i}", n) for i, n in enumerate(sizes)], shard_bytes=shard_bytes
    ).entries
    assert sum(entry.samples for entry in entries) == len(sizes)
    assert all(entry.bytes <= shard_bytes or entry.samples == 1 for entry in entries)
    keys = [
        key for e in entries for key in read_index(index_path(folder, e.name), ["key"])["key"].to_pylist()
    ]
    assert keys == [f"k{i}" for i in range(len(sizes))]


def test_a_shard_gets_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=10**9, shard_samples=2)
    writer.add(sample("a"))
    writer.add(sample("b"))
    assert list(tmp_path.glob("*.tar")) == []
    writer.add(sample("c"))
    assert [path.name for path in tmp_path.glob("*.tar")] == ["000000.tar"]
    writer.close()
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["000000.tar", "000001.tar", "index/000000.parquet", "index/000001.parquet"]


def test_a_writer_without_samples_writes_no_shard(tmp_path: Path) -> None:
    assert write(tmp_path / "new", []).entries == []
    assert list((tmp_path / "new").iterdir()) == []


def test_a_prefix_names_the_shards_of_a_part(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=10**9, shard_samples=1, prefix="p003-")
    writer.add(sample("a"))
    writer.add(sample("b"))
    assert [entry.name for entry in writer.close()] == ["p003-000000.tar", "p003-000001.tar"]
    assert index_path(tmp_path, "p003-000001.tar").is_file()


def test_a_missing_damaged_or_foreign_index_is_a_user_error(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(UserError, match="the index is missing"):
        read_index(tmp_path / "no.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"cut\.parquet: not a readable index"):
        read_index(tmp_path / "cut.parquet")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="lacks the columns captions, height"):
        read_index(tmp_path / "foreign.parquet")
