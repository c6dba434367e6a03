"""Joining parts: repeated samples are left out, a part's counts are checked, and links are reported."""

import errno
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.edit.merge import merge
from shards.format.manifest import read_manifest
from shards.inspect.verify import verify
from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.data.reader import ShardReader


def parts_of(rows: list[dict[str, Any]], tmp_path: Path, count: int) -> list[Path]:
    """A table packed in parts, a shard for every two pictures."""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    settings = PackSettings(str(tmp_path / "t.parquet"), "table", persons="none", shard_samples=2)
    folders = [tmp_path / f"part{i}" for i in range(1, count + 1)]
    for i, folder in enumerate(folders, 1):
        pack(settings, folder, part=(i, count))
    return folders


@pytest.fixture
def rows(emoji_table: Path) -> list[dict[str, Any]]:
    """Nine pictures without split: one occurs once, and four occur twice under names that are not legal keys. Without
    captions, because the rows of a picture would be joined for the sake of their captions."""
    table = pq.read_table(emoji_table).slice(0, 5).to_pylist()
    once = [{**row, "key": f"first/{i}"} for i, row in enumerate(table)]
    again = [{**row, "key": f"second/{i}"} for i, row in enumerate(table[1:], 1)]
    return [{k: v for k, v in row.items() if k not in ("split", "caption")} for row in once + again]


