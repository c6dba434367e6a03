"""One rule for the columns of captions in all layouts: `captions` and `caption` are kept both, or else the first of
text, sentence, sentences and comment; the same for all rows of a file, and the others are attributes, with a note."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.sources import Record, SourceOptions, open_source

Row = dict[str, Any]


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def write_table(path: Path, rows: list[Row]) -> None:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif path.suffix == ".arrow":
        pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(path))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)


def table(name: str, column: str = "path") -> Callable[[Path, list[Row]], tuple[str, Path]]:
    def write(folder: Path, rows: list[Row]) -> tuple[str, Path]:
        write_table(folder / name, [{column: f"{i}.png", **row} for i, row in enumerate(rows)])
        return "table", folder / name

    return write


def metadata(name: str) -> Callable[[Path, list[Row]], tuple[str, Path]]:
    def write(folder: Path, rows: list[Row]) -> tuple[str, Path]:
        write_table(folder / name, [{"file_name": f"{i}.png", **row} for i, row in enumerate(rows)])
        for i in range(len(rows)):
            (folder / f"{i}.png").write_bytes(picture(i))
        return "folder", folder

    return write


def jsons(folder: Path, rows: list[Row]) -> tuple[str, Path]:
    for i, row in enumerate(rows):
        (folder / f"{i}.png").write_bytes(picture(i))
        (folder / f"{i}.json").write_text(json.dumps(row))
    return "folder", folder


def tar(folder: Path, rows: list[Row]) -> tuple[str, Path]:
    with tarfile.open(folder / "a.tar", "w") as file:
        for i, row in enumerate(rows):
            for name, data in ((f"{i}.png", picture(i)), (f"{i}.json", json.dumps(row).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    return "wds", folder / "a.tar"


TABLES = {
    "csv": table("t.csv"),
    "csv with usual names": table("t.csv", "file_name"),
    "jsonl": table("t.jsonl"),
    "parquet": table("t.parquet"),
    "parquet with usual names": table("t.parquet", "file_name"),
    "arrow": table("t.arrow"),
    "metadata.csv": metadata("metadata.csv"),
    "metadata.jsonl": metadata("metadata.jsonl"),
    "metadata.parquet": metadata("metadata.parquet"),
}
JSONS = {"folder .json": jsons, "wds .json": tar}
EVERY = pytest.mark.parametrize("write", [*TABLES.values(), *JSONS.values()], ids=[*TABLES, *JSONS])


def read(found: tuple[str, Path], **options: Any) -> tuple[list[Record], list[str]]:
    given = SourceOptions(**options)
    records = list(open_source(found[0], str(found[1]), given))
    assert [record.refused for record in records] == [None] * len(records)
    return records, [note.partition(" ")[2].partition(" with")[2] for note in given.findings.notes]


@EVERY
def test_caption_goes_before_text_and_the_note_names_both(write: Any, tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "caption": f"c{i}", "Comment": f"x{i}"} for i in range(3)]
    records, notes = read(write(tmp_path, rows))
    assert [record.captions for record in records] == [("c0",), ("c1",), ("c2",)]
    assert [record.attributes for record in records] == [
        {"text": f"t{i}", "Comment": f"x{i}"} for i in range(3)
    ]
    assert notes == [
        " captions in 'caption'; 'Comment', 'text' became attributes (--column caption=NAME chooses)"
    ]


@EVERY
def test_captions_and_caption_are_both_kept_without_a_note(write: Any, tmp_path: Path) -> None:
    rows = [{"caption": "one", "captions": "two"}, {"caption": "same", "captions": "same"}]
    records, notes = read(write(tmp_path, rows))
    assert [record.captions for record in records] == [("two", "one"), ("same",)]
    assert ([record.attributes for record in records], notes) == ([{}, {}], [])


@EVERY
def test_without_them_the_order_is_text_sentence_sentences_comment(write: Any, tmp_path: Path) -> None:
    names = ["comment", "sentences", "sentence", "text"]
    for length in range(1, 5):
        folder = tmp_path / str(length)
        folder.mkdir()
        records, notes = read(write(folder, [{name: f"a {name}" for name in names[:length]}]))
        assert records[0].captions == (f"a {names[length - 1]}",)
        assert len(notes) == (length > 1)


@EVERY
def test_the_user_chooses_another_column_without_a_note(write: Any, tmp_path: Path) -> None:
    rows = [{"caption": "c", "text": "t"}]
    records, notes = read(write(tmp_path, rows), columns={"caption": "text"})
    assert (records[0].captions, notes) == (("t",), [])


@pytest.mark.parametrize("write", TABLES.values(), ids=TABLES)
def test_all_rows_of_a_file_have_the_same_column(write: Any, tmp_path: Path) -> None:
    rows = [{"text": "t0", "caption": ""}, {"text": "t1", "caption": "c1"}, {"text": "", "caption": "c2"}]
    records, notes = read(write(tmp_path, rows))
    assert [record.captions for record in records] == [(), ("c1",), ("c2",)]
    assert [record.attributes for record in records] == [{"text": "t0"}, {"text": "t1"}, {}]
    assert notes == [" captions in 'caption'; 'text' became attributes (--column caption=NAME chooses)"]


@pytest.mark.parametrize("write", [table("t.jsonl"), metadata("metadata.jsonl")], ids=["table", "metadata"])
def test_a_field_that_only_a_later_line_has_counts_for_all_lines(write: Any, tmp_path: Path) -> None:
    records, notes = read(write(tmp_path, [{"text": "t0"}, {"caption": "c1"}]))
    assert [record.captions for record in records] == [(), ("c1",)]
    assert notes == [" captions in 'caption'; 'text' became attributes (--column caption=NAME chooses)"]


@pytest.mark.parametrize("write", JSONS.values(), ids=JSONS)
def test_every_json_of_a_picture_is_a_file_of_its_own_and_differences_are_noted(
    write: Any, tmp_path: Path
) -> None:
    rows = [{"text": "t0", "caption": ""}, {"text": "t1"}, {"caption": "c2"}, {"captions": ["c3"]}, {"x": 1}]
    records, notes = read(write(tmp_path, rows))
    assert [record.captions for record in records] == [("t0",), ("t1",), ("c2",), ("c3",), ()]
    assert notes == [" captions in 'caption'", " captions in 'captions'", " captions in 'text'"]


def test_tables_that_differ_are_noted(tmp_path: Path) -> None:
    for number, name in enumerate(["caption", "text", "text"]):
        write_table(tmp_path / f"{number}.csv", [{"path": "1.png", name: "c"}])
    options = SourceOptions()
    assert len(list(open_source("table", str(tmp_path), options))) == 3
    assert options.findings.notes == [
        "1 tables with captions in 'caption'",
        "2 tables with captions in 'text'",
    ]
