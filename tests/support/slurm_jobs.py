"""Jobs on the test cluster: submitted with the batch scripts as they are, watched, disturbed, and compared."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uniemox_dist.scheduler.states import PHASES, Phase

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "pretrain.sbatch"
PATIENCE_S = 240.0
ENDED = {state for state, phase in PHASES.items() if phase is Phase.ENDED}


@dataclass
class Cluster:
    """The Slurm on this machine."""

    tool: str
    state: Path
    env: dict[str, str]
    submitted: list[int] = field(default_factory=list)

    def run(self, *command: str, env: dict[str, str] | None = None, cwd: Path | None = None) -> str:
        """A command of Slurm's, or of ours; what it printed."""
        result = subprocess.run(
            command, env={**self.env, **(env or {})}, capture_output=True, text=True, check=False, cwd=cwd
        )
        assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(self, folder: Path, options: Sequence[str], arguments: Sequence[str], **env: str) -> "Job":
        """sbatch of the shipped script; its log is in `folder`."""
        command = ["sbatch", "--parsable", *options, str(SCRIPT), *arguments]
        number = int(self.run(*command, env=env, cwd=folder).split(";")[0])
        self.submitted.append(number)
        return Job(self, number, folder)

    def occupy(self, nodes: int) -> int:
        """A job of the partition that pre-empts others; it ends by itself."""
        command = [
            "sbatch",
            "--parsable",
            "-p",
            "urgent",
            "--exclusive",
            f"--nodes={nodes}",
            "--output=/dev/null",
            "--wrap=sleep 3",
        ]
        return int(self.run(*command))

    def kill_nodes(self, *names: str) -> None:
        """Crashes nodes and reports it to the controller, which would otherwise notice after half a minute."""
        for name in names:
            self.run("bash", self.tool, "kill-node", name)
        time.sleep(1)  # an answer of a node that is still under way would bring it back into service
        self.run("scontrol", "update", f"NodeName={','.join(names)}", "State=DOWN", "Reason=crashed")

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld."""
        number = int((self.state / "run" / "slurmctld.pid").read_text())
        subprocess.run(["kill", "-KILL", str(number)], check=True)
        until(lambda: not Path(f"/proc/{number}").exists(), "the controller's end")

    def in_node(self, name: str, *command: str) -> None:
        """Runs a command in the namespaces of a node, as its administrator would."""
        init = (self.state / "run" / f"{name}.pid").read_text().strip()
        self.run("nsenter", "-t", init, "-m", "-u", "-p", *command)

    def heal(self) -> None:
        """Starts what is missing."""
        self.run("bash", self.tool, "up")

    def cancel_all(self) -> None:
        """Ends all jobs, and waits for that."""
        self.heal()
        self.run("scancel", "--full", "--user=root")
        until(lambda: not self.run("squeue", "-h"), "the end of all jobs")
        idle = ["idle"] * 4
        until(lambda: self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%T").split() == idle, "idle nodes")


@dataclass
class Job:
    """One job of a test."""

    cluster: Cluster
    number: int
    folder: Path

    def facts(self) -> dict[str, str]:
        """The output of scontrol; empty while the controller is down."""
        command = ["scontrol", "show", "job", "-o", str(self.number)]
        result = subprocess.run(command, env=self.cluster.env, capture_output=True, text=True, check=False)
        return dict(re.findall(r"(\w+)=(\S*)", result.stdout))

    @property
    def state(self) -> str:
        return self.facts().get("JobState", "")

    @property
    def restarts(self) -> int:
        return int(self.facts().get("Restarts", 0))

    @property
    def log(self) -> str:
        """The main log."""
        path = self.folder / f"uniemox-{self.number}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def ended(self) -> tuple[str, int]:
        """Waits for the end; the job's state and its exit code."""
        until(lambda: self.state in ENDED, lambda: f"the end of job {self.number}:\n{self.log[-6000:]}")
        facts = self.facts()
        return facts["JobState"], int(facts["ExitCode"].partition(":")[0])

    def kill_ranks(self) -> None:
        """SIGKILL to all training processes of the job."""
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words = (path / "cmdline").read_bytes().split(b"\0")
                ours = f"SLURM_JOB_ID={self.number}".encode() in (path / "environ").read_bytes().split(b"\0")
                if ours and b"uniemox_dist.cli" in words and b"pretrain" in words:
                    os.kill(int(path.name), signal.SIGKILL)
            except OSError:  # it ended meanwhile
                continue

    def cancel(self, *options: str) -> None:
        self.cluster.run("scancel", *options, str(self.number))


def until(reached: Callable[[], bool], what: str | Callable[[], str], patience_s: float = PATIENCE_S) -> None:
    """Looks again and again."""
    end = time.monotonic() + patience_s
    while not reached():
        if time.monotonic() > end:
            raise AssertionError(f"did not come: {what if isinstance(what, str) else what()}")
        time.sleep(0.05)


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a .jsonl file that is being written."""
    found = []
    for text in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def events(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Events of some kinds."""
    return [line for line in lines(run / "events.jsonl") if line["event"] in kinds]


def reached(run: Path, step: int) -> Callable[[], bool]:
    """Whether the run has done this step."""
    return lambda: any(line["step"] >= step for line in lines(run / "metrics.jsonl"))


def repeated(run: Path) -> int:
    """Number of steps that were done twice, according to the lines."""
    steps = [line["step"] for line in lines(run / "metrics.jsonl")]
    return len(steps) - len(set(steps))
