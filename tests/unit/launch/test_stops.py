"""Signals to the launcher: between two attempts, while ranks are starting, and in an attempt after the first."""

import os
import signal
import sys
from pathlib import Path

import pytest
from attempts import begun, in_background, restarts, until

from launch.restarts import exit_after_stop
from uniemox_dist.distributed.local_launcher import Signals, run_attempt
from uniemox_dist.runs.folder import RunFolder, read_lines


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def last_event(run: RunFolder) -> dict[str, object]:
    return {key: value for key, value in read_lines(run.events)[-1].items() if key != "time"}


@pytest.mark.long
@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
def test_a_stop_between_two_attempts_takes_effect_at_once(run: RunFolder, saved: bool, code: int) -> None:
    save = "if not rank: checkpoint(3)\n" if saved else ""
    process = in_background(run, f"{save}sys.exit(1)", longest_pause_s=600, max_restarts=20)
    assert process.stderr is not None
    # Pauses grow: 1 s, 2 s, and 4 s after the third attempt.
    until(process, lambda: "in 4 s" in process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == code
    attempts = begun(run)
    assert attempts == 3
    says = process.stderr.read().splitlines()[-1]
    expected = (
        "stopped; run the same command again to continue from step 3"
        if saved
        else "stopped before the first checkpoint"
    )
    assert says == f"uniemox: {expected}"
    step = 3 if saved else None
    assert last_event(run) == {"event": "signal", "step": step, "signal": "SIGTERM", "saved": saved}


@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
def test_a_stop_while_ranks_are_starting_does_not_start_them_again(
    run: RunFolder, saved: bool, code: int
) -> None:
    save = "if not rank: checkpoint(3)\n" if saved else ""
    process = in_background(
        run, f"{save}(run / f'up{{rank}}').touch()\ntime.sleep(300)", longest_pause_s=0.05
    )
    until(process, lambda: all((run.path / f"up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == code
    assert begun(run) == 1
    assert restarts(run) == []
    step = 3 if saved else None
    assert last_event(run) == {"event": "signal", "step": step, "signal": "SIGTERM", "saved": saved}


def test_no_stop_is_recorded_for_a_run_that_another_process_trains_or_without_a_folder(
    run: RunFolder, tmp_path: Path
) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        run.lock()
        assert exit_after_stop(run, signals) == 1
        run.unlock()
        assert not run.events.exists()
        nowhere = RunFolder(tmp_path / "nowhere")
        assert exit_after_stop(nowhere, signals) == 1
        assert not nowhere.path.exists()
        assert exit_after_stop(run, signals) == 1
    assert last_event(run) == {"event": "signal", "step": None, "signal": "SIGUSR1", "saved": False}


def test_a_signal_before_the_ranks_were_started_reaches_them(run: RunFolder) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        ended = run_attempt([sys.executable, "-c", "import time\ntime.sleep(300)"], 2, signals, gpus=False)
    assert (ended.code, ended.unprepared) == (1, True)


def test_a_signal_reaches_the_ranks_of_a_later_attempt(run: RunFolder) -> None:
    code = (
        "if not attempts: die()\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        "(run / f'up{rank}').touch()\nwhile True: time.sleep(0.02)"
    )
    process = in_background(run, code, longest_pause_s=0.05)
    until(process, lambda: all((run.path / f"up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(120) == 75
    assert begun(run) == 2


def test_a_fault_while_stopping_is_a_fault_and_not_tried_again(run: RunFolder) -> None:
    code = (
        "checkpoint(1)\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "(run / f'up{rank}').touch()\nwhile True: time.sleep(0.02)"
    )
    process = in_background(run, code, longest_pause_s=0.05)
    until(process, lambda: all((run.path / f"up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 1
    assert begun(run) == 1
