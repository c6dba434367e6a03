"""Inference and evaluation see the pixels of `load_encoder`'s preprocessing, and no incomplete picture."""

import ast
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import VARIANTS, encoded, png16
from PIL import Image
from skimage import data

from shards.pictures.decode import decode_picture
from shards.sources.tables import CellReader
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.views import evaluation_views, resize_whole
from uniemox_dist.inference.inputs import PictureBatches, Pictures
from uniemox_dist.release.load import to_pixels

ROOT = Path(__file__).parents[3]
SETTINGS = ViewSettings(image_size=32)
LARGE = Image.fromarray(np.tile(data.astronaut(), (3, 3, 1))[:1403, :1201])
"""Large enough for a decode at a quarter, with sides that are no multiples of it."""


@pytest.mark.parametrize("name", ["large", "large progressive", "12 bits", *VARIANTS])
def test_a_file_has_the_same_pixels_as_an_opened_picture(name: str) -> None:
    ramp = np.repeat((np.arange(64 * 64) % 4096).reshape(64, 64, 1), 3, axis=2)
    files = {
        **VARIANTS,
        "large": encoded("JPEG", LARGE),
        "large progressive": encoded("JPEG", LARGE, progressive=True),
        "12 bits": png16(ramp),
    }
    opened = to_pixels(Image.open(io.BytesIO(files[name])))
    assert torch.equal(opened.permute(1, 2, 0), torch.from_numpy(decode_picture(files[name])))
    scene, person = evaluation_views(files[name], (), SETTINGS)
    assert torch.equal(scene, resize_whole(opened, 32))
    assert torch.equal(person, scene)


def test_a_truncated_jpeg_with_an_end_marker_is_an_error_of_that_picture(tmp_path: Path) -> None:
    whole = VARIANTS["jpeg"]
    for name, content in (
        ("a.jpg", whole),
        ("b.jpg", whole[: len(whole) * 6 // 10] + b"\xff\xd9"),
        ("c.gif", VARIANTS["gif"]),
    ):
        (tmp_path / name).write_bytes(content)
    pictures = Pictures(str(tmp_path))
    assert [name for name, *_ in pictures.read(range(3), CellReader())] == ["a.jpg", "b.jpg", "c.gif"]
    batch = PictureBatches(pictures, SETTINGS, 3, range(3))[0]
    assert [error is None for error in batch.errors] == [True, False, True]
    assert (batch.errors[1] or "").startswith("cannot be decoded: the JPEG is ")
    assert int(batch.scene_B3HW[1].max()) == 0


def test_every_file_is_opened_with_a_list_of_formats() -> None:
    """Without it Pillow tries all of its decoders; the one for EPS starts Ghostscript."""
    without = []
    for top in ("shards", "uniemox_dist", "launch", "tools"):
        for path in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call) or ast.unparse(node.func) != "Image.open":
                    continue
                if "formats" not in {keyword.arg for keyword in node.keywords}:
                    without.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert without == []
