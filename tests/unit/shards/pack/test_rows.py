"""Several rows of one picture: one sample with all captions, in the order of the source, whatever the seed."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.detect.types import Person
from shards.format.manifest import find_manifest_folders, read_manifest
from shards.format.sample import parse_record
from shards.pack.packer import PackResult
from shards.pack.pipeline import PackSettings, pack
from shards.sources import Record
from shards.sources.rows import join_rows
from uniemox_dist.cli.main import run


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels_HW3).save(path, "PNG")


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    """Ten pictures with five captions each, as Flickr30k is published: `|` as delimiter, its own column names."""
    lines = ["image_name| comment_number| comment"]
    for i in range(10):
        picture(tmp_path / f"source/{i}.png", i)
        lines += [f"{i}.png| {n}| picture {i}, caption {n} ." for n in range(5)]
    table = tmp_path / "source/results.csv"
    table.write_text("\n".join(lines) + "\n")
    return table


def samples(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for split in find_manifest_folders(folder):
        for path in sorted(split.glob("*.tar")):
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.name.endswith(".json"):
                        record = parse_record(json.load(tar.extractfile(member) or io.BytesIO()))
                        found[record["source"]] = record
    return found


def packed(source: Path, out: Path, **options: Any) -> PackResult:
    more = {name: options.pop(name) for name in ("part", "resume", "workers") if name in options}
    return pack(PackSettings(str(source), persons="none", **options), out, **more)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_five_rows_of_a_picture_are_one_sample_with_five_captions(
    flickr: Path, tmp_path: Path, seed: int
) -> None:
    result = packed(flickr, tmp_path / "out", seed=seed)
    assert (result.records, result.packed, result.rejected, result.rows) == (10, {"": 10}, [], (50, 10))
    assert {name: sample["captions"] for name, sample in samples(tmp_path / "out").items()} == {
        f"results.csv#{5 * i}": [f"picture {i}, caption {n} ." for n in range(5)] for i in range(10)
    }
    # A column whose values differ becomes a list, one value for each row.
    assert samples(tmp_path / "out")["results.csv#5"]["attributes"] == {"comment_number": [0, 1, 2, 3, 4]}


def test_rows_of_a_picture_need_not_be_neighbours(flickr: Path, tmp_path: Path) -> None:
    header, *lines = flickr.read_text().splitlines()
    shuffled = [lines[i] for i in np.random.default_rng(0).permutation(len(lines))]
    flickr.write_text("\n".join([header, *shuffled]) + "\n")
    packed(flickr, tmp_path / "out")
    expected: dict[str, list[str]] = {}
    for line in shuffled:
        name, _, caption = line.split("| ")
        expected.setdefault(name, []).append(caption)
    found = [tuple(sample["captions"]) for sample in samples(tmp_path / "out").values()]
    assert sorted(found) == sorted(map(tuple, expected.values()))


def test_parts_of_a_table_with_repeated_pictures_hold_each_picture_once(flickr: Path, tmp_path: Path) -> None:
    results = [packed(flickr, tmp_path / f"part{i}", part=(i, 3)) for i in (1, 2, 3)]
    assert [result.records for result in results] == [3, 3, 4]
    names = [set(samples(tmp_path / f"part{i}")) for i in (1, 2, 3)]
    assert set.union(*names) == {f"results.csv#{5 * i}" for i in range(10)}
    assert sum(map(len, names)) == 10


def test_a_table_without_repeated_pictures_is_listed_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The provenance, which decides whether a pack resumes, is that of code that joined no rows."""
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        picture(Path(f"{i}.png"), i)
    rows = [{"path": f"{i}.png", "caption": f"c{i}", "label": "joy"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), "t.parquet")
    result = packed(Path("t.parquet"), Path("out"))
    assert result.rows == (4, 4)
    provenance = read_manifest(result.folders[0]).provenance
    assert provenance["source_sha256"] == "7c79dcca7e87d03928f36fc0ca5dc310334322b0831eb27b442de0c8e0b7b555"
    assert list(provenance["settings"])[-1] == "keep_labels"  # no settings that were added later


