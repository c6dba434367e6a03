"""Decisions before any picture is read: labels, splits, the order of packing, parts."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards.pack.listing
from shards.pack.listing import Listing
from shards.pack.spool import parse_record
from shards.sources import Cell, Record, SourceOptions, open_source
from shards.sources.find_set import find_set
from shards.sources.presets import Labels, Preset, assign_shares, find_preset, load_presets
from uniemox_dist.core.errors import UserError


def listed(
    tmp_path: Path, records: list[Record], preset: str | Preset | None = None, **options: object
) -> Listing:
    found = preset if isinstance(preset, Preset) else find_preset(preset)
    settings = {"seed": 0, "keep_labels": (), **options}
    return Listing.read(iter(records), tmp_path / "work", preset=found, **settings)  # type: ignore[arg-type]


def record(listing: Listing, number: int) -> Record:
    return parse_record(listing.spool.line(number))


def of(label: str | None, count: int, **more: object) -> list[Record]:
    group = more.get("group")
    return [Record(f"{label}/{group}/{i}.jpg", "x", label=label, **more) for i in range(count)]  # type: ignore[arg-type]


def shares(listing: Listing) -> dict[tuple[str, str | None, str | None], int]:
    found = [
        (listing.split(i), listing.label(i), record(listing, i).group) for i in range(len(listing.spool))
    ]
    return dict(Counter(found))


# ---- presets


@pytest.mark.parametrize("name", [name for name, preset in load_presets().items() if preset.labels])
def test_a_preset_takes_its_labels_in_any_case_and_refuses_others(name: str, tmp_path: Path) -> None:
    labels = load_presets()[name].labels
    records = [
        Record(f"{i}", "x", label=form(label)) for i, label in enumerate(labels) for form in (str.upper,)
    ]
    listing = listed(tmp_path, [*records, Record("other", "x", label="bliss"), Record("none", "x")], name)
    assert [record(listing, i).label for i in range(len(labels))] == list(labels)
    for number in (len(labels), len(labels) + 1):
        refused = record(listing, number).refused
        assert refused is not None
        assert refused[0] == "label"
    assert ", ".join(labels) in str(record(listing, len(labels)).refused)


def test_an_unknown_preset_lists_the_valid_ones() -> None:
    with pytest.raises(
        UserError, match=r"--preset=emo9: not known; did you mean emo8\? valid are emo8, .*, and files"
    ):
        find_preset("emo9")


@pytest.mark.parametrize(
    ("name", "label", "count", "expected"),
    [
        ("emotion6", "joy", 100, {"train": 70, "val": 10, "test": 20}),
        ("heco", "Peace", 10, {"train": 7, "val": 1, "test": 2}),
        ("fi", "awe", 100, {"train": 80, "val": 5, "test": 15}),
        ("fi", "awe", 7, {"train": 6, "test": 1}),  # 5.6, 0.35, 1.05: the largest remainder is train's
        ("heco", "Peace", 1, {"train": 1}),
    ],
)
def test_splits_are_cut_per_label_by_largest_remainder(
    name: str, label: str, count: int, expected: dict[str, int], tmp_path: Path
) -> None:
    other = next(x for x in load_presets()[name].labels if x != label)
    listing = listed(tmp_path, of(label, count) + of(other, 10), name)
    assert listing.made_splits
    found = shares(listing)
    assert {split: found[split, label, None] for split in expected} == expected
    assert sum(n for (_, of_label, _), n in found.items() if of_label == other) == 10


def test_ube_shares_every_search_engine_of_a_label(tmp_path: Path) -> None:
    records = of("joy", 20, group="google") + of("joy", 10, group="bing") + of("fear", 10, group="google")
    found = shares(listed(tmp_path, records, "ube"))
    assert found["train", "joy", "google"] == 14
    assert found["test", "joy", "bing"] == 2
    assert found["val", "fear", "google"] == 1


def test_caer_s_keeps_train_and_divides_test_unless_val_is_there(tmp_path: Path) -> None:
    given = of("Happy", 30, split="train") + [
        Record(f"t{i}", "x", label="Happy", split="test") for i in range(50)
    ]
    found = shares(listed(tmp_path, given, "caer-s"))
    assert found == {("train", "Happy", None): 30, ("test", "Happy", None): 33, ("val", "Happy", None): 17}
    given.append(Record("v", "x", label="Happy", split="val"))
    listing = listed(tmp_path / "again", given, "caer-s")
    assert not listing.made_splits
    assert shares(listing)["test", "Happy", None] == 50


def test_given_splits_are_kept(tmp_path: Path) -> None:
    listing = listed(tmp_path, of("joy", 10, split="train"), "emotion6")
    assert shares(listing) == {("train", "joy", None): 10}


def test_emotion6_finds_its_pictures_below_images(tmp_path: Path) -> None:
    (tmp_path / "images/joy").mkdir(parents=True)
    found = find_set(find_preset("emotion6"), "emotion6", str(tmp_path), None)
    assert (found.root, found.pictures) == (tmp_path, tmp_path / "images")


def test_the_seed_decides_the_split_of_each_sample(tmp_path: Path) -> None:
    made = [
        [listed(tmp_path / f"{i}", of("Peace", 40), "heco", seed=seed).split(n) for n in range(40)]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert made[0] == made[1] != made[2]


def test_cut_gives_everyone_one_share() -> None:
    strata, draws = np.repeat([0, 1], [7, 5]), np.arange(12, dtype=np.uint64)
    chosen = assign_shares(strata, draws, {"a": 1.0, "b": 1.0})
    assert Counter(chosen[:7].tolist()) == {0: 4, 1: 3}
    assert Counter(chosen[7:].tolist()) == {0: 3, 1: 2}


def test_asked_labels_are_kept_and_others_refused(tmp_path: Path) -> None:
    listing = listed(tmp_path, of("joy", 1) + of("fear", 1) + of(None, 1), keep_labels=("Joy",))
    assert [record(listing, i).refused is None for i in range(3)] == [True, False, False]


def test_without_declared_labels_every_label_is_accepted() -> None:
    assert Labels(()).canonical("any Thing") == "any Thing"


# ---- splits of the source


def test_records_with_and_without_a_split_do_not_mix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="record 1 has no split, but others have 'train'"):
        listed(tmp_path, [Record("a", "x", split="train"), Record("b", "x")])


def test_a_refused_record_needs_no_split(tmp_path: Path) -> None:
    """A layout may not know the split of a row that it cannot read: nothing of it is packed anywhere."""
    refused = Record("c", b"", refused=("annotation", "broken"))
    listing = listed(tmp_path, [Record("a", "x", split="train"), refused, Record("b", "x", split="test")])
    assert sorted(listing.split(i) for i in range(3)) == ["", "test", "train"]
    listing = listed(
        tmp_path / "2", [Record("a", "x"), Record("c", "x", split="../x", refused=("label", "l"))]
    )
    assert listing.split(0) == ""


@pytest.mark.parametrize("name", ["rejected.parquet", "part.json", "manifest.json", "sizes.json"])
def test_a_split_that_is_called_like_a_file_of_ours_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        listed(tmp_path, [Record("a", "x", split=name)])
    assert (
        str(caught.value) == f"SOURCE: split={name!r}: reserved for a file of the data set; rename the split"
    )


@pytest.mark.parametrize("name", [".work", ".partial", "x" * 201, "a/b", "ä"])
def test_a_split_that_is_not_a_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a folder name; use only letters, digits"):
        listed(tmp_path, [Record("a", "x", split=name)])


# ---- order


def test_the_order_is_test_val_train_and_then_the_others_by_name(tmp_path: Path) -> None:
    records = [
        Record(f"{s}{i}", "x", split=s) for i in range(5) for s in ("zoo", "train", "art", "test", "val")
    ]
    listing = listed(tmp_path, records)
    order, _ = listing.order(None)
    assert [listing.split(n) for n in order[::5]] == ["test", "val", "train", "art", "zoo"]


def test_the_order_follows_the_seed_and_the_names_and_mixes_labels(tmp_path: Path) -> None:
    records = of("a", 20) + of("b", 20)

    def names(folder: str, seed: int, given: list[Record]) -> list[str]:
        listing = listed(tmp_path / folder, given, seed=seed)
        return [record(listing, n).name for n in listing.order(None)[0].tolist()]

    first = names("1", 0, records)
    assert first == names("2", 0, records) == names("3", 0, records[::-1])
    assert first != names("4", 1, records)
    assert sorted(first) == sorted(record.name for record in records)
    assert 4 <= sum(name.startswith("a/") for name in first[:20]) <= 16


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_parts_divide_the_order_without_rest(parts: int, tmp_path: Path) -> None:
    listing = listed(tmp_path, of("a", 33))
    whole, _ = listing.order(None)
    pieces = [listing.order((i, parts))[0] for i in range(1, parts + 1)]
    assert np.concatenate(pieces).tolist() == whole.tolist()
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 1


def test_row_groups_of_a_piece_stay_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": bytes([i]) * 1000, "split": "test" if i % 3 == 0 else "train"} for i in range(120)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=10, compression="none")
    monkeypatch.setattr(shards.pack.listing, "PIECE_BYTES", 35_000)
    source: Iterator[Record] = open_source("table", str(tmp_path / "t.parquet"), SourceOptions())
    listing = listed(tmp_path, list(source))
    order, piece = listing.order(None)
    groups = []
    for number in order.tolist():
        cell = listing.cell(listing.spool.line(number))
        assert isinstance(cell, Cell)
        groups.append(cell.row_group)
    for split in ("test", "train"):
        mine = [
            (p, g) for n, p, g in zip(order.tolist(), piece.tolist(), groups) if listing.split(n) == split
        ]
        assert [p for p, _ in mine] == sorted(p for p, _ in mine)  # one piece after the other
        together = {p: {g for q, g in mine if q == p} for p, _ in mine}
        assert 3 <= len(together) <= 6
        assert sum(len(found) for found in together.values()) == 12  # no row group is fetched for two pieces
        assert any(
            max(found) - min(found) >= len(found) for found in together.values()
        )  # from all over the table


def test_listing_the_same_gives_the_same_hash_and_another_source_another(tmp_path: Path) -> None:
    digests = [
        listed(tmp_path / f"{i}", records).digest
        for i, records in enumerate((of("a", 5), of("a", 5), of("a", 6), of("b", 5)))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_pictures_given_as_bytes_are_kept_on_disk(tmp_path: Path) -> None:
    listing = listed(tmp_path, [Record("a", b"one"), Record("b", b"three"), Record("c", b"")])
    images = [parse_record(listing.spool.line(i), tmp_path / "work").image for i in range(3)]
    assert images[2] == b""
    content = (tmp_path / "work/pictures.bin").read_bytes()
    assert [content[i.offset : i.offset + i.length] for i in images[:2]] == [b"one", b"three"]  # type: ignore[union-attr]
