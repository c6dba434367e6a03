"""Tables that other programs write: JSON Lines, Arrow, Hugging Face's classes, splits in names, paths outside."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from shards.pictures.formats import BadPicture
from shards.sources import Cell, Record, SourceOptions, check_options, open_source
from shards.sources.files import fetch_images
from shards.sources.tables import CellReader
from uniemox_dist.core.errors import UserError


def records(source: object, **options: Any) -> list[Record]:
    return list(open_source("table", str(source), SourceOptions(**options)))


def image_of(record: Record) -> object:
    return CellReader().read(record.image, 0) if isinstance(record.image, Cell) else record.image


# ---- JSON Lines


@pytest.mark.parametrize("name", ["t.jsonl", "t.ndjson", "t.JSONL"])
def test_a_line_of_json_becomes_a_record(name: str, tmp_path: Path) -> None:
    lines = [
        {"file_name": "a/1.jpg", "text": "one", "label": 3, "deep": {"x": [1.5, None]}, "note": None},
        {"image": "2.jpg", "text": ["two", "zwei"], "tag": "kept", "split": "Validation", "key": "k"},
        {"url": "https://host/3.jpg", "text": "three", "WIDTH": 7},
        {"image": {"path": "4.jpg", "bytes": None}, "persons": [{"box": [0, 0, 1, 0.5]}]},
    ]
    text = "\ufeff" + "\n\n".join(json.dumps(line) for line in lines) + "\n"
    (tmp_path / name).write_text(text, encoding="utf-8")
    first, second, third, fourth = records(tmp_path / name)
    deep = {"deep": {"x": [1.5, None]}}
    assert first == Record(f"{name}#0", str(tmp_path / "a/1.jpg"), ("one",), "3", deep)
    assert second == Record(
        "k", str(tmp_path / "2.jpg"), ("two", "zwei"), attributes={"tag": "kept"}, split="val"
    )
    assert third == Record(f"{name}#2", "https://host/3.jpg", ("three",), attributes={"WIDTH": 7})
    assert fourth.image == str(tmp_path / "4.jpg")
    assert [person.box for person in fourth.persons or ()] == [(0, 0, 1, 0.5)]


def test_a_bad_line_refuses_only_itself(tmp_path: Path) -> None:
    lines = [
        b'{"path": "1.jpg"}',
        b'{"path":',
        b'["2.jpg"]',
        b'{"path": "caf\xe9.jpg"}',
        b'{"caption": "none"}',
    ]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join([*lines, b'{"path": "5.jpg"}']))
    found = records(tmp_path / "t.jsonl")
    assert [record.name for record in found] == [f"t.jsonl#{i}" for i in range(6)]
    details = [record.refused[1] if record.refused else "" for record in found]
    assert [detail[:40] for detail in details] == [
        "",
        "line 2: Expecting value at character 9",
        "line 3: holds list, not an object",
        "line 4: 'utf-8' codec can't decode byte ",
        "names no picture; its fields are caption",
        "",
    ]


def test_columns_of_json_lines_can_be_renamed(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"jpg": "1.jpg", "says": "c", "text": "t"}\n')
    [record] = records(tmp_path / "t.jsonl", columns={"image": "jpg", "caption": "says"})
    assert (record.image, record.captions, record.attributes) == (
        str(tmp_path / "1.jpg"),
        ("c",),
        {"text": "t"},
    )


def test_an_endless_line_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b'{"path": "1.jpg"}\n"' + b"x" * (17 << 20))
    with pytest.raises(UserError, match="line 2 has more than 16 MiB; put one object on each line"):
        records(tmp_path / "t.jsonl")


def test_json_lines_in_utf16_are_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "1.jpg"}\n', encoding="utf-16")
    with pytest.raises(
        UserError, match=r"is in UTF-16; convert it: iconv -f UTF-16 -t UTF-8 t\.jsonl > FILE"
    ):
        records(tmp_path / "t.jsonl")


# ---- CSV of other programs


@pytest.mark.parametrize("mark", ["| ", ";", "\t"])
def test_other_delimiters_are_found_in_the_header(mark: str, tmp_path: Path) -> None:
    rows = [["image_name", "comment"], ["1.jpg", "a, b"]]
    (tmp_path / "t.csv").write_text("".join(mark.join(row) + "\n" for row in rows))
    [record] = records(tmp_path / "t.csv")
    assert (record.image, record.captions) == (str(tmp_path / "1.jpg"), ("a, b",))


@pytest.mark.parametrize(
    ("text", "column", "caption"),
    [
        ('"path";"a, caption"\n"1.jpg";"x"\n', "a, caption", "x"),  # the comma is inside of quotes
        ('path;"a, caption"\n1.jpg;x, y\n', "a, caption", "x, y"),
        ('path|"a ""b"", c;d"\n1.jpg|"x|y"\n', 'a "b", c;d', "x|y"),
        ('"path","a;b"\n1.jpg,"x; y"\n', "a;b", "x; y"),
        ('path,"a\nb;c"\n1.jpg,x\n', "a\nb;c", "x"),
        ("path,a;b\n1.jpg,x\n", "a;b", "x"),  # both delimiters fit the header, one the rows
        ("path;a,b\n1.jpg;x\n2.jpg;y\n", "a,b", "x"),
        ('path;size 5",b\n1.jpg;x\n', 'size 5",b', "x"),  # a quote inside of a cell is a character
        ("path\ta;b,c\n1.jpg\tx, y; z\n", "a;b,c", "x, y; z"),
        ("path;a,b\n" + "1.jpg;x\n" * 20000, "a,b", "x"),  # longer than what decides
    ],
)
def test_the_delimiter_is_the_one_outside_of_quotes_that_fits_the_rows(
    text: str, column: str, caption: str, tmp_path: Path
) -> None:
    (tmp_path / "t.csv").write_text(text)
    first = records(tmp_path / "t.csv", columns={"caption": column})[0]
    assert (first.image, first.captions) == (str(tmp_path / "1.jpg"), (caption,))


def test_a_csv_with_one_column_and_a_row_of_two_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path\n1.jpg\n2.jpg,x\n")
    with pytest.raises(
        UserError, match="line 3 has 2 values, but the header has 1; fix its commas or quotes"
    ):
        records(tmp_path / "t.csv")


def test_a_key_that_occurs_twice_refuses_its_line(tmp_path: Path) -> None:
    lines = [
        '{"path": "1.jpg", "caption": "a", "caption": "b"}',
        '{"path": "2.jpg", "caption": "a", "caption": "a", "more": {"x": 1, "x": 2}}',
        '{"path": "3.jpg", "caption": "a", "caption": "a"}',  # loses nothing
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    first, second, third = records(tmp_path / "t.jsonl")
    detail = "line {}: the key '{}' occurs twice in one object, with different values"
    assert first.refused == ("annotation", detail.format(1, "caption"))
    assert second.refused == ("annotation", detail.format(2, "x"))
    assert (third.refused, third.captions) == (None, ("a",))


def test_a_table_with_a_column_called_path_has_a_label_of_that_very_name_only(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,text,category\n1.jpg,t,c\n")
    options = SourceOptions()
    [record] = open_source("table", str(tmp_path / "t.csv"), options)
    assert (record.captions, record.label, record.attributes) == (("t",), None, {"category": "c"})
    assert options.findings.notes == [
        "the column 'category' became an attribute; --column label=category makes it the label"
    ]


# ---- Arrow


def write_arrow(path: Path, table: pa.Table, kind: str) -> Path:
    if kind == "feather":
        pyarrow.feather.write_feather(table, str(path), compression="lz4", chunksize=2)
    else:
        make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


@pytest.mark.parametrize("kind", ["feather", "file", "stream"])
def test_pictures_and_captions_of_arrow_files_are_read(kind: str, tmp_path: Path) -> None:
    table = pa.table({"image": [bytes([i]) for i in range(5)], "caption": [f"c{i}" for i in range(5)]})
    found = records(write_arrow(tmp_path / "t.arrow", table, kind))
    assert [image_of(record) for record in found] == [bytes([i]) for i in range(5)]
    assert [record.captions for record in found] == [(f"c{i}",) for i in range(5)]
    assert [record.name for record in found] == [f"t.arrow#{i}" for i in range(5)]


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_an_arrow_file_that_is_cut_off_is_a_user_error(kind: str, tmp_path: Path) -> None:
    table = pa.table({"image": [bytes(1000)] * 5})
    path = write_arrow(tmp_path / "t.arrow", table, kind)
    data = path.read_bytes()
    for length in (0, 3, len(data) // 2, len(data) - 8):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"SOURCE=.*t\.arrow: not a readable table: .*; copy it again"):
            records(path)


BYTES = [
    pa.binary(),
    pa.large_binary(),
    pa.binary_view(),
    pa.binary(1),
    pa.dictionary(pa.int8(), pa.binary()),
]
TEXTS = [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.int32(), pa.large_string()),
]


@pytest.mark.parametrize("kind", BYTES, ids=str)
def test_pictures_may_have_any_type_of_bytes(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array([b"x", b"y"], kind if not pa.types.is_dictionary(kind) else kind.value_type)
    table = pa.table({"image": column.dictionary_encode() if pa.types.is_dictionary(kind) else column})
    assert [image_of(r) for r in records(write_arrow(tmp_path / "t.arrow", table, "file"))] == [b"x", b"y"]
    if not pa.types.is_dictionary(kind):
        pq.write_table(table, tmp_path / "t.parquet")
        assert [image_of(r) for r in records(tmp_path / "t.parquet")] == [b"x", b"y"]


@pytest.mark.parametrize("kind", TEXTS, ids=str)
def test_paths_captions_and_labels_may_have_any_type_of_text(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array(["a", "b"], pa.string()).cast(kind) if not pa.types.is_dictionary(kind) else None
    column = pa.array(["a", "b"]).dictionary_encode().cast(kind) if column is None else column
    table = pa.table(dict.fromkeys(("path", "caption", "label"), column))
    pq.write_table(table, tmp_path / "t.parquet")
    for path in (tmp_path / "t.parquet", write_arrow(tmp_path / "t.arrow", table, "file")):
        found = [(record.image, record.captions, record.label) for record in records(path)]
        assert found == [(str(tmp_path / text), (text,), text) for text in "ab"]


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()),
        pa.large_list(pa.string()),
        pa.list_view(pa.string_view()),
        pa.list_(pa.string(), 2),
    ],
    ids=str,
)
def test_captions_may_have_any_type_of_list(kind: pa.DataType, tmp_path: Path) -> None:
    table = pa.table({"path": ["a"], "text": pa.array([["one", "two"]], kind)})
    [record] = records(write_arrow(tmp_path / "t.arrow", table, "file"))
    assert record.captions == ("one", "two")


# ---- Hugging Face


FEATURES = {
    "image": {"_type": "Image"},
    "text": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["joy", "fear"], "_type": "ClassLabel"},
    "tags": {"feature": {"names": ["x", "y"], "_type": "ClassLabel"}, "_type": "List"},
    "objects": {  # how `datasets` 5 states a Sequence of objects
        "bbox": {"feature": {"dtype": "float32", "_type": "Value"}, "_type": "List"},
        "category": {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "List"},
    },
    "parts": {  # how `datasets` 2 does
        "feature": {"kind": {"names": ["eye", "ear"], "_type": "ClassLabel"}},
        "_type": "Sequence",
    },
}


def hugging_face(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] = FEATURES) -> Path:
    table = pa.Table.from_pylist(rows)
    content = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": content}), path)
    return path


def test_classes_are_stored_by_name(tmp_path: Path) -> None:
    row = {
        "image": {"bytes": b"x", "path": "1.png"},
        "text": "a caption",
        "label": 1,
        "tags": [1, 0],
        "objects": {"bbox": [0.5], "category": [1, 0]},
        "parts": {"kind": [0, 1, None]},
    }
    rows = [row, {**row, "label": -1}, {**row, "label": 0}, {**row, "label": 2}, {**row, "label": None}]
    found = records(hugging_face(tmp_path / "t.parquet", rows))
    assert [record.label for record in found] == ["fear", None, "joy", None, None]
    assert found[0].captions == ("a caption",)
    assert found[0].attributes == {
        "tags": ["y", "x"],
        "objects": {"bbox": [0.5], "category": ["dog", "cat"]},
        "parts": {"kind": ["eye", "ear", None]},
    }
    assert image_of(found[0]) == b"x"
    assert [record.refused for record in found[:3]] == [None] * 3
    assert found[3].refused == (
        "annotation",
        "the column 'label': class 2 has no name; the table names 2 classes",
    )


def test_the_picture_column_of_hugging_face_may_have_any_name(tmp_path: Path) -> None:
    features = {"pixels": {"_type": "Image"}, "labels": {"names": ["a", "b"], "_type": "ClassLabel"}}
    rows = [{"pixels": {"bytes": b"x", "path": None}, "labels": 1}]
    [record] = records(hugging_face(tmp_path / "t.parquet", rows, features))
    assert (image_of(record), record.label) == (b"x", "b")


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"info": {"features": []}}', b'{"info": null}', b"\xff"])
def test_unreadable_features_count_as_none(content: bytes, tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"], "label": [1]}).replace_schema_metadata({b"huggingface": content})
    pq.write_table(table, tmp_path / "t.parquet")
    assert [record.label for record in records(tmp_path / "t.parquet")] == ["1"]


# ---- splits


def test_usual_names_of_splits_in_a_column_mean_the_same(tmp_path: Path) -> None:
    names = ["train", "Training", "val", "VALIDATION", "valid", "dev", "test", "testing", "extra"]
    rows = [{"image": b"x", "split": name} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [record.split for record in records(tmp_path / "t.parquet")]
    assert found == ["train", "train", "val", "val", "val", "val", "test", "test", "extra"]


def splits_of(tmp_path: Path, *names: str, source: str = "") -> dict[str, str | None]:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"image": [b"x"]}), tmp_path / name)
    found = records(f"{tmp_path}/{source}" if source else tmp_path)
    return {record.name.partition("#")[0]: record.split for record in found}


def test_tables_called_like_splits_are_splits(tmp_path: Path) -> None:
    assert splits_of(
        tmp_path,
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
        "Validation-00000-of-00001-0d49c5d7b8ac2ba4.parquet",
        "test.parquet",
    ) == {
        "train-00000-of-00002.parquet": "train",
        "train-00001-of-00002.parquet": "train",
        "Validation-00000-of-00001-0d49c5d7b8ac2ba4.parquet": "val",
        "test.parquet": "test",
    }


def test_folders_called_like_splits_are_splits_of_their_tables(tmp_path: Path) -> None:
    expected = {"train/0000.parquet": "train", "test/0000.parquet": "test"}
    assert splits_of(tmp_path, *expected) == expected
    assert splits_of(tmp_path, *expected, source="*/*.parquet") == expected


def test_tables_of_which_one_is_not_called_like_a_split_have_none(tmp_path: Path) -> None:
    assert splits_of(tmp_path, "train.parquet", "more.parquet") == {
        "train.parquet": None,
        "more.parquet": None,
    }


def test_a_table_that_is_the_source_itself_has_the_splits_of_its_column_only(tmp_path: Path) -> None:
    name = "train-00000-of-00001.parquet"
    assert splits_of(tmp_path, name, source=name) == {name: None}


def test_a_folder_may_hold_tables_of_one_other_kind(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_text("path\n1.jpg\n")
    assert [record.split for record in records(tmp_path)] == ["test", "train"]
    (tmp_path / "more.jsonl").touch()
    with pytest.raises(
        UserError, match=r"has tables of several kinds \(\.jsonl, \.csv\); give a pattern such"
    ):
        records(tmp_path)


# ---- paths outside


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/etc/passwd",
            "../1.jpg",
            "a/../../1.jpg",
            "..",
            ".",
            "a/..",
            "file:///etc/passwd",
            "local:///etc/x",
        ),
        *("zip://a.jpg::/etc/x.zip", "simplecache::file:///etc/passwd", "s3://b/x::file:///etc/passwd"),
        *("git://x", "FILE:///etc/passwd", "memory://x"),
    ],
)
def test_a_path_that_leads_out_of_the_folder_is_refused_by_name(path: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/t.csv").write_text(f"path,caption\n{path},c\n")
    (tmp_path / "in/t.jsonl").write_text(json.dumps({"path": path}) + "\n")
    pq.write_table(pa.table({"path": [path]}), tmp_path / "in/t.parquet")
    for name in ("t.csv", "t.jsonl", "t.parquet"):
        [record] = records(tmp_path / "in" / name)
        assert record.refused is not None
        reason, detail = record.refused
        assert (reason, record.image) == ("outside", b"")
        assert detail.startswith(path)
        assert detail.endswith("; --allow-outside permits it")
        [allowed] = records(tmp_path / "in" / name, allow_outside=True)
        assert allowed.refused is None


def test_paths_and_urls_that_stay_inside_are_kept(tmp_path: Path) -> None:
    inside = [f"{tmp_path}/1.jpg", "./2.jpg", "a/../3.jpg", "..4.jpg", f"file://{tmp_path}/5.jpg"]
    urls = [
        "http://h/1.jpg",
        "https://h/a::b.jpg",
        "s3://b/../1.jpg",
        "gs://b/1.jpg",
        "hf://datasets/x/1.jpg",
    ]
    (tmp_path / "t.csv").write_text("path\n" + "".join(f"{path}\n" for path in inside + urls))
    found = records(tmp_path / "t.csv")
    assert [record.refused for record in found] == [None] * 10
    assert [record.image for record in found[5:]] == urls


def test_a_path_inside_a_cell_of_hugging_face_may_not_lead_out(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": None, "path": "/etc/passwd"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    [record] = records(tmp_path / "t.parquet")
    refused = image_of(record)
    assert isinstance(refused, BadPicture)
    assert refused.reason == "outside"


def test_a_link_that_leads_out_is_refused_when_the_picture_is_read(tmp_path: Path) -> None:
    for name in ("in/real.jpg", "elsewhere/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "in/file.jpg").symlink_to(tmp_path / "elsewhere/1.jpg")
    (tmp_path / "in/folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/inner.jpg").symlink_to("real.jpg")
    (tmp_path / "link").symlink_to(tmp_path / "in")  # the table's own folder may be a link
    names = ["real.jpg", "inner.jpg", "file.jpg", "folder/1.jpg"]
    (tmp_path / "in/t.csv").write_text("path\n" + "".join(f"{name}\n" for name in names))
    for source in ("in/t.csv", "link/t.csv"):
        options = SourceOptions()
        found = list(open_source("table", str(tmp_path / source), options))
        images = [record.image for record in found]
        first, second, *outside = fetch_images(images, tuple(options.findings.roots))
        assert (first, second) == (b"x", b"x")
        for name, refused in zip(names[2:], outside):
            assert isinstance(refused, BadPicture)
            assert refused.reason == "outside"
            assert refused.detail == (
                f"a link leads out of the folder {tmp_path / Path(source).parent}: "
                f"{tmp_path / Path(source).parent / name}; --allow-outside permits it"
            )
        assert fetch_images(images) == [b"x"] * 4
        allowed = SourceOptions(allow_outside=True)
        assert len(list(open_source("table", str(tmp_path / source), allowed))) == 4
        assert not allowed.findings.roots


def test_the_option_has_an_effect_or_is_refused() -> None:
    with pytest.raises(
        UserError, match="--allow-outside: --layout wds reads no paths from its files; leave it"
    ):
        check_options("wds", SourceOptions(allow_outside=True))


def test_a_column_that_no_line_has_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"path": "1.jpg", "words": "a"}\n{"path": "2.jpg", "other": "b"}\n')
    assert [record.captions for record in records(tmp_path, columns={"caption": "words"})] == [("a",), ()]
    with pytest.raises(
        UserError, match=r"^--column caption=nope: no line of .*t\.jsonl has such a field; the "
    ):
        records(tmp_path, columns={"caption": "nope"})


def test_an_empty_cell_of_pictures_leaves_it_to_the_path_of_its_row(tmp_path: Path) -> None:
    rows = [
        {"image": b"bytes", "path": "1.jpg"},
        {"image": None, "path": "p/2.jpg"},
        {"image": None, "path": "../3.jpg"},
        {"image": None, "path": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [image_of(record) for record in records(tmp_path / "t.parquet")]
    assert found == [b"bytes", str(tmp_path / "p/2.jpg"), b"", b""]


def test_blank_texts_are_missing_and_outer_white_space_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(
        'path,caption,label\n1.jpg," \n",joy \n2.jpg, two , joy\n', encoding="utf-8"
    )
    first, second = records(tmp_path / "t.csv")
    assert (first.captions, first.label) == ((), "joy")
    assert (second.captions, second.label) == (("two",), "joy")
