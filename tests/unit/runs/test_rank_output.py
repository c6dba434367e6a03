"""The output of ranks in a Slurm job: all but rank 0 write to their own files, and their last error to the main log."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import os, subprocess, sys
from uniemox_dist.runs.rank_output import main_log
from uniemox_dist.core.logs import start_logging
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.distributed.world import World
run = RunFolder(sys.argv[1])
world = World(int(sys.argv[2]), 4)
main_log.redirect_output(run, world)
log = start_logging(run.logs, world.rank, main_log.stream)
print("printed")
os.write(2, b"by a library\\n")
subprocess.run(["sh", "-c", "echo by a helper"])
import logging
logging.getLogger("uniemox").info("information")
logging.getLogger("uniemox").error("an error")
main_log.print_lines("uniemox: error: one\\nuniemox: error: two")
raise ValueError("not caught")
"""


def run(tmp_path: Path, rank: int, **env: str) -> tuple[str, str, str]:
    """The text that a rank wrote to its standard output and error, and to its own file."""
    (tmp_path / "logs").mkdir(exist_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", **env}
    command = [sys.executable, "-c", CODE, str(tmp_path), str(rank)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    own = tmp_path / "logs" / f"rank{rank}.out"
    return result.stdout, result.stderr, own.read_text() if own.is_file() else ""


def test_a_rank_of_a_job_writes_to_its_own_file_and_its_last_error_to_the_main_log(tmp_path: Path) -> None:
    out, err, own = run(tmp_path, 3, SLURM_STEP_ID="0")
    assert out == ""
    who = f"rank 3 on {socket.gethostname()}: "
    lines = err.splitlines()
    assert all(line.startswith(who) for line in lines)
    said = [line.removeprefix(who) for line in lines]
    assert said[:3] == ["uniemox: error: an error", "uniemox: error: one", "uniemox: error: two"]
    assert (said[3], said[-1]) == ("Traceback (most recent call last):", "ValueError: not caught")
    assert own.startswith("printed\nby a library\nby a helper\n")
    assert own.endswith("ValueError: not caught\n")


@pytest.mark.parametrize(("rank", "env"), [(0, {"SLURM_STEP_ID": "0"}), (3, {})])
def test_rank_0_and_ranks_outside_slurm_keep_their_output(
    tmp_path: Path, rank: int, env: dict[str, str]
) -> None:
    out, err, own = run(tmp_path, rank, **env)
    assert own == ""
    assert "printed" in out
    assert "by a helper" in out
    assert err.splitlines()[0] == "by a library"
    assert "uniemox: error: one" not in err  # reported by the command line itself


def test_if_its_file_cannot_be_written_a_rank_keeps_its_output(tmp_path: Path) -> None:
    (tmp_path / "logs" / "rank3.out").mkdir(parents=True)
    assert "printed" in run(tmp_path, 3, SLURM_STEP_ID="0")[0]
