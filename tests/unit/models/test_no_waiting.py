"""Forward and backward never make the host wait for the device: no reads back, no copies to the device."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from handmade import TINY_STUDENT
from torch.utils._python_dispatch import TorchDispatchMode

from uniemox_dist.config.schema import LossConfig
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order
from uniemox_dist.models.student import Student, Targets, Views

E, B = 12, 3
READS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique", "bincount")
"""Operations whose result, or its shape, the host must know before it continues."""


class Watch(TorchDispatchMode):
    """Notes down what would make the host wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # lift_fresh is a tensor made from Python's numbers: on a GPU, a copy from the host.
        if name in (*READS, "lift_fresh", "lift_fresh_copy"):
            self.found.append(name)
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            self.found.append("index by a mask")
        return func(*args, **(kwargs or {}))


def step(mask: str, fusion: str) -> Callable[[], None]:
    changes = {"mask": mask, "fusion": fusion, "fusion_heads": 4, "drop_path": 0.1}
    model = TINY_STUDENT.model_copy(update=changes)
    student = Student(model, LossConfig(norm_pix=True), E)
    pixels = torch.randint(0, 256, (B, 3, 32, 32), dtype=torch.uint8)
    slots, on_person = torch.arange(B), torch.rand(B, 16) < 0.5
    unit = torch.nn.functional.normalize
    targets = Targets(unit(torch.randn(B, E), dim=1), unit(torch.randn(7, E), dim=1))
    targets = replace(targets, loss_weights={"relation": 1.0, "similarity": 0.5, "reconstruction": 2.0})

    def run() -> None:
        scene = choose_patch_order(model, slots, SCENE_VIEW, 5, on_person)
        views = Views(pixels, pixels, scene, choose_patch_order(model, slots, PERSON_VIEW, 5))
        total, parts = student(views, targets)
        total.backward()
        assert parts.shape == (3,)

    return run


@pytest.mark.parametrize(
    ("mask", "fusion"), [("random", "prior"), ("block", "attention"), ("person", "gated_mlp")]
)
def test_masks_forward_and_backward_read_nothing_back(mask: str, fusion: str) -> None:
    run = step(mask, fusion)
    run()  # tables and statistics are made once
    with Watch() as watch:
        run()
    assert watch.found == []


def test_the_watch_detects_host_synchronisation() -> None:
    x = torch.arange(4)
    for careless in (
        lambda: x.sum().item(),
        lambda: torch.tensor([1, 2]),
        lambda: x[x > 2],
        lambda: x.nonzero(),
    ):
        with Watch() as watch:
            careless()
        assert watch.found != []
