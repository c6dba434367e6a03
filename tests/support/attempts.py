"""Ranks of the launcher's tests: small scripts that save checkpoints, write events and die, in a run's folder."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from launch.restarts import run_with_restarts
from uniemox_dist.checkpoints.folders import FORMAT, FORMAT_VERSION
from uniemox_dist.distributed.local_launcher import Signals
from uniemox_dist.runs.folder import RunFolder, read_lines

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


def in_background(
    run: RunFolder, code: str, *, longest_pause_s: float, max_restarts: int = 2
) -> "subprocess.Popen[str]":
    """The same, in a separate process that can be signalled."""
    launcher = (
        "import sys\nimport launch.restarts as r\nfrom uniemox_dist.distributed.local_launcher import Signals\n"
        "from uniemox_dist.runs.folder import RunFolder\n"
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
