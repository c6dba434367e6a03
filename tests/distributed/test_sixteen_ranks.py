"""A job of 16 ranks from its start over its death to its resumption by 12, with losses of an undisturbed process."""

import os
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from ranks import TINY, events, largest_difference, losses, run_ranks

from uniemox_dist.checkpoints.folders import COMPLETE, list_complete_checkpoints, step_folder
from uniemox_dist.checkpoints.format import part_files

KILLED = (5, 10, 11)


def die_after(marker: Path, rank: int) -> None:
    """Lets some ranks die by SIGKILL as soon as a file exists."""

    def wait() -> None:
        while not marker.exists():
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank in KILLED:
        threading.Thread(target=wait, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 1), (3, 2)])
def test_sixteen_ranks_die_and_twelve_continue_with_the_losses_of_one_process(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, before: int, after: int
) -> None:
    """Of these ZeRO stages."""
    settings = [
        *TINY,
        f"run.dir={tmp_path}",
        "run.max_steps=12",
        "run.save_every=4",
        "run.keep_last=9",
        "batch.global_batch=48",
        "batch.streams=48",
        "optim.ema_decay=0.9",
        f"data.path={tiny_data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{tiny_teacher}",
    ]
    assert run_ranks([*settings, "run.name=one", "batch.micro_batch=48"], world_size=1) == [0]
    run = tmp_path / "many"
    first = [*settings, "run.name=many", "batch.micro_batch=3", f"zero.stage={before}"]
    marker = run / "checkpoints" / step_folder(4) / COMPLETE
    with pytest.raises(AssertionError, match=r"Connection (closed|reset) by peer|Broken pipe"):
        run_ranks(first, world_size=16, prepare=partial(die_after, marker))
    saved = list_complete_checkpoints(run / "checkpoints")[-1]
    assert saved.step in (4, 8)
    assert len(part_files(saved)) == 16
    then = [*settings, "run.name=many", "batch.micro_batch=4", f"zero.stage={after}"]
    assert run_ranks(then, world_size=12) == [0] * 12
    assert [event["step"] for event in events(run, "resume")] == [saved.step]
    last = list_complete_checkpoints(run / "checkpoints")[-1]
    assert (last.step, len(part_files(last))) == (12, 12)
    assert largest_difference(losses(tmp_path / "one"), losses(run)) < 1e-5
