"""Source layouts: what folders and tables become, record by record."""

import io
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import shards.sources
from shards.detect.types import Person
from shards.sources import Cell, Record, SourceOptions, open_source
from shards.sources.tables import CellReader
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import sha256_file


def records(layout: str, source: object, **options: Any) -> list[Record]:
    return list(open_source(layout, str(source), SourceOptions(**options)))


def image_of(record: Record) -> object:
    """The picture of a record; those in tables are fetched later by their place."""
    return CellReader().read(record.image, 0) if isinstance(record.image, Cell) else record.image


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


def test_top_folders_without_a_split_name_are_labels(tmp_path: Path) -> None:
    tree(tmp_path, "trains/a/1.jpg", "joy/2.jpg", "3.jpg")
    found = by_name(records("folder", tmp_path))
    assert {name: (r.split, r.label) for name, r in found.items()} == {
        "trains/a/1.jpg": (None, "trains"),
        "joy/2.jpg": (None, "joy"),
        "3.jpg": (None, None),
    }


def test_folders_of_splits_beside_others_are_named_in_one_line(tmp_path: Path) -> None:
    tree(tmp_path, "Train/a/1.jpg", "joy/2.jpg", "awe/2.jpg", "3.jpg")
    with pytest.raises(UserError) as caught:
        records("folder", tmp_path)
    assert str(caught.value) == (
        f"SOURCE={tmp_path}: has folders of splits (Train) beside others (awe, joy); remove one kind, or rename "
        "a label that is called like a split"
    )


def test_the_case_of_split_folders_does_not_matter_and_clutter_is_left_out(tmp_path: Path) -> None:
    tree(tmp_path, "Train/joy/1.jpg", "VALID/awe/2.jpg", "test/joy/3.jpg")
    tree(tmp_path, "__MACOSX/train/joy/._1.jpg", ".cache/4.jpg", "test/joy/.thumbs/5.jpg", "test/joy/.6.jpg")
    found = by_name(records("folder", tmp_path))
    assert {name: (r.split, r.label) for name, r in found.items()} == {
        "Train/joy/1.jpg": ("train", "joy"),
        "VALID/awe/2.jpg": ("val", "awe"),
        "test/joy/3.jpg": ("test", "joy"),
        "test/joy/.6.jpg": ("test", "joy"),
    }


def test_unicode_dotted_and_spaced_names_stay_as_they_are(tmp_path: Path) -> None:
    names = {"Freude ü/ein bild.v2.jpg", "喜び/絵.png", "a.b/c..jpg"}
    tree(tmp_path, *names)
    found = by_name(records("folder", tmp_path))
    assert set(found) == names
    assert {r.label for r in found.values()} == {"Freude ü", "喜び", "a.b"}


def test_a_file_name_that_is_not_utf8_is_escaped_and_readable(tmp_path: Path) -> None:
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


def test_an_unreadable_caption_refuses_only_its_own_picture(tmp_path: Path) -> None:
    tree(tmp_path, "bytes.jpg", "fine.jpg", "loop.jpg", "nowhere.jpg")
    (tmp_path / "bytes.txt").write_bytes(b"caf\xe9")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "nowhere.txt").symlink_to("no such file")
    found = by_name(records("folder", tmp_path))
    reason, detail = found["bytes.jpg"].refused or ("", "")
    assert (reason, detail[:45]) == ("annotation", "its caption bytes.txt: 'utf-8' codec can't de")
    refused = {name: found[f"{name}.jpg"].refused for name in ("fine", "loop", "nowhere")}
    assert refused == {
        "fine": None,
        "loop": ("annotation", "its caption loop.txt: cannot be read (Too many levels of symbolic links)"),
        "nowhere": ("annotation", "its caption nowhere.txt: no such file"),
    }


def test_other_files_are_no_records_and_pictures_of_other_formats_are_offered(tmp_path: Path) -> None:
    tree(tmp_path, "a.jpg", "b.gif", "notes.txt", "c.jpg.bak", "jpg", ".d.JPEG")
    assert [record.name for record in records("folder", tmp_path)] == [".d.JPEG", "a.jpg", "b.gif"]


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    tree(tmp_path, "x/a.jpg")
    (tmp_path / "x/again").symlink_to(tmp_path)
    (tmp_path / "x/self.jpg").symlink_to(tmp_path / "x/self.jpg")
    # A link to itself is a picture that cannot be read: it is offered, and refused when it is packed.
    assert [record.name for record in records("folder", tmp_path)] == ["x/a.jpg", "x/self.jpg"]


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "elsewhere", "deep/1.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/joy").symlink_to(tmp_path / "elsewhere")
    [record] = records("folder", tmp_path / "in")
    assert (record.name, record.label, record.group) == ("joy/deep/1.jpg", "joy", "deep")


