"""Choices of the objective on real ranks: however a global batch is divided, the losses are the same."""

from pathlib import Path

import pytest
from ranks import TINY, largest_difference, losses, run_ranks

CHOICES = {
    "masks by person, both views reconstructed": (
        "model.mask=person",
        "model.mask_person_share=0.3",
        "loss.person_reconstruction=true",
        "loss.norm_pix=true",
    ),
    "blocks, a gated MLP and scheduled losses": (
        "model.mask=block",
        "model.fusion=gated_mlp",
        "model.fusion_heads=2",
        "loss.schedule.relation=[[0, 0], [1, 1]]",
        "loss.relation_form=kl",
    ),
    "a timm encoder with registers and learned positions": (
        "model.name=vit_wee_patch16_reg1_gap_256",
        "model.image_size=32",
        "model.patch_size=8",
        "model.width=null",
        "model.depth=null",
        "model.heads=null",
        "model.positions=learned",
        "model.fusion=attention",
        "model.fusion_heads=2",
    ),
}


def train(tmp_path: Path, data: Path, teacher: Path, name: str, *more: str, world_size: int) -> Path:
    settings = (
        f"run.dir={tmp_path}",
        f"run.name={name}",
        "run.max_steps=3",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
    )
    assert run_ranks([*TINY, *settings, *more], world_size=world_size) == [0] * world_size
    return tmp_path / name


@pytest.mark.parametrize("choice", CHOICES)
def test_losses_of_a_choice_do_not_depend_on_ranks_and_micro_batches(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, choice: str
) -> None:
    more = CHOICES[choice]
    one = train(tmp_path, tiny_data, tiny_teacher, "one", *more, "batch.micro_batch=24", world_size=1)
    two = train(
        tmp_path,
        tiny_data,
        tiny_teacher,
        "two",
        *more,
        "batch.micro_batch=6",
        "data.workers=1",
        "zero.stage=3",
        world_size=2,
    )
    assert largest_difference(losses(one), losses(two)) < 1e-5


def test_local_relations_compare_with_the_micro_batchs_own_texts_and_so_depend_on_its_size(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    runs = {
        micro: losses(
            train(
                tmp_path,
                tiny_data,
                tiny_teacher,
                f"micro{micro}",
                "loss.relation_over=local",
                f"batch.micro_batch={micro}",
                world_size=1,
            )
        )
        for micro in (24, 6)
    }
    whole = losses(train(tmp_path, tiny_data, tiny_teacher, "global", "batch.micro_batch=24", world_size=1))
    assert runs[24] == whole  # one micro-batch of one rank is the global batch
    assert runs[6][1][1] != pytest.approx(whole[1][1], rel=1e-3)
    assert runs[6][1][2:] == pytest.approx(whole[1][2:], rel=1e-5)  # the other losses of the first step
