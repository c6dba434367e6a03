"""The renderer that decodes on a GPU, here on a CPU: the loader's views up to rounding, and its own refusals."""

import io
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))

from bench_gpu_decode import TorchvisionRenderer, compare_refusals

from uniemox_dist.data.crops import ViewSettings, plan_training_views
from uniemox_dist.data.views import allocate_views, render

SETTINGS = ViewSettings(image_size=64, colour_jitter=0.2)
RENDERER = TorchvisionRenderer(torch.device("cpu"))


def test_views_are_those_of_the_loader_up_to_rounding(photo_folder: Path) -> None:
    files = [path.read_bytes() for path in sorted(photo_folder.rglob("*.jpg"))]
    sizes = [Image.open(io.BytesIO(data)).size for data in files]
    plans = [plan_training_views(*size, (), SETTINGS, 0, slot) for slot, size in enumerate(sizes)]
    plans = [plan for plan in plans if plan.scale == 1]
    assert len(plans) == len(files)
    views, batch = allocate_views(2 * len(files), 64), allocate_views(2 * len(files), 64)
    pictures = list(zip(files, sizes, plans))
    RENDERER.render_batch(pictures, views[: len(files)], views[len(files) :])
    for i, (data, size, plan) in enumerate(pictures):
        expected = allocate_views(2, 64)
        render(data, size, plan, expected[0], expected[1])
        found = views[[i, len(files) + i]]
        difference = (found.short() - expected.short()).abs()
        # Bytes are rounded and cut off between the two directions of a resize, and fp32 is not.
        assert float(difference.float().mean()) < 0.5
        assert int(difference.max()) <= 12
        RENDERER(data, size, plan, batch[i], batch[len(files) + i])
    assert torch.equal(batch, views)  # one call of the decoder gives what many give


def test_a_picture_of_another_size_or_a_damaged_one_is_refused(photo_folder: Path) -> None:
    data = (photo_folder / "people/astronaut-0.jpg").read_bytes()
    views = allocate_views(2, 64)
    plan = plan_training_views(200, 180, (), SETTINGS, 0, 0)
    with pytest.raises(ValueError, match="has 240 x 180 pixels where 200 x 180 are stated"):
        RENDERER(data, (200, 180), plan, views[0], views[1])
    plan = plan_training_views(240, 180, (), SETTINGS, 0, 0)
    with pytest.raises(ValueError, match="cannot be decoded"):
        RENDERER(data[: len(data) // 2], (240, 180), plan, views[0], views[1])


def test_what_is_no_plain_upright_jpeg_has_the_pixels_of_the_loader() -> None:
    found = compare_refusals(RENDERER)
    assert found["cut off in the middle"] == {"cpu": False, "gpu": False, "mean": None}
    assert found["turned by EXIF"] == found["PNG"] == {"cpu": True, "gpu": True, "mean": 0.0}
    assert all(row["cpu"] and row["gpu"] for name, row in found.items() if name != "cut off in the middle")