def test_a_missing_or_empty_folder_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"SOURCE=.*no: no such folder"):
        records("folder", tmp_path / "no")
    with pytest.raises(UserError, match=r"has no pictures; its files are none; give another folder"):
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
    assert image_of(record) == b"jpg"
    fields = (record.name, record.captions, record.label, record.attributes, record.split, record.persons)
    assert fields == ("k", ("c",), "3", {"polarity": -4}, "train", None)
    assert record.size is not None


def test_a_list_of_captions_stays_a_list_without_its_empty_ones(tmp_path: Path) -> None:
    rows = [{"image": b"x", "caption": ["one", "", "two", None]}, {"image": b"x", "caption": []}]
    found = by_name(records("table", parquet(tmp_path / "t.parquet", rows)))
    assert found["t.parquet#0"].captions == ("one", "two")
    assert found["t.parquet#1"].captions == ()


def test_rows_without_a_key_are_named_by_table_and_row_in_any_row_group(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"image": bytes([i])} for i in range(25)], row_group_size=4)
    found = by_name(records("table", path))
    assert {name: image_of(record) for name, record in found.items()} == {
        f"t.parquet#{i}": bytes([i]) for i in range(25)
    }


def test_columns_can_be_renamed(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"jpg": b"x", "text": "c", "label": "l"}])
    [record] = records("table", path, columns={"image": "jpg", "caption": "text"})
    assert (image_of(record), record.captions, record.label, record.attributes) == (b"x", ("c",), "l", {})
    with pytest.raises(UserError, match=r"--column picture=…: unknown column; valid are image, path"):
        records("table", path, columns={"picture": "jpg"})
    with pytest.raises(
        UserError, match=r"--column caption=words: .* has no such column; its columns are jpg, text"
    ):
        records("table", path, columns={"image": "jpg", "caption": "words"})


def test_a_struct_of_bytes_and_path_is_a_picture(tmp_path: Path) -> None:
    rows = [
        {"key": "a", "image": {"bytes": b"x", "path": None}},
        {"key": "b", "image": {"bytes": None, "path": "p.jpg"}},
    ]
    found = by_name(records("table", parquet(tmp_path / "t.parquet", rows)))
    assert (image_of(found["a"]), image_of(found["b"])) == (b"x", str(tmp_path / "p.jpg"))


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
    found = by_name(records("table", tmp_path / "t.csv", allow_outside=True))
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
        f"SOURCE={path}: has neither column 'image' (picture bytes) nor 'path' (picture file); "
        "its columns are jpg, text; name one with --column image=NAME"
    )


def test_a_picture_column_of_numbers_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"image": 3}])
    with pytest.raises(UserError, match="column 'image' holds int64, not pictures or paths"):
        records("table", path)


@pytest.mark.parametrize("name", ["t.parquet", "t.csv"])
def test_a_file_that_is_not_a_table_is_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=f"SOURCE=.*{name}: not a readable table"):
        records("table", tmp_path / name)


def test_a_missing_table_error_lists_valid_sources(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"no such table; give a \.parquet or \.csv file, a folder of \.parquet files, or shipped:",
    ):
        records("table", tmp_path / "no.parquet")


def test_an_unknown_layout_lists_the_valid_ones() -> None:
    with pytest.raises(UserError) as caught:
        records("zip", "x")
    valid = str(caught.value).removeprefix("--layout=zip: not known; valid are ").split(", ")
    assert {"coco", "emoset", "emotic", "folder", "table", "wds"} <= set(valid)


def test_the_shipped_table_matches_its_readme() -> None:
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
    assert all(isinstance(r.image, Cell) and len(r.captions) == 1 for r in found)
    reader = CellReader()
    assert all(reader.read(r.image, 0)[8:12] == b"WEBP" for r in found if isinstance(r.image, Cell))
    polarity = [r.attributes["polarity"] for r in found if "polarity" in r.attributes]
    assert (len(polarity), min(polarity), max(polarity)) == (118, -4, 4)
    families = {
        split: {r.attributes["family"] for r in found if r.split == split} for split in ("train", "test")
    }
    assert not families["train"] & families["test"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('path,label\na.jpg,"joy\nb.jpg,awe\n', "line 3: unexpected end of data; fix its quotes"),
        ('path,label\na.jpg,"joy"x,1\n', "line 2: ',' expected after '\"'; fix its quotes"),
        ("path,label\na.jpg\n", "line 2 has 1 values, but the header has 2; fix its commas or quotes"),
        ("label,text\njoy,x\n", "has neither column 'image'"),
        ("path,label,path\na.jpg,x,b.jpg\n", "has 2 columns called 'path'; rename or remove all but one"),
        ("path\ncaf\udce9.jpg\n", "not a CSV in UTF-8 ("),
    ],
)
def test_a_broken_csv_names_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError) as caught:
        records("table", tmp_path / "t.csv")
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_several_tables_are_one_source(tmp_path: Path) -> None:
    for name in ("b", "a"):
        parquet(tmp_path / f"{name}.parquet", [{"image": name.encode()}])
    for source in (tmp_path, tmp_path / "*.parquet"):
        found = records("table", source)
        assert [(r.name, image_of(r)) for r in found] == [("a.parquet#0", b"a"), ("b.parquet#0", b"b")]


