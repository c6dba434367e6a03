"""Annotated data sets as they are published: what COCO, EMOTIC and EmoSet become, record by record."""

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
from PIL import Image
from upath import UPath

from shards.sources import Findings, Record, SourceOptions, open_source
from shards.sources.layouts.emotic import CATEGORIES
from shards.storage import Place
from uniemox_dist.core.errors import UserError


def records(layout: str, source: object, **options: Any) -> list[Record]:
    found = list(open_source(layout, str(source), SourceOptions(**options)))
    for split in {record.split for record in found}:
        names = [record.name for record in found if record.split == split]
        assert len(set(names)) == len(names)
    return found


def error_of(layout: str, source: object, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        records(layout, source, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def put_json(path: Place, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def jpeg(path: Path, size: tuple[int, int] = (64, 48)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 30)).save(path)
    return path


# ---- COCO


def coco_captions() -> dict[str, Any]:
    return {
        "info": {"year": 2017},
        "images": [
            {"id": 139, "file_name": "000000000139.jpg", "width": 640, "height": 426, "license": 2},
            {"id": 9, "file_name": "000000000009.jpg", "width": 200, "height": 100, "coco_url": "http://…"},
            {"id": 200, "file_name": "000000000200.jpg", "width": 10, "height": 10},
        ],
        "annotations": [
            {"id": 31, "image_id": 9, "caption": "Two dogs run. "},
            {"id": 7, "image_id": 9, "caption": " Dogs on a lawn.\n"},
            {"id": 40, "image_id": 9, "caption": "Dogs on a lawn."},
            {"id": 8, "image_id": 139, "caption": "A living room."},
            {"id": 9, "image_id": 139, "caption": "  "},
        ],
    }


def coco_instances() -> dict[str, Any]:
    def entry(number: int, box: list[float], **more: Any) -> dict[str, Any]:
        rest = {"image_id": 9, "category_id": 1, "iscrowd": 0, "segmentation": [[1.0, 2.0, 3.0]]}
        return {"id": number, "bbox": box, **rest, **more}

    return {
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            entry(60, [20.0, 10.0, 40.0, 20.0]),
            entry(50, [100.0, 30.0, 40.0, 20.0]),
            entry(70, [0.0, 50.0, 150.5, 60.0]),
            entry(71, [0.0, 0.0, 190.0, 90.0], category_id=18),
            entry(72, [0.0, 0.0, 190.0, 90.0], iscrowd=1, segmentation={"counts": [1], "size": [1, 1]}),
            entry(73, [5.0, 5.0, 0.0, 40.0]),
            entry(74, [200.0, 5.0, 30.0, 40.0]),
            entry(75, [1.0, 1.0, 2.0, 2.0], image_id=4711),
        ],
    }


def coco(root: Place, parts: tuple[str, ...] = ("val2017",), pictures: str = "{part}") -> Place:
    for part in parts:
        put_json(root / "annotations" / f"captions_{part}.json", coco_captions())
        put_json(root / "annotations" / f"instances_{part}.json", coco_instances())
        for name in ("000000000009.jpg", "000000000139.jpg"):
            path = root / pictures.format(part=part) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    return root


def test_a_coco_picture_has_all_its_captions_in_id_order_without_repeats(tmp_path: Path) -> None:
    first, second, third = records("coco", coco(tmp_path))
    assert first == Record(
        name="val2017/000000000009.jpg",
        image=str(tmp_path / "val2017/000000000009.jpg"),
        captions=("Dogs on a lawn.", "Two dogs run."),
        attributes={"coco_id": 9},
        split="val",
    )
    assert (second.name, second.captions) == ("val2017/000000000139.jpg", ("A living room.",))
    assert (third.name, third.captions, third.persons) == ("val2017/000000000200.jpg", (), None)


def test_coco_splits_come_from_the_file_names_and_unreadable_pictures_are_left_to_the_packer(
    tmp_path: Path,
) -> None:
    found = records("coco", coco(tmp_path, ("val2014", "train2014"), "images/{part}"))
    assert [(r.split, r.name[-7:]) for r in found] == [
        *(("train", name) for name in ("009.jpg", "139.jpg", "200.jpg")),
        *(("val", name) for name in ("009.jpg", "139.jpg", "200.jpg")),
    ]
    assert found[2].image == str(tmp_path / "images/train2014/000000000200.jpg")
    assert not Path(found[2].image).exists()


@pytest.mark.parametrize(
    ("file", "pictures", "split", "prefix"),
    [
        ("annotations/captions_val2017.json", "val2017", "val", "val2017/"),
        ("captions_val2017.json", "images/val2017", "val", "val2017/"),
        ("captions_train.json", ".", "train", "train/"),
        ("mine.json", ".", None, ""),
        ("mine.json", "images", None, ""),
    ],
)
def test_one_coco_json_finds_its_pictures_nearby(
    tmp_path: Path, file: str, pictures: str, split: str | None, prefix: str
) -> None:
    put_json(tmp_path / file, coco_captions())
    picture = jpeg(tmp_path / pictures / "000000000139.jpg")
    found = {record.name: record for record in records("coco", tmp_path / file)}
    record = found[f"{prefix}000000000139.jpg"]
    assert record.split == split
    assert isinstance(record.image, str)
    assert Path(record.image).samefile(picture)


def test_one_coco_json_named_without_a_folder_finds_pictures_of_the_folder_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coco(tmp_path)
    monkeypatch.chdir(tmp_path / "annotations")
    assert records("coco", "captions_val2017.json")[0].image == str(tmp_path / "val2017/000000000009.jpg")


def test_coco_persons_are_uncrowded_boxes_by_falling_area_as_fractions(tmp_path: Path) -> None:
    first, second, third = records("coco", coco(tmp_path), source_persons=True)
    assert first.persons is not None
    assert [person.box for person in first.persons] == [
        (0.0, 0.5, 0.7525, 1.0),  # reaches 10 px over the lower edge
        (0.5, 0.3, 0.7, 0.5),  # id 50 before 60, of equal area
        (0.1, 0.1, 0.3, 0.3),
    ]
    assert {person.score for person in first.persons} == {1.0}
    assert (second.persons, third.persons) == ((), ())


def test_coco_persons_without_an_instances_file_are_refused_by_name(tmp_path: Path) -> None:
    (coco(tmp_path) / "annotations/instances_val2017.json").unlink()
    assert records("coco", tmp_path)[0].persons is None
    text = error_of("coco", tmp_path, source_persons=True)
    assert f"{tmp_path}/annotations/instances_val2017.json is missing" in text


def test_coco_persons_need_the_pictures_size_and_the_category(tmp_path: Path) -> None:
    captions = coco_captions()
    captions["images"][1]["width"] = 0
    put_json(coco(tmp_path) / "annotations/captions_val2017.json", captions)
    assert "image 9 has width and height 0 and 100" in error_of("coco", tmp_path, source_persons=True)
    instances = coco_instances() | {"categories": [{"id": 1, "name": "human"}]}
    put_json(coco(tmp_path) / "annotations/instances_val2017.json", instances)
    assert "has no category 'person'" in error_of("coco", tmp_path, source_persons=True)


def test_coco_years_that_share_pictures_are_not_mixed(tmp_path: Path) -> None:
    text = error_of("coco", coco(tmp_path, ("train2017", "val2014")))
    assert "several years (captions_train2017.json, captions_val2014.json)" in text
    assert len(records("coco", tmp_path / "annotations/captions_val2014.json")) == 3


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        ("{", "cannot be read as JSON"),
        (
            '{"images": [1], "images": []}',
            "(the key 'images' occurs twice in one object, with different values)",
        ),
        ("[]", "has no list 'images'"),
        ('{"images": []}', "has no list 'annotations'"),
        ('{"images": [], "annotations": []}', "lists no images"),
        ('{"images": [{"id": 1}], "annotations": []}', "an entry lacks 'file_name'"),
        ('{"images": [3], "annotations": []}', "an entry is malformed"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1}]}',
            "an entry lacks 'caption'",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": []}',
            "lists one image id twice",
        ),
    ],
)
def test_a_malformed_coco_file_is_reported_with_its_problem(
    tmp_path: Path, content: str, phrase: str
) -> None:
    path = coco(tmp_path) / "annotations/captions_val2017.json"
    path.write_text(content)
    text = error_of("coco", tmp_path)
    assert text.startswith(f"{path}: ")
    assert phrase in text


