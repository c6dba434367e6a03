"""`shards index`: all files or none, and keys that are the data set's own."""

import shutil
from pathlib import Path

import pytest

from shards.edit.index_tars import index_folder
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


def test_a_repacked_key_of_two_tars_cannot_be_copied_under_its_new_name(
    photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The tar's members have their old names: a copy would hold samples that its index calls otherwise."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        shutil.copy(photo_shards / "000000.tar", tmp_path / "in" / f"{name}.tar")
    index_folder(tmp_path / "in")
    assert run(["shards", "select", str(tmp_path / "in"), str(tmp_path / "out"), "--copy"]) == EXIT_USER
    assert "b.tar was not written by `shards pack`; copy it with" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


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