def test_shards_of_marked_samples_only_are_left_out_and_stay_counted(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folders = parts_of(rows, tmp_path, 9)  # one part and one shard for each record
    result = merge(tmp_path / "out", folders)
    assert (result.records, result.packed, dict(result.refused)) == (9, {"": 5}, {"duplicate": 4})
    manifest = read_manifest(tmp_path / "out")
    assert [entry.samples for entry in manifest.shards] == [1] * 5
    names = {path.name for path in (tmp_path / "out").glob("*.tar")}
    assert names == {entry.name for entry in manifest.shards}
    assert not any(verdict.problems for verdict in verify([tmp_path / "out"]))


def test_a_split_of_marked_samples_only_is_left_out(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    pair = [{**rows[1], "split": "test"}, {**rows[5], "split": "train"}]
    result = merge(tmp_path / "out", parts_of(pair, tmp_path, 2))
    assert (result.packed, dict(result.refused)) == ({"test": 1}, {"leak": 1})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["rejected.parquet", "test"]
    for command in ("verify", "stats", "report"):
        assert run(["shards", command, str(tmp_path / "out")]) == EXIT_DONE


def test_refusals_of_a_merge_name_records_as_a_pack_does(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    merge(tmp_path / "out", parts_of(rows, tmp_path, 9))
    names = {row["key"] for row in rows}
    for row in pq.read_table(tmp_path / "out/rejected.parquet").to_pylist():
        first = row["detail"].removeprefix("the same picture as ")
        assert {row["source"], first} <= names
        assert row["source"].partition("/")[2] == first.partition("/")[2]


@pytest.mark.parametrize(
    "text",
    ["[1]", "5", '"x"', "{", "{}", '{"part": [1, 2]}', "[" * 5000, b"\xff", "part", "packed", "rejected"],
    ids=lambda value: str(value)[:12],
)
def test_a_part_with_an_unreadable_part_json_is_refused(
    text: str | bytes, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    folders = parts_of(rows, tmp_path, 2)
    note = folders[0] / "part.json"
    if text in ("part", "packed", "rejected"):  # a field of the wrong type
        text = json.dumps({**json.loads(note.read_text()), text: 5})
    note.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"PARTS=.*part1: part\.json cannot be read; pack this part again"):
        merge(tmp_path / "out", folders)
    assert not (tmp_path / "out").exists()


def lose_manifest(part: Path) -> None:
    (part / "manifest.json").unlink()


def lose_list(part: Path) -> None:
    (part / "rejected.parquet").unlink()


def damage_list(part: Path) -> None:
    (part / "rejected.parquet").write_bytes(b"PAR1")


def shorten_list(part: Path) -> None:
    table = pq.read_table(part / "rejected.parquet")
    pq.write_table(table.slice(1), part / "rejected.parquet")


def cut_tar(part: Path) -> None:
    os.truncate(next(part.glob("*.tar")), 5000)


def swap_index(part: Path) -> None:
    first, second, *_ = sorted(part.glob("index/*"))
    shutil.copy(second, first)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_manifest, "has other samples than its part.json counts; pack this part again"),
        (lose_list, "rejected.parquet is missing; pack this part again"),
        (damage_list, "not a readable list of refused records"),
        (shorten_list, "rejected.parquet lists other records than part.json counts; pack this part again"),
        (cut_tar, "has 5000 bytes instead of"),
        (swap_index, "the index is not the one that was written"),
    ],
)
def test_a_part_that_lost_something_is_refused_and_nothing_is_written(
    damage: Any, says: str, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows[3]["image"] = rows[4]["image"] = b"no picture"
    folders = parts_of(rows, tmp_path, 1)
    damage(folders[0])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as caught:
        merge(tmp_path / "out", folders)
    assert says in str(caught.value)
    assert str(folders[0]) in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("is_same", [True, False])
def test_parts_that_must_stay_are_named(
    is_same: bool,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folders = parts_of(rows, tmp_path, 2)
    if not is_same:

        def elsewhere(*_: object) -> None:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr("shards.edit.links.os.link", elsewhere)
    assert run(["shards", "merge", str(tmp_path / "out"), *map(str, folders)]) == EXIT_DONE
    told = "are symbolic links, because they are on another file system: {}, {} must stay where they are"
    assert (told.format(*folders) in capfd.readouterr().out) != is_same
    assert run(["shards", "select", str(tmp_path / "out"), str(tmp_path / "some"), "--link"]) == EXIT_DONE
    assert (told.format(*folders) in capfd.readouterr().out) != is_same
    if is_same:
        for folder in folders:
            shutil.rmtree(folder)
    assert ShardReader.from_folder(tmp_path / "some", "data.path").read(0, 0).image
    assert run(["shards", "verify", str(tmp_path / "some")]) == EXIT_DONE


def test_parts_without_any_picture_have_nothing_to_join(
    tmp_path: Path, rows: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    folders = parts_of([{**row, "image": b""} for row in rows], tmp_path, 2)
    assert run(["shards", "merge", str(tmp_path / "out"), *map(str, folders)]) == EXIT_USER
    assert "none of the 2 parts has a sample; see their rejected" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def gif(image: bytes) -> bytes:
    data = io.BytesIO()
    Image.open(io.BytesIO(image), formats=["WEBP"]).convert("RGB").save(data, "GIF")
    return data.getvalue()


def test_counts_of_converted_pictures_cover_all_parts_and_data_sets(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    """The pictures 0 to 4 and 1 to 4 again; five records are GIFs, among them both copies of picture 1."""
    rows = [
        {**row, "image": gif(row["image"]) if i in (0, 1, 2, 5, 8) else row["image"]}
        for i, row in enumerate(rows)
    ]
    folders = parts_of(rows, tmp_path, 9)
    result = merge(tmp_path / "out", folders)
    assert dict(result.refused) == {"duplicate": 2}
    assert read_manifest(tmp_path / "out").provenance["converted"] == {"GIF": 4}
    for name, some in (("a", rows[:5]), ("b", rows[5:])):
        pq.write_table(pa.Table.from_pylist(some), tmp_path / f"{name}.parquet")
        pack(PackSettings(str(tmp_path / f"{name}.parquet"), persons="none"), tmp_path / name)
    assert read_manifest(tmp_path / "a").provenance["converted"] == {"GIF": 3}
    merge(tmp_path / "sets", [tmp_path / "a", tmp_path / "b"])
    assert read_manifest(tmp_path / "sets").provenance["converted"] == {"GIF": 4}
    pack(PackSettings(str(tmp_path / "b.parquet"), persons="none"), tmp_path / "a", append=True)
    appended = read_manifest(tmp_path / "a").provenance
    assert appended["converted"] == {"GIF": 4}
    assert appended["appended"][0]["converted"] == {"GIF": 1}


def test_files_that_are_no_pictures_are_counted_once_for_parts_and_added_up_for_data_sets(
    photo_folder: Path, tmp_path: Path
) -> None:
    sources = [tmp_path / "one", tmp_path / "two"]
    for source, count in zip(sources, (1, 2)):
        shutil.copytree(photo_folder, source)
        for number in range(count):
            (source / f"{number}.pdf").write_bytes(b"%PDF")
    for number in (1, 2):
        pack(
            PackSettings(str(sources[0]), "folder", persons="none"), tmp_path / f"p{number}", part=(number, 2)
        )
    merge(tmp_path / "parts", [tmp_path / "p1", tmp_path / "p2"])
    assert read_manifest(tmp_path / "parts").provenance["not_pictures"][".pdf"] == 1
    for source in sources:
        pack(
            PackSettings(str(source), "folder", persons="none", seed=int(source.name == "two")),
            tmp_path / f"{source.name}-set",
        )
    merge(tmp_path / "sets", [tmp_path / "one-set", tmp_path / "two-set"])
    assert read_manifest(tmp_path / "sets").provenance["not_pictures"][".pdf"] == 3