def test_coco_boxes_come_with_the_size_of_the_picture_that_they_were_drawn_in(tmp_path: Path) -> None:
    found = records("coco", coco(tmp_path), source_persons=True)
    assert [record.boxes_size for record in found] == [(200, 100), (640, 426), (10, 10)]
    assert {record.boxes_size for record in records("coco", tmp_path)} == {None}


def test_a_null_coco_caption_is_ignored_and_one_that_is_not_a_text_is_malformed(tmp_path: Path) -> None:
    path = coco(tmp_path) / "annotations/captions_val2017.json"
    content = coco_captions()
    content["annotations"][3]["caption"] = None
    put_json(path, content)
    assert [record.captions for record in records("coco", tmp_path)][1] == ()
    content["annotations"][3]["caption"] = {"en": "x"}
    put_json(path, content)
    assert "an entry is malformed (holds an object, but a text is expected)" in error_of("coco", tmp_path)
    path.write_text("[" * 100_000)
    assert f"{path}: cannot be read as JSON (its values are nested too deeply)" in error_of("coco", tmp_path)


def test_a_folder_or_file_that_is_not_coco_is_an_error_with_the_expected_content(tmp_path: Path) -> None:
    assert "has no annotations/captions_<split><year>.json" in error_of("coco", tmp_path)
    assert f"{tmp_path}/x.json is missing" in error_of("coco", tmp_path / "x.json")


