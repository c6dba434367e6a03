"""Masks as a pure function of (seed, slot, view), and with model.mask=person of the person's position.

Only integer arithmetic is involved, so masks are the same on every device and for any number of ranks. A mask is an
order of a view's patches: the first V are visible, the others masked. V is the same for all samples.
Shape legend: B samples, N patches, V visible patches, K rectangles, L drop-path layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from uniemox_dist.config.schema import ModelConfig

SCENE_VIEW, PERSON_VIEW = 0, 1
_ORDER, _RECTANGLES, _PATHS = 0, 1, 2
# The 64-bit constants of the splitmix64 finaliser as signed integers, since torch has no unsigned ones.
_WEYL, _MUL1, _MUL2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
MAX_RECTANGLES = 48
"""Rectangles drawn for a block mask. Those after the last one that is needed have no effect."""
MIN_ASPECT = 0.3
"""Smallest ratio of a rectangle's sides (BEiT, Bao et al. 2022)."""
MIN_AREA = 0.08
"""Smallest area of a rectangle as a share of the view (BEiT's 16 of 196 patches)."""
MAX_AREA = 0.3
"""Largest area of a rectangle as a share of the view."""


def hash_int64(x: Tensor) -> Tensor:
    """Applies the finaliser of splitmix64 (Steele et al. 2014) to wrapping int64; exact on every device."""
    x = x * _WEYL
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MUL1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MUL2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def choose_patch_order(
    model: ModelConfig, slots_B: Tensor, view: int, seed: int, on_person_BN: Tensor | None = None
) -> Tensor:
    """Returns the order of patches, int64 B×N, for the strategy `model.mask`.

    Args:
        on_person_BN: True for patches of this view that show the person. If None, mask=person masks at random.
    """
    if model.mask == "block":
        return block_order(slots_B, view, seed, model.patch_grid)
    order_BN = patch_order(slots_B, view, seed, model.patches)
    if model.mask == "person" and on_person_BN is not None:
        return person_order(order_BN, on_person_BN, model.visible, model.mask_person_share)
    return order_BN


def patch_order(slots_B: Tensor, view: int, seed: int, patches: int) -> Tensor:
    """Returns a random order: the argsort of hashed patch numbers is a random permutation."""
    return _hash_slots(slots_B, view, seed, patches).argsort(dim=1, stable=True)


def person_order(order_BN: Tensor, on_person_BN: Tensor, visible: int, share: float) -> Tensor:
    """Returns an order in which the given share of the masked patches is on the person.

    If the person, or the rest of the view, has too few patches, the other one provides the difference. Within both
    groups the given random order decides which patches are masked.
    """
    masked = order_BN.shape[1] - visible
    on_BN = on_person_BN.gather(1, order_BN).long()
    persons_B1 = on_BN.sum(dim=1, keepdim=True)
    others_B1 = order_BN.shape[1] - persons_B1
    wanted_B1 = torch.full_like(persons_B1, int(share * masked + 0.5)).minimum(persons_B1)
    wanted_B1 = wanted_B1.maximum(masked - others_B1)
    # In both groups the first patches of the random order are visible.
    hidden_BN = torch.where(
        on_BN > 0,
        on_BN.cumsum(1) > persons_B1 - wanted_B1,
        (1 - on_BN).cumsum(1) > others_B1 - (masked - wanted_B1),
    )
    return order_BN.gather(1, hidden_BN.long().argsort(dim=1, stable=True))


