"""Values of tables do not depend on the format of the table: labels, missing values, and lists in cells."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.sources import Record, SourceOptions, open_source
from shards.sources.values import parse_label


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