# ---- EmoSet


def emoset(root: Place, rows: dict[str, list[Any]], nested: bool = True) -> Place:
    order = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
    indices = {"label2idx": {name: i for i, name in enumerate(order)}}
    put_json(root / "info.json", {"emotion": indices} if nested else indices)
    for split, content in rows.items():
        put_json(root / f"{split}.json", content)
    return root


def emoset_row(root: Place, label: str, number: int, annotation: Any = None) -> list[Any]:
    """A row of the newer release; its annotation is written where one is given."""
    stem = f"{label}/{label}_{number:05}"
    if annotation is not None:
        put_json(root / f"annotation/{stem}.json", annotation)
    return [label, f"{label}_{number:05}", f"image/{stem}.jpg", f"annotation/{stem}.json"]


@pytest.mark.parametrize("nested", [True, False], ids=["emotion.label2idx", "label2idx"])
@pytest.mark.parametrize("older", [True, False], ids=["three", "four"])
@pytest.mark.parametrize("remote", [True, False], ids=["memory", "local"])
def test_emoset_rows_of_both_releases_become_the_same_records(
    tmp_path: Path, nested: bool, older: bool, remote: bool
) -> None:
    root: Place = UPath(f"memory://emoset-{nested}-{older}") if remote else tmp_path
    facts = {
        "image_id": "awe_00003",
        "emotion": "awe",
        "brightness": 0.0,
        "colorfulness": 0.4,
        "scene": "bakery/shop",
        "object": ["Tree", "Sky"],
        "facial_expression": None,
        "human_action": "",
        "reviewer": 7,
    }
    train = [emoset_row(root, "awe", 3, facts), emoset_row(root, "anger", 12, {"object": []})]
    test = [emoset_row(root, "fear", 1, {"human_action": "hugging", "brightness": math.nan})]
    if older:
        train, test = ([[label, image, note] for label, _, image, note in rows] for rows in (train, test))
    emoset(root, {"test": test, "train": train}, nested)
    found = records("emoset", root)
    assert [(r.name, r.split, r.label, r.attributes, r.refused) for r in found] == [
        ("image/anger/anger_00012.jpg", "train", "anger", {"polarity": "negative"}, None),
        (
            "image/awe/awe_00003.jpg",
            "train",
            "awe",
            {
                "scene": "bakery/shop",
                "object": ["Tree", "Sky"],
                "brightness": 0.0,
                "colorfulness": 0.4,
                "polarity": "positive",
            },
            None,
        ),
        (
            "image/fear/fear_00001.jpg",
            "test",
            "fear",
            {"human_action": "hugging", "polarity": "negative"},
            None,
        ),
    ]
    assert found[1].image == str(root / "image/awe/awe_00003.jpg")
    assert (found[1].persons, found[1].captions) == (None, ())


def test_an_emoset_row_without_an_annotation_keeps_its_label(tmp_path: Path) -> None:
    rows = [
        ["awe", "image/a.jpg"],
        ["awe", "image/b.jpg", None],
        ["awe", "awe_1", "image/c.jpg", ""],
        ["awe", 4, "image/d.jpg", None],
    ]
    found = records("emoset", emoset(tmp_path, {"val": rows}))
    assert [r.name for r in found] == ["image/a.jpg", "image/b.jpg", "image/c.jpg", "image/d.jpg"]
    assert all(r.label == "awe" and r.refused is None for r in found)
    assert all(r.attributes == {"polarity": "positive"} for r in found)


def test_an_emoset_annotation_that_is_named_but_missing_or_broken_refuses_the_record(tmp_path: Path) -> None:
    (tmp_path / "annotation").mkdir()
    (tmp_path / "annotation/half.json").write_text('{"scene": ')
    (tmp_path / "annotation/list.json").write_text("[1]")
    (tmp_path / "annotation/bytes.json").write_bytes(b'{"scene": "\xff\xfe"}')
    names = ("bytes", "half", "list", "none")
    rows = [["fear", f"image/{name}.jpg", f"annotation/{name}.json"] for name in names]
    found = records("emoset", emoset(tmp_path, {"train": rows}))
    assert {r.refused and r.refused[0] for r in found} == {"annotation"}
    details = [r.refused[1] for r in found if r.refused]
    assert details[0].startswith("annotation/bytes.json: cannot be read as JSON (")
    assert details[1].startswith("annotation/half.json: cannot be read as JSON (Expecting value")
    assert details[2:] == [
        "annotation/list.json: holds a list, not an object",
        "annotation/none.json: no such file",
    ]


