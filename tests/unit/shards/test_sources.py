"""Source layouts: what folders and tables become, record by record."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards.sources
from shards.sources import Record, SourceOptions, open_source
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import sha256_file


def records(layout: str, source: object, **options: Any) -> list[Record]:
    return list(open_source(layout, str(source), SourceOptions(**options)))


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def by_name(found: list[Record]) -> dict[str, Record]:
    assert len({record.name for record in found}) == len(found)
    return {record.name: record for record in found}


# ---- folders


def test_top_folders_called_like_splits_are_splits_and_those_below_labels(tmp_path: Path) -> None:
    tree(tmp_path, "train/joy/1.jpg", "train/awe/deep/2.PNG", "test/joy/3.webp", "val/4.jpeg")
    found = by_name(records("folder", tmp_path))
    assert {name: (r.split, r.label) for name, r in found.items()} == {
        "train/joy/1.jpg": ("train", "joy"),
        "train/awe/deep/2.PNG": ("train", "awe"),
        "test/joy/3.webp": ("test", "joy"),
        "val/4.jpeg": ("val", None),
    }
    assert all(record.image == str(tmp_path / name) for name, record in found.items())


def test_one_other_top_folder_makes_all_of_them_labels(tmp_path: Path) -> None:
    tree(tmp_path, "train/a/1.jpg", "joy/2.jpg", "3.jpg")
    found = by_name(records("folder", tmp_path))
    assert {name: (r.split, r.label) for name, r in found.items()} == {
        "train/a/1.jpg": (None, "train"),
        "joy/2.jpg": (None, "joy"),
        "3.jpg": (None, None),
    }


def test_unicode_dotted_and_spaced_names_stay_as_they_are(tmp_path: Path) -> None:
    names = {"Freude ü/ein bild.v2.jpg", "喜び/絵.png", "a.b/c..jpg"}
    tree(tmp_path, *names)
    found = by_name(records("folder", tmp_path))
    assert set(found) == names
    assert {r.label for r in found.values()} == {"Freude ü", "喜び", "a.b"}


def test_a_file_name_that_is_no_utf8_is_escaped_and_still_readable(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.jpg"
    with open(path, "wb") as file:
        file.write(b"x")
    [record] = records("folder", tmp_path)
    assert record.name == "\\xff.jpg"
    assert isinstance(record.image, str)
    assert Path(record.image).read_bytes() == b"x"


def test_a_text_beside_a_picture_is_its_caption(tmp_path: Path) -> None:
    tree(tmp_path, "a.b.jpg", "c.jpg", "d.jpg")
    (tmp_path / "a.b.txt").write_text("\ufeff  zwei Katzen \n", encoding="utf-8")
    (tmp_path / "d.txt").write_text(" \n")
    found = by_name(records("folder", tmp_path))
    assert {name: r.captions for name, r in found.items()} == {
        "a.b.jpg": ("zwei Katzen",),
        "c.jpg": (),
        "d.jpg": (),
    }


def test_a_caption_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"a\.txt: not a UTF-8 text \(byte 3\)"):
        records("folder", tmp_path)


def test_other_files_are_no_records(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "b.gif", "notes.txt", "c.jpg.bak", "jpg")
    assert [record.name for record in records("folder", tmp_path)] == ["a.jpg"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    tree(tmp_path, "x/a.jpg")
    (tmp_path / "x/again").symlink_to(tmp_path)
    assert [record.name for record in records("folder", tmp_path)] == ["x/a.jpg"]


def test_folders_come_in_an_order_of_the_seed_that_mixes_labels(tmp_path: Path) -> None:
    tree(tmp_path, *(f"{label}/{i:02d}.jpg" for label in ("a", "b") for i in range(20)))
    first, again, other = (
        [record.name for record in records("folder", tmp_path, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    assert 4 <= sum(name.startswith("a/") for name in first[:20]) <= 16  # not label by label


def test_a_missing_or_empty_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOURCE=.*no: no such folder"):
        records("folder", tmp_path / "no")
    with pytest.raises(UserError, match=r"holds no pictures \(\.jpeg, \.jpg, \.png, \.webp\)"):
        records("folder", tmp_path)


# ---- tables


def parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def test_a_row_of_a_table_becomes_a_record(tmp_path: Path) -> None:
    row = {
        "key": "k",
        "image": b"jpg",
        "caption": "c",
        "label": 3,
        "split": "train",
        "polarity": -4,
        "note": None,
    }
    [record] = records("table", parquet(tmp_path / "t.parquet", [row]))
    assert record == Record("k", b"jpg", ("c",), "3", {"polarity": -4}, "train", None)


def test_a_list_of_captions_stays_a_list_without_its_empty_ones(tmp_path: Path) -> None:
    rows = [{"image": b"x", "caption": ["one", "", "two", None]}, {"image": b"x", "caption": []}]
    found = by_name(records("table", parquet(tmp_path / "t.parquet", rows)))
    assert found["t.parquet#0"].captions == ("one", "two")
    assert found["t.parquet#1"].captions == ()


def test_rows_without_a_key_are_named_by_table_and_row_in_any_row_group(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"image": bytes([i])} for i in range(25)], row_group_size=4)
    found = by_name(records("table", path, seed=5))
    assert {name: record.image for name, record in found.items()} == {
        f"t.parquet#{i}": bytes([i]) for i in range(25)
    }


def test_tables_come_in_an_order_of_the_seed(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "t.parquet", [{"image": b"", "key": str(i)} for i in range(60)], row_group_size=20
    )
    orders = [[record.name for record in records("table", path, seed=seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(map(int, orders[0])) == list(range(60))


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"jpg": b"x", "text": "c", "label": "l"}])
    [record] = records("table", path, columns={"image": "jpg", "caption": "text"})
    assert (record.image, record.captions, record.label, record.attributes) == (b"x", ("c",), "l", {})
    with pytest.raises(
        UserError, match=r"--column picture=…: not a column that packing knows; valid are image, path"
    ):
        records("table", path, columns={"picture": "jpg"})


def test_a_struct_of_bytes_and_path_is_a_picture(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "image": {"bytes": b"x", "path": None}},
        {"key": "b", "image": {"bytes": None, "path": "p.jpg"}},
    ]
    found = by_name(records("table", parquet(tmp_path / "t.parquet", rows)))
    assert (found["a"].image, found["b"].image) == (b"x", str(tmp_path / "p.jpg"))


def test_attributes_become_values_that_json_has(tmp_path: Path) -> None:
    import datetime
    from decimal import Decimal

    row = {
        "image": b"x",
        "day": datetime.date(2026, 1, 2),
        "at": datetime.datetime(2026, 1, 2, 3, 4, 5),
        "price": Decimal("1.50"),
        "raw": b"\x00\xff",
        "nan": float("nan"),
        "inf": float("inf"),
        "empty": "",
        "deep": {"a": [1.5, float("nan")], "b": True},
    }
    [record] = records("table", parquet(tmp_path / "t.parquet", [row]))
    assert record.attributes == {
        "day": "2026-01-02",
        "at": "2026-01-02T03:04:05",
        "price": "1.50",
        "raw": "AP8=",
        "inf": "inf",
        "deep": {"a": [1.5, None], "b": True},
    }


def test_a_csv_names_pictures_beside_it_and_keeps_its_texts(tmp_path: Path) -> None:
    text = (
        "path,key,caption,label,split,score,day\n"
        'pics/ä 1.jpg,007,"two\nlines, ""quoted""",1,train,0.5,2026-01-02\n'
        "/abs/2.jpg,,,,,,\n"
    )
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    found = by_name(records("table", tmp_path / "t.csv"))
    assert found["007"] == Record(
        "007",
        str(tmp_path / "pics/ä 1.jpg"),
        ('two\nlines, "quoted"',),
        "1",
        {"score": 0.5, "day": "2026-01-02"},
        "train",
    )
    assert found["t.csv#1"] == Record("t.csv#1", "/abs/2.jpg")


