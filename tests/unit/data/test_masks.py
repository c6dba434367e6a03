"""Masks: frozen values, independence of the batch, and rates of visible patches."""

import math

import pytest
import torch

from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.data.masks import (
    PERSON_VIEW,
    SCENE_VIEW,
    block_order,
    choose_patch_order,
    hash_int64,
    patch_order,
    person_order,
)

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
    assert hash_int64(torch.tensor(values)).tolist() == [signed(plain_mix(value & M64)) for value in values]


def test_an_order_of_patches_keeps_its_values() -> None:
    order = patch_order(torch.tensor([0, 1, 10**12]), SCENE_VIEW, seed=7, patches=9)
    assert order.tolist() == [
        [0, 2, 1, 7, 3, 4, 8, 5, 6],
        [6, 1, 5, 8, 3, 7, 4, 0, 2],
        [5, 4, 3, 7, 8, 0, 6, 2, 1],
    ]


def test_the_order_equals_one_computed_with_python_integers() -> None:
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


def test_masks_differ_between_views_slots_and_seeds() -> None:
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


def masks(order_BN: torch.Tensor, visible: int) -> torch.Tensor:
    """1 where a patch is masked, B×N."""
    return torch.ones_like(order_BN).scatter(1, order_BN[:, :visible], 0)


@pytest.mark.parametrize("side", [1, 2, 4, 10, 14])
def test_an_order_by_blocks_holds_every_patch_once(side: int) -> None:
    order = block_order(torch.arange(300), SCENE_VIEW, 0, side)
    assert (order.sort(dim=1).values == torch.arange(side**2)).all()


def test_block_masks_are_coherent_and_mask_all_patches_at_similar_rates() -> None:
    slots = torch.arange(4000)
    block = masks(block_order(slots, SCENE_VIEW, 1, 14), 49).view(-1, 14, 14)
    random = masks(patch_order(slots, SCENE_VIEW, 1, 196), 49).view(-1, 14, 14)
    equal_neighbours = [(m[:, :, 1:] == m[:, :, :-1]).float().mean().item() for m in (block, random)]
    assert equal_neighbours[0] > 0.85  # 49 visible of 196 at random: 0.75² + 0.25²
    assert equal_neighbours[1] == pytest.approx(0.625, abs=0.01)
    rates = block.float().mean(0)
    assert rates.mean().item() == pytest.approx(0.75)
    assert rates.min() > 0.70
    assert rates.max() < 0.80


def test_block_masks_leave_corners_visible_more_often_than_the_centre() -> None:
    """Block masks are not uniform: 26.9 % and 23.7 % in 50,000 masks, as docs/model.md states."""
    samples = 12_000
    orders = torch.cat([block_order(slots, SCENE_VIEW, 0, 14) for slots in torch.arange(samples).split(2000)])
    visible = 1 - masks(orders, 49).view(-1, 14, 14).float().mean(0)
    corners = visible[[0, 0, -1, -1], [0, -1, 0, -1]].mean().item()
    centre = visible[6:8, 6:8].mean().item()
    assert corners == pytest.approx(0.269, abs=0.006)
    assert centre == pytest.approx(0.237, abs=0.006)
    assert visible.min() > 0.22
    assert visible.max() < 0.29


def test_blocks_differ_between_views_and_slots() -> None:
    slots = torch.arange(50)
    scene, person = (masks(block_order(slots, view, 0, 14), 49) for view in (SCENE_VIEW, PERSON_VIEW))
    assert (scene != person).any(1).all()
    assert (scene[1:] != scene[:-1]).any(1).all()
    assert (person[:-1] != scene[1:]).any(1).all()


@pytest.mark.parametrize(
    ("persons", "share", "masked_persons"),
    [
        (30, 0.1, 15),
        (30, 0.5, 30),
        (190, 0.1, 141),
        (0, 0.5, 0),
        (196, 0.5, 147),
        (100, 0.0, 51),
        (100, 1.0, 100),
    ],
)
def test_the_given_share_of_masked_patches_is_on_the_person_if_it_has_enough(
    persons: int, share: float, masked_persons: int
) -> None:
    on = torch.zeros(40, 196, dtype=torch.bool)
    on[:, :persons] = True
    order = person_order(patch_order(torch.arange(40), SCENE_VIEW, 0, 196), on, 49, share)
    assert (order.sort(dim=1).values == torch.arange(196)).all()
    assert (on.gather(1, order[:, 49:]).sum(1) == masked_persons).all()


def test_a_mask_by_person_without_a_person_is_the_random_one() -> None:
    model = ModelConfig(mask="person")
    slots = torch.arange(20)
    on = torch.zeros(20, 196, dtype=torch.bool)
    random = patch_order(slots, SCENE_VIEW, 3, 196)
    assert torch.equal(choose_patch_order(model, slots, SCENE_VIEW, 3, on), random)
    assert torch.equal(choose_patch_order(model, slots, SCENE_VIEW, 3), random)


@pytest.mark.parametrize("mask", ["block", "person"])
def test_a_strategys_masks_do_not_depend_on_the_split_of_the_batch(mask: str) -> None:
    model = ModelConfig(mask=mask)  # type: ignore[arg-type]
    slots = torch.arange(500, 524)
    on = patch_order(slots, 7, 0, 196) < 60
    whole = choose_patch_order(model, slots, SCENE_VIEW, 3, on)
    parts = [choose_patch_order(model, s, SCENE_VIEW, 3, o) for s, o in zip(slots.split(5), on.split(5))]
    assert torch.equal(torch.cat(parts), whole)
