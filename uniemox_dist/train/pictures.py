"""Reconstructions of a fixed set of held-out pictures, while a run goes on and for its report."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.masks import SCENE_VIEW, patch_order
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.views import evaluation_views
from uniemox_dist.models.patches import patchify, unpatchify
from uniemox_dist.models.student import Student
from uniemox_dist.runtime.errors import UserError

GREY = 0.5


def fixed_pictures(reader: ShardReader, settings: ViewSettings, count: int) -> Tensor:
    """The first `count` sound pictures of a data set as scene views, uint8 B×3×H×W (packing has shuffled them)."""
    return torch.stack(list(islice(_sound_views(reader, settings), count)))


def _sound_views(reader: ShardReader, settings: ViewSettings) -> Iterator[Tensor]:
    for shard, entry in enumerate(reader.manifest.shards):
        for row in range(entry.samples):
            try:
                raw = reader.read(shard, row)
                yield evaluation_views(raw.image, raw.persons, settings)[0]
            except UserError:
                raise
            except ValueError:  # damaged: training reports it, these pictures go on without it
                continue


@torch.no_grad()
def reconstructions(student: Student, scene_B3HW: Tensor, seed: int) -> Tensor:
    """Picture, masked picture, and reconstruction (visible patches kept) side by side: B×3×H×3W in 0…1."""
    patch = student.model.patch_size
    slots_B = torch.arange(scene_B3HW.shape[0], device=scene_B3HW.device)
    order_BN = patch_order(slots_B, SCENE_VIEW, seed, student.model.patches)
    masked_BM = student.split(order_BN)[1]
    picture = scene_B3HW.float() / 255
    patches_BNP = patchify(picture, patch)
    index_BMP = masked_BM[:, :, None].expand(-1, -1, patches_BNP.shape[2])
    masked = patches_BNP.scatter(1, index_BMP, torch.full_like(index_BMP, GREY, dtype=patches_BNP.dtype))
    filled = patches_BNP.scatter(1, index_BMP, student.reconstruct(scene_B3HW, order_BN).clamp(0, 1))
    return torch.cat([picture, unpatchify(masked, patch), unpatchify(filled, patch)], dim=3)


def grid(rows_B3HW: Tensor, columns: int, gap: int = 6) -> np.ndarray:
    """Pictures in a grid on white: uint8 H×W×3."""
    B, _, H, W = rows_B3HW.shape
    lines = -(-B // columns)
    sheet = np.full((lines * (H + gap) - gap, columns * (W + gap) - gap, 3), 255, np.uint8)
    pixels = (rows_B3HW.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, picture in enumerate(pixels):
        y, x = (i // columns) * (H + gap), (i % columns) * (W + gap)
        sheet[y : y + H, x : x + W] = picture
    return sheet


def save_png(path: Path, sheet: np.ndarray) -> None:
    """Writes a sheet as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sheet).save(path)
