"""Boxes of a source in pictures that EXIF turns: all eight orientations, compared with the upright pixels."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from shards.detect.types import Person
from shards.pack.pipeline import PackSettings, pack
from shards.pack.prepare import turn_boxes_upright
from shards.pictures.decode import decode_picture
from shards.pictures.orientation import turn_box
from shards.sources import Record
from uniemox_dist.data.reader import ShardReader

BOX = (0.1, 0.2, 0.4, 0.9)  # of the stored picture, in which it is red
ORIENTATIONS = range(1, 9)


def png(orientation: int, width: int = 80, height: int = 40) -> bytes:
    """A white picture with a red rectangle at BOX as it is stored."""
    rgb = np.full((height, width, 3), 255, np.uint8)
    x1, y1, x2, y2 = (round(value * side) for value, side in zip(BOX, (width, height) * 2))
    rgb[y1:y2, x1:x2] = (255, 0, 0)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def red(data: bytes) -> tuple[float, ...]:
    """The box of red pixels in the upright picture, as fractions."""
    rows, columns = np.nonzero(decode_picture(data)[:, :, 1] == 0)
    height, width = decode_picture(data).shape[:2]
    return (
        columns.min() / width,
        rows.min() / height,
        (columns.max() + 1) / width,
        (rows.max() + 1) / height,
    )


def boxed(size: tuple[float, float] | None) -> Record:
    return Record("r", "x.png", persons=(Person(BOX, 1.0, {"age": "Kid"}),), boxes_size=size)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("size", [(80, 40), (60, 60)], ids=["wide", "square"])
def test_a_box_of_the_stored_pixels_is_turned_with_them(orientation: int, size: tuple[int, int]) -> None:
    data = png(orientation, *size)
    assert turn_box(BOX, orientation) == pytest.approx(red(data))
    [person] = turn_boxes_upright(boxed(size), data).persons or ()
    assert person.box == pytest.approx(red(data), abs=1e-5)
    assert (person.score, person.labels) == (1.0, {"age": "Kid"})


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_a_stated_size_of_the_other_orientation_means_that_the_box_is_upright(orientation: int) -> None:
    record = boxed((40, 80))
    assert turn_boxes_upright(record, png(orientation)) is record


def test_boxes_of_a_picture_that_was_scaled_after_annotation_are_turned_too() -> None:
    [person] = turn_boxes_upright(boxed((640, 320)), png(6)).persons or ()
    assert person.box == pytest.approx(red(png(6)), abs=1e-5)


@pytest.mark.parametrize(
    "record", [boxed(None), Record("r", "x.png", boxes_size=(80, 40))], ids=["no size", "nobody"]
)
def test_boxes_without_a_stated_size_stay_unchanged(record: Record) -> None:
    assert turn_boxes_upright(record, png(6)) is record


def test_a_set_annotated_in_stored_pixels_is_packed_with_upright_boxes(tmp_path: Path) -> None:
    x1, y1, x2, y2 = (value * side for value, side in zip(BOX, (80, 40) * 2))
    images = [{"id": i, "file_name": f"{i}.png", "width": 80, "height": 40} for i in (*ORIENTATIONS, 9)]
    box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1, "iscrowd": 0}
    content = {
        "captions_val2017.json": {"images": images, "annotations": []},
        "instances_val2017.json": {
            "categories": [{"id": 1, "name": "person"}],
            "annotations": [{**box, "id": image["id"], "image_id": image["id"]} for image in images],
        },
    }
    for folder in ("annotations", "val2017"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for name, value in content.items():
        (tmp_path / "in/annotations" / name).write_text(json.dumps(value))
    for i in ORIENTATIONS:
        (tmp_path / f"in/val2017/{i}.png").write_bytes(png(i))
    (tmp_path / "in/val2017/9.png").write_bytes(b"")
    result = pack(PackSettings(str(tmp_path / "in"), "coco", persons="source"), tmp_path / "out")
    assert [refused.reason for refused in result.rejected] == ["empty"]
    reader = ShardReader.from_folder(tmp_path / "out/val", "x")
    boxes = {reader.record(0, row)["source"]: reader.record(0, row)["persons"][0]["box"] for row in range(8)}
    expected = {f"val2017/{i}.png": pytest.approx(red(png(i)), abs=1e-5) for i in ORIENTATIONS}
    assert boxes == expected
