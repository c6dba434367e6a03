"""Masks: frozen values, independence of the batch, and uniform rates."""

import math

import pytest
import torch

from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, mix, patch_order

M64 = (1 << 64) - 1


def plain_mix(x: int) -> int:
    """splitmix64 on Python integers."""
    x = (x * 0x9E3779B97F4A7C15) & M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def test_the_hash_is_splitmix64() -> None:
    values = [0, 1, 2, -1, 12345678901234567, 2**63 - 1, -(2**63)]
    assert mix(torch.tensor(values)).tolist() == [signed(plain_mix(value & M64)) for value in values]


def test_an_order_of_patches_keeps_its_values() -> None:
    order = patch_order(torch.tensor([0, 1, 10**12]), SCENE_VIEW, seed=7, patches=9)
    assert order.tolist() == [
        [0, 2, 1, 7, 3, 4, 8, 5, 6],
        [6, 1, 5, 8, 3, 7, 4, 0, 2],
        [5, 4, 3, 7, 8, 0, 6, 2, 1],
    ]


def test_the_order_is_that_of_plain_integers() -> None:
    slot, view, seed = 123, PERSON_VIEW, 42
    key = plain_mix((slot * 4 + view + plain_mix(seed)) & M64)
    expected = sorted(range(50), key=lambda patch: signed(plain_mix((key + patch) & M64)))
    assert patch_order(torch.tensor([slot]), view, seed, 50)[0].tolist() == expected


def test_every_order_holds_every_patch_once() -> None:
    order = patch_order(torch.arange(200), SCENE_VIEW, 0, 49)
    assert (order.sort(dim=1).values == torch.arange(49)).all()


@pytest.mark.parametrize("pieces", [[24], [12, 12], [1] * 24, [5, 19]])
def test_a_sample_has_the_same_mask_in_any_split_of_the_batch(pieces: list[int]) -> None:
    slots = torch.arange(1000, 1024)
    whole = patch_order(slots, SCENE_VIEW, 3, 36)
    parts = [patch_order(piece, SCENE_VIEW, 3, 36) for piece in slots.split(pieces)]
    assert torch.equal(torch.cat(parts), whole)
    backwards = patch_order(slots.flip(0), SCENE_VIEW, 3, 36)
    assert torch.equal(backwards.flip(0), whole)


def test_views_slots_and_seeds_have_masks_of_their_own() -> None:
    def visible(slot: int, view: int, seed: int) -> tuple[int, ...]:
        return tuple(patch_order(torch.tensor([slot]), view, seed, 196)[0, :49].sort().values.tolist())

    masks = {visible(slot, view, seed) for slot in range(20) for view in (0, 1) for seed in (0, 1, 2)}
    assert len(masks) == 20 * 2 * 3


def test_every_patch_and_every_pair_is_visible_equally_often() -> None:
    samples, patches, visible = 20_000, 36, 9
    order = patch_order(torch.arange(samples), SCENE_VIEW, 11, patches)
    kept = torch.zeros(samples, patches).scatter_(1, order[:, :visible], 1.0)
    assert (kept.sum(1) == visible).all()

    def beyond(rates: torch.Tensor, expected: float) -> float:
        """The largest distance, in standard deviations of a rate."""
        return float((rates - expected).abs().max()) / math.sqrt(expected * (1 - expected) / samples)

    assert beyond(kept.mean(0), visible / patches) < 4
    together = (kept.T @ kept / samples)[~torch.eye(patches, dtype=torch.bool)]
    assert beyond(together, visible * (visible - 1) / (patches * (patches - 1))) < 4.5  # of 630 pairs


def test_the_two_views_of_a_sample_are_masked_independently() -> None:
    samples, patches, visible = 20_000, 36, 9
    slots = torch.arange(samples)
    kept = [
        torch.zeros(samples, patches).scatter_(1, patch_order(slots, view, 11, patches)[:, :visible], 1.0)
        for view in (SCENE_VIEW, PERSON_VIEW)
    ]
    rate = (kept[0] * kept[1]).mean()
    p = (visible / patches) ** 2
    assert abs(float(rate) - p) < 4 * math.sqrt(p * (1 - p) / (samples * patches))
