"""Conversion of pixels to patches and back, and fixed position embeddings.

Shape legend: B samples, N patches of a view, K chosen patches, P = 3·p·p values of a patch, D width.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def normalise(
    pixels_B3HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype
) -> Tensor:
    """Converts uint8 pixels to standardised floats on their device."""
    return standardise(pixels_B3HW, *load_statistics(tuple(mean), tuple(std), pixels_B3HW.device), dtype)


def standardise(pixels_B3HW: Tensor, mean_1311: Tensor, std_1311: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts uint8 pixels to standardised floats, with statistics on their device."""
    return ((pixels_B3HW.float() / 255 - mean_1311) / std_1311).to(dtype)


def standardise_patches(
    pixels_B3HW: Tensor, mean_1311: Tensor, std_1311: Tensor, dtype: torch.dtype, patch_size: int
) -> Tensor:
    """Converts uint8 pixels to standardised patches B×N×P."""
    return patchify(standardise(pixels_B3HW, mean_1311, std_1311, dtype), patch_size)


@lru_cache(maxsize=16)
def load_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns mean and std on the device. Cached, because a copy in every pass would make the host wait.

    They are not buffers of a module, because those would become bf16 with it.
    """
    with torch.inference_mode(False):
        both = torch.tensor([mean, std], dtype=torch.float32, device=device).view(2, 1, 3, 1, 1)
    return both[0], both[1]


def patchify(images_B3HW: Tensor, patch_size: int) -> Tensor:
    """Cuts B×3×H×W into patches B×N×P; values in the order channel, row, column, as in a convolution's weight."""
    B, C, H, W = images_B3HW.shape
    h, w, p = H // patch_size, W // patch_size, patch_size
    grid = images_B3HW.reshape(B, C, h, p, w, p)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(B, h * w, C * p * p)


def unpatchify(patches_BNP: Tensor, patch_size: int) -> Tensor:
    """Inverts `patchify` for square pictures."""
    B, N, _ = patches_BNP.shape
    side, p = round(N**0.5), patch_size
    grid = patches_BNP.reshape(B, side, side, 3, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(B, 3, side * p, side * p)


def select_patches(x_BND: Tensor, index_BK: Tensor) -> Tensor:
    """Selects rows of each sample: B×N×D and numbers B×K to B×K×D."""
    return x_BND.gather(1, index_BK[:, :, None].expand(-1, -1, x_BND.shape[2]))


def sincos_positions(width: int, side: int) -> Tensor:
    """Computes fixed 2-D sine-cosine positions with a zero row for the class token: 1×(1+side²)×width.

    Half the channels encode the column and half the row, as in MAE (He et al. 2022).
    """
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width // 4))
    axis = np.arange(side, dtype=np.float64)[:, None] * omega
    waves = np.concatenate([np.sin(axis), np.cos(axis)], axis=1)  # side × width/2
    column = np.tile(waves, (side, 1))
    row = np.repeat(waves, side, axis=0)
    table = np.concatenate([np.zeros((1, width)), np.concatenate([column, row], axis=1)])
    return torch.from_numpy(table).float()[None]
