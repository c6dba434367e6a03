"""Tables of a repository of Hugging Face's `datasets` whose splits are in the YAML of its README.md."""

from pathlib import Path
from typing import Any

import caption_sets as sets
import pytest
from published_sets import SETS, jpegs, table, text

from shards.pack.opening import open_settings
from shards.pack.settings import PackSettings
from shards.sources import SourceOptions, open_source


def listed(source: Path) -> tuple[list[tuple[str, str | None, tuple[str, ...]]], list[str]]:
    """Pictures, splits and captions of a source, and the notes."""
    options = SourceOptions()
    records = list(open_source("table", str(source), options))
    return [(str(r.image).rpartition("/")[2], r.split, r.captions) for r in records], options.findings.notes


def test_a_card_states_tables_and_splits(tmp_path: Path) -> None:
    sets.hugging_face_card(tmp_path / "a")
    records, notes = listed(tmp_path / "a")
    splits = {
        0: "train",
        1: "train",
        2: "train",
        3: "train",
        4: "val",
    }  # not 5: the card does not name its table
    assert records == [(f"{i}.jpg", split, (f"caption {i}",)) for i, split in splits.items()]
    assert notes == [
        "README.md names missing/*.csv, which SOURCE does not have",
        "splits of README.md: train (3 tables), val (1 table)",
    ]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("data_files: rows/a.csv", [("0.jpg", None)]),
        ("data_files: [rows/a.csv, rows/b-2.csv]", [("0.jpg", None), ("3.jpg", None)]),
        ("data_files:\n  - {split: dev, path: './rows/[a].csv'}", [("0.jpg", "val")]),
    ],
)
def test_data_files_have_several_forms(stated: str, expected: list[Any], tmp_path: Path) -> None:
    sets.hugging_face_card(tmp_path)
    text(tmp_path / "README.md", "---", "configs:", "- config_name: small", f"  {stated}", "---")
    assert [(image, split) for image, split, _ in listed(tmp_path)[0]] == expected


def test_the_default_of_several_configurations_counts(tmp_path: Path) -> None:
    sets.hugging_face_card(tmp_path)
    two = ["- {config_name: one, data_files: rows/a.csv}", "- {config_name: two, data_files: rows/b-2.csv"]
    text(tmp_path / "README.md", "---", "configs:", two[0], two[1] + ", default: true}", "---")
    assert [image for image, _, _ in listed(tmp_path)[0]] == ["3.jpg"]
    text(tmp_path / "README.md", "---", "configs:", two[0], two[1] + "}", "---")
    table(tmp_path / "train.csv", ["path", "text"], ["rows/5.jpg", "top"])
    assert [image for image, _, _ in listed(tmp_path)[0]] == ["5.jpg"]  # as without a card


@pytest.mark.parametrize(
    ("card", "note"),
    [
        (["---", "configs: {", "---"], "README.md is not used: README.md: line 2 is not valid YAML"),
        (["---", "configs: [{data_files: [{split: train}]}]", "---"], "states no path"),
        (["---", "configs: [{data_files: ../other/*.csv}]", "---"], "'../other/*.csv' does not lie below its folder"),
        (["---", "configs: [{data_files: 'hf://datasets/x/*.csv'}]", "---"], "does not lie below its folder"),
        (["---", "configs: [{data_files: {test: rows/a.csv}}]", "---"], "states no path"),
        (["# Data", "---", "configs: [{data_files: rows/a.csv}]", "---"], None),
        (["---", "configs: [{data_files: 'rows/*'}]", "---"], None),  # pictures, too
        (["---", "license: mit", "---"], None),
    ],
)  # fmt: skip
def test_a_card_that_names_no_tables_is_not_used(card: list[str], note: str | None, tmp_path: Path) -> None:
    sets.hugging_face_card(tmp_path)
    text(tmp_path / "README.md", *card)
    table(tmp_path / "train.csv", ["path", "text"], ["rows/5.jpg", "top"])
    records, notes = listed(tmp_path)
    assert records == [("5.jpg", "train", ("top",))]
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


def test_a_preset_reads_the_splits_of_the_card(tmp_path: Path) -> None:
    SETS["EmoSet-118K-hf"](tmp_path)
    card = [
        "configs:",
        "- config_name: default",
        "  data_files:",
        "  - {split: train, path: 'data/train-*'}",
        "  - {split: holdout, path: 'data/t[e]st-*'}",
    ]
    text(tmp_path / "README.md", "---", *card, "---")
    jpegs(tmp_path, "preview.jpg")
    opened = open_settings(PackSettings(str(tmp_path), None, preset="emoset"))
    splits = [record.split for record in open_source(opened.layout, opened.place, opened.options)]
    assert {split: splits.count(split) for split in splits} == {"train": 16, "holdout": 8}