def block_order(slots_B: Tensor, view: int, seed: int, side: int) -> Tensor:
    """Returns an order whose masked patches form rectangles of random size, shape and position (BEiT, Bao et al. 2022).

    As many rectangles are used as the mask needs; of the last one, a random subset of patches. Patches are not masked
    equally often: over 50,000 masks of 14×14 patches at ratio 0.75, a corner patch was visible in 26.9 % and a central
    one in 23.7 %.
    """
    device = slots_B.device
    draws_BK3 = _hash_slots(slots_B, view, seed, 3 * MAX_RECTANGLES, _RECTANGLES).view(-1, MAX_RECTANGLES, 3)
    draws_BK3 = (
        draws_BK3 >> 16
    ) & 0xFFFFFFFFFFFF  # non-negative, because a remainder of a negative number differs
    shapes_S2 = _list_shapes(side, device)
    shape_BK2 = shapes_S2[draws_BK3[:, :, 0] % shapes_S2.shape[0]]
    # A rectangle may extend over the edge. Otherwise patches near the edges would hardly ever be masked.
    first_BK2 = draws_BK3[:, :, 1:] % (side + shape_BK2 - 1) - shape_BK2 + 1
    at_S = torch.arange(side, device=device)
    end_BK2 = first_BK2 + shape_BK2
    rows_BKS, columns_BKS = (
        (at_S >= first_BK2[:, :, i, None]) & (at_S < end_BK2[:, :, i, None]) for i in (0, 1)
    )
    inside_BKN = (rows_BKS[:, :, :, None] & columns_BKS[:, :, None]).flatten(2)
    numbers_K1 = torch.arange(MAX_RECTANGLES, dtype=torch.uint8, device=device)[:, None]
    none = torch.full((), MAX_RECTANGLES, dtype=torch.uint8, device=device)
    first_cover_BN = torch.where(inside_BKN, numbers_K1, none).amin(dim=1)
    random_BN = patch_order(slots_B, view, seed, side**2)
    # Patches covered by no rectangle, or by a late one, come first and are visible.
    late_BN = first_cover_BN.gather(1, random_BN).argsort(dim=1, stable=True, descending=True)
    return random_BN.gather(1, late_BN)


def draw_drop_paths(slots_B: Tensor, seed: int, count: int) -> Tensor:
    """Returns random numbers for drop path, uniform in [0, 1), 2B×count: scene views first, then person views."""
    both = [_hash_slots(slots_B, view, seed, count, _PATHS) for view in (SCENE_VIEW, PERSON_VIEW)]
    return ((torch.cat(both) >> 40) & 0xFFFFFF).float() / (1 << 24)


def drop_path_factors(draws_BL: Tensor, rates: Sequence[float]) -> Tensor:
    """Returns the factors of residual branches, B×L. A branch whose number is below its rate is dropped (0); the others
    are scaled up."""
    columns = [
        (draws_B >= rate).float() / (1 - rate)
        for draws_B, rate in zip(draws_BL.unbind(1), rates, strict=True)
    ]
    return torch.stack(columns, dim=1)


@dataclass(frozen=True)
class SlotDraws:
    """Draws the masks and drop paths of micro-batches. Loader processes do so, because on a GPU each of the many small
    operations would be a launch."""

    model: ModelConfig
    seed: int
    masks: bool = True
    drop_rates: tuple[float, ...] = ()
    """Rates of the module's drop-path layers, in their order."""

    def draw(self, slots_B: Tensor, on_person_BN: Tensor | None, *, with_person: bool) -> dict[str, Tensor]:
        """Returns fields of a MicroBatch."""
        drawn: dict[str, Tensor] = {}
        if self.masks:
            model, seed = self.model, self.seed
            drawn["scene_order_BN"] = choose_patch_order(model, slots_B, SCENE_VIEW, seed, on_person_BN)
            if with_person:
                drawn["person_order_BN"] = choose_patch_order(model, slots_B, PERSON_VIEW, seed)
        if self.drop_rates:
            draws_BL = draw_drop_paths(slots_B, self.seed, len(self.drop_rates))
            drawn["drop_factors_BL"] = drop_path_factors(draws_BL, self.drop_rates)
        return drawn


def _hash_slots(slots_B: Tensor, view: int, seed: int, count: int, purpose: int = _ORDER) -> Tensor:
    """Returns hashes of (seed, purpose, view, slot, 0…count-1), int64 B×count."""
    sample_key_B1 = hash_int64(slots_B[:, None] * 4 + view + _seed_key(seed + (purpose << 32)))
    return hash_int64(sample_key_B1 + torch.arange(count, device=slots_B.device))


@lru_cache(maxsize=4)
def _seed_key(seed: int) -> int:
    return int(hash_int64(torch.tensor(seed, dtype=torch.int64)))


@lru_cache(maxsize=8)
def _list_shapes(side: int, device: torch.device) -> Tensor:
    """Lists the heights and widths that a rectangle may have, S×2."""
    sides = range(1, side + 1)
    shapes = [
        (h, w)
        for h in sides
        for w in sides
        if MIN_AREA * side**2 <= h * w <= max(1.0, MAX_AREA * side**2)
        and MIN_ASPECT <= h / w <= 1 / MIN_ASPECT
    ]
    return torch.tensor(shapes or [(1, 1)], device=device)
