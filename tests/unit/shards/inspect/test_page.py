"""The page's account of the records behind a folder's samples, and the counts of its charts."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from labelled_sets import emotic_set, heco_set
from labelled_sets import packed as pack_set

from shards.edit.select import select
from shards.inspect.charts import histogram, value_histogram
from shards.inspect.emotions import Values
from shards.inspect.page import write_page
from shards.inspect.stats import Tally, describe, describe_json
from shards.inspect.verify import quarantine, verify
from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings
from uniemox_dist.cli.main import run


@pytest.fixture
def packed(emoji_table: Path, tmp_path: Path) -> Path:
    """40 records in two splits, of which 3 were refused: one is not a picture, two are copies. (Rows with captions
    would be joined.)"""
    rows: list[dict[str, Any]] = pq.read_table(emoji_table).to_pylist()
    rows = rows[:30] + [row for row in rows if row["split"] == "test"][:7]
    rows += [
        {**rows[0], "key": "no", "image": b"no picture"},
        *({**rows[i], "key": f"again{i}"} for i in (1, 2)),
    ]
    table = pa.Table.from_pylist(rows).drop_columns(["caption"])  # with captions the copies would be joined
    pq.write_table(table, tmp_path / "t.parquet")
    pack(PackSettings(str(tmp_path / "t.parquet"), persons="none", shard_samples=10), tmp_path / "out")
    return tmp_path / "out"


def page(folder: Path) -> tuple[str, str]:
    """The sentence below the title, and the section about refusals, as text."""
    write_page(folder, folder.parent / "page.html")
    text = (folder.parent / "page.html").read_text(encoding="utf-8")
    sentence = re.findall(r"<p>(.*?)</p>", text, re.DOTALL)[0]
    refused = text[text.index("<h2>Refused</h2>") : text.index("<h2>How it was made")]
    return sentence.partition(" MB")[2], " ".join(re.sub(r"<[^>]+>", " ", refused).split())


def test_all_splits_together_account_for_every_record(packed: Path) -> None:
    sentence, refused = page(packed)
    assert sentence == "; 37 of 40 records were packed."
    assert "corrupt 1 no " in refused
    assert "duplicate 2 " in refused


def test_one_split_and_a_selection_are_parts_of_a_pack(packed: Path, tmp_path: Path) -> None:
    select(packed / "train", tmp_path / "some", filter_text="side > 0")
    for folder in (packed / "train", tmp_path / "some"):
        sentence, refused = page(folder)
        assert sentence == "; part of a pack of 40 records."
        assert refused == (
            "Refused Counted over the whole pack; its rejected.parquet lists them one by one. "
            "reason records corrupt 1 duplicate 2"
        )


def test_shards_in_quarantine_do_not_count_as_packed(packed: Path) -> None:
    (packed / "train/000001.tar").write_bytes(b"damaged")
    quarantine(verify([packed / "train"]))
    sentence, refused = page(packed)
    assert sentence == "; part of a pack of 40 records; 1 bad shard was quarantined."
    assert "duplicate 2 " in refused


def test_a_pack_without_refusals_is_reported_as_such(photo_shards: Path, tmp_path: Path) -> None:
    select(photo_shards, tmp_path / "some", labels=("people",))
    assert page(photo_shards.parent / photo_shards.name) == (
        "; all 20 records were packed.",
        "Refused Nothing was refused.",
    )
    assert page(tmp_path / "some") == (
        "; part of a pack of 20 records.",
        "Refused Nothing was refused in the whole pack of 20 records.",
    )


def test_packs_that_lie_side_by_side_are_not_added_up(
    packed: Path, photo_shards: Path, tmp_path: Path
) -> None:
    select(photo_shards, tmp_path / "both/a")
    select(packed / "train", tmp_path / "both/b")
    sentence, refused = page(tmp_path / "both")
    assert sentence == "."
    assert refused == "Refused This data set has no list of refused records."


@pytest.mark.parametrize(("low", "high"), [(10, 99), (0, 40), (1, 256), (157, 163)])
def test_evenly_spread_values_make_bars_of_one_height(low: int, high: int) -> None:
    tally = Tally()
    tally.add(np.arange(low, high + 1))
    chart = histogram("t", "u", [tally])
    assert chart is not None
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class', chart.svg)]
    *whole, last = heights
    assert max(whole) == min(whole) >= last > 0  # the last bin may end beyond the values
    assert len(heights) <= 32


def test_a_wide_range_has_no_bin_without_a_whole_number() -> None:
    tally = Tally()
    tally.add(np.arange(1, 5000))
    chart = histogram("t", "u", [tally])
    assert chart is not None
    lefts = [float(x) for x in re.findall(r'<rect x="([\d.]+)" width', chart.svg)]
    widths = [float(width) for width in re.findall(r'<rect x="[\d.]+" width="([\d.]+)"', chart.svg)]
    gaps = [b - a - width for a, b, width in zip(lefts, lefts[1:], widths)]
    assert all(0.8 <= gap <= 1.2 for gap in gaps)  # neighbouring bars are one unit apart


def bars(svg: str) -> list[float]:
    """The heights of a chart's bars, as shares of the tallest."""
    heights = [float(height) for height in re.findall(r'height="([\d.]+)" class', svg)]
    return [round(height / max(heights), 2) for height in heights]


