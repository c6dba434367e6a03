"""Trivial baselines: features of a picture without a learned encoder."""

import numpy as np
from PIL import Image


def colour_histogram(picture_HW3: np.ndarray) -> np.ndarray:
    """Colour histogram of 8×8×8 RGB cells: the square roots of 512 shares, so that distances are meaningful."""
    cells = (picture_HW3 >> 5).reshape(-1, 3).astype(np.int64)
    counts = np.bincount(cells @ np.array([64, 8, 1]), minlength=512)
    return np.sqrt(counts / counts.sum()).astype(np.float32)


def small_pixels(picture_HW3: np.ndarray) -> np.ndarray:
    """The pixels of the picture at 24×24: 1,728 numbers in 0…1."""
    small = Image.fromarray(picture_HW3).resize((24, 24), Image.Resampling.BICUBIC, reducing_gap=None)
    return np.asarray(small, np.float32).reshape(-1) / 255
