"""Joining unrelated data sets, on disk and on a store."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed_pack import Killed
from s3 import list_local, list_names, list_objects, serve_s3

import shards.remote_folder
from shards.edit.merge import merge
from shards.edit.select import select
from shards.format.manifest import read_manifest
from shards.format.rejected import read_rejected
from shards.format.sample import make_key
from shards.inspect.verify import verify
from shards.pack.pipeline import PackSettings, pack
from shards.storage import parse_place
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3("data"):
        yield "s3://data"


@pytest.fixture(scope="module")
def rows(emoji_table: Path) -> list[dict[str, Any]]:
    return [row for row in pq.read_table(emoji_table).to_pylist() if row["split"] == "train"]


@pytest.fixture(scope="module")
def sets(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two data sets with other settings and licences. The second has three pictures of the first: one in the same
    split, a train picture as test, a test picture as train. Two of its keys name other pictures in the first."""
    folder = tmp_path_factory.mktemp("sets")
    first = [{**row, "split": "test" if i < 4 else "train"} for i, row in enumerate(rows[:20])]
    second = [
        *({**row, "split": "test" if i < 3 else "train"} for i, row in enumerate(rows[20:30])),
        {**rows[10], "key": "same", "split": "train"},
        {**rows[11], "key": "train-as-test", "split": "test"},
        {**rows[0], "key": "test-as-train", "split": "train"},
        {**rows[40], "key": rows[5]["key"], "split": "train"},
        {**rows[41], "key": rows[6]["key"], "split": "test"},
    ]
    for name, records, more, licence in (("one", first, {"seed": 4}, "MIT"), ("two", second, {}, None)):
        pq.write_table(pa.Table.from_pylist(records), folder / f"{name}.parquet")
        pack(
            PackSettings(str(folder / f"{name}.parquet"), persons="none", shard_samples=6, **more),
            folder / name,
            licence=licence,
        )
    return folder / "one", folder / "two"


def pictures(out: Path, split: str) -> dict[str, bytes]:
    reader = ShardReader.from_folder(str(out / split), "data.path")
    places = [(s, r) for s, count in enumerate(reader.manifest.counts) for r in range(count)]
    return {sample.key: sample.image for sample in (reader.read(*place) for place in places)}


