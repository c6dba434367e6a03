"""Processes that a rank started survive the signals that Slurm sends to every process of a job step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A rank that starts a helper program (such as a compiler), and a forked helper; it prints the signals that it
# received.
RANK = """
import os, subprocess, sys, time
from pathlib import Path
from uniemox_dist.core.signals import StopFlag
where = Path(sys.argv[1])
stop = StopFlag().install()
shell = f"touch {where}/shell; while ! [ -e {where}/go ]; do sleep 0.02; done; echo lived"
before = subprocess.Popen(["sh", "-c", shell], stdout=subprocess.PIPE, text=True)
forked = os.fork()
if forked == 0:
    import signal
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    (where / "fork").touch()
    while not (where / "go").exists():
        time.sleep(0.02)
    os._exit(7)
while not stop or not (where / "go").exists():
    time.sleep(0.02)
print(stop.received, before.communicate()[0].strip(), os.waitstatus_to_exitcode(os.waitpid(forked, 0)[1]))
"""


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_to_all_processes_of_a_rank_stops_it_and_kills_no_helper(
    tmp_path: Path, number: signal.Signals
) -> None:
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup themselves
    try:
        rank = subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
    finally:
        signal.signal(signal.SIGHUP, hangup)
    while not all((tmp_path / name).exists() for name in ("shell", "fork")):
        assert rank.poll() is None
        time.sleep(0.02)
    for _ in range(3):
        os.killpg(rank.pid, number)
    (tmp_path / "go").touch()
    said, _ = rank.communicate(timeout=120)
    assert said.split() == [number.name, "lived", "7"]


def test_a_launcher_handles_signals_that_its_parent_blocked() -> None:
    code = (
        "import os, signal\nfrom uniemox_dist.distributed.local_launcher import Signals\n"
        "with Signals() as signals:\n    os.kill(os.getpid(), signal.SIGTERM)\n    print(signals.received)"
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert said == "[15]\n"