def test_rows_that_disagree_in_label_refuse_their_picture_by_name(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text(
        "path,caption,label\n0.png,a,joy\n1.png,b,joy\n0.png,c,fear\n1.png,d,\n0.png,e,joy\n"
    )
    for seed in range(3):
        result = packed(tmp_path / "t.csv", tmp_path / f"out{seed}", seed=seed)
        [refused] = result.rejected
        assert (refused.source, refused.reason, refused.detail) == (
            "t.csv#0",
            "conflict",
            "its rows t.csv#0 and t.csv#2 state different labels ('joy' and 'fear')",
        )
        # A row without a label takes that of the others.
        [sample] = samples(tmp_path / f"out{seed}").values()
        assert (sample["label"], sample["captions"]) == ("joy", ["b", "d"])


def test_labels_are_compared_before_some_are_selected(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text("path,label\n0.png,joy\n0.png,fear\n1.png,joy\n")
    result = packed(tmp_path / "t.csv", tmp_path / "out", keep_labels=("joy",))
    assert [(refused.source, refused.reason) for refused in result.rejected] == [("t.csv#0", "conflict")]


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_of_one_picture_in_two_splits_are_a_leak_and_the_test_copy_stays(
    tmp_path: Path, seed: int
) -> None:
    for i in range(2):
        picture(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text(
        "path,caption,split\n0.png,a,train\n0.png,b,testing\n0.png,c,test\n0.png,d,Training\n1.png,e,train\n"
    )
    result = packed(tmp_path / "t.csv", tmp_path / "out", seed=seed)
    assert result.packed == {"test": 1, "train": 1}
    [refused] = result.rejected
    assert (refused.source, refused.reason) == ("t.csv#0", "leak")
    assert samples(tmp_path / "out")["t.csv#1"]["captions"] == ["b", "c"]


def test_a_row_that_cannot_be_read_is_refused_alone(tmp_path: Path) -> None:
    picture(tmp_path / "0.png", 0)
    (tmp_path / "t.jsonl").write_text(
        '{"path": "0.png", "caption": "a"}\n{"path": "0.png", "caption": {"b": 1}}\n{"path": "0.png", "caption": "c"}\n'
    )
    result = packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert [(refused.source, refused.reason) for refused in result.rejected] == [("t.jsonl#1", "annotation")]
    assert result.records == 2
    assert samples(tmp_path / "out")["t.jsonl#0"]["captions"] == ["a", "c"]


def test_persons_that_differ_are_a_conflict_and_equal_ones_are_kept() -> None:
    one, other = (Person((0, 0, 1, side), 1.0) for side in (0.5, 1.0))
    rows = [Record("a", "x", persons=(one,)), Record("b", "x"), Record("c", "x", persons=(one,))]
    assert join_rows(rows) == Record("a", "x", persons=(one,))
    found = join_rows([*rows, Record("d", "x", persons=(other,))])
    assert found.refused == ("conflict", "its rows a and d state different persons")


def test_the_summary_counts_rows_captions_labels_and_boxes(
    flickr: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["shards", "pack", str(flickr), str(tmp_path / "out"), "--persons", "none"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path / 'out'}: 10 samples",
        "10 records = 10 packed + 0 refused; 0 with a person, 10 without",
        "the samples have 50 captions, 0 labels and 0 boxes; 0 have no caption, 10 no label, 10 no box",
        "50 rows of the source describe 10 pictures",
    ]


# ---- pictures inside a table


def inside(path: Path, rows: list[dict[str, Any]], kind: str = "bytes", group_rows: int = 4) -> Path:
    """A table of pictures by number, as bytes or as Hugging Face's struct."""
    for row in rows:
        buffer = io.BytesIO()
        pixels_HW3 = np.random.default_rng(row["image"]).integers(0, 255, (20, 30, 3), np.uint8)
        Image.fromarray(pixels_HW3).save(buffer, "PNG")
        data = buffer.getvalue()
        row["image"] = data if kind == "bytes" else {"bytes": data, "path": f"{len(data)}.png"}
    if path.suffix == ".arrow":
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path), chunksize=group_rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group_rows)
    return path


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow"])
@pytest.mark.parametrize("kind", ["bytes", "struct"])
@pytest.mark.parametrize("seed", [0, 1])
def test_rows_with_the_same_bytes_are_one_sample_with_all_captions(
    name: str, kind: str, seed: int, tmp_path: Path
) -> None:
    pairs = [(number, n) for number in range(7) for n in range(5)]
    order = [pairs[i] for i in np.random.default_rng(0).permutation(len(pairs))]
    rows = [{"image": number, "caption": f"picture {number}, caption {n}", "n": n} for number, n in order]
    result = packed(inside(tmp_path / name, rows, kind), tmp_path / "out", seed=seed)
    assert (result.records, result.packed, result.rejected, result.rows) == (7, {"": 7}, [], (35, 7))
    expected: dict[int, list[str]] = {}
    for number, n in order:
        expected.setdefault(number, []).append(f"picture {number}, caption {n}")
    found = samples(tmp_path / "out")
    assert [found[source]["captions"] for source in sorted(found, key=row_number)] == list(expected.values())
    first = [next(i for i, pair in enumerate(order) if pair[0] == number) for number in expected]
    assert sorted(map(row_number, found)) == first


def row_number(source: str) -> int:
    return int(source.rpartition("#")[2])


def test_rows_with_the_same_bytes_and_other_labels_are_a_conflict(tmp_path: Path) -> None:
    rows = [{"image": 0, "caption": "a", "label": "joy"}, {"image": 1, "caption": "b", "label": None}]
    rows += [{"image": 0, "caption": "c", "label": "fear"}, {"image": 1, "caption": "d", "label": "awe"}]
    result = packed(inside(tmp_path / "t.parquet", rows, group_rows=1), tmp_path / "out")
    assert [(refused.source, refused.reason) for refused in result.rejected] == [("t.parquet#0", "conflict")]
    assert samples(tmp_path / "out")["t.parquet#1"]["label"] == "awe"


def test_rows_with_the_same_bytes_in_two_splits_or_tables_and_empty_ones(tmp_path: Path) -> None:
    picture(tmp_path / "in/9.png", 9)
    rows = [{"image": 0, "caption": "a", "split": "train"}, {"image": 0, "caption": "b", "split": "test"}]
    inside(tmp_path / "in/1.parquet", rows)
    inside(tmp_path / "in/2.parquet", [{"image": 0, "caption": "c", "split": "test"}])
    empty = [
        {"image": None, "path": path, "caption": path, "split": "test"} for path in ("9.png", None, None)
    ]
    table = pa.Table.from_pylist([*empty, {**empty[0], "caption": "again"}])
    pq.write_table(table.set_column(0, "image", pa.nulls(4, pa.binary())), tmp_path / "in/3.parquet")
    result = packed(tmp_path / "in", tmp_path / "out")
    assert sorted((refused.source, refused.reason) for refused in result.rejected) == [
        ("1.parquet#0", "leak"),
        ("3.parquet#1", "empty"),
        ("3.parquet#2", "empty"),
    ]
    found = samples(tmp_path / "out")
    assert {source: sample["captions"] for source, sample in found.items()} == {
        "1.parquet#1": ["b", "c"],
        "3.parquet#0": ["9.png", "again"],
    }


def test_pictures_of_a_table_without_captions_are_not_read_while_it_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = inside(tmp_path / "t.parquet", [{"image": number, "n": number} for number in (0, 0, 1)])
    read: list[int] = []
    monkeypatch.setattr("shards.sources.layouts.table.hash_cell", read.append)
    result = packed(table, tmp_path / "out")
    assert (read, [refused.reason for refused in result.rejected]) == ([], ["duplicate"])
