"""What needs no learning of pictures: the rows that a student must beat before its numbers mean anything."""

import numpy as np
from matplotlib.tri import LinearTriInterpolator, Triangulation
from PIL import Image

ALPHAS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
FOLDS = 5


def colour_histogram(picture_HW3: np.ndarray) -> np.ndarray:
    """Shares of the 8×8×8 RGB cells: 512 numbers (square roots, so that distances mean something)."""
    cells = (picture_HW3 >> 5).reshape(-1, 3).astype(np.int64)
    counts = np.bincount(cells @ np.array([64, 8, 1]), minlength=512)
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def small_pixels(picture_HW3: np.ndarray) -> np.ndarray:
    """The picture at 24×24: 1,728 numbers in 0…1."""
    small = Image.fromarray(picture_HW3).resize((24, 24), Image.Resampling.BICUBIC, reducing_gap=None)
    return np.asarray(small, np.float32).reshape(-1) / 255


def folds(groups: list[str], count: int = FOLDS) -> np.ndarray:
    """A fold number per sample; samples of one group share it (look-alikes must not be on both sides)."""
    names = sorted(set(groups))
    order = np.random.RandomState(0).permutation(len(names))
    fold = {name: int(i) % count for name, i in zip(names, order)}
    return np.array([fold[g] for g in groups])


def ridge(x: np.ndarray, y: np.ndarray, groups: list[str], x_new: np.ndarray) -> np.ndarray:
    """Ridge regression from features (n×F) to targets (n×E), predicted for `x_new`.

    Features are standardised; the strength is chosen by cross-validation over groups.
    """
    fold_n = folds(groups)
    errors = np.zeros(len(ALPHAS))
    for fold in range(FOLDS):
        held = fold_n == fold
        predictions = _ridge_path(x[~held], y[~held], x[held])
        errors += [np.square(p - y[held]).sum() for p in predictions]
    return _ridge_path(x, y, x_new)[int(np.argmin(errors))]


def _ridge_path(x: np.ndarray, y: np.ndarray, x_new: np.ndarray) -> list[np.ndarray]:
    """Predictions for every strength from one eigendecomposition of the smaller Gram matrix."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    centre, scale, offset = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    z, z_new, n = (x - centre) / scale, (x_new - centre) / scale, len(x)
    if x.shape[1] <= n:
        values, vectors = np.linalg.eigh(z.T @ z)
        left, right = vectors.T @ (z.T @ (y - offset)), z_new @ vectors
    else:
        values, vectors = np.linalg.eigh(z @ z.T)
        left, right = vectors.T @ (y - offset), (z_new @ z.T) @ vectors
    return [offset + right @ (left / (np.maximum(values, 0) + alpha * n / 100)[:, None]) for alpha in ALPHAS]


def interpolate(patches_NP: np.ndarray, visible_V: np.ndarray, side: int, patch: int) -> np.ndarray:
    """Linear interpolation, pixel by pixel, of the visible patches' mean colours: side·patch squared ×3 in 0…1.

    Means sit at patch centres; between them values are linear on a Delaunay triangulation, and outside of it the
    nearest visible patch's.

    Args:
        patches_NP: pixels of all patches, channel-major, 0…1; only visible ones are looked at.
        visible_V: their numbers.
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
