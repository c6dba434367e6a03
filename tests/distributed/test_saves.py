"""Saving beside training: what is saved is the step's own state, failures cost a checkpoint and never the run."""

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import events, losses, run_ranks, two_ranks

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.core.files import sha256_file


def settings(tmp_path: Path, data: Path, teacher: Path, *more: str) -> list[str]:
    return two_ranks(tmp_path, data, teacher, "run.max_steps=6", "optim.ema_decay=0.9", *more)


def steps(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in list_complete_checkpoints(run / "checkpoints")]


def a_slow_disk(rank: int) -> None:
    """Rank 1's second part is written only when step 3 has changed the weights, and is due itself."""
    from uniemox_dist.checkpoints import async_writer
    from uniemox_dist.train import pretrain

    write, made = async_writer.write_part, 0

    def slow(path: Path, tensors: Any) -> tuple[int, str]:
        while rank == 1 and "00000002" in str(path) and made < 3:
            time.sleep(0.01)
        return write(path, tensors)

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal made
        result = update_weights(*arguments, **named)
        made += 1
        return result

    async_writer.write_part = slow
    update_weights, pretrain.update_weights = pretrain.update_weights, counted


def test_a_slow_writer_writes_the_state_of_the_step_that_was_saved(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = settings(tmp_path, tiny_data, tiny_teacher, "run.save_every=1", "run.max_steps=4")
    assert run_ranks(run, world_size=2) == [0, 0]
    assert run_ranks([*run, "run.name=slow"], world_size=2, prepare=a_slow_disk) == [0, 0]
    assert steps(tmp_path / "run") == steps(tmp_path / "slow") == [1, 2, 3, 4]
    for step in (1, 2, 3, 4):
        for name in ("part_00000.safetensors", "part_00001.safetensors"):
            pair = [tmp_path / r / "checkpoints" / f"step_{step:08d}" / name for r in ("run", "slow")]
            assert sha256_file(pair[0]) == sha256_file(pair[1])
    assert losses(tmp_path / "run") == losses(tmp_path / "slow")
    told = (tmp_path / "slow" / "logs" / "rank0.log").read_text()
    assert re.search(r"rank 0 step 3 WARNING step 3 waited \d\.\d s until step 2 was written", told)
    saved = events(tmp_path / "slow", "save")
    assert [event["step"] for event in saved] == [1, 2, 3, 4]
    assert all(0 < event["blocked_s"] <= event["seconds"] for event in saved)


def a_disk_that_fails_once(rank: int) -> None:
    from uniemox_dist.checkpoints import async_writer

    write = async_writer.write_part

    def failing(path: Path, tensors: Any) -> tuple[int, str]:
        if rank == 1 and "00000002" in str(path):
            path.write_bytes(b"half a fi")
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    async_writer.write_part = failing


def test_a_failed_write_is_reported_and_leaves_nothing_and_the_next_save_works(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = settings(tmp_path, tiny_data, tiny_teacher)
    assert run_ranks(run, world_size=2, prepare=a_disk_that_fails_once) == [0, 0]
    assert steps(tmp_path / "run") == [4, 6]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name[0] == "."] == []
    (fault,) = events(tmp_path / "run", "fault")
    assert fault["step"] == 2
    assert fault["error"].endswith("(rank 1): No space left on device")


def a_disk_with_room_for_one_more(rank: int) -> None:
    """Free space as a disk would have it that holds two checkpoints, as rank 1 sees it."""
    from uniemox_dist.checkpoints import async_writer
    from uniemox_dist.train import loop

    loop.LAST_SAVE_PAUSES_S = ()

    def free(folder: Path) -> int:
        used = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        return 2_500_000 - used if rank == 1 else 10**12

    async_writer.free_bytes = free


def test_without_space_old_checkpoints_are_deleted_first_or_the_save_is_skipped(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = settings(tmp_path, tiny_data, tiny_teacher, "run.keep_last=2", "run.max_steps=8")
    assert run_ranks(run, world_size=2, prepare=a_disk_with_room_for_one_more) == [0, 0]
    assert steps(tmp_path / "run") == [6, 8]
    assert events(tmp_path / "run", "fault") == []
    kept = [*run, "run.name=kept", "run.keep_every=2"]
    assert run_ranks(kept, world_size=2, prepare=a_disk_with_room_for_one_more) == [1, 1]
    assert steps(tmp_path / "kept") == [2, 4]  # none of them may be deleted
    faults = events(tmp_path / "kept", "fault")
    assert [fault.get("step") for fault in faults] == [6, 8, None]
    assert "a checkpoint needs 1.3 MB and rank 1 has" in faults[0]["error"]
    assert "free disk space, or keep fewer" in faults[0]["error"]


def a_signal_before_the_start(rank: int) -> None:
    from uniemox_dist.train import pretrain

    build = pretrain.build

    def signalled(*arguments: Any, **named: Any) -> Any:
        if rank == 1:  # of all ranks one is enough
            os.kill(os.getpid(), signal.SIGUSR2)
            os.kill(os.getpid(), signal.SIGTERM)
        return build(*arguments, **named)

    pretrain.build = signalled


def test_a_signal_while_starting_up_ends_in_a_complete_save_and_75(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = settings(tmp_path, tiny_data, tiny_teacher)
    assert run_ranks(run, world_size=2, prepare=a_signal_before_the_start) == [75, 75]
    assert steps(tmp_path / "run") == [1]
    told = [(e["step"], e["signal"], e["saved"]) for e in events(tmp_path / "run", "signal")]
    assert told == [(1, "SIGUSR2", True)]  # by rank 0, which got none


def a_rank_that_sleeps(rank: int) -> None:
    from uniemox_dist.teacher.model import Teacher

    embed = Teacher.embed_pictures

    def slow(self: Teacher, *arguments: Any) -> Any:
        time.sleep(0.25 if rank == 1 else 0.0)
        return embed(self, *arguments)

    Teacher.embed_pictures = slow  # type: ignore[method-assign]


def test_a_slow_rank_is_named_with_its_host(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    run = settings(tmp_path, tiny_data, tiny_teacher, "run.max_steps=12", "run.save_every=100")
    assert run_ranks(run, world_size=2, prepare=a_rank_that_sleeps) == [0, 0]
    (found,) = events(tmp_path / "run", "straggler")
    assert (found["rank"], found["host"]) == (1, os.uname().nodename)
    assert found["seconds"] > 0.25
    assert [e["hosts"] for e in events(tmp_path / "run", "start")] == [[os.uname().nodename]]


@pytest.mark.parametrize("resume", ["auto", "path"])
def test_without_an_intact_checkpoint_the_run_does_not_start_over(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, resume: str
) -> None:
    run = [*settings(tmp_path, tiny_data, tiny_teacher, "run.max_steps=4"), "batch.micro_batch=24"]
    assert run_ranks(run, world_size=1) == [0]
    folder = tmp_path / "run" / "checkpoints"
    for part in folder.glob("*/part_00000.safetensors"):
        data = bytearray(part.read_bytes())
        data[-5] ^= 4
        part.write_bytes(data)
    where = "auto" if resume == "auto" else str(folder / "step_00000004")
    says = r"\(damaged too: 1 more\): no intact checkpoint" if resume == "auto" else "use another checkpoint"
    with pytest.raises(AssertionError, match=says):
        run_ranks(run, world_size=1, resume=where)
    assert steps(tmp_path / "run") == [2, 4]  # nothing was renamed


def test_a_changed_complete_json_is_found_by_its_own_hash(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = [*settings(tmp_path, tiny_data, tiny_teacher, "run.max_steps=4"), "batch.micro_batch=24"]
    assert run_ranks(run, world_size=1) == [0]
    path = tmp_path / "run" / "checkpoints" / "step_00000004" / "complete.json"
    path.write_text(path.read_text().replace('"adam_step": 4.0', '"adam_step": 5.0'))
    assert run_ranks(run, world_size=1) == [0]
    (fault,) = events(tmp_path / "run", "fault")
    assert "complete.json was altered: its SHA-256 differs" in fault["error"]
    assert fault["set_aside"] == "step_00000004.damaged"
    assert (tmp_path / "run" / "checkpoints" / "step_00000004.damaged").is_dir()
    assert steps(tmp_path / "run") == [2, 4]


LACKING = '{"format": "uniemox-checkpoint", "format_version": 1, "step": 4, "files": {}}'
NEGATIVE = LACKING.replace("{}", '{"part_00000.safetensors": {"bytes": -5, "sha256": ""}}')


@pytest.mark.parametrize(
    "content",
    [
        LACKING,
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in ("", '{"format": "uniemox-checkpoint"}', NEGATIVE)
        ),
    ],
)
def test_an_invalid_complete_json_is_set_aside_like_other_damage(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, content: str
) -> None:
    run = [*settings(tmp_path, tiny_data, tiny_teacher, "run.max_steps=4"), "batch.micro_batch=24"]
    assert run_ranks(run, world_size=1) == [0]
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step_00000004" / "complete.json").write_text(content)
    assert run_ranks(run, world_size=1) == [0]
    assert [e["step"] for e in events(tmp_path / "run", "resume")] == [2]
    assert [e["set_aside"] for e in events(tmp_path / "run", "fault")] == ["step_00000004.damaged"]
    for step in (2, 4):
        (folder / f"step_{step:08d}" / "complete.json").write_text(content)
    with pytest.raises(AssertionError, match="no intact checkpoint is left"):
        run_ranks(run, world_size=1)
    assert sorted(path.name for path in folder.glob("step_*")) == [
        "step_00000002",
        "step_00000004",
        "step_00000004.damaged",
    ]


def test_a_run_that_started_from_another_resumes_its_own_newest_checkpoint_only(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = [*settings(tmp_path, tiny_data, tiny_teacher, "run.max_steps=4"), "batch.micro_batch=24"]
    assert run_ranks(run, world_size=1) == [0]
    older = str(tmp_path / "run" / "checkpoints" / "step_00000002")
    with pytest.raises(AssertionError, match="the run has newer checkpoints, up to step 4; move them away"):
        run_ranks(run, world_size=1, resume=older)
    branch = [*run, "run.name=branch", "run.max_steps=3"]
    assert run_ranks(branch, world_size=1, resume=older) == [0]
    assert run_ranks([*branch, "run.max_steps=5"], world_size=1, resume=older) == [0]
    assert [e["step"] for e in events(tmp_path / "branch", "resume")] == [2, 3]