def list_pictures(folder: Path) -> list[bytes]:
    """All pictures in the tars, as a reader without an index finds them."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if not name.endswith((".json", ".txt"))]
            found += [file.read() for name in names if (file := tar.extractfile(name)) is not None]
    return found


def test_keys_that_name_different_pictures_are_refused_unless_a_rule_is_given(
    sets: tuple[Path, Path], rows: list[dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = sets
    assert run(["shards", "merge", str(tmp_path / "out"), str(one), str(two)]) == EXIT_USER
    [line] = capfd.readouterr().err.strip().splitlines()
    assert f"PARTS: 2 keys name different pictures, such as {rows[6]['key']} in {two}/test/" in line
    assert f" and {one}/train/" in line
    assert list(tmp_path.iterdir()) == []
    command = ["shards", "merge", str(tmp_path / "drop"), str(one), str(two), "--same-key", "drop"]
    assert run(command) == EXIT_DONE
    assert "refused: duplicate 1, duplicate_key 2, leak 2;" in capfd.readouterr().out
    assert (
        read_manifest(tmp_path / "drop/train").samples + read_manifest(tmp_path / "drop/test").samples == 30
    )


def test_joined_sets_have_every_picture_once_and_keep_the_provenance_of_each(
    sets: tuple[Path, Path], rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    one, two = sets
    before = list_local(one), list_local(two)
    result = merge(tmp_path / "out", sets, same_key="rename")
    assert (result.records, result.marked, result.renamed) == (35, 3, 2)
    assert dict(result.refused) == {"duplicate": 1, "leak": 2}
    rejected = read_rejected(tmp_path / "out")
    assert rejected is not None
    assert sorted((row["source"], row["reason"], row["detail"]) for row in rejected) == [
        (f"one/{rows[11]['key']}", "leak", "the same picture as two/train-as-test of split test"),
        ("two/same", "duplicate", f"the same picture as one/{rows[10]['key']}"),
        ("two/test-as-train", "leak", f"the same picture as one/{rows[0]['key']} of split test"),
    ]
    train, test = pictures(tmp_path / "out", "train"), pictures(tmp_path / "out", "test")
    assert (len(train), len(test)) == (16 - 1 + 7 + 1, 4 + 3 + 1 + 1)
    assert set(train.values()) & set(test.values()) == set()
    assert not set(train) & set(test)
    images = {row["image"] if isinstance(row["image"], bytes) else row["image"]["bytes"] for row in rows[:30]}
    assert images <= set(train.values()) | set(test.values())
    names = [entry.name for entry in read_manifest(tmp_path / "out/train").shards]
    assert names == [
        "m001-000000.tar",
        "m001-000001.tar",
        "m001-000002.tar",
        "m002-000000.tar",
        "m002-000001.tar",
    ]
    # The later of two samples in the order test, train, and then of the data sets, gets the new key.
    assert make_key(f"m001-000000.tar/{rows[6]['key']}") in train or any(len(key) == 16 for key in train)
    provenance = read_manifest(tmp_path / "out/train").provenance
    assert [part["name"] for part in provenance["merged"]] == ["one", "two"]
    for part, folder in zip(provenance["merged"], sets):
        manifest = read_manifest(folder / "train")
        assert part["provenance"] == manifest.provenance
        assert (part["identity"], part["samples"]) == (manifest.identity, manifest.samples)
    assert provenance["licence"] == "MIT AND unstated"
    assert (provenance["records"], provenance["rejected"]) == (35, {"duplicate": 1, "leak": 2})
    assert not any(verdict.problems for verdict in verify([tmp_path / "out/train", tmp_path / "out/test"]))
    assert (list_local(one), list_local(two)) == before
    assert run(["shards", "report", str(tmp_path / "out")]) == EXIT_DONE
    # Other readers see marked samples in the linked tars, but not in those of a selection.
    select(tmp_path / "out/train", tmp_path / "train")
    assert len(list_pictures(tmp_path / "out/train")) == len(train) + 3
    assert set(list_pictures(tmp_path / "train")) == set(train.values())


def test_wrong_inputs_are_one_line(
    sets: tuple[Path, Path], photo_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, two = map(str, sets)
    part = str(tmp_path / "part")
    table = str(sets[0].with_suffix(".parquet"))
    pack(PackSettings(table, persons="none"), Path(part), part=(1, 2))
    for parts, says in (
        ([one], f"PARTS={one}: one data set; give at least two, or all parts of a pack"),
        ([one, one], f"PARTS={one}/test: is the same data set as {one}/test; give it once"),
        (
            [one, str(tmp_path)],
            f"PARTS={tmp_path}: has no manifest.json; give data sets, or all folders that",
        ),
        ([one, part], f"PARTS={part}: is a part of a parallel pack, but {one} is not; join the parts first"),
        (
            [one, str(photo_shards)],
            f"PARTS={photo_shards}: has no splits, but {one} has test, train; divide it",
        ),
        ([one, two, "zz://x"], "zz://x: Unsupported filesystem"),
    ):
        assert run(["shards", "merge", str(tmp_path / "out"), *parts]) == EXIT_USER
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert says in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("parts_are_remote", [False, True])
def test_data_sets_on_a_store_are_joined_to_the_same_files(
    parts_are_remote: bool, bucket: str, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    import s3fs

    merge(tmp_path / "local", sets, same_key="rename")
    name = "from-store" if parts_are_remote else "from-disk"
    parts = list(sets)
    if parts_are_remote:
        for folder in sets:
            s3fs.S3FileSystem().put(str(folder), f"data/sets/{folder.name}", recursive=True)
        parts = [parse_place(f"{bucket}/sets/{folder.name}") for folder in sets]
    merge(parse_place(f"{bucket}/{name}"), parts, same_key="rename")
    assert list_objects(f"{bucket}/{name}") == list_local(tmp_path / "local")
    with pytest.raises(UserError, match=f"OUT={bucket}/{name}: exists; give another folder, or delete it"):
        merge(parse_place(f"{bucket}/{name}"), parts, same_key="rename")
    if parts_are_remote:
        merge(tmp_path / "downloaded", parts, same_key="rename")
        assert list_local(tmp_path / "downloaded") == list_local(tmp_path / "local")


def test_a_killed_merge_on_a_store_is_not_complete_and_the_next_one_replaces_it(
    bucket: str, sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = parse_place(f"{bucket}/killed")
    upload, delete = shards.remote_folder.RemoteFolder.upload, shards.remote_folder.RemoteFolder.delete
    is_dead = False

    def killed(self: Any, source: Path, name: str) -> None:
        nonlocal is_dead
        if name.endswith("manifest.json"):
            is_dead = True
            raise Killed
        upload(self, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(shards.remote_folder.RemoteFolder, "upload", killed)
        patch.setattr(
            shards.remote_folder.RemoteFolder,
            "delete",
            lambda self, names: None if is_dead else delete(self, names),
        )
        with pytest.raises(Killed):
            merge(out, sets, same_key="drop")
    left = list_names(f"{bucket}/killed")
    assert "train/m001-000000.tar" in left
    assert not any(name.endswith("manifest.json") for name in left)
    merge(out, sets, same_key="rename")
    merge(tmp_path / "local", sets, same_key="rename")
    assert list_objects(f"{bucket}/killed") == list_local(tmp_path / "local")
    with pytest.raises(UserError, match="2 keys name different pictures"):
        merge(parse_place(f"{bucket}/refused"), sets)
    assert list_names(f"{bucket}/refused") == []


def test_parts_of_a_pack_on_a_store_are_joined_there(
    bucket: str, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = PackSettings(str(sets[0].with_suffix(".parquet")), persons="none", shard_samples=5)
    for number in (1, 2):
        pack(settings, tmp_path / f"p{number}", part=(number, 2))
        pack(settings, parse_place(f"{bucket}/parts/p{number}"), part=(number, 2))
    merge(tmp_path / "out", [tmp_path / "p1", tmp_path / "p2"])
    command = ["shards", "merge", f"{bucket}/joined", f"{bucket}/parts/p1", f"{bucket}/parts/p2"]
    assert run(command) == EXIT_DONE
    assert list_objects(f"{bucket}/joined") == list_local(tmp_path / "out")
