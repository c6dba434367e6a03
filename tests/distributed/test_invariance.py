"""Results that must not depend on how a global batch is divided: losses, gradients, resumed runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ranks import TINY, largest_difference, losses, run_ranks

from uniemox_dist.checkpoints.folders import COMPLETE, digest, list_complete_checkpoints
from uniemox_dist.checkpoints.format import FragmentReader
from uniemox_dist.checkpoints.fragment_index import FRAGMENTS
from uniemox_dist.core.files import write_json

BETA1 = 0.9


def train(
    tmp_path: Path, data: Path, teacher: Path, name: str, *more: str, world_size: int = 1, steps: int = 3
) -> Path:
    """A real run of the tiny model; returns its folder."""
    settings = (
        f"run.dir={tmp_path}",
        f"run.name={name}",
        f"run.max_steps={steps}",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
        "run.save_every=1",
        "run.keep_last=99",
    )
    codes = run_ranks([*TINY, *settings, *more], world_size=world_size)
    assert codes == [0] * world_size
    return tmp_path / name


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    return train(folder, tiny_data, tiny_teacher, "one", "batch.micro_batch=24", "optim.clip_grad=0", steps=6)


def gradients(run: Path) -> dict[str, torch.Tensor]:
    """First-step gradients, from Adam's first moment after one step: m = (1 - beta1) g."""
    first = list_complete_checkpoints(run / "checkpoints")[0]
    assert first.step == 1
    reader = FragmentReader(first)
    return {name: reader.parameter(name, "exp_avg") / (1 - BETA1) for name in reader.shapes}


@pytest.mark.parametrize(
    ("world_size", "accumulation", "zero_stage"),
    [
        (1, 4, 1),
        (2, 2, 2),
        (4, 1, 3),
        *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((2, 1, 1), (2, 4, 3), (4, 2, 2))),
    ],
)
def test_losses_and_first_gradients_do_not_depend_on_ranks_accumulation_or_zero_stage(
    tmp_path: Path,
    reference: Path,
    tiny_data: Path,
    tiny_teacher: Path,
    world_size: int,
    accumulation: int,
    zero_stage: int,
) -> None:
    micro = 24 // world_size // accumulation
    run = train(
        tmp_path,
        tiny_data,
        tiny_teacher,
        "other",
        f"batch.micro_batch={micro}",
        f"zero.stage={zero_stage}",
        "optim.clip_grad=0",
        world_size=world_size,
        steps=6,
    )
    assert largest_difference(losses(reference), losses(run)) < 1e-5
    expected, found = gradients(reference), gradients(run)
    assert expected.keys() == found.keys()
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    assert norm > 0.1
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-6 * max(gradient.norm().item(), 1e-3 * norm.item()), name


def test_a_resumed_run_has_exactly_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, reference: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = ("batch.micro_batch=24", "optim.clip_grad=0")
    run = shutil.copytree(reference, tmp_path / "again")
    for checkpoint in list_complete_checkpoints(run / "checkpoints"):
        if checkpoint.step > 3:
            (checkpoint.folder / "complete.json").unlink()  # as if it had been killed while saving step 4
    train(tmp_path, tiny_data, tiny_teacher, "again", *settings, steps=6)
    assert losses(run) == losses(reference)
    kept = FragmentReader(list_complete_checkpoints(run / "checkpoints")[-1])
    wanted = FragmentReader(list_complete_checkpoints(reference / "checkpoints")[-1])
    assert all(torch.equal(kept.parameter(name), wanted.parameter(name)) for name in wanted.shapes)


MOVED = (
    "optim.clip_grad=0",
    "optim.ema_decay=0.9",
    "optim.layer_decay=0.7",  # and so eight groups of parameters
    # The learning rate must not notice that the first part stops early: peak = blr * 24/256 = min_lr, a constant rate.
    "optim.min_lr=1e-4",
    "optim.blr=1.0666666666666667e-3",
)