def test_an_emoset_annotation_that_no_file_can_have_or_no_reader_follows_refuses_the_record(
    tmp_path: Path,
) -> None:
    for name, text in (("deep", "[" * 100_000), ("nested", '{"object": ' + "[" * 200 + "]" * 200 + "}")):
        (tmp_path / f"{name}.json").write_text(text)
    (tmp_path / "loop.json").symlink_to("loop.json")
    put_json(tmp_path / "infinite.json", {"brightness": math.inf, "colorfulness": math.nan})
    names = ("deep.json", "infinite.json", "loop.json", "nested.json", "x" * 300)
    rows = [["fear", f"{name}.jpg", name] for name in names]
    found = {record.name[:-4]: record for record in records("emoset", emoset(tmp_path, {"train": rows}))}
    assert {name[:13]: record.refused and record.refused[1] for name, record in found.items()} == {
        "deep.json": "deep.json: cannot be read as JSON (its values are nested too deeply)",
        "infinite.json": None,
        "loop.json": "loop.json: cannot be read (Too many levels of symbolic links)",
        "nested.json": "nested.json: cannot be read as JSON (its values are nested more than 64 deep)",
        "x" * 13: f"{'x' * 120}: cannot be read (File name too long)",
    }
    assert found["infinite.json"].attributes == {"brightness": "inf", "polarity": "negative"}


def test_an_emoset_label_that_info_json_does_not_know_refuses_the_record(tmp_path: Path) -> None:
    [record] = records("emoset", emoset(tmp_path, {"train": [["joy", "image/1.jpg", "annotation/1.json"]]}))
    assert record.refused is not None
    reason, detail = record.refused
    assert reason == "label"
    assert detail.startswith("label 'joy' is not one of amusement, anger, awe, ")
    assert record.attributes == {}


@pytest.mark.parametrize(
    "row",
    [
        ["awe"],
        ["awe", 1, "a.jpg", "a.json", 2],
        [0, "a.jpg", "a.json"],
        ["awe", 7, "a.json"],
        "awe",
        {"a": 1},
    ],
)
def test_a_malformed_emoset_row_is_named_with_file_and_number(tmp_path: Path, row: Any) -> None:
    text = error_of("emoset", emoset(tmp_path, {"val": [["awe", "a.jpg"], row]}))
    assert text.startswith(f"{tmp_path}/val.json: row 2 is {json.dumps(row)}; give [label, ")


def test_an_emoset_folder_that_lacks_a_file_or_labels_is_an_error_that_names_them(tmp_path: Path) -> None:
    assert f"{tmp_path}/info.json is missing" in error_of("emoset", tmp_path)
    emoset(tmp_path, {})
    assert "has none of train.json, val.json, test.json" in error_of("emoset", tmp_path)
    put_json(tmp_path / "train.json", [])
    assert f"{tmp_path}/train.json: not a list of rows, or an empty one" in error_of("emoset", tmp_path)
    (tmp_path / "train.json").write_text("[[")
    assert f"{tmp_path}/train.json: cannot be read as JSON" in error_of("emoset", tmp_path)
    for content in ({"emotion": {"label2idx": {}}}, {"emotion": ["awe"]}, [1]):
        put_json(tmp_path / "info.json", content)
        assert "has no labels under emotion.label2idx or label2idx" in error_of("emoset", tmp_path)


# ---- EMOTIC

HEADER = (
    *("Index", "Folder", "Filename", "Image Size", "BBox"),
    *("Categorical_Labels", "Continuous_Labels", "Gender", "Age"),
)


def emotic_csv(path: Path, *rows: tuple[Any, ...], header: tuple[str, ...] = HEADER) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([header, *((i, *row) for i, row in enumerate(rows))])
    return path.parent


def cells(**changes: Any) -> tuple[Any, ...]:
    row = {
        "folder": "mscoco/images",
        "filename": "a.jpg",
        "size": [200, 100],
        "box": [20, 10, 60, 50],
        "categories": ["Peace", "Affection"],
        "continuous": [5.0, 3.0, 9.0],
        "gender": "Male",
        "age": "Adult",
    }
    return tuple((row | changes).values())


