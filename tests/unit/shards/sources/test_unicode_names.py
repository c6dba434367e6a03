"""Names in composed form (NFC) in a file of the source and in decomposed form (NFD, as macOS writes) on disk, and the
reverse."""

import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shards.pack.packer import PackResult
from shards.pack.pipeline import PackSettings, pack
from shards.sources import Record, SourceOptions, open_source
from shards.sources.described import PictureNames
from shards.sources.files import NamesInForms, fetch_images
from shards.sources.preset_schema import Table

NFC, NFD = (unicodedata.normalize(form, "é/Ünï") for form in ("NFC", "NFD"))
BOTH = pytest.mark.parametrize(("stated", "real"), [(NFC, NFD), (NFD, NFC)], ids=["stated NFC", "stated NFD"])


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels_HW3 = np.random.default_rng(number).integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def listed(layout: str, source: Path, **options: Any) -> list[Record]:
    return list(open_source(layout, str(source), SourceOptions(**options)))


def packed(layout: str, source: Path, out: Path) -> PackResult:
    return pack(PackSettings(str(source), layout, persons="none"), out)


@BOTH
def test_a_table_names_its_pictures_in_any_form(stated: str, real: str, tmp_path: Path) -> None:
    put(tmp_path / f"in/{real}.png", picture(1))
    put(tmp_path / "in/t.csv", f"path,caption\n{stated}.png,a\n./{real}.png,b\n")
    put(tmp_path / "in/t.jsonl", json.dumps({"path": f"{stated}.png"}))
    for table in ("t.csv", "t.jsonl"):
        for allow in (False, True):
            found = listed("table", tmp_path / "in" / table, allow_outside=allow)
            assert {record.image for record in found} == {f"{tmp_path}/in/{real}.png"}
            assert fetch_images([record.image for record in found]) == [picture(1)] * len(found)
    # Rows that state it in both forms are one picture.
    result = packed("table", tmp_path / "in/t.csv", tmp_path / "out")
    assert (result.packed, result.rejected, result.contents["captions"]) == ({"": 1}, [], 2)


@BOTH
def test_rows_that_name_pictures_by_their_file_name_do_so_in_any_form(
    stated: str, real: str, tmp_path: Path
) -> None:
    put(tmp_path / f"deep/{real}.png", picture(1))
    names = PictureNames(Table(match="name"), str(tmp_path))
    assert names.find(f"{stated.rpartition('/')[2]}.png") == f"deep/{real}.png"


@BOTH
def test_two_files_that_differ_only_in_form_stay_two(stated: str, real: str, tmp_path: Path) -> None:
    for number, name in enumerate((stated, real)):
        put(tmp_path / f"{name}.png", picture(number))
        put(tmp_path / f"{name}.txt", f"text {number}")
    rows = f"{stated}.png,row 0\n{real}.png,row 1\n"
    put(tmp_path / "metadata.csv", f"file_name,caption\n{rows}")
    put(tmp_path / "t.csv", f"path,caption\n{rows}")
    assert [record.image for record in listed("table", tmp_path / "t.csv")] == [
        f"{tmp_path}/{stated}.png",
        f"{tmp_path}/{real}.png",
    ]
    found = {record.image: record.captions for record in listed("folder", tmp_path)}
    assert found == {
        f"{tmp_path}/{stated}.png": ("text 0", "row 0"),
        f"{tmp_path}/{real}.png": ("text 1", "row 1"),
    }


def test_a_name_in_a_third_form_matches_neither_of_two_files(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "éü.png") for form in ("NFC", "NFD")]
    third = unicodedata.normalize("NFD", "é") + "ü.png"
    for number, name in enumerate(names):
        put(tmp_path / name, picture(number))
    put(tmp_path / "t.csv", f"path\n{third}\n")
    assert [record.image for record in listed("table", tmp_path / "t.csv")] == [f"{tmp_path}/{third}"]
    forms = NamesInForms(names)
    assert [forms.find(name) for name in (*names, third)] == [*names, third]
    assert NamesInForms(names[:1]).find(third) == names[0]


@BOTH
def test_files_beside_a_picture_and_rows_about_it_may_have_another_form(
    stated: str, real: str, tmp_path: Path
) -> None:
    put(tmp_path / f"{real}.png", picture(1))
    put(tmp_path / f"{stated}.txt", "text")
    put(tmp_path / f"{stated}.png.caption", "caption")
    put(tmp_path / f"{stated}.json", json.dumps({"caption": "json"}))
    put(tmp_path / "metadata.jsonl", json.dumps({"file_name": f"{stated}.png", "text": "row"}))
    options = SourceOptions()
    [record] = open_source("folder", str(tmp_path), options)
    assert record.captions == ("text", "caption", "row", "json")
    assert not any("no picture" in note for note in options.findings.notes)


@BOTH
def test_coco_names_its_pictures_in_any_form(stated: str, real: str, tmp_path: Path) -> None:
    put(tmp_path / f"images/val2017/{real}.png", picture(1))
    content = {"images": [{"id": 1, "file_name": f"{stated}.png"}], "annotations": []}
    put(tmp_path / "annotations/captions_val2017.json", json.dumps(content))
    [record] = listed("coco", tmp_path)
    assert record.image == f"{tmp_path}/images/val2017/{real}.png"


@BOTH
def test_emoset_names_its_pictures_and_annotations_in_any_form(
    stated: str, real: str, tmp_path: Path
) -> None:
    put(tmp_path / f"{real}.png", picture(1))
    put(tmp_path / f"{real}.json", json.dumps({"scene": "park"}))
    put(tmp_path / "info.json", json.dumps({"label2idx": {"awe": 0}}))
    put(tmp_path / "train.json", json.dumps([["awe", f"{stated}.png", f"{stated}.json"]]))
    [record] = listed("emoset", tmp_path)
    assert (record.image, record.refused) == (f"{tmp_path}/{real}.png", None)
    assert record.attributes["scene"] == "park"


@BOTH
def test_emotic_names_its_pictures_in_any_form(stated: str, real: str, tmp_path: Path) -> None:
    put(tmp_path / f"images/{real}.png", picture(1))
    folder, _, name = stated.partition("/")
    header = "Folder,Filename,Image Size,BBox,Categorical_Labels"
    put(tmp_path / "train.csv", f'{header}\n{folder},{name}.png,"[30, 20]","[1, 1, 9, 9]",[\'Peace\']\n')
    [record] = listed("emotic", tmp_path)
    assert (record.image, record.refused) == (f"{tmp_path}/images/{real}.png", None)
