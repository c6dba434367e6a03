"""Picture folders as people have them: captions in every usual place, pictures of any name, every file counted."""

import io
import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import shards.sources.layouts.folder
from shards.pack.packer import PackResult
from shards.pack.pipeline import PackSettings, pack
from shards.sources import Record, SourceOptions, open_source
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import UserError


def picture(number: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels_HW3).save(buffer, kind)
    return buffer.getvalue()


def tree(root: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def listed(root: Path, **options: Any) -> tuple[dict[str, Record], SourceOptions]:
    given = SourceOptions(**options)
    found = list(open_source("folder", str(root), given))
    assert len({record.name for record in found}) == len(found)
    return {record.name: record for record in found}, given


def packed(root: Path, out: Path) -> PackResult:
    return pack(PackSettings(str(root), "folder", persons="none"), out)


# ---- captions beside pictures


@pytest.mark.parametrize(
    "name", ["x.txt", "x.TXT", "x.caption", "x.Caption", "x.text", "x.jpg.txt", "x.jpg.caption", "x.JPG.txt"]
)
def test_a_captions_file_beside_a_picture_is_read(name: str, tmp_path: Path) -> None:
    picture_name = "x.JPG" if name.startswith("x.JPG") else "x.jpg"
    found, options = listed(tree(tmp_path, {picture_name: picture(1), name: "\ufeff a caption \n"}))
    assert found[picture_name].captions == ("a caption",)
    assert options.findings.notes == []
    assert options.findings.not_pictures == {f".{name.rpartition('.')[2].lower()}": 1}


@pytest.mark.parametrize(
    ("content", "captions", "attributes"),
    [
        ({"caption": "c", "url": "u", "width": 3, "sha256": "f", "status": "success"}, ("c",), {"url": "u"}),
        ({"captions": ["a", "b"], "attributes": {"x": 1}}, ("a", "b"), {"x": 1}),
        ({"text": "t"}, ("t",), {}),
        ({"tags": "cat, dog"}, ("cat, dog",), {"tags": "cat, dog"}),
        ({"tags": ["cat", "dog"], "caption": "c"}, ("c",), {"tags": ["cat", "dog"]}),
        ({"tags": ["cat", "dog"]}, ("cat, dog",), {"tags": ["cat", "dog"]}),
    ],
)
def test_the_json_beside_a_picture_is_read(
    content: dict[str, Any], captions: tuple[str, ...], attributes: dict[str, Any], tmp_path: Path
) -> None:
    found, _ = listed(tree(tmp_path, {"x.jpg": picture(1), "x.json": json.dumps(content)}))
    assert (found["x.jpg"].captions, found["x.jpg"].attributes) == (captions, attributes)


def test_an_extracted_tar_of_ours_gives_the_same_samples(tmp_path: Path) -> None:
    said = json.dumps({"captions": ["a", "b"], "score": 0.5, "persons": [{"box": [0, 0, 1, 1]}]})
    result = packed(tree(tmp_path / "in", {"1.png": picture(1), "1.json": said}), tmp_path / "out")
    with tarfile.open(result.folders[0] / "000000.tar") as tar:
        tar.extractall(tmp_path / "extracted", filter="data")
    (first,), (again,) = (listed(tmp_path / name)[0].values() for name in ("in", "extracted"))
    assert (again.captions, again.attributes) == (("a", "b"), {"score": 0.5})
    assert (again.captions, again.attributes, again.persons) == (
        first.captions,
        first.attributes,
        first.persons,
    )


def test_a_folder_goes_before_the_label_of_a_json(tmp_path: Path) -> None:
    said = json.dumps({"label": "fear", "persons": [{"box": [0, 0, 1, 1]}]})
    files = {"joy/1.jpg": picture(1), "joy/1.json": said, "2.jpg": picture(2), "2.json": said}
    found, _ = listed(tree(tmp_path, files))
    assert (found["joy/1.jpg"].label, found["joy/1.jpg"].attributes) == ("joy", {"label": "fear"})
    assert (found["2.jpg"].label, found["2.jpg"].attributes) == ("fear", {})
    assert [len(found[name].persons or ()) for name in ("joy/1.jpg", "2.jpg")] == [1, 1]


def test_all_captions_files_of_a_picture_are_kept_in_a_stated_order(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "x.jpg": picture(1),
        "x.json": json.dumps({"caption": "json"}),
        "x.jpg.txt": "whole name",
        "x.text": "text",
        "x.caption": "caption",
        "x.TXT": "TXT",
        "x.txt": "txt",
        "metadata.csv": "file_name,text\nx.jpg,metadata\n",
        "y.jpg": picture(2),
        "y.txt": "same",
        "y.caption": "same",
    }
    found, options = listed(tree(tmp_path, files))
    expected = ("txt", "TXT", "caption", "text", "whole name", "metadata", "json")
    assert found["x.jpg"].captions == expected
    assert found["y.jpg"].captions == ("same",)
    note = "1 pictures with different captions in several files; all are kept, such as x.jpg"
    assert note in options.findings.notes


def test_captions_files_that_belong_to_no_picture_are_counted(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "x.jpg": picture(1),
        "readme.txt": "hello",
        "y.caption": "c",
        "z.json": '{"caption": "c", "url": "http://z.jpg"}',
        "n.json": "{}",
        "coco.json": '{"images": [], "annotations": []}',
        "damaged.json": '{"caption": "c',
        "list.json": '["c"]',
    }
    _, options = listed(tree(tmp_path, files))
    assert options.findings.notes == [
        "2 captions files (.txt, .caption, .text) that belong to no picture, such as readme.txt",
        "1 .json files with captions that belong to no picture, such as z.json",
    ]
    assert options.findings.not_pictures == {".txt": 1, ".caption": 1, ".json": 5}


def test_a_json_that_is_damaged_refuses_its_picture_and_a_foreign_one_is_noted(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        **{
            f"{name}.jpg": picture(i)
            for i, name in enumerate(("cut", "list", "huge", "bad", "deep", "twice"))
        },
        "cut.json": '{"caption": "c',
        "twice.json": '{"caption": "a", "caption": "b"}',
        "list.json": "[1, 2]",
        "huge.json": json.dumps({"caption": "c", "imageData": "x" * (1 << 20)}),
        "bad.json": '{"caption": {"en": "c"}}',
        "deep.json": "[" * 5000,
    }
    found, options = listed(tree(tmp_path, files))
    refused = {name: record.refused and record.refused[1][:52] for name, record in found.items()}
    assert refused == {
        "cut.jpg": "its cut.json: Unterminated string starting at: line ",
        "list.jpg": None,
        "huge.jpg": None,
        "bad.jpg": "its bad.json: the column 'caption': holds an object,",
        "deep.jpg": "its deep.json: its values are nested too deeply",
        "twice.jpg": "its twice.json: the key 'caption' occurs twice in on",
    }
    assert options.findings.notes == [
        "1 .json files of more than 1 MiB, which were not read, such as huge.json",
        "1 .json files that hold no object, which were not read, such as list.json",
    ]


def test_a_captions_file_of_many_megabytes_refuses_its_picture(tmp_path: Path) -> None:
    found, _ = listed(tree(tmp_path, {"x.jpg": picture(1), "x.txt": "x" * (17 << 20)}))
    assert found["x.jpg"].refused == ("annotation", "its caption x.txt: has more than 16 MiB")


# ---- metadata files


def write_metadata(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        lines = [",".join(map(str, row.values())) for row in rows]
        path.write_text("\n".join([",".join(rows[0]), *lines]) + "\n")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl", "metadata.parquet"])
def test_a_metadata_file_describes_the_pictures_below_it(name: str, tmp_path: Path) -> None:
    tree(tmp_path, {f"train/{i}.png": picture(i) for i in range(3)} | {"test/9.png": picture(9)})
    rows = [{"file_name": f"{i}.png", "text": f"c{i}", "label": f"l{i}", "score": i} for i in range(2)]
    write_metadata(tmp_path / "train" / name, rows)
    found, options = listed(tmp_path)
    described = {n: (r.captions, r.label, r.attributes, r.split) for n, r in found.items()}
    assert described == {
        "test/9.png": ((), None, {}, "test"),
        "train/0.png": (("c0",), "l0", {"score": 0}, "train"),
        "train/1.png": (("c1",), "l1", {"score": 1}, "train"),
        "train/2.png": ((), None, {}, "train"),
    }
    assert options.findings.notes == ["1 pictures that no metadata file names, such as train/2.png"]


def test_rows_of_one_picture_in_a_metadata_file_are_joined(tmp_path: Path) -> None:
    tree(tmp_path, {f"{i}.png": picture(i) for i in range(2)})
    rows = [("0.png", "a", "joy"), ("1.png", "b", "joy"), ("./0.png", "c", "joy"), ("1.png", "d", "fear")]
    lines = "".join(f"{','.join(row)}\n" for row in rows)
    (tmp_path / "metadata.csv").write_text(f"file_name,text,label\n{lines}")
    found, _ = listed(tmp_path)
    assert found["0.png"].captions == ("a", "c")
    assert found["1.png"].refused == (
        "conflict",
        "its rows metadata.csv, row 2 and metadata.csv, row 4 state different labels ('joy' and 'fear')",
    )


def test_files_that_only_the_metadata_names_are_listed_by_name(tmp_path: Path) -> None:
    tree(tmp_path, {"a/1.png": picture(1), "notes.md": "text"})
    names = ["1.png", "missing.png", "missing.png", "../../x.png", "/etc/passwd", "../notes.md", None]
    write_metadata(tmp_path / "a/metadata.jsonl", [{"file_name": name, "text": "c"} for name in names])
    with open(tmp_path / "a/metadata.jsonl", "a") as file:
        file.write("{\n")
    result = packed(tmp_path, tmp_path / "out")
    rows = pq.read_table(tmp_path / "out/rejected.parquet").to_pylist()
    found = {row["source"]: (row["reason"], row["detail"]) for row in rows}
    place = "a/metadata.jsonl, row"
    assert found == {
        "a/missing.png": ("unreadable", f"{place} 2 names it, but there is no such file"),
        "../x.png": ("outside", f"{place} 4 names it, but it leads out of the folder"),
        "/etc/passwd": ("outside", f"{place} 5 names it, but it leads out of the folder"),
        "notes.md": ("corrupt", found["notes.md"][1]),  # the metadata calls it a picture
        f"{place} 7": ("annotation", f"{place} 7: names no file"),
        f"{place} 8": (
            "annotation",
            f"{place} 8: line 8: Expecting property name enclosed in double quotes at character 2",
        ),
    }
    assert result.packed == {"": 1}


def test_a_picture_that_is_refused_is_not_reported_as_missing(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {
        "a/b/1.png": picture(1),
        "a/b/1.txt": b"caf\xe9",
        "a/2.psd": b"8BPS",
        "3.png": picture(3),
    }
    tree(tmp_path, files | {"a/2.txt": "caption of the PSD"})
    write_metadata(tmp_path / "a/metadata.jsonl", [{"file_name": name} for name in ("b/1.png", "2.psd")])
    found, options = listed(tmp_path)
    assert {name: record.refused and record.refused[0] for name, record in found.items()} == {
        "3.png": None,
        "a/2.psd": "format",
        "a/b/1.png": "annotation",
    }
    assert options.findings.notes == []


def test_a_file_called_metadata_without_file_names_is_noted(tmp_path: Path) -> None:
    tree(tmp_path, {"1.png": picture(1), "metadata.csv": "id,what\n1,x\n"})
    found, options = listed(tmp_path)
    assert found["1.png"].captions == ()
    assert options.findings.notes == ["metadata.csv is not used: it has no column file_name, only id, what"]


def test_columns_of_metadata_can_be_renamed(tmp_path: Path) -> None:
    tree(tmp_path, {"1.png": picture(1), "metadata.csv": "pic,says,text\n1.png,c,t\n"})
    found, _ = listed(tmp_path, columns={"path": "pic", "caption": "says"})
    assert (found["1.png"].captions, found["1.png"].attributes) == (("c",), {"text": "t"})


def test_splits_may_stand_in_the_metadata(tmp_path: Path) -> None:
    tree(tmp_path, {"1.png": picture(1), "2.png": picture(2)})
    (tmp_path / "metadata.csv").write_text("file_name,split\n1.png,Training\n2.png,dev\n")
    found, _ = listed(tmp_path)
    assert [record.split for record in found.values()] == ["train", "val"]


# ---- files by content


def test_pictures_come_in_whatever_their_name(tmp_path: Path) -> None:
    names = ["a.jpg_large", "b", "c.pbm", "d.txt", "e.json", "f.tmp", "g.jpg?w=300", "h."]
    found, options = listed(tree(tmp_path, {name: picture(i) for i, name in enumerate(names)}))
    assert sorted(found) == names
    assert options.findings.not_pictures == {}
    assert packed(tmp_path, tmp_path.parent / "out-of-names").packed == {"": 8}


def test_files_that_are_no_pictures_are_counted_and_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files: dict[str, bytes | str] = {
        "joy/1.jpg": picture(1),
        "joy/1.xml": "<a/>",
        "a.txt": "x",
        "b.TXT": "x",
        "Makefile": "x",
        ".DS_Store": "x",
        ".git/config": "x",
        "__MACOSX/joy/._1.jpg": "x",
    }
    tree(tmp_path / "in", files)
    os.mkfifo(tmp_path / "in/pipe")
    arguments = [str(tmp_path / "in"), str(tmp_path / "out"), "--layout", "folder", "--persons", "none"]
    assert run(["shards", "pack", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 records = 1 packed + 0 refused; 0 with a person, 1 without",
        "the samples have 0 captions, 1 labels and 0 boxes; 1 have no caption, 0 no label, 1 no box",
        "not pictures: 2 .txt, 2 in hidden folders, 2 without extension, 1 .ds_store, 1 .xml",
        "2 captions files (.txt, .caption, .text) that belong to no picture, such as a.txt",
    ]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sum(manifest["provenance"]["not_pictures"].values()) == 8


def test_a_file_that_cannot_be_read_is_refused_unless_its_name_says_that_it_is_text(tmp_path: Path) -> None:
    tree(tmp_path, {"1.png": picture(1)})
    (tmp_path / "IMG_2").symlink_to("nowhere")
    (tmp_path / "note.txt").symlink_to("nowhere")
    result = packed(tmp_path, tmp_path.parent / "out-of-links")
    assert [(refused.source, refused.reason) for refused in result.rejected] == [("IMG_2", "unreadable")]
    assert result.findings.not_pictures == {".txt": 1}


def test_heads_are_read_only_of_files_whose_extension_decides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path, {f"{i}.jpg": picture(i) for i in range(20)} | {"a.xml": "x", "b": "x", "1.txt": "c"})
    read_head, read = shards.sources.layouts.folder.read_head, []

    def counted(path: Path) -> bytes:
        head = read_head(path)
        read.append((path.name, len(head) <= 1024))
        return head

    monkeypatch.setattr(shards.sources.layouts.folder, "read_head", counted)
    listed(tmp_path)
    assert sorted(read) == [("1.txt", True), ("a.xml", True), ("b", True)]


def test_a_folder_without_pictures_says_what_it_has(tmp_path: Path) -> None:
    tree(tmp_path, {"a.txt": "x", "b.txt": "x", "c": "x"})
    with pytest.raises(UserError) as caught:
        listed(tmp_path)
    assert str(caught.value) == (
        f"SOURCE={tmp_path}: has no pictures; its files are 2 .txt, 1 without extension; give another folder, or "
        "another --layout"
    )


CONTENTS = st.sampled_from(
    [
        picture(1),
        picture(2),
        picture(3, "JPEG"),
        picture(4)[:90],
        b"",
        b"text",
        b'{"caption": "c"}',
        b"%PDF-1.4",
        b"8BPS",
    ]
)
NAMES = st.builds(
    lambda folder, stem, end: f"{folder}{stem}{end}",
    st.sampled_from(["", "joy/", "joy/deep/", ".hidden/", "__MACOSX/"]),
    st.sampled_from(["a", "b", "metadata", ".c", "ü"]),
    st.sampled_from(
        ["", ".jpg", ".png", ".PNG", ".txt", ".caption", ".json", ".jpg.txt", ".csv", ".x y", "."]
    ),
)


@settings(max_examples=25, deadline=None)
@given(files=st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=12))
def test_every_file_is_packed_refused_or_counted(
    files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("folder")
    tree(root / "in", {**files, "always.png": picture(99)})
    result = packed(root / "in", root / "out")
    number = sum(len(names) for _, _, names in os.walk(root / "in"))
    parts = Counter(
        packed=sum(result.packed.values()),
        refused=len(result.rejected),
        others=sum(result.findings.not_pictures.values()),
    )
    assert number == sum(parts.values()), (files, parts)


def test_a_column_that_no_file_has_is_a_user_error(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "b.png": picture(2), "b.json": '{"words": "b"}'}
    root = tree(tmp_path, {**files, "metadata.csv": "file_name,text\na.png,of a\n"})
    found, _ = listed(root, columns={"caption": "words"})
    assert found["b.png"].captions == ("b",)
    with pytest.raises(
        UserError, match=r"^--column caption=nope: no metadata file or \.json has such a field"
    ):
        listed(root, columns={"caption": "nope"})