def test_emotic_csv_rows_of_one_picture_become_its_persons_by_falling_area(tmp_path: Path) -> None:
    emotic_csv(
        tmp_path / "train.csv",
        cells(filename="b.jpg", folder="ade20k/images", categories=[], continuous="", gender="", age=""),
        cells(),
        cells(box=[-15, 30, 100, 120], categories=["Disquitement"], continuous="[nan, 2.0, nan]", age="Kid "),
        cells(box=[120, 10, 160, 50], categories=["disquiet", "Disquietment"]),
        cells(box=[200, 0, 230, 50], categories=["Pain"]),
    )
    emotic_csv(tmp_path / "test.csv", cells())
    jpeg(tmp_path / "images/mscoco/images/a.jpg")
    other, picture, test = records("emotic", tmp_path)
    assert (other.name, other.split, test.name, test.split) == (
        "ade20k/images/b.jpg",
        "train",
        "mscoco/images/a.jpg",
        "test",
    )
    assert other.persons is not None
    assert [p.labels for p in other.persons] == [{"categories": []}]
    assert picture.image == str(tmp_path / "images/mscoco/images/a.jpg")
    assert (picture.label, picture.refused, picture.split) == (None, None, "train")
    assert picture.attributes == {"categories": ["Affection", "Disquietment", "Pain", "Peace"]}
    assert picture.persons is not None
    assert [p.to_json() for p in picture.persons] == [
        {
            "box": [0.0, 0.3, 0.5, 1.0],
            "score": 1.0,
            "labels": {"categories": ["Disquietment"], "arousal": 2.0, "gender": "Male", "age": "Kid"},
        },
        {
            "box": [0.1, 0.1, 0.3, 0.5],
            "score": 1.0,
            "labels": {
                "categories": ["Affection", "Peace"],
                "valence": 5.0,
                "arousal": 3.0,
                "dominance": 9.0,
                "gender": "Male",
                "age": "Adult",
            },
        },
        {
            "box": [0.6, 0.1, 0.8, 0.5],
            "score": 1.0,
            "labels": {
                "categories": ["Disquietment"],
                "valence": 5.0,
                "arousal": 3.0,
                "dominance": 9.0,
                "gender": "Male",
                "age": "Adult",
            },
        },
    ]


def test_an_emotic_csv_may_do_without_optional_columns(tmp_path: Path) -> None:
    emotic_csv(
        tmp_path / "val.csv",
        ("mscoco/images", "a.jpg", [200, 100], [0, 0, 100, 100], ["Fear"]),
        header=("Index", "Folder", "Filename", "Image Size", "BBox", "Categorical_Labels"),
    )
    [record] = records("emotic", tmp_path)
    assert record.persons is not None
    assert [(p.box, p.labels) for p in record.persons] == [((0.0, 0.0, 0.5, 1.0), {"categories": ["Fear"]})]


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (cells(size=[0, 100]), "image size [0.0, 100.0] cannot scale a box"),
        (cells(size=""), "image size [] cannot scale a box"),
        (cells(box=[200, 0, 230, 50]), "no annotated person's box is inside the picture"),
    ],
)
def test_an_emotic_picture_whose_persons_cannot_be_placed_is_refused(
    tmp_path: Path, row: tuple[Any, ...], detail: str
) -> None:
    [record] = records("emotic", emotic_csv(tmp_path / "train.csv", row))
    assert record.refused == ("annotation", detail)
    assert record.attributes == {"categories": ["Affection", "Peace"]}


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (cells(filename="b.jpg", box=[1, 2, 3]), "BBox is '[1, 2, 3]', not [x1, y1, x2, y2] in pixels"),
        (
            cells(filename="b.jpg", box=[60, 10, 20, 50]),
            "BBox is '[60, 10, 20, 50]', not [x1, y1, x2, y2] in pixels",
        ),
        (
            cells(filename="b.jpg", box="[1, 2, nan, 4]"),
            "BBox is '[1, 2, nan, 4]', not [x1, y1, x2, y2] in pixels",
        ),
        (cells(filename="b.jpg", box="[1, 2"), "BBox is '[1, 2', not a list such as [1, 2]"),
        (
            cells(filename="b.jpg", box="__import__('os').abort()"),
            "BBox is \"__import__('os').abort()\", not a list such as [1, 2]",
        ),
        (
            cells(filename="b.jpg", categories=["Joy"]),
            f"'Joy' is not a category of EMOTIC; valid are {', '.join(CATEGORIES)}",
        ),
        (
            cells(filename="b.jpg", continuous=[5, 5]),
            "Continuous_Labels is '[5, 5]', not [valence, arousal, dominance]",
        ),
    ],
)
def test_a_broken_emotic_row_refuses_its_picture_and_no_other(
    tmp_path: Path, row: tuple[Any, ...], detail: str
) -> None:
    found = records("emotic", emotic_csv(tmp_path / "train.csv", cells(), row, cells(filename="c.jpg")))
    assert [(record.name, record.refused) for record in found] == [
        ("mscoco/images/a.jpg", None),
        ("mscoco/images/b.jpg", ("annotation", f"train.csv, line 3: {detail}")),
        ("mscoco/images/c.jpg", None),
    ]


