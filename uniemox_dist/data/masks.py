"""Random masks as a pure function of (seed, slot, view): the same on every device and number of ranks.

The argsort of hashed patch numbers is a random permutation; its first V entries are the visible patches.
Shape legend: B samples, N patches, V visible patches.
"""

import torch
from torch import Tensor

SCENE_VIEW, PERSON_VIEW = 0, 1
# The 64-bit constants of the splitmix64 finaliser, as the signed integers that torch has.
_WEYL, _MUL1, _MUL2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


def mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on wrapping int64 (Steele et al. 2014); integers, hence exact anywhere."""
    x = x * _WEYL
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MUL1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MUL2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def patch_order(slots_B: Tensor, view: int, seed: int, patches: int) -> Tensor:
    """A random order of the patches of each sample: int64 B×N. The first V are visible, the others masked."""
    seed_key = mix(torch.tensor(seed, dtype=torch.int64, device=slots_B.device))
    sample_key_B1 = mix(slots_B[:, None] * 4 + view + seed_key)
    patch_N = torch.arange(patches, device=slots_B.device)
    return mix(sample_key_B1 + patch_N).argsort(dim=1, stable=True)
