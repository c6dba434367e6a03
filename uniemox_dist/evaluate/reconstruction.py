"""The error of reconstructed pixels: of students, and of two trivial ways to fill masked patches.

Shape legend: B pictures, N patches, V visible patches, P patch values.
"""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.tri import LinearTriInterpolator, Triangulation
from torch import Tensor

from uniemox_dist.data.evaluation_batches import EvaluationBatch
from uniemox_dist.data.masks import SCENE_VIEW, patch_order
from uniemox_dist.models.patches import patchify, select_patches
from uniemox_dist.models.student import Student

LINEAR, MEAN = "linear interpolation", "mean of visible patches"


def masked_errors(
    students: Mapping[str, Student], batch: EvaluationBatch, seed: int
) -> dict[str, np.ndarray]:
    """Mean squared error over the masked pixels of each picture, B per row; pixels and predictions in 0…1.

    Masks depend only on the number of the sample, so they are the same for all rows and any batch size.
    """
    device = next(next(iter(students.values())).parameters()).device
    scene_B3HW = batch.scene_B3HW.to(device)
    errors: dict[str, np.ndarray] = {}
    for row, student in students.items():
        model = student.model
        order_BN = patch_order(torch.tensor(batch.numbers), SCENE_VIEW, seed, model.patches).to(device)
        truth = select_patches(
            patchify(scene_B3HW.float() / 255, model.patch_size), student.split(order_BN)[1]
        )
        error_B = (student.reconstruct(scene_B3HW, order_BN).clamp(0, 1) - truth).square().mean((1, 2))
        errors[row] = error_B.cpu().numpy().astype(np.float64)
    both = [
        _trivial_errors(scene_3HW, student, order_N)
        for scene_3HW, order_N in zip(batch.scene_B3HW, order_BN.cpu())
    ]
    return {**errors, LINEAR: np.array([b[0] for b in both]), MEAN: np.array([b[1] for b in both])}


def _trivial_errors(scene_3HW: Tensor, student: Student, order_N: Tensor) -> tuple[float, float]:
    """The error of one picture by linear interpolation, and by the mean colour of the visible patches."""
    patch, side = student.model.patch_size, student.model.patch_grid
    patches_NP = patchify(scene_3HW[None].float() / 255, patch)[0].numpy()
    visible, masked = (part[0].numpy() for part in student.split(order_N[None]))
    filled = interpolate(patches_NP, visible, side, patch).transpose(2, 0, 1)[None]
    filled_NP = patchify(torch.from_numpy(filled), patch)[0].numpy()
    mean_3 = patches_NP[visible].reshape(len(visible), 3, -1).mean((0, 2))
    return (
        float(np.square(filled_NP[masked] - patches_NP[masked]).mean()),
        float(np.square(mean_3.repeat(patch * patch) - patches_NP[masked]).mean()),
    )


def interpolate(patches_NP: np.ndarray, visible_V: np.ndarray, side: int, patch: int) -> np.ndarray:
    """The picture interpolated linearly from the mean colours of its visible patches, H×W×3 in 0…1.

    The mean colours are placed at patch centres. Pixels inside their Delaunay triangulation are interpolated; pixels
    outside of it
    take the mean of the nearest visible patch.

    Args:
        patches_NP: pixels of all patches, channel-major, 0…1; only those of visible patches are used.
        visible_V: numbers of the visible patches.
        side: patches along one side of the picture.
        patch: pixels along one side of a patch.
    """
    means_V3 = patches_NP[visible_V].reshape(len(visible_V), 3, -1).mean(2)
    y, x = ((visible_V // side) + 0.5) * patch, ((visible_V % side) + 0.5) * patch
    grid_y, grid_x = np.mgrid[0 : side * patch, 0 : side * patch] + 0.5
    distance = (grid_y[..., None] - y) ** 2 + (grid_x[..., None] - x) ** 2
    picture = means_V3[distance.argmin(2)].copy()
    if len(visible_V) >= 3 and np.linalg.matrix_rank(np.stack([x - x[0], y - y[0]])) == 2:
        triangles = Triangulation(x, y)
        for channel in range(3):
            inside = LinearTriInterpolator(triangles, means_V3[:, channel])(grid_x, grid_y)
            known = ~np.ma.getmaskarray(inside)
            picture[..., channel][known] = inside.data[known]
    return picture