def test_an_emotic_row_without_a_picture_name_is_refused_by_its_line(tmp_path: Path) -> None:
    found = records("emotic", emotic_csv(tmp_path / "train.csv", cells(), cells(filename="")))
    assert [(record.name, record.refused) for record in found] == [
        ("mscoco/images/a.jpg", None),
        (
            "train.csv, line 3",
            ("annotation", "train.csv, line 3: has no picture name; give a Folder and a Filename"),
        ),
    ]


def test_emotic_states_its_scale_so_that_other_values_are_refused(tmp_path: Path) -> None:
    findings = Findings()
    next(
        iter(
            open_source(
                "emotic", str(emotic_csv(tmp_path / "train.csv", cells())), SourceOptions(findings=findings)
            )
        )
    )
    assert findings.dimension_ranges == dict.fromkeys(("valence", "arousal", "dominance"), (1, 10))


@pytest.mark.parametrize(
    ("broken", "phrase"),
    [
        (
            '1,mscoco/images,b.jpg,"[200, 100]\n',
            "not a readable table: line 4: ',' expected after '\"'; fix its quotes",
        ),
        ('1,mscoco/images,b.jpg,"[200, "100]"\n', "not a readable table: line 3: ',' expected after '\"'"),
        ("1,mscoco/images\n", "line 3 has 2 values, but the header has 9; fix its commas or quotes"),
    ],
)
def test_a_row_of_an_emotic_csv_with_a_quote_out_of_place_swallows_no_others(
    tmp_path: Path, broken: str, phrase: str
) -> None:
    path = emotic_csv(tmp_path / "train.csv", cells(), cells(filename="c.jpg")) / "train.csv"
    header, first, last = path.read_text().splitlines(keepends=True)
    path.write_text(header + first + broken + last)
    assert error_of("emotic", tmp_path).startswith(f"SOURCE={path}: {phrase}")


def test_an_emotic_csv_with_a_column_twice_is_refused(tmp_path: Path) -> None:
    emotic_csv(tmp_path / "train.csv", (*cells(), "Kid"), header=(*HEADER, "Age"))
    assert "has 2 columns called 'Age'; rename or remove all but one" in error_of("emotic", tmp_path)


def test_emotic_boxes_come_with_the_size_of_the_picture_that_they_were_drawn_in(tmp_path: Path) -> None:
    [record] = records("emotic", emotic_csv(tmp_path / "train.csv", cells()))
    assert record.boxes_size == (200, 100)