@pytest.fixture(scope="module")
def unmoved(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> dict[str, Path]:
    """Six steps of one rank, by precision."""
    folder = tmp_path_factory.mktemp("unmoved")
    settings = (*MOVED, "batch.micro_batch=24")
    return {
        precision: train(
            folder, tiny_data, tiny_teacher, precision, *settings, f"optim.precision={precision}", steps=6
        )
        for precision in ("fp32", "bf16")
    }


@pytest.mark.parametrize(
    ("precision", "before", "after"),
    [
        ("fp32", (2, 1), (3, 3)),
        pytest.param("fp32", (3, 3), (1, 2), marks=pytest.mark.slow),
        pytest.param("fp32", (2, 2), (4, 1), marks=pytest.mark.slow),
        ("fp32", (4, 1), (2, 2)),
        pytest.param("fp32", (1, 2), (2, 3), marks=pytest.mark.slow),
        pytest.param("fp32", (4, 3), (3, 1), marks=pytest.mark.slow),
        pytest.param("fp32", (1, 0), (2, 1), marks=pytest.mark.slow),
        ("bf16", (2, 3), (1, 1)),
        pytest.param("bf16", (1, 2), (4, 3), marks=pytest.mark.slow),
        pytest.param("bf16", (3, 1), (2, 2), marks=pytest.mark.slow),
    ],
)
def test_any_ranks_and_zero_stage_resume_any_other_with_the_same_losses(
    tmp_path: Path,
    unmoved: dict[str, Path],
    tiny_data: Path,
    tiny_teacher: Path,
    precision: str,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    for step, (world_size, zero_stage) in ((3, before), (6, after)):
        run = train(
            tmp_path,
            tiny_data,
            tiny_teacher,
            "moved",
            *MOVED,
            f"batch.micro_batch={24 // world_size}",
            f"zero.stage={zero_stage}",
            f"optim.precision={precision}",
            world_size=world_size,
            steps=step,
        )
    assert (
        largest_difference(losses(unmoved[precision]), losses(run)) < {"fp32": 1e-5, "bf16": 1e-2}[precision]
    )
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (moved,) = [line for line in lines if line["event"] == "convert"]
    assert (moved["step"], moved["from_ranks"], moved["from_zero_stage"]) == (3, *before)
    assert (moved["ranks"], moved["zero_stage"]) == after


def test_a_checkpoint_of_an_earlier_version_without_the_fragment_index_is_resumed_by_another_layout(
    tmp_path: Path, unmoved: dict[str, Path], tiny_data: Path, tiny_teacher: Path
) -> None:
    for step, (world_size, stage) in ((3, (2, 1)), (6, (1, 2))):
        layout = (f"batch.micro_batch={24 // world_size}", f"zero.stage={stage}")
        run = train(
            tmp_path,
            tiny_data,
            tiny_teacher,
            "old",
            *MOVED,
            *layout,
            "optim.precision=fp32",
            world_size=world_size,
            steps=step,
        )
        if step == 3:
            for checkpoint in list_complete_checkpoints(run / "checkpoints"):
                info = {key: value for key, value in checkpoint.info.items() if key != FRAGMENTS}
                write_json(checkpoint.folder / COMPLETE, {**info, "sha256": digest(info)})
    assert largest_difference(losses(unmoved["fp32"]), losses(run)) < 1e-5
    has_index = [FRAGMENTS in saved.info for saved in list_complete_checkpoints(run / "checkpoints")]
    assert has_index == [False] * 3 + [True] * 3


def test_bf16_resumes_bit_for_bit_on_the_same_layout(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = ("batch.micro_batch=12", "optim.precision=bf16")
    whole = train(tmp_path, tiny_data, tiny_teacher, "whole", *settings, world_size=2, steps=4)
    parts = shutil.copytree(whole, tmp_path / "parts")
    for checkpoint in list_complete_checkpoints(parts / "checkpoints")[2:]:
        (checkpoint.folder / "complete.json").unlink()
    train(tmp_path, tiny_data, tiny_teacher, "parts", *settings, world_size=2, steps=4)
    assert losses(whole) == losses(parts)


def test_the_teacher_is_neither_trained_nor_in_the_checkpoint(reference: Path, tiny_teacher: Path) -> None:
    names = FragmentReader(list_complete_checkpoints(reference / "checkpoints")[-1]).shapes
    assert {name.partition(".")[0] for name in names} == {"encoder", "to_decoder", "fusion", "decoder"}
    assert "encoder.pos_embed" not in names  # fixed, and recomputed


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (3, "fp32"), (2, "bf16")])
def test_steps_with_non_finite_gradients_change_nothing_and_end_the_run_after_some(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, zero_stage: int, precision: str
) -> None:
    settings = [
        f"run.dir={tmp_path}",
        "run.name=wild",
        "run.max_steps=40",
        f"data.path={tiny_data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{tiny_teacher}",
        "batch.micro_batch=12",
        "optim.blr=1e30",
        "optim.max_skipped=3",
        f"zero.stage={zero_stage}",
        f"optim.precision={precision}",
        "run.save_every=1000",
    ]
    assert run_ranks([*TINY, *settings], world_size=2) == [1, 1]
    events = [json.loads(line) for line in (tmp_path / "wild" / "events.jsonl").read_text().splitlines()]
    assert [e["in_a_row"] for e in events if e["event"] == "skip"][-3:] == [1, 2, 3]
    assert "3 steps in a row had a non-finite loss" in events[-1]["error"]
    assert "no checkpoint has been saved yet" in events[-1]["error"]
