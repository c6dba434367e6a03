"""`shards index`: all files or none, and keys that are the data set's own."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from tars import jpeg, write_tar

from shards.edit.index_tars import index_folder
from shards.edit.select import select
from shards.format.index import index_path, read_index
from shards.format.manifest import read_manifest
from shards.inspect.verify import verify
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader


def keys(folder: Path, tar: str) -> list[str]:
    found: list[str] = read_index(index_path(folder, tar), ["key"])["key"].to_pylist()
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_tar_leaves_no_file(
    workers: int, photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(photo_shards / "000000.tar", tmp_path / "a.tar")
    (tmp_path / "b.tar").write_bytes((photo_shards / "000001.tar").read_bytes()[:30_000])
    assert run(["shards", "index", str(tmp_path), "--workers", str(workers)]) == EXIT_USER
    assert "b.tar: not a complete tar" in capfd.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("workers", [0, 2])
def test_keys_that_several_tars_have_get_the_tars_name_in_front(
    workers: int, photo_shards: Path, tmp_path: Path
) -> None:
    for name in ("a", "b", "c"):
        shutil.copy(photo_shards / "000000.tar", tmp_path / f"{name}.tar")
    manifest, rejected = index_folder(tmp_path, workers=workers)
    assert (manifest.samples, rejected) == (24, [])
    assert keys(tmp_path, "a.tar") == keys(photo_shards, "000000.tar")
    assert len({key for name in "abc" for key in keys(tmp_path, f"{name}.tar")}) == 24
    assert not any(verdict.problems for verdict in verify([tmp_path]))
    reader = ShardReader(tmp_path, read_manifest(tmp_path))
    assert reader.read(2, 3).image == reader.read(0, 3).image
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".tar") == [
        "index",
        "manifest.json",
        "rejected.parquet",
        "sizes.json",
    ]


def test_a_selection_of_indexed_tars_has_the_keys_of_the_index_and_all_annotations(
    photo_shards: Path, tmp_path: Path
) -> None:
    """The tars' members have other names: hashes of tar and key, and new names of keys that two tars have."""
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(photo_shards / "000000.tar", tmp_path / "in" / f"{name}.tar")
    fields = {"label": "joy", "scene": "attic", "persons": [{"box": [0, 0, 0.5, 1]}]}
    members = {
        "x.txt": b"its caption",
        "y.jpg": jpeg(2),
        "x.jpg": jpeg(1),
        "x.json": json.dumps(fields).encode(),
        "y.left.png": jpeg(3),
    }
    write_tar(tmp_path / "in/c.tar", members)
    index_folder(tmp_path / "in")
    select(tmp_path / "in", tmp_path / "out")
    before, after = (ShardReader.from_folder(tmp_path / name, "x") for name in ("in", "out"))
    rows = [(shard, row) for shard in range(3) for row in range(before.counts[shard])]
    assert after.samples == before.samples == 18
    for number, place in enumerate(rows):
        old, new = before.read(*place), after.read(0, number)
        assert vars(old) == vars(new)
    record = after.record(0, 16)
    assert (record["source"], record["attributes"]) == ("c.tar/x", {"scene": "attic"})
    assert after.read(0, 16).image == jpeg(1)
    assert not any(verdict.problems for verdict in verify([tmp_path / "out"]))
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        names = tar.getnames()
    assert names == [
        f"{key}.{end}" for key in keys(tmp_path / "out", "000000.tar") for end in ("jpg", "json", "txt")
    ]


def test_a_file_in_the_way_of_the_indexes_is_named_and_nothing_is_written(
    photo_shards: Path, tmp_path: Path
) -> None:
    shutil.copy(photo_shards / "000000.tar", tmp_path / "a.tar")
    (tmp_path / "index").write_text("mine")
    with pytest.raises(UserError, match=r"DIR=.*: cannot be written \(File exists\)"):
        index_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "index"]


def test_names_that_no_manifest_can_hold_and_folders_called_tar(photo_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(UserError, match=r"has no \.tar files"):
        index_folder(tmp_path)
    shutil.copy(photo_shards / "000000.tar", str(tmp_path / "caf\udce9.tar"))
    with pytest.raises(UserError, match="cannot be written into a manifest; rename it") as caught:
        index_folder(tmp_path)
    assert str(caught.value).isprintable()


def test_remains_of_a_killed_index_are_cleared(photo_shards: Path, tmp_path: Path) -> None:
    shutil.copy(photo_shards / "000000.tar", tmp_path / "a.tar")
    (tmp_path / ".index.tmp/index").mkdir(parents=True)
    (tmp_path / ".index.tmp/index/z.parquet").write_text("half")
    index_folder(tmp_path)
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["a.parquet"]
    assert not (tmp_path / ".index.tmp").exists()