def test_an_emotic_csv_of_other_columns_is_an_error_with_its_columns(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("Folder,Filename,emotion\n")
    assert error_of("emotic", tmp_path) == (
        f"{tmp_path}/train.csv: lacks the columns Image Size, BBox, Categorical_Labels; "
        "its columns are Folder, Filename, emotion"
    )
    (tmp_path / "train.csv").write_text(",".join(HEADER) + "\n")
    assert "has no rows" in error_of("emotic", tmp_path)
    (tmp_path / "train.csv").write_bytes(b"Folder,\xff")
    assert "not a CSV in UTF-8" in error_of("emotic", tmp_path)
    (tmp_path / "train.csv").write_bytes("Folder".encode("utf-16"))
    assert "train.csv: is in UTF-16; convert it" in error_of("emotic", tmp_path)


def test_a_folder_that_is_not_emotic_is_an_error_with_the_expected_content(tmp_path: Path) -> None:
    assert "has neither Annotations.mat nor train.csv, val.csv or test.csv" in error_of("emotic", tmp_path)


# MATLAB arrays of structs and cells, as savemat takes them.


def structs(*entries: dict[str, Any]) -> np.ndarray:
    array = np.empty((1, len(entries)), dtype=[(name, object) for name in entries[0]])
    for i, entry in enumerate(entries):
        array[0, i] = tuple(entry.values())
    return array


def texts(*values: str) -> np.ndarray:
    array = np.empty((1, len(values)), dtype=object)
    array[0, :] = values
    return array


def felt(valence: float, arousal: float, dominance: float) -> dict[str, Any]:
    return {"valence": valence, "arousal": arousal, "dominance": dominance}


def train_person(box: list[float], *categories: str, age: str = "Adult") -> dict[str, Any]:
    return {
        "body_bbox": box,
        "annotations_categories": {"worker_id": "w", "categories": texts(*categories)},
        "annotations_continuous": {"worker_id": "w", **felt(7, math.nan, 4)},
        "gender": "Female",
        "age": age,
    }


def mat_picture(name: str, persons: np.ndarray, size: tuple[float, float] = (200, 100)) -> dict[str, Any]:
    return {
        "filename": name,
        "folder": "mscoco/images",
        "image_size": {"n_col": size[0], "n_row": size[1]},
        "original_database": {"name": "mscoco", "info": {"image_id": 3}},
        "person": persons,
    }


def annotations_mat() -> dict[str, Any]:
    several = {
        "body_bbox": [0, 0, 100, 100],
        "annotations_categories": structs(
            {"categories": texts("Anger")}, {"categories": texts("Fear", "Pain")}
        ),
        "combined_categories": texts("Pain", "Disquietment"),
        "annotations_continuous": structs(felt(2, 2, 2), felt(5, 5, 5)),
        "combined_continuous": felt(3.5, 10 / 3, math.nan),
        "gender": "Male",
        "age": "Teenager",
    }
    uncombined = {key: value for key, value in several.items() if not key.startswith("combined")}
    return {
        "train": structs(
            mat_picture(
                "b.jpg",
                structs(
                    train_person([20, 10, 60, 50], "Peace"),
                    train_person([-3.5, 30, 100, 120.2], "Doubt/Confusion", "Affection", age="Kid"),
                ),
            ),
            mat_picture("a.jpg", structs(train_person([0, 0, 50, 50], "Yearning")), size=(0, 0)),
            mat_picture("c.jpg", structs(train_person([50, 0, 20, 50], "Yearning"))),
        ),
        "val": structs(mat_picture("v.jpg", structs(several))),
        "test": structs(mat_picture("t.jpg", structs(uncombined))),
    }


@pytest.mark.parametrize("where", ["Annotations.mat", "Annotations/Annotations.mat"])
def test_emotic_mat_structs_become_one_record_per_picture(tmp_path: Path, where: str) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    scipy.io.savemat(tmp_path / where, annotations_mat())
    jpeg(tmp_path / "emotic/mscoco/images/b.jpg", (200, 100))
    unsized, two, swapped, val, test = records("emotic", tmp_path)
    assert [(r.split, r.name) for r in (unsized, two, swapped, val, test)] == [
        ("train", "mscoco/images/a.jpg"),
        ("train", "mscoco/images/b.jpg"),
        ("train", "mscoco/images/c.jpg"),
        ("val", "mscoco/images/v.jpg"),
        ("test", "mscoco/images/t.jpg"),
    ]
    assert two.image == str(tmp_path / "emotic/mscoco/images/b.jpg")
    assert two.attributes == {"categories": ["Affection", "Doubt/Confusion", "Peace"]}
    assert two.persons is not None
    assert json.loads(json.dumps([p.to_json() for p in two.persons])) == [
        {
            "box": [0.0, 0.3, 0.5, 1.0],
            "score": 1.0,
            "labels": {
                "categories": ["Affection", "Doubt/Confusion"],
                "valence": 7.0,
                "dominance": 4.0,
                "gender": "Female",
                "age": "Kid",
            },
        },
        {
            "box": [0.1, 0.1, 0.3, 0.5],
            "score": 1.0,
            "labels": {
                "categories": ["Peace"],
                "valence": 7.0,
                "dominance": 4.0,
                "gender": "Female",
                "age": "Adult",
            },
        },
    ]
    assert unsized.refused == ("annotation", "image size [0.0, 0.0] cannot scale a box")
    assert swapped.refused == (
        "annotation",
        "Annotations.mat, train(3): BBox is '[50.0, 0.0, 20.0, 50.0]', not [x1, y1, x2, y2] in pixels",
    )


def test_emotic_uses_combined_labels_or_joins_those_of_the_annotators(tmp_path: Path) -> None:
    scipy.io.savemat(tmp_path / "Annotations.mat", annotations_mat())
    val, test = records("emotic", tmp_path)[-2:]
    assert val.persons is not None
    assert test.persons is not None
    assert val.persons[0].labels == {
        "categories": ["Disquietment", "Pain"],
        "valence": 3.5,
        "arousal": 10 / 3,
        "gender": "Male",
        "age": "Teenager",
    }
    assert test.persons[0].labels == {
        "categories": ["Anger", "Fear", "Pain"],
        **felt(3.5, 3.5, 3.5),
        "gender": "Male",
        "age": "Teenager",
    }


def test_an_emotic_mat_with_an_unknown_category_names_picture_and_category(tmp_path: Path) -> None:
    content = {"train": structs(mat_picture("b.jpg", structs(train_person([0, 0, 9, 9], "Joy"))))}
    scipy.io.savemat(tmp_path / "Annotations.mat", content)
    [record] = records("emotic", tmp_path)
    assert (record.name, record.refused) == (
        "mscoco/images/b.jpg",
        (
            "annotation",
            f"Annotations.mat, train(1): 'Joy' is not a category of EMOTIC; valid are {', '.join(CATEGORIES)}",
        ),
    )


def test_a_mat_that_is_damaged_or_not_emotic_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "Annotations.mat"
    path.write_bytes(b"MATLAB 5.0 MAT-file" + bytes(200))
    assert f"{path}: not a MATLAB 5 file" in error_of("emotic", tmp_path)
    scipy.io.savemat(path, {"faces": [1.0]})
    assert f"{path}: has faces instead of train, val or test" in error_of("emotic", tmp_path)


def test_a_mat_without_scipy_names_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Annotations.mat").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    assert 'scipy is not installed; run pip install -e ".[emotic]" in your clone of uniemox-dist' in error_of(
        "emotic", tmp_path
    )


