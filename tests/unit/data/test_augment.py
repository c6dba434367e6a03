"""Augmentation depends on slots only, and mixed pairs stay in one micro-batch."""

import random

import numpy as np
import pytest
import torch

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.augment import Augment, seed_libraries
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.origin import ReadCounts
from uniemox_dist.data.views import allocate_views

SIZE = 32


def config(*more: str) -> FinetuneRun:
    model = (
        "model.name=null",
        f"model.image_size={SIZE}",
        "model.patch_size=8",
        "model.width=32",
        "model.heads=2",
    )
    found = load_config("finetune", [*model, *more])
    assert isinstance(found, FinetuneRun)
    return found


def views(count: int) -> torch.Tensor:
    room = allocate_views(count, SIZE)
    room.copy_(torch.arange(count * 3 * SIZE * SIZE).view(count, 3, SIZE, SIZE) % 251)
    return room


def batch(slots: list[int]) -> MicroBatch:
    """Each view has the grey level of its slot, each target its own class."""
    scene = allocate_views(len(slots), SIZE)
    for i, slot in enumerate(slots):
        scene[i] = 10 * slot
    return MicroBatch(
        torch.tensor(slots),
        scene,
        scene.clone(),
        None,
        None,
        None,
        (),
        (),
        (),
        ReadCounts(),
        torch.eye(12)[slots],
    )


def test_a_view_is_varied_by_its_slot_alone_and_leaves_the_generators_as_they_were() -> None:
    one, other = (Augment(config("finetune.erasing=1")) for _ in range(2))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    a, b = views(4), views(4)
    for i in range(4):
        one.change_view(a[i], slot=7 + i, number=0)
    for i in reversed(range(4)):
        other.change_view(b[i], slot=7 + i, number=0)
    assert torch.equal(a, b)
    assert all(not torch.equal(a[i], views(4)[i]) for i in range(4))
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected
    person = views(1)
    one.change_view(person[0], slot=7, number=1)
    assert not torch.equal(person[0], a[0])


def test_views_are_unchanged_without_augmentation() -> None:
    off = Augment(
        config("finetune.rand_augment=null", "finetune.erasing=0", "finetune.mixup=0", "finetune.cutmix=0")
    )
    view = views(1)
    off.change_view(view[0], 3, 0)
    assert torch.equal(view, views(1))
    given = batch([0, 1])
    assert off.mix_pairs(given) is given


@pytest.mark.parametrize(("off", "cuts"), [("cutmix", False), ("mixup", True)])
def test_pairs_are_mixed_identically_in_micro_batches_of_any_even_size(off: str, cuts: bool) -> None:
    augment = Augment(config(f"finetune.{off}=0"))
    slots = list(range(12))
    whole = augment.mix_pairs(batch(slots))
    parts = [augment.mix_pairs(batch(slots[i : i + 2])) for i in range(0, 12, 2)]
    assert torch.equal(whole.scene_B3HW, torch.cat([part.scene_B3HW for part in parts]))
    assert whole.targets_BC is not None
    assert torch.equal(whole.targets_BC, torch.cat([p.targets_BC for p in parts if p.targets_BC is not None]))
    torch.testing.assert_close(whole.targets_BC.sum(1), torch.ones(12))
    shares = set()
    for a, b in zip(slots[::2], slots[1::2]):
        mix = augment.choose_mix(a)
        assert mix is not None
        assert (mix.box is not None) == cuts
        shares.add(mix.share)
        for one, other in ((a, b), (b, a)):
            assert whole.targets_BC[one, one] == pytest.approx(mix.share, abs=1e-6)
            assert whole.targets_BC[one, other] == pytest.approx(1 - mix.share, abs=1e-6)
            scene = whole.scene_B3HW[one].float()
            mean = 10 * (mix.share * one + (1 - mix.share) * other)
            assert scene.mean().item() == pytest.approx(mean, abs=0.5)  # half a grey level
            assert len(scene.unique()) == (2 if cuts and mix.share < 1 else 1)
            assert whole.person_B3HW is not None
            assert torch.equal(whole.person_B3HW[one], whole.scene_B3HW[one])
    assert len(shares) == 6


def test_invalid_augmentation_settings_are_user_errors() -> None:
    with pytest.raises(UserError, match=r"batch\.micro_batch=3 and batch\.streams=96 must be even"):
        config("batch.micro_batch=3")
    with pytest.raises(UserError, match=r"finetune\.rand_augment=rand-z5: timm does not accept it"):
        Augment(config("finetune.rand_augment=rand-z5"))
    with pytest.raises(UserError, match=r"finetune\.labels: 'a' is given twice"):
        config("finetune.labels=[a, b, a]")
    with pytest.raises(UserError, match=r"'a' is the only label"):
        config("finetune.labels=[a]")
    with pytest.raises(UserError, match=r"loss\.\*: fine-tuning has no such section"):
        config("loss.relation=1")
    with pytest.raises(UserError, match=r"finetune\.mixupp: unknown key; did you mean finetune\.mixup\?"):
        config("finetune.mixupp=1")
    with pytest.raises(UserError, match=r"data\.path: give one folder"):
        config("data.path=null", "data.sources=[{path: x}]", "run.epochs=null", "run.max_steps=2")


def test_the_strongest_of_every_kind_can_be_drawn() -> None:
    strongest = Augment(config("finetune.rand_augment=rand-m10-n4-inc1", "finetune.erasing=0"))
    for slot in range(150):  # 600 draws of 15 kinds, half of them applied
        strongest.change_view(views(1)[0], slot, 0)


def test_seeds_of_64_bits_are_taken() -> None:
    with seed_libraries((1 << 64) - 1):
        first = random.random(), np.random.rand(), torch.rand(1).item()
    with seed_libraries((1 << 64) - 1):
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
