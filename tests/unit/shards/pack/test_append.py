"""`shards pack --append`: new shards of a finished data set, on disk and on a store."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from killed_pack import KillAfter, Killed
from PIL import Image
from s3 import list_local, list_objects, serve_s3

import shards.pack.partial
import shards.remote_folder
from shards.format.manifest import read_manifest
from shards.format.rejected import read_rejected
from shards.inspect.verify import verify
from shards.pack.pipeline import PackSettings, pack
from shards.storage import Place, parse_place
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with serve_s3("data"):
        yield "s3://data"


@pytest.fixture(scope="module")
def tables(emoji_table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tables with splits. The second repeats a test picture as train, a train picture as train, a train picture as
    test, and has one new picture under a key of the first."""
    folder = tmp_path_factory.mktemp("tables")
    rows = pq.read_table(emoji_table).to_pylist()
    train, test = ([row for row in rows if row["split"] == split] for split in ("train", "test"))
    first, second = train[:30] + test[:10], train[30:60] + test[10:16]
    second += [
        {**test[0], "split": "train", "key": "leak-to-train"},
        {**train[0], "key": "copy"},
        {**train[1], "split": "test", "key": "leak-to-test"},
        {**train[61], "key": train[2]["key"]},
    ]
    schema = pq.read_schema(emoji_table)
    for name, part in (("a", first), ("b", second)):
        pq.write_table(pa.Table.from_pylist(part, schema=schema), folder / f"{name}.parquet")
    return folder / "a.parquet", folder / "b.parquet"


def settings(source: Path, **more: Any) -> PackSettings:
    return PackSettings(str(source), persons="none", shard_samples=8, **more)


def files(out: Place) -> dict[str, bytes]:
    return list_local(out) if isinstance(out, Path) else list_objects(str(out))


def places(tmp_path: Path, bucket: str, name: str) -> tuple[Place, Place]:
    return tmp_path / name, parse_place(f"{bucket}/{name}")