def test_emotic_has_26_categories_in_alphabetical_order() -> None:
    assert len(CATEGORIES) == 26
    assert list(CATEGORIES) == sorted(CATEGORIES)


# ---- all three at a URL


def test_coco_and_emotic_are_read_from_urls(tmp_path: Path) -> None:
    root = coco(UPath("memory://annotated/coco"))
    found = records("coco", root, source_persons=True)
    assert found[0].image == "memory://annotated/coco/val2017/000000000009.jpg"
    assert found[0].persons is not None
    assert len(found[0].persons) == 3
    assert records("coco", root / "annotations/captions_val2017.json", source_persons=True) == found

    scipy.io.savemat(tmp_path / "a.mat", annotations_mat())
    emotic_csv(tmp_path / "train.csv", cells())
    for name, file in (("mat/Annotations.mat", "a.mat"), ("csv/train.csv", "train.csv")):
        target = UPath("memory://annotated/emotic") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((tmp_path / file).read_bytes())
    assert records("emotic", "memory://annotated/emotic/mat")[1].image == (
        "memory://annotated/emotic/mat/emotic/mscoco/images/b.jpg"
    )
    [record] = records("emotic", "memory://annotated/emotic/csv")
    assert record.image == "memory://annotated/emotic/csv/emotic/mscoco/images/a.jpg"
    assert "has no annotations/captions_" in error_of("coco", "memory://annotated/nothing")


# ---- names of splits, and paths that lead out of the folder


def test_usual_names_of_splits_are_read_in_every_layout(tmp_path: Path) -> None:
    rows = {
        name: [emoset_row(tmp_path, "awe", i)] for i, name in enumerate(("Training", "validation", "TEST"))
    }
    assert [r.split for r in records("emoset", emoset(tmp_path / "emoset", rows))] == ["train", "val", "test"]
    parts = ("training2017", "valid2017")
    assert {r.split for r in records("coco", coco(tmp_path / "coco", parts))} == {"train", "val"}
    (tmp_path / "emotic").mkdir()
    for name in ("train", "dev"):
        emotic_csv(tmp_path / f"emotic/{name}.csv", cells())
    assert [record.split for record in records("emotic", tmp_path / "emotic")] == ["train", "val"]


def test_two_files_of_one_split_are_a_user_error(tmp_path: Path) -> None:
    rows = {name: [emoset_row(tmp_path, "awe", 1)] for name in ("val", "validation")}
    emoset(tmp_path, rows)
    assert error_of("emoset", tmp_path) == (
        f"SOURCE: {tmp_path}/val.json and {tmp_path}/validation.json are both of split val; remove one"
    )


@pytest.mark.parametrize("outside", ["/etc/passwd", "../x.jpg", "a/../../x.jpg"])
def test_a_picture_or_annotation_outside_of_the_folder_is_refused(outside: str, tmp_path: Path) -> None:
    rows = {"train": [["awe", outside, None], ["awe", "1", "image/1.jpg", outside]]}
    emoset(tmp_path / "emoset", rows)
    coco(tmp_path / "coco")
    content = coco_captions()
    content["images"][0]["file_name"] = outside
    put_json(tmp_path / "coco/annotations/captions_val2017.json", content)
    (tmp_path / "emotic").mkdir()
    emotic_csv(tmp_path / "emotic/train.csv", cells(folder="", filename=outside))
    for layout, count in (("emoset", 2), ("coco", 1), ("emotic", 1)):
        found = [record.refused for record in records(layout, tmp_path / layout) if record.refused]
        assert [refused[0] for refused in found] == ["outside"] * count
        assert all(refused[1].startswith(f"{outside} leads out of the folder ") for refused in found)
        allowed = records(layout, tmp_path / layout, allow_outside=True)
        assert all(record.refused is None or record.refused[0] != "outside" for record in allowed)