def ticks(svg: str) -> list[str]:
    """The texts below a chart."""
    return re.findall(r'text-anchor="middle">([^<]*)<', svg)


def test_values_have_the_axis_of_their_own_scale() -> None:
    one_to_ten, negative, single = Values(), Values(), Values()
    one_to_ten.add([(1.0, 1), (5.0, 4), (9.0, 2), (10.0, 1)])
    chart = value_histogram("Valence", "of persons", [one_to_ten])
    assert chart is not None
    assert (chart.median, bars(chart.svg)) == ("5", [0.25, 1.0, 0.5, 0.25])
    assert ticks(chart.svg) == [str(value) for value in range(1, 11)]
    negative.add([(-0.8, 3), (-0.15, 2), (0.4, 3)])
    chart = value_histogram("Valence", "of pictures", [negative, Values()])
    assert chart is not None
    assert (chart.median, bars(chart.svg)) == ("-0.15", [1.0, 0.67, 1.0])
    shown = [float(tick) for tick in ticks(chart.svg)]
    assert shown[0] == -0.8
    assert max(shown) <= 0.4
    steps = {round(b - a, 6) for a, b in pairwise(shown)}
    assert len(steps) == 1
    single.add([(4.2, 7)])
    chart = value_histogram("Arousal", "of pictures", [single])
    assert chart is not None
    assert (chart.median, bars(chart.svg)) == ("4.2", [1.0])
    assert len(set(ticks(chart.svg))) == len(ticks(chart.svg)) == 7
    assert ticks(chart.svg)[3] == "4.2"
    assert value_histogram("Arousal", "of pictures", [Values()]) is None


def test_the_labels_and_values_of_persons_are_counted_and_shown(tmp_path: Path) -> None:
    heco = heco_set(tmp_path / "heco", 12)  # 12 first persons with three of each label; 4 second ones
    out = tmp_path / "out"
    assert run(["shards", "pack", str(heco), str(out), "--preset", "heco", "--persons", "source"]) == 0
    persons = describe_json(out)["data_sets"]
    total = sum((Counter(d["person_labels"]) for d in persons), start=Counter())
    # Second persons of pictures 0, 3, 6 and 9 have the labels 0, 0, 2 and 2 of Surprise, Excitement, Happiness, Peace.
    assert total == {"Surprise": 5, "Excitement": 3, "Happiness": 5, "Peace": 3}
    assert sum(d["labelled_persons"] for d in persons) == 16
    assert (
        sum(d["person_dimensions"]["valence"]["samples"] for d in persons) == 12
    )  # second persons have none
    dominance = [d["person_dimensions"]["dominance"] for d in persons]
    assert sum(d["samples"] * d["mean"] for d in dominance) == 12 * 5 + 4 * 4
    assert all(d["dimensions"] == {} for d in persons)
    assert "labels of persons: " in "\n".join(describe(out))
    write_page(out, tmp_path / "heco.html")
    page = (tmp_path / "heco.html").read_text()
    assert "How many of 16 annotated persons have each label" in page
    assert page.count("<span>of persons, median") == 3
    assert page.count("<small>person: Surprise</small>") == 5


def test_categories_of_persons_are_counted_one_by_one(tmp_path: Path) -> None:
    data = pack_set(emotic_set(tmp_path / "source", 4, 2), tmp_path / "data", layout="emotic")
    [train] = describe_json(data / "train")["data_sets"]
    # Pictures 1 and 3 have two persons. Each person has the category of its picture, and one for its own number.
    assert train["labelled_persons"] == 6
    assert train["person_labels"] == {
        "Sadness": 4,
        "Sensitivity": 2,
        "Affection": 1,
        "Anger": 2,
        "Annoyance": 1,
        "Anticipation": 2,
    }
    write_page(data / "train", tmp_path / "page.html")
    assert "<h2>Labels of persons</h2>" in (tmp_path / "page.html").read_text()
