"""Values of tables do not depend on the format of the table: labels, missing values, and lists in cells."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PillowImage

from shards.sources import Record, SourceOptions, open_source
from shards.sources.values import parse_label
from uniemox_dist.core.errors import UserError


def records(source: Path, **options: Any) -> list[Record]:
    return list(open_source("table", str(source), SourceOptions(**options)))


def labels(source: Path) -> list[str | None]:
    return [record.label for record in records(source)]


# ---- Labels


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (1, "1"),
        (1.0, "1"),
        (-0.0, "0"),
        ("1.0", "1"),
        (" 12.00 ", "12"),
        ("1.5", "1.5"),
        (1.5, "1.5"),
        ("007", "007"),
        ("007.0", "007.0"),
        ("v1.0", "v1.0"),
        (True, "true"),
        ("False", "false"),
        (float("nan"), None),
        (None, None),
        (["joy"], "joy"),
        ([], None),
        ([None, 2.0], "2"),
    ],
)
def test_a_label_does_not_depend_on_how_its_number_is_stored(value: Any, label: str | None) -> None:
    assert parse_label(value) == label


def test_labels_of_one_set_are_equal_in_all_formats_with_a_gap_in_the_column(tmp_path: Path) -> None:
    paths = ["0.jpg", "1.jpg", "2.jpg"]
    (tmp_path / "t.csv").write_text("path,label\n0.jpg,1.0\n1.jpg,\n2.jpg,3.0\n")
    lines = [{"path": p, "label": label} for p, label in zip(paths, [1, None, 3])]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pq.write_table(pa.table({"path": paths, "label": [1.0, None, 3.0]}), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert labels(tmp_path / name) == ["1", None, "3"], name


def test_booleans_are_spelled_alike_in_all_formats(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n0.jpg,True\n1.jpg,false\n")
    (tmp_path / "t.jsonl").write_text('{"path": "0.jpg", "label": true}\n{"path": "1.jpg", "label": false}\n')
    pq.write_table(pa.table({"path": ["0.jpg", "1.jpg"], "label": [True, False]}), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        assert labels(tmp_path / name) == ["true", "false"], name


def test_several_labels_of_a_picture_are_refused_with_a_hint(tmp_path: Path) -> None:
    table = pa.table({"path": ["0.jpg", "1.jpg"], "label": [["joy"], ["joy", "awe"]]})
    pq.write_table(table, tmp_path / "t.parquet")
    first, second = records(tmp_path / "t.parquet")
    assert (first.label, first.refused) == ("joy", None)
    assert second.refused == (
        "annotation",
        "the column 'label': holds 2 labels (joy, awe), but a sample has one; give several as an object of shares such "
        'as {"joy": 1, "awe": 1}, with --column votes=NAME',
    )


def test_the_error_of_a_cut_line_reads_well(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path":"0.jpg"}\n{"path":"1.jpg","capt')
    assert records(tmp_path / "t.jsonl")[1].refused == (
        "annotation",
        "line 2: Unterminated string starting at character 17",
    )


# ---- Cells of a CSV


def test_words_for_missing_values_are_missing_in_a_csv_and_noted_by_column_and_word(tmp_path: Path) -> None:
    rows = ["0.jpg,NaN,None,NaN,None", "1.jpg,NaN,nan bread,2,NA", r"2.jpg,joy,\N,N/A,x", "3.jpg,<NA>,null,,"]
    (tmp_path / "t.csv").write_text("\n".join(["path,label,caption,v,note", *rows]))
    options = SourceOptions(columns={"valence": "v"})
    found = list(open_source("table", str(tmp_path / "t.csv"), options))
    assert [record.refused for record in found] == [None] * 4
    assert [record.label for record in found] == [None, None, "joy", None]
    assert [record.captions for record in found] == [(), ("nan bread",), (), ()]
    assert [record.attributes for record in found] == [
        {"note": "None"},
        {"valence": 2.0, "note": "NA"},
        {"note": "x"},
        {},
    ]
    kept = "missing values (a text if the table is JSON Lines, Parquet or Arrow)"
    assert options.findings.notes == [
        f"1 cell of the column 'caption' with 'None': {kept}",
        "1 cell of the column 'caption' with '\\\\N': missing values",
        f"1 cell of the column 'caption' with 'null': {kept}",
        "1 cell of the column 'label' with '<NA>': missing values",
        "2 cells of the column 'label' with 'NaN': missing values",
        f"1 cell of the column 'v' with 'N/A': {kept}",
        "1 cell of the column 'v' with 'NaN': missing values",
    ]


def test_a_set_with_gaps_has_equal_records_from_csv_json_lines_and_parquet(tmp_path: Path) -> None:
    paths, shown = ["0.jpg", "1.jpg", "2.jpg"], ["1.0", "NaN", "2.0"]
    text = "\n".join(f"{path},{label},NaN,{label}" for path, label in zip(paths, shown))
    (tmp_path / "t.csv").write_text(f"path,label,caption,score\n{text}\n")
    lines = [f'{{"path": "{p}", "label": {s}, "caption": null, "score": {s}}}' for p, s in zip(paths, shown)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    numbers = [1.0, float("nan"), 2.0]
    columns = {"path": paths, "label": numbers, "caption": pa.nulls(3, pa.string()), "score": numbers}
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        found = records(tmp_path / name)
        assert [(r.label, r.captions, r.attributes) for r in found] == [
            ("1", (), {"score": 1.0}),
            (None, (), {}),
            ("2", (), {"score": 2.0}),
        ], name


def test_words_for_missing_values_in_json_lines_are_texts(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "0.jpg", "label": "None", "caption": "null"}\n')
    [record] = records(tmp_path / "t.jsonl")
    assert (record.label, record.captions) == ("None", ("null",))


def test_metadata_of_a_folder_follows_the_same_rules(tmp_path: Path) -> None:
    PillowImage.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    cell = '"[""x"", ""y""]"'
    (tmp_path / "metadata.csv").write_text(f",file_name,label,text\n0,a.png,NaN,{cell}\n")
    options = SourceOptions()
    [record] = open_source("folder", str(tmp_path), options)
    assert (record.label, record.captions, record.attributes) == (None, ("x", "y"), {})
    assert options.findings.notes == [
        "a column without a name was left out; name it in the header to keep it",
        "1 cell of the column 'label' with 'NaN': missing values",
        "1 cell of the column 'text' with a list: each of its texts is a caption",
    ]


@pytest.mark.parametrize(
    ("cell", "captions"),
    [
        ('["a","b"]', ("a", "b")),
        ('["a \\u00e9", null]', ("a é",)),
        ("['a', \"it's\"]", ("a", "it's")),
        ("['a' 'b'\n 'c']", ("a", "b", "c")),
        ("['a\\n\\'b', None]", ("a\n'b",)),
        ("[]", ()),
        ("[applause] a man", ("[applause] a man",)),
        ("[applause]", ("[applause]",)),
        ("[1, 2]", ("[1, 2]",)),
        ("['a', 3]", ("['a', 3]",)),
        ("['a' + 'b']", ("['a' + 'b']",)),
        ('["a"] and ["b"]', ('["a"] and ["b"]',)),
        ("['a' ... 'b']", ("['a' ... 'b']",)),
        ("['a' " + " " * 9_000 + "x]", ("['a' " + " " * 9_000 + "x]",)),
    ],
)
def test_a_list_in_a_caption_cell_is_several_captions(
    cell: str, captions: tuple[str, ...], tmp_path: Path
) -> None:
    quoted = cell.replace('"', '""')
    (tmp_path / "t.csv").write_text(f'path,caption\n0.jpg,"{quoted}"\n')
    [record] = records(tmp_path / "t.csv")
    assert record.captions == captions


def test_cells_that_look_like_lists_are_noted(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,caption\n0.jpg,['a' ... 'b']\n1.jpg,\"['a', 'b']\"\n2.jpg,[x] y\n")
    options = SourceOptions()
    assert len(list(open_source("table", str(tmp_path / "t.csv"), options))) == 3
    assert options.findings.notes == [
        "1 cell of the column 'caption' with a list: each of its texts is a caption",
        "1 cell of the column 'caption' with brackets that hold no list of texts: one caption each",
    ]


def test_the_unnamed_index_of_pandas_is_left_out_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(",path,caption\n0,0.jpg,a\n1,1.jpg,b\n")
    options = SourceOptions()
    found = list(open_source("table", str(tmp_path / "t.csv"), options))
    assert [(record.captions, record.attributes) for record in found] == [(("a",), {}), (("b",), {})]
    assert options.findings.notes == [
        "a column without a name was left out; name it in the header to keep it"
    ]


# ---- Files of other kinds


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        (
            "t.csv.gz",
            gzip.compress(b"path\n0.jpg\n", mtime=0),
            "is compressed with gzip; decompress it: gunzip -k t.csv.gz",
        ),
        (
            "t.csv",
            gzip.compress(b"path\n0.jpg\n", mtime=0),
            "is compressed with gzip; decompress it: gunzip -k t.csv",
        ),
        (
            "t.jsonl.gz",
            gzip.compress(b"{}", mtime=0),
            "is compressed with gzip; decompress it: gunzip -k t.jsonl.gz",
        ),
        (
            "t.jsonl",
            gzip.compress(b"{}", mtime=0),
            "is compressed with gzip; decompress it: gunzip -k t.jsonl",
        ),
        (
            "t.parquet.zst",
            b"\x28\xb5\x2f\xfd1",
            "is compressed with zstd; decompress it: unzstd -k t.parquet.zst",
        ),
        ("t.xlsx", b"PK\x03\x04x", "is a spreadsheet; save it as CSV in UTF-8"),
        ("t.csv", b"PK\x03\x04\xff[Content_Types].xml", "is a spreadsheet; save it as CSV in UTF-8"),
        (
            "t.xls",
            b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
            "is a spreadsheet of old Excel; save it as CSV in UTF-8",
        ),
        ("t.zip", b"PK\x03\x04x", "is a zip archive; unpack it and give the table inside"),
        (
            "t.csv",
            "path\n".encode("utf-16"),
            "is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 t.csv > FILE",
        ),
        (
            "t.json",
            b'[{"path": "0.jpg"}]',
            "is a JSON array; write one object on each line: jq -c '.[]' t.json > t.jsonl",
        ),
        (
            "t.json",
            b'{"images": []}',
            "is JSON; write one object for each picture on a line of its own, and call the file .jsonl",
        ),
        (
            "t.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
            "is a pointer of Git LFS; fetch the file itself: git lfs pull",
        ),
        ("t.pkl", b"\x80\x04.", "is a pickle, which may run code; save it as Parquet"),
        ("t.db", b"SQLite format 3\0", "is a database of SQLite; export its table as CSV"),
    ],
)
def test_a_file_that_is_no_table_is_refused_by_its_kind(
    name: str, content: bytes, error: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        records(tmp_path / name)
    assert str(caught.value) == f"SOURCE={tmp_path / name}: {error}"
