"""Losses and gradients that are not finite, on one rank of two: all ranks skip alike, in every stage and precision."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import events, largest_difference, losses, run_ranks, two_ranks

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.checkpoints.format import FragmentReader

BAD_STEP = 3


def on_rank_1(rank: int, spoil: Callable[[Any, torch.Tensor, int], torch.Tensor]) -> None:
    """Lets `spoil` change the loss of each forward pass of rank 1; `spoil` gets the number of the pass, from 1 on."""
    from uniemox_dist.models.student import Student

    forward, passes = Student.forward, 0

    def changed(self: Student, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        total, parts = forward(self, *arguments)
        return spoil(self, total, passes), parts

    if rank == 1:
        Student.forward = changed  # type: ignore[method-assign, assignment]


def loss_is_nan_at_step_3(rank: int) -> None:
    # Its gradients stay finite: no engine would notice.
    on_rank_1(rank, lambda _, total, passes: total + (math.nan if passes == BAD_STEP else 0.0))


def loss_is_nan_from_step_3_on(rank: int) -> None:
    on_rank_1(rank, lambda _, total, passes: total + (math.nan if passes >= BAD_STEP else 0.0))


def gradient_is_infinite_at_step_3(rank: int) -> None:
    hooks: list[Any] = []

    def spoil(student: Any, total: torch.Tensor, passes: int) -> torch.Tensor:
        for hook in hooks:
            hook.remove()
        # By name: asking the module for it would make ZeRO-3 gather it, on this rank alone.
        weight = dict(student.named_parameters())["encoder.norm.bias"]
        factor = math.inf if passes == BAD_STEP else 1.0
        hooks[:] = [weight.register_hook(lambda gradient: gradient * factor)]
        return total

    on_rank_1(rank, spoil)


def settings(tmp_path: Path, data: Path, teacher: Path, *more: str) -> list[str]:
    return two_ranks(tmp_path, data, teacher, "run.max_steps=5", *more)


def evidence(run: Path, step: int) -> list[dict[str, Any]]:
    return [
        json.loads(path.read_text()) for path in sorted(run.glob(f"logs/nonfinite_step_{step:08d}_*.json"))
    ]


@pytest.fixture(scope="module")
def zero_1(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    """A run in ZeRO-1 and fp32 whose third step is skipped."""
    folder = tmp_path_factory.mktemp("zero_1")
    run = settings(folder, tiny_data, tiny_teacher)
    assert run_ranks(run, world_size=2, prepare=loss_is_nan_at_step_3) == [0, 0]
    return folder / "run"


def check_step_3_was_skipped(run: Path) -> None:
    assert [(e["step"], e["in_a_row"], e["where"]) for e in events(run, "skip")] == [(3, 1, "loss")]
    found = list_complete_checkpoints(run / "checkpoints")
    assert [(c.step, c.info["adam_step"]) for c in found] == [(2, 2.0), (4, 3.0), (5, 4.0)]
    reader = FragmentReader(found[-1])
    assert all(reader.parameter(name).isfinite().all() for name in reader.shapes)
    seen = losses(run)
    assert math.isnan(seen[3][0])
    assert all(math.isfinite(value) for step in (1, 2, 4, 5) for value in seen[step])


def test_evidence_names_the_samples_of_all_ranks(zero_1: Path) -> None:
    check_step_3_was_skipped(zero_1)
    files = evidence(zero_1, 3)
    slots = [slot for facts in files for batch in facts["micro_batches"] for slot in batch["slots"]]
    assert sorted(slots) == list(range(48, 72))
    assert all(len(batch["keys"]) == 12 for facts in files for batch in facts["micro_batches"])
    rows = [row for facts in files for row in facts["gradients"]]
    assert rows
    assert all(row["nan"] == row["infinite"] == 0 < row["largest"] for row in rows)


@pytest.mark.parametrize(
    ("stage", "precision", "checks"),
    [
        (3, "fp32", "false"),
        (1, "bf16", "false"),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in (
                (0, "fp32", "false"),
                (2, "fp32", "false"),
                (3, "bf16", "false"),
                (2, "bf16", "true"),
            )
        ),
    ],
)
def test_a_nan_loss_on_one_rank_makes_all_ranks_skip_the_step(
    tmp_path: Path, zero_1: Path, tiny_data: Path, tiny_teacher: Path, stage: int, precision: str, checks: str
) -> None:
    """Whether or not DeepSpeed's own check of bf16 is on."""
    layout = (
        f"zero.stage={stage}",
        f"optim.precision={precision}",
        f"deepspeed.bf16.check_grad_overflow={checks}",
    )
    run = settings(tmp_path, tiny_data, tiny_teacher, *layout)
    assert run_ranks(run, world_size=2, prepare=loss_is_nan_at_step_3) == [0, 0]
    check_step_3_was_skipped(tmp_path / "run")
    if precision == "fp32":  # what comes after starts from the same weights
        ours, others = losses(tmp_path / "run"), losses(zero_1)
        assert (
            largest_difference({k: ours[k] for k in (1, 2, 4, 5)}, {k: others[k] for k in (1, 2, 4, 5)})
            < 1e-5
        )


@pytest.mark.parametrize(
    ("stage", "precision", "checks"),
    [
        (0, "fp32", "false"),
        (2, "bf16", "false"),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in ((1, "fp32", "false"), (3, "fp32", "false"), (1, "bf16", "true"))
        ),
    ],
)
def test_a_gradient_that_is_not_finite_is_skipped_and_named(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, stage: int, precision: str, checks: str
) -> None:
    """With clipping, which leaves the gradients in the evidence as they are."""
    layout = (
        f"zero.stage={stage}",
        f"optim.precision={precision}",
        f"deepspeed.bf16.check_grad_overflow={checks}",
        "optim.clip_grad=0.5",
        "run.max_steps=4",
    )
    run = settings(tmp_path, tiny_data, tiny_teacher, *layout)
    assert run_ranks(run, world_size=2, prepare=gradient_is_infinite_at_step_3) == [0, 0]
    assert [(e["step"], e["where"]) for e in events(tmp_path / "run", "skip")] == [(3, "gradients")]
    assert list_complete_checkpoints(tmp_path / "run" / "checkpoints")[-1].info["adam_step"] == 3.0
    bad = {
        row["name"]
        for facts in evidence(tmp_path / "run", 3)
        for row in facts["gradients"]
        if row["nan"] or row["infinite"]
    }
    assert bad == {"encoder.norm.bias"}


def test_too_many_in_a_row_end_the_run_with_evidence_and_leave_the_last_good_checkpoint(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = settings(
        tmp_path, tiny_data, tiny_teacher, "run.max_steps=20", "optim.max_skipped=4", "run.keep_last=1"
    )
    assert run_ranks(run, world_size=2, prepare=loss_is_nan_from_step_3_on) == [1, 1]
    assert [e["in_a_row"] for e in events(tmp_path / "run", "skip")] == [1, 2, 3, 4]
    last = events(tmp_path / "run", "fault")[-1]
    assert last["error"].startswith("4 steps in a row had a non-finite loss or gradient")
    assert "the checkpoint of step 2 is kept" in last["error"]
    assert (last["ends"], last["restart"]) == (True, False)
    assert [c.step for c in list_complete_checkpoints(tmp_path / "run" / "checkpoints")] == [2]
    assert len(evidence(tmp_path / "run", 3)) == len(evidence(tmp_path / "run", 6)) == 2
    # Once the values are finite again, training continues from there.
    assert run_ranks([*run, "run.max_steps=4"], world_size=2) == [0, 0]
    assert [e["step"] for e in events(tmp_path / "run", "resume")] == [2]