def test_a_picture_column_of_a_csv_holds_paths(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("image\na.jpg\n")
    assert [record.image for record in records("table", tmp_path / "t.csv")] == [str(tmp_path / "a.jpg")]


def test_line_breaks_inside_quotes_are_read_right_in_a_long_csv(tmp_path: Path) -> None:
    rows = "".join(
        f'{i}.jpg,"line\n{"x" * 400}\n{i}"\n' for i in range(6000)
    )  # over pyarrow's blocks of 1 MB
    (tmp_path / "t.csv").write_text("path,caption\n" + rows)
    found = by_name(records("table", tmp_path / "t.csv"))
    assert len(found) == 6000
    assert all(r.captions[0].split("\n")[2] == Path(str(r.image)).stem for r in found.values())


def test_a_table_without_pictures_lists_its_columns(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"jpg": b"x", "text": "c"}])
    with pytest.raises(UserError) as caught:
        records("table", path)
    assert str(caught.value) == (
        f"SOURCE={path}: has neither the column 'image' (picture bytes) nor 'path' (picture file); "
        "its columns are jpg, text; name one with --column image=NAME"
    )


def test_a_picture_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"image": 3}])
    with pytest.raises(UserError, match="the column 'image' holds int, not pictures or paths"):
        records("table", path)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_file_that_is_no_table_is_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"SOURCE=.*{name}: not a readable table"):
        records("table", tmp_path / name)


def test_a_missing_table_names_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no such table; give a \.parquet or \.csv file, or shipped:fluent_emoji"
    ):
        records("table", tmp_path / "no.parquet")


def test_an_unknown_layout_lists_the_valid_ones() -> None:
    with pytest.raises(UserError) as caught:
        records("zip", "x")
    assert str(caught.value) == "--layout=zip: not known; valid are folder, table"


def test_the_shipped_table_holds_what_its_readme_says() -> None:
    folder = Path(shards.sources.__file__).parents[1] / "demo"
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert sha256_file(folder / "fluent_emoji.parquet") in readme
    found = records("table", "shipped:fluent_emoji")
    assert len(by_name(found)) == 1599
    assert Counter(record.split for record in found) == {"train": 1251, "test": 348}
    groups = Counter((record.label, record.split) for record in found)
    assert len(groups) == 16
    for label in {record.label for record in found}:
        assert f"| {label} | {groups[label, 'train']} | {groups[label, 'test']} |" in readme
    assert len({record.attributes["subgroup"] for record in found}) == 95
    assert len({record.attributes["family"] for record in found}) == 1126
    assert all(
        isinstance(r.image, bytes) and r.image[8:12] == b"WEBP" and len(r.captions) == 1 for r in found
    )
    polarity = [r.attributes["polarity"] for r in found if "polarity" in r.attributes]
    assert (len(polarity), min(polarity), max(polarity)) == (118, -4, 4)
    families = {
        split: {r.attributes["family"] for r in found if r.split == split} for split in ("train", "test")
    }
    assert not families["train"] & families["test"]
