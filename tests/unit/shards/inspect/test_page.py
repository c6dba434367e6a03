"""The page's account of the records behind a folder's samples, and the counts of its charts."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.edit.select import select
from shards.inspect.charts import histogram
from shards.inspect.page import write_page
from shards.inspect.stats import Tally
from shards.inspect.verify import quarantine, verify
from shards.pack.pipeline import pack
from shards.pack.settings import PackSettings


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
    assert sentence == "; of 40 records 37 were packed."
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
        "; of 20 records all were packed.",
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