@pytest.mark.parametrize("kind", [0, 1])
def test_appending_keeps_all_shards_and_checks_pictures_and_keys_against_them(
    kind: int, bucket: str, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = places(tmp_path, bucket, "whole")[kind]
    pack(settings(tables[0]), out, licence="MIT")
    before = files(out)
    old = {split: read_manifest(out / split) for split in ("train", "test")}
    result = pack(settings(tables[1], seed=3), out, append=True, licence="CC-BY-4.0")
    after = files(out)
    shards = [name for name in before if name.endswith((".tar", ".parquet")) and name != "rejected.parquet"]
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
    assert sorted(set(after) - set(before)) == sorted(
        f"{split}/{name}"
        for split, numbers in (("train", range(4, 8)), ("test", range(2, 3)))
        for number in numbers
        for name in (f"{number:06d}.tar", f"index/{number:06d}.parquet")
    )
    assert dict(result.packed) == {"test": 6, "train": 30}
    assert result.records == 40
    assert sorted((row.reason, row.detail) for row in result.rejected) == sorted(
        [
            ("leak", f"the same picture as {name_of(out, 'test', tables[0], 'test', 0)} of split test"),
            ("duplicate", f"the same picture as {name_of(out, 'train', tables[0], 'train', 0)}"),
            ("leak", f"the same picture as {name_of(out, 'train', tables[0], 'train', 1)} of split train"),
            ("duplicate_key", f"a sample of the data set has the same key {keys(tables[0], 'train')[2]}"),
        ]
    )
    for split, samples in (("train", 60), ("test", 16)):
        manifest = read_manifest(out / split)
        assert manifest.shards[: len(old[split].shards)] == tuple(old[split].shards)
        assert manifest.samples == samples
        provenance = manifest.provenance
        assert provenance["settings"] == old[split].provenance["settings"]
        assert provenance["records"] == 80
        assert provenance["rejected"] == {"duplicate": 1, "duplicate_key": 1, "leak": 2}
        assert provenance["licence"] == "MIT AND CC-BY-4.0"
        [part] = provenance["appended"]
        assert part["settings"] == settings(tables[1], seed=3).to_json()
        assert part["shards"] == [entry.name for entry in manifest.shards[len(old[split].shards) :]]
        assert (part["records"], part["samples"], part["licence"]) == (40, 36, "CC-BY-4.0")
    rejected = read_rejected(out)
    assert rejected is not None
    assert len(rejected) == 4
    if kind == 0:
        assert not [verdict for verdict in verify([out / "train", out / "test"]) if verdict.problems]


def keys(table: Path, split: str) -> list[str]:
    return [row["key"] for row in pq.read_table(table).to_pylist() if row["split"] == split]


def name_of(out: Place, split: str, table: Path, of: str, row: int) -> str:
    key = keys(table, of)[row]
    for entry in read_manifest(out / split).shards:
        index = pq.read_table((out / split / "index" / entry.name.replace(".tar", ".parquet")).open("rb"))
        if key in index["key"].to_pylist():
            return f"{split}/{entry.name}/{key}"
    raise AssertionError(key)


@pytest.mark.parametrize("kind", [0, 1])
def test_appending_the_same_again_changes_nothing(
    kind: int, bucket: str, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = places(tmp_path, bucket, "again")[kind]
    pack(settings(tables[0]), out)
    pack(settings(tables[1]), out, append=True)
    before = files(out)
    assert pack(settings(tables[1]), out, append=True, resume=True).reused
    assert pack(settings(tables[0]), out, append=True, resume=True).reused
    assert pack(settings(tables[0]), out, append=True).reused  # all are copies
    assert files(out) == before


@pytest.mark.parametrize("kind", [0, 1])
def test_a_killed_append_leaves_the_data_set_whole_and_resumes(
    kind: int, bucket: str, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = places(tmp_path, bucket, "killed")[kind]
    pack(settings(tables[0]), out)
    before = files(out)
    with pytest.raises(Killed):
        pack(settings(tables[1]), out, append=True, progress=KillAfter(30))
    now = files(out)
    assert {name: now[name] for name in before} == before
    with pytest.raises(UserError, match=r"interrupted pack is in .*continue it with --resume"):
        pack(settings(tables[1]), out, append=True)
    assert pack(settings(tables[1]), out, append=True, resume=True).resumed >= 8
    expected = places(tmp_path, bucket, "undisturbed")[0]
    pack(settings(tables[0]), expected)
    pack(settings(tables[1]), expected, append=True)
    assert files(out) == files(expected)


def test_a_kill_while_manifests_are_replaced_is_finished_by_resume_on_disk(
    tables: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tmp_path / "expected"
    pack(settings(tables[0]), expected)
    shutil.copytree(expected, tmp_path / "base")
    pack(settings(tables[1]), expected, append=True)
    replace = os.replace
    moves = 0

    def count(limit: int) -> Callable[..., None]:
        def killed(source: Any, target: Any) -> None:
            nonlocal moves
            if ".partial" in str(source) and ".partial" not in str(target):
                moves += 1
                if moves > limit:
                    raise Killed
            replace(source, target)

        return killed

    for limit in range(15):
        out, moves = tmp_path / f"out{limit}", 0
        shutil.copytree(tmp_path / "base", out)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", count(limit))
            with pytest.raises(Killed):
                pack(settings(tables[1]), out, append=True)
        verdicts = verify([out / "train", out / "test"])
        # sizes.json may be that of the new manifest already
        assert not [verdict for verdict in verdicts if verdict.problems and verdict.shard != "sizes.json"]
        pack(settings(tables[1]), out, append=True, resume=True)
        assert files(out) == files(expected)


def test_a_kill_while_manifests_are_replaced_is_finished_by_resume_on_a_store(
    bucket: str, tables: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, out = places(tmp_path, bucket, "replaced")
    pack(settings(tables[0]), expected)
    pack(settings(tables[1]), expected, append=True)
    pack(settings(tables[0]), out)
    copy = shards.remote_folder.RemoteFolder.copy

    def killed(self: Any, source: Place, name: str) -> None:
        if name == "train/manifest.json":
            raise Killed
        copy(self, source, name)

    with monkeypatch.context() as patch:
        patch.setattr(shards.remote_folder.RemoteFolder, "copy", killed)
        with pytest.raises(Killed):
            pack(settings(tables[1]), out, append=True)
    assert pack(settings(tables[1]), out, append=True, resume=True).reused
    assert files(out) == files(expected)


def test_wrong_appends_are_one_line(
    tables: tuple[Path, Path], photo_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(settings(tables[0]), out)
    pack(settings(tables[0]), tmp_path / "part", part=(1, 2))
    before = files(out)
    photos = ["shards", "pack", str(photo_folder), "--layout", "folder", "--persons", "none", "--append"]
    table = ["shards", "pack", str(tables[1]), "--persons", "none", "--append"]
    for command, says in (
        ([*table, str(tmp_path / "no")], "has no data set to append to; pack it without --append first"),
        ([*table, str(out), "--part", "1/2"], "--append: is not possible with --part"),
        (
            [*table, str(tmp_path / "part")],
            "is a part of a parallel pack; join the parts with `shards merge` first",
        ),
        ([*photos, str(out)], f"SOURCE: has no splits, but OUT={out} has the splits test, train"),
    ):
        assert run(command) == EXIT_USER
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert says in lines[0]
    assert files(out) == before
    assert run([*photos, str(out / "train")]) == EXIT_DONE
    assert read_manifest(out / "train").samples == 50


def test_caches_of_the_old_shards_stay_valid(
    tables: tuple[Path, Path], tmp_path: Path, tiny_teacher: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(settings(tables[0]), out)
    command = [
        "teach",
        str(out),
        "--teacher",
        f"local-dir:{tiny_teacher}",
        "--views",
        "1",
        "--image-size",
        "32",
    ]
    assert run([*command, "--workers", "0"]) == EXIT_DONE
    cached = {name: content for name, content in files(out).items() if name.endswith(".safetensors")}
    pack(settings(tables[1]), out, append=True)
    capfd.readouterr()
    assert run([*command, "--workers", "0"]) == EXIT_DONE
    said = capfd.readouterr().out
    assert "30 views of 60 pictures embedded" in said
    assert "6 views of 16 pictures embedded" in said
    after = files(out)
    assert {name: after[name] for name in cached} == cached


@pytest.mark.parametrize("kind", [0, 1])
def test_a_pack_and_an_append_do_not_continue_each_other(
    kind: int, bucket: str, tables: tuple[Path, Path], tmp_path: Path
) -> None:
    out = places(tmp_path, bucket, "crossed")[kind]
    pack(settings(tables[0]), out)
    before = files(out)
    with pytest.raises(Killed):
        pack(settings(tables[1]), out, append=True, progress=KillAfter(30))
    for resume in (False, True):
        with pytest.raises(UserError, match=r"exists; give another folder|was packed with other settings"):
            pack(settings(tables[1]), out, resume=resume)
    now = files(out)
    assert {name: now[name] for name in before} == before
    started = places(tmp_path, bucket, "started")[kind]
    if kind == 0:
        started.mkdir()  # so that its working folder is inside
    with pytest.raises(Killed):
        pack(settings(tables[1]), started, progress=KillAfter(30))
    with pytest.raises(
        UserError, match="a pack into it was interrupted; finish it with --resume and without"
    ):
        pack(settings(tables[1]), started, append=True, resume=True)


def test_pictures_with_keys_of_others_are_refused_by_name_and_merging_keeps_them(
    tables: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(settings(tables[0]), out)
    pack(settings(tables[0]), tmp_path / "first")
    pack(settings(tables[1]), tmp_path / "second")
    assert run(["shards", "pack", str(tables[1]), str(out), "--persons", "none", "--append"]) == EXIT_DONE
    key = keys(tables[0], "train")[2]
    said = capfd.readouterr().out
    assert f"refused {key}: duplicate_key: a sample of the data set has the same key {key}" in said
    assert said.splitlines()[-1] == (
        "  1 new pictures have keys of others; to keep them, pack SOURCE into a data set of its own, and join both "
        "with `uniemox shards merge --same-key rename`"
    )
    joined = tmp_path / "joined"
    parts = [str(tmp_path / "first"), str(tmp_path / "second")]
    assert run(["shards", "merge", str(joined), *parts, "--same-key", "rename"]) == EXIT_DONE
    assert "1 samples have another key" in capfd.readouterr().out
    samples = [
        sum(read_manifest(path / split).samples for split in ("train", "test")) for path in (out, joined)
    ]
    assert samples == [76, 77]


@pytest.mark.parametrize("kind", [0, 1])
def test_refused_pictures_that_were_replaced_are_appended(kind: int, bucket: str, tmp_path: Path) -> None:
    """Names and counts: 3 of 12 pictures are damaged, 2 of these are replaced, one by a copy of another."""
    out = places(tmp_path, bucket, "retried")[kind]
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / f"in/{number}.png")
    for number in (3, 5, 7):
        os.rename(tmp_path / f"in/{number}.png", tmp_path / f"{number}.png")
        (tmp_path / f"in/{number}.png").write_bytes(b"no picture")
    options = settings(tmp_path / "in", layout="folder")
    assert len(pack(options, out).rejected) == 3
    os.replace(tmp_path / "3.png", tmp_path / "in/3.png")
    shutil.copy(tmp_path / "in/0.png", tmp_path / "in/5.png")
    result = pack(options, out, retry_refused=True)
    assert (result.records, result.packed) == (3, {"": 1})
    manifest = read_manifest(out)
    assert (manifest.samples, manifest.provenance["records"]) == (10, 12)
    assert manifest.provenance["rejected"] == {"corrupt": 1, "duplicate": 1}
    assert {row["source"]: row["reason"] for row in read_rejected(out) or []} == {
        "5.png": "duplicate",
        "7.png": "corrupt",
    }
    before = files(out)
    assert pack(options, out, retry_refused=True).reused
    assert files(out) == before


def test_the_command_prints_what_it_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(tmp_path / f"in/{number}.png")
    (tmp_path / "in/2.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    command = ["shards", "pack", str(tmp_path / "in"), str(out), "--layout", "folder", "--persons", "none"]
    assert run(command) == EXIT_DONE
    capsys.readouterr()
    assert run([*command, "--retry-refused"]) == EXIT_DONE
    assert capsys.readouterr().out == f"{out} is unchanged: none of 1 refused records can be packed now\n"
    Image.new("RGB", (20, 30), (2, 0, 0)).save(tmp_path / "in/2.png")
    assert run([*command, "--retry-refused"]) == EXIT_DONE
    assert "1 records = 1 packed + 0 refused" in capsys.readouterr().out
    assert run([*command, "--retry-refused"]) == EXIT_DONE
    assert capsys.readouterr().out == f"{out} is unchanged: no refused record to try again\n"


@pytest.mark.parametrize("remote", [False, True])
def test_append_to_one_split_looks_at_the_other_splits(
    tables: tuple[Path, Path], tmp_path: Path, bucket: str, remote: bool
) -> None:
    """A picture of test does not come into train, and keys stay unique in all splits."""
    out = parse_place(f"{bucket}/one-split") if remote else tmp_path / "out"
    pack(settings(tables[0]), out)
    rows = pq.read_table(tables[0]).to_pylist()
    test = next(row for row in rows if row["split"] == "test")
    first, second = pq.read_table(tables[1]).to_pylist()[:2]
    new = [{**test, "key": "copy"}, {**first, "key": test["key"]}, {**second, "key": "new"}]
    more = tmp_path / "more.parquet"
    pq.write_table(
        pa.Table.from_pylist([{k: v for k, v in row.items() if k != "split"} for row in new]), more
    )
    summary = pack(settings(more), out / "train", append=True)
    refused = {row["source"]: row["reason"] for row in read_rejected(out / "train") or []}
    assert refused == {"copy": "leak", test["key"]: "duplicate_key"}
    assert summary.packed == {"": 1}
