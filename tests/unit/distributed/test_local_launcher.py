"""The local launcher with real processes: exit codes, variables, signals, and no rank left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from uniemox_dist.distributed.local_launcher import free_port, run_ranks


def ranks(code: str, count: int) -> int:
    return run_ranks(
        [sys.executable, "-c", f"import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}"],
        count,
        gpus=False,
    )


@pytest.mark.parametrize(
    ("codes", "whole"),
    [
        ((0, 0), 0),
        ((75, 75), 75),
        ((75, 1), 1),
        ((0, 75), 1),
        ((2, 2), 2),
        ((2, 1), 2),
        ((1, 0), 1),
        ((0, 139), 1),
    ],
)
def test_the_exit_code_of_an_attempt(codes: tuple[int, int], whole: int) -> None:
    assert ranks(f"sys.exit({codes}[rank])", 2) == whole


def test_each_rank_gets_its_place_in_the_world(tmp_path: Path) -> None:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR"]
    code = f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in {names}))"
    assert ranks(code, 3) == 0
    assert [(tmp_path / str(r)).read_text() for r in range(3)] == [
        f"{r} {r} 3 127.0.0.1 cpu" for r in range(3)
    ]


def test_a_failed_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("uniemox_dist.distributed.local_launcher.GRACE_S", 0.5)
    began = time.monotonic()
    assert (
        ranks("signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsys.exit(3) if rank else time.sleep(300)", 2)
        == 1
    )
    assert time.monotonic() - began < 60


def test_signals_reach_every_rank(tmp_path: Path) -> None:
    code = (
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(75))\n"
        f"open(f'{tmp_path}/{{rank}}', 'w').close()\nwhile True: time.sleep(0.05)"
    )
    launcher = (
        f"import sys\nsys.path.insert(0, {os.getcwd()!r})\n"
        "from uniemox_dist.distributed.local_launcher import run_ranks\n"
        f"code = '''import os, sys, time, signal\nrank = int(os.environ['RANK'])\n{code}'''\n"
        "sys.exit(run_ranks([sys.executable, '-c', code], 2, gpus=False))"
    )
    process = subprocess.Popen([sys.executable, "-c", launcher])
    while not all((tmp_path / str(rank)).exists() for rank in range(2)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR2)
    assert process.wait(120) == 75


def test_a_rank_that_was_killed_is_named_by_the_launcher(capfd: pytest.CaptureFixture[str]) -> None:
    assert ranks("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(0.3)", 2) == 1
    error = capfd.readouterr().err
    assert "uniemox: error: rank 1 (pid " in error
    assert "died of SIGKILL (possibly out of memory)" in error


def test_ranks_meet_at_a_free_port_below_those_of_outgoing_connections() -> None:
    port = free_port()
    assert port in range(10_000, 32_768)
    with socket.create_server(("127.0.0.1", port)) as taken:
        assert free_port() != taken.getsockname()[1]