def test_tables_of_one_name_in_several_folders_have_records_of_different_names(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name / "data.parquet", [{"image": name.encode()}])
    found = records("table", tmp_path / "*/data.parquet")
    assert [(r.name, image_of(r)) for r in found] == [("a/data.parquet#0", b"a"), ("b/data.parquet#0", b"b")]


def test_a_table_damaged_in_a_column_is_named_whoever_reads_that_column(tmp_path: Path) -> None:
    path = parquet(tmp_path / "t.parquet", [{"image": bytes(range(200)), "caption": "c" * 200}])
    whole, columns = path.read_bytes(), pq.ParquetFile(path).metadata.row_group(0)
    offsets = {columns.column(i).path_in_schema: columns.column(i).data_page_offset for i in range(2)}
    for column, read in (("caption", records), ("image", lambda *source: image_of(records(*source)[0]))):
        at = offsets[column]
        path.write_bytes(whole[:at] + b"\xff" * 30 + whole[at + 30 :])
        with pytest.raises(UserError) as caught:
            read("table", path)
        assert str(caught.value).startswith(f"SOURCE={path}: not a readable table: ")
        assert len(str(caught.value).splitlines()) == 1


def test_values_that_are_no_texts_refuse_their_row_which_keeps_its_split(tmp_path: Path) -> None:
    rows = [{"image": b"x", "split": "train", "key": "a", "caption": {"en": "c"}}]
    [record] = records("table", parquet(tmp_path / "t.parquet", rows))
    detail = "the column 'caption': holds an object, but a text is expected"
    assert (record.name, record.split, record.refused) == ("a", "train", ("annotation", detail))


def test_persons_of_a_table_are_the_sources_own(tmp_path: Path) -> None:
    person = {"box": [0.1, 0.2, 0.3, 0.4], "score": 0.5, "labels": '{"age": 3}'}
    rows = [{"key": "a", "image": b"x", "persons": [person]}, {"key": "b", "image": b"x", "persons": []}]
    found = by_name(records("table", parquet(tmp_path / "t.parquet", rows)))
    assert found["a"].persons == (Person((0.1, 0.2, 0.3, 0.4), 0.5, {"age": 3}),)
    assert found["b"].persons is None
    (tmp_path / "t.csv").write_text('path,persons\na.jpg,"[{""box"": [0, 0, 1]}]"\n')
    [record] = records("table", tmp_path / "t.csv")
    assert record.refused is not None
    assert record.refused[0] == "annotation"


NEW_LAYOUT = """
from shards.sources import Record
from shards.storage import parse_place


def read(source, options):
    root = parse_place(source, "SOURCE")
    for line in (root / "pictures.txt").read_text(encoding="utf-8").splitlines():
        name, label = line.split()
        yield Record(name=name, image=str(root / name), label=label)
"""


def test_a_module_dropped_into_layouts_is_a_layout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from shards.sources import layout_names, layouts
    from uniemox_dist.cli.main import run

    before = layout_names()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/listed_file.py").write_text(NEW_LAYOUT)
    (tmp_path / "more/_helper.py").write_text("raise AssertionError('not a layout')")
    monkeypatch.setattr(layouts, "__path__", [*layouts.__path__, str(tmp_path / "more")])
    assert layout_names() == sorted([*before, "listed_file"])
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(buffer.getvalue())
    (tmp_path / "in/pictures.txt").write_text("a.png joy\n")
    command = ["shards", "pack", str(tmp_path / "in"), str(tmp_path / "out"), "--persons", "none"]
    assert run([*command, "--workers", "0", "--layout", "listed_file"]) == 0
    assert "1 records = 1 packed + 0 refused" in capsys.readouterr().out
    command[3] = str(tmp_path / "other")
    assert run([*command, "--layout", "listed"]) == 2
    assert f"--layout=listed: not known; valid are {', '.join(layout_names())}" in capsys.readouterr().err
    assert run(["shards", "pack", "--help"]) == 0
    assert "listed_file" in capsys.readouterr().out
