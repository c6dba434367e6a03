"""The launcher's restart policy with real processes and real checkpoint folders."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.local import Signals
from launch.restarts import run_with_restarts
from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION
from uniemox_dist.runtime.files import write_json
from uniemox_dist.runtime.run_folder import RunFolder, read_lines

# What the ranks' scripts may use: their rank, how many attempts began before, a checkpoint, an event.
PRELUDE = """
import json, os, signal, sys, time
from pathlib import Path
rank, run = int(os.environ["RANK"]), Path({run!r})
begun = run / f"begun{{rank}}"
attempts = len(begun.read_text()) if begun.exists() else 0
begun.write_text("." * (attempts + 1))
def checkpoint(step):
    folder = run / "checkpoints" / f"step_{{step:08d}}"
    folder.mkdir(parents=True, exist_ok=True)
    info = {{"format": {format!r}, "format_version": {version}, "step": step, "files": {{}}}}
    (folder / "complete.json").write_text(json.dumps(info))
def event(**facts):
    with open(run / "events.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def script(run: RunFolder, code: str) -> list[str]:
    prelude = PRELUDE.format(run=str(run.path), format=FORMAT, version=FORMAT_VERSION)
    return [sys.executable, "-c", prelude + code]


def launch(run: RunFolder, code: str, *, ranks: int = 2, max_restarts: int = 2) -> int:
    with Signals() as signals:
        return run_with_restarts(
            lambda: script(run, code), ranks, run, signals, max_restarts=max_restarts, gpus=False
        )


def begun(run: RunFolder, rank: int = 0) -> int:
    path = run.path / f"begun{rank}"
    return len(path.read_text()) if path.exists() else 0


def restarts(run: RunFolder) -> list[dict[str, object]]:
    events = [e for e in read_lines(run.events) if e["event"] == "restart"]
    return [{key: e[key] for key in ("attempt", "left", "code", "step")} for e in events]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.restarts.LONGEST_PAUSE_S", 0.05)


def test_a_killed_rank_is_started_again_and_the_run_ends_well(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launch(run, "checkpoint(4)\nif rank and not attempts: die()") == 0
    assert (begun(run, 0), begun(run, 1)) == (2, 2)
    assert restarts(run) == [{"attempt": 2, "left": 1, "code": 1, "step": 4}]
    assert (
        "died of SIGKILL (killed, perhaps for its memory); starts again from step 4" in capfd.readouterr().err
    )


def test_after_so_many_restarts_without_progress_it_gives_up_and_names_the_last_fault(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    code = "event(event='fault', error=f'the {attempts}. of many', ends=True)\nsys.exit(1)"
    assert launch(run, code, ranks=1, max_restarts=2) == 1
    assert begun(run) == 3
    assert [e["left"] for e in restarts(run)] == [1, 0]
    assert [e["step"] for e in restarts(run)] == [None, None]
    last = capfd.readouterr().err.splitlines()[-1]
    assert last == (
        "uniemox: gives up after 2 restarts without a new checkpoint (run.max_restarts=2); "
        "the last fault: the 2. of many"
    )


def test_each_new_checkpoint_gives_back_all_restarts(run: RunFolder) -> None:
    code = "if attempts < 4 and rank == 0: checkpoint(attempts // 2 + 1)\nsys.exit(0 if attempts == 7 else 1)"
    assert launch(run, code, max_restarts=2) == 1
    # Steps 1, 1, 2, 2 were saved by attempts 1 to 4: the last progress is that of attempt 3.
    assert begun(run) == 5
    assert [(e["step"], e["left"]) for e in restarts(run)] == [(1, 1), (1, 0), (2, 1), (2, 0)]


def test_checkpoints_of_before_are_no_progress(run: RunFolder) -> None:
    write_json(
        run.checkpoints / "step_00000009" / "complete.json",
        {"format": FORMAT, "format_version": FORMAT_VERSION, "step": 9, "files": {}},
    )
    assert launch(run, "sys.exit(1)", ranks=1, max_restarts=1) == 1
    assert begun(run) == 2


@pytest.mark.parametrize("code", [0, 2, 75])
def test_what_is_no_fault_is_never_started_again(run: RunFolder, code: int) -> None:
    assert launch(run, f"checkpoint(1)\nsys.exit({code})") == code
    assert begun(run) == 1
    assert restarts(run) == []


def test_a_mistake_that_one_rank_found_is_not_tried_again(run: RunFolder) -> None:
    assert launch(run, "sys.exit(2 if rank else 1)") == 2
    assert begun(run) == 1


def test_a_fault_that_would_only_happen_again_is_not_tried_again(
    run: RunFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    code = (
        "if not attempts: die()\n"
        "event(event='fault', error='a slow disk')\n"
        "event(event='fault', error='no finite loss', ends=True, restart=False)\nsys.exit(1)"
    )
    assert launch(run, code, ranks=1) == 1
    assert begun(run) == 2
    says = capfd.readouterr().err.splitlines()[-1]
    assert says == "uniemox: not started again, as the same would happen: no finite loss"
    # That of an earlier attempt, or of an earlier start, does not count.
    assert launch(run, "if attempts < 4: sys.exit(1)", ranks=1) == 0
    assert begun(run) == 5


def test_without_a_folder_no_event_is_written(run: RunFolder, tmp_path: Path) -> None:
    nowhere = RunFolder(tmp_path / "nowhere")
    with Signals() as signals:
        code = run_with_restarts(
            lambda: [sys.executable, "-c", "import sys; sys.exit(1)"],
            1,
            nowhere,
            signals,
            max_restarts=1,
            gpus=False,
        )
    assert code == 1
    assert not nowhere.path.exists()


def test_every_attempt_meets_at_a_port_of_its_own(run: RunFolder) -> None:
    code = "open(run / 'ports', 'a').write(os.environ['MASTER_PORT'] + ' ')\nsys.exit(attempts < 2)"
    assert launch(run, code, ranks=1) == 0
    assert len(set((run.path / "ports").read_text().split())) == 3


def in_background(
    run: RunFolder, code: str, *, longest_pause_s: float, max_restarts: int = 2
) -> "subprocess.Popen[str]":
    """The same, in a process of its own that can be signalled."""
    launcher = (
        "import sys\nimport launch.restarts as r\nfrom launch.local import Signals\n"
        "from uniemox_dist.runtime.run_folder import RunFolder\n"
        f"r.LONGEST_PAUSE_S = {longest_pause_s}\n"
        "with Signals() as signals:\n"
        f"    sys.exit(r.run_with_restarts(lambda: {script(run, code)!r}, 2, RunFolder({str(run.path)!r}), signals, "
        f"max_restarts={max_restarts}, gpus=False))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", launcher],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def until(process: "subprocess.Popen[str]", reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None
        time.sleep(0.02)


@pytest.mark.parametrize(("saved", "code"), [(True, 75), (False, 1)])
def test_a_stop_between_two_attempts_is_obeyed_at_once(run: RunFolder, saved: bool, code: int) -> None:
    save = "if not rank: checkpoint(3)\n" if saved else ""
    process = in_background(run, f"{save}sys.exit(1)", longest_pause_s=600, max_restarts=20)
    assert process.stderr is not None
    # Pauses grow: 1 s, 2 s, and 4 s after the third attempt.
    until(process, lambda: "in 4 s" in process.stderr.readline())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == code
    attempts = begun(run)
    assert attempts == 3
    says = process.stderr.read().splitlines()[-1]
    expected = (
        "stopped; start the same command again to go on from step 3"
        if saved
        else "stopped before the first checkpoint"
    )
    assert says == f"uniemox: {expected}"


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
    assert process.wait(60) == code
    assert begun(run) == 1
    assert restarts(run) == []


def test_a_signal_reaches_the_ranks_of_a_later_attempt(run: RunFolder) -> None:
    code = (
        "if not attempts: die()\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        "(run / f'up{rank}').touch()\nwhile True: time.sleep(0.02)"
    )
    process = in_background(run, code, longest_pause_s=0.05)
    until(process, lambda: all((run.path / f"up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGUSR2)
    assert process.wait(60) == 75
    assert begun(run) == 2


def test_a_fault_while_stopping_is_a_fault_and_not_tried_again(run: RunFolder) -> None:
    code = (
        "checkpoint(1)\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(1))\n"
        "(run / f'up{rank}').touch()\nwhile True: time.sleep(0.02)"
    )
    process = in_background(run, code, longest_pause_s=0.05)
    until(process, lambda: all((run.path / f"up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 1
    assert begun(run) == 1


def test_a_stopped_rank_and_what_it_started_are_killed_before_the_next_attempt(run: RunFolder) -> None:
    code = (
        "import subprocess\nif attempts: sys.exit(0)\n"
        "if rank: sys.exit(1)\n"
        "child = subprocess.Popen(['sleep', '300'])\n"
        "(run / 'pids').write_text(f'{os.getpid()} {child.pid}')\nos.kill(os.getpid(), signal.SIGSTOP)"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("launch.local.GRACE_S", 1.0)
        assert launch(run, code) == 0
    for pid in (run.path / "pids").read_text().split():
        assert not alive(int(pid))


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked about yet since its end does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
