"""A real Slurm of four nodes on this machine, and what the tests ask of it."""

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import Cluster

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests" / "distributed"))


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster, up for the whole session; the command `uniemox` on it is the one under test."""
    folder = tmp_path_factory.mktemp("cluster")
    command = folder / "uniemox"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m uniemox_dist.cli "$@"\n')
    command.chmod(0o755)
    state = Path(f"/tmp/ms-{os.getpid()}")  # short: sockets lie there
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH"))}
    env |= {"MINI_SLURM_DIR": str(state), "UNIEMOX": str(command), "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    tool = str(ROOT / "tools" / "mini-slurm")
    first = 1000 + os.getpid() % 15000  # ports follow from it: other clusters on this machine have others
    up = subprocess.run(
        ["bash", tool, "up", "--nodes", "4", "--with-accounting", "--conf", f"FirstJobId={first}"],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert up.returncode == 0, up.stderr
    try:
        yield Cluster(tool, state, {**env, "SLURM_CONF": str(state / "etc" / "slurm.conf")})
    finally:
        subprocess.run(["bash", tool, "down"], env=env, capture_output=True, check=False)


@pytest.fixture
def cluster(slurm: Cluster) -> Iterator[Cluster]:
    """The same, with all nodes well and no jobs."""
    slurm.cancel_all()
    yield slurm
    slurm.cancel_all()
