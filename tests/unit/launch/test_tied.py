"""Ranks and the launcher that they belong to: its death, and a terminal that closes, stop them like SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attempts import begun, in_background, until

from uniemox_dist.core.signals import LAUNCHER_PID, StopFlag, stop_signals
from uniemox_dist.runs.folder import RunFolder

# A rank that handles signals, and prints which one stopped it.
MINDS = (
    "from uniemox_dist.core.signals import StopFlag, stop_with_launcher\n"
    "stop = StopFlag().install()\nstop_with_launcher()\n(run / f'up{rank}').touch()\n"
    "while not stop: time.sleep(0.02)\n"
    "(run / f'new{rank}').write_text(stop.received)\n"
    "(run / f'new{rank}').rename(run / f'by{rank}')\nsys.exit(75)"
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def all_there(run: RunFolder, name: str) -> bool:
    return all((run.path / f"{name}{rank}").exists() for rank in range(2))


def test_ranks_whose_launcher_is_killed_are_asked_to_stop(run: RunFolder) -> None:
    process = in_background(run, MINDS, longest_pause_s=0.05)
    until(process, lambda: all_there(run, "up"))
    process.kill()
    process.wait(120)
    with subprocess.Popen(["sleep", "60"]) as patience:
        until(patience, lambda: all_there(run, "by"))
        patience.kill()
    assert [(run.path / f"by{rank}").read_text() for rank in range(2)] == ["SIGTERM", "SIGTERM"]
    assert begun(run) == 1


def after_start(launcher: str | None) -> list[str]:
    """The signal that stopped a rank at its start, and whether its children inherit the launcher's variable."""
    code = (
        "import os\nfrom uniemox_dist.core.signals import LAUNCHER_PID, StopFlag, stop_with_launcher\n"
        "stop = StopFlag().install()\nstop_with_launcher()\nprint(stop.received, LAUNCHER_PID in os.environ)"
    )
    env = {**os.environ, **({} if launcher is None else {LAUNCHER_PID: launcher})}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True
    ).stdout.split()


def test_a_rank_that_starts_after_the_death_of_its_launcher_stops_at_once() -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    assert after_start(str(gone.pid)) == ["SIGTERM", "False"]
    assert after_start(str(os.getpid())) == ["None", "False"]


def test_a_rank_without_a_launcher_is_tied_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LAUNCHER_PID, raising=False)
    assert after_start(None) == ["None", "False"]


def test_a_terminal_that_closes_stops_all_ranks(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        process = in_background(run, MINDS, longest_pause_s=0.05)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stderr is not None
    process.stderr.close()  # no process reads any more: only the launcher's further output is lost
    until(process, lambda: all_there(run, "up"))
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 75
    assert [(run.path / f"by{rank}").read_text() for rank in range(2)] == ["SIGHUP", "SIGHUP"]


def test_under_nohup_a_terminal_that_closes_stops_nothing(run: RunFolder) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = in_background(run, MINDS, longest_pause_s=0.05)
        assert signal.SIGHUP not in stop_signals()
    finally:
        signal.signal(signal.SIGHUP, before)
    until(process, lambda: all_there(run, "up"))
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(120) == 75
    assert [(run.path / f"by{rank}").read_text() for rank in range(2)] == ["SIGUSR2", "SIGUSR2"]


def test_a_second_interrupt_ends_at_once_and_any_other_second_signal_does_not() -> None:
    before = {number: signal.getsignal(number) for number in stop_signals()}
    stop = StopFlag().install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
