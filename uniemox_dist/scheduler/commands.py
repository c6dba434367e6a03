"""Functions that call sbatch, squeue and scontrol, and read their output.

They run on login nodes. Inside a job the batch script calls Slurm's commands and passes their output on, because the
container of a job may lack them.
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.formatting import cut
from uniemox_dist.scheduler.durations import parse_duration
from uniemox_dist.scheduler.states import Phase, find_phase

TIMEOUT_S = 60
"""Seconds to wait for an answer of the controller; a busy one needs tens of them."""
SCREEN_TIMEOUT_S = 5.0
"""Seconds to wait for squeue in interactive commands."""
RETRY_S = 60.0
"""Seconds after which `JobQueries` calls squeue again when it did not answer."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_DEBUG_FLAGS")
"""Variables that belong to the site, not to the allocation in which the command is called."""
_UNREACHABLE = re.compile(r"(?i)unable to contact|timed out|connection refused|connect failure|communication")


class NoSlurm(UserError):
    """This machine lacks a command of Slurm."""


class SlurmFault(Fault):
    """Slurm did not answer."""


@dataclass(frozen=True)
class JobState:
    """The state of a job as squeue reports it."""

    state: str
    """Slurm's name of the state, such as PENDING or RUNNING."""
    reason: str = ""
    """Why the job does not run, such as Resources; empty for a job that runs."""
    nodes: str = ""
    """The job's nodes in Slurm's short form, such as n[1-3]."""
    start: float | None = None
    """When the job started, or is expected to start, in seconds since 1970."""
    time_left_s: float | None = None
    """Seconds until the time limit; None without a limit, or where Slurm does not report one."""

    @property
    def live(self) -> bool:
        """Whether the job runs, or will run without being submitted again."""
        return find_phase(self.state) is not Phase.ENDED


@dataclass(frozen=True)
class LiveJobs:
    """The jobs that wait or run, from the output of `squeue -h -o '%A %T %l'`."""

    states: dict[int, str] = field(default_factory=dict)
    """State of each job by its number."""
    limits_s: dict[int, float] = field(default_factory=dict)
    """Time limits in seconds, of the jobs that have one."""

    @classmethod
    def parse(cls, text: str) -> "LiveJobs":
        """Reads squeue's lines; skips other lines and further columns."""
        states, limits = {}, {}
        for line in text.splitlines():
            words = line.split()
            if len(words) < 2 or not words[0].isdigit():
                continue
            if find_phase(words[1]) is not Phase.ENDED:
                states[int(words[0])] = words[1]
            limit = parse_duration(words[2]) if len(words) > 2 else None
            if limit is not None:
                limits[int(words[0])] = limit
        return cls(states, limits)

    def knows(self, own_id: int) -> bool:
        """Whether squeue answered: its answer then contains the calling job."""
        return own_id in self.states


class JobQueries:
    """Repeated queries of squeue that never wait long."""

    def __init__(self) -> None:
        self.remark = ""
        """The reason why squeue did not answer, in one line; empty if it answered or there was no query."""
        self._retry_at = 0.0

    def query(self, ids: Sequence[int]) -> Mapping[int, JobState] | None:
        """The states of those jobs that Slurm knows, from one call of squeue; None without an answer."""
        if not ids:
            self.remark = ""
            return {}
        if time.monotonic() < self._retry_at:
            return None
        try:
            found = query_job_states(ids, timeout_s=SCREEN_TIMEOUT_S)
        except NoSlurm:
            why = "there is no squeue on this machine"
        except (Fault, UserError) as error:
            why = cut(str(error), 100)
        else:
            self.remark = ""
            return found
        self.remark = f"States are from the run folders alone, without Slurm: {why}"
        self._retry_at = time.monotonic() + RETRY_S
        return None


def has(tool: str) -> bool:
    """Whether this machine has a command, such as sbatch."""
    return shutil.which(tool) is not None


def sbatch(
    options: Sequence[str], script: Path, arguments: Sequence[str] = (), *, remarks: list[str] | None = None
) -> int:
    """Submits a script and returns the job's number.

    Options in the script win over variables such as SBATCH_PARTITION, which sbatch alone would prefer. Other lines that
    sbatch prints are appended to `remarks`.

    Raises:
        UserError: without sbatch, or with its reason if it refuses the job.
        SlurmFault: if Slurm does not answer.
    """
    text = script.read_text(encoding="utf-8", errors="replace")
    env = {k: v for k, v in environment().items() if f"\n#SBATCH --{_option(k)}" not in text}
    answer = _call(["sbatch", "--parsable", *options, str(script), *arguments], env=env, remarks=remarks)
    match = re.search(r"^(\d+)(?:;\S*)?$", answer, re.M)
    if match is None:
        raise SlurmFault(f"sbatch printed {answer.strip()!r}, which is not a job number")
    return int(match.group(1))


def scontrol(*arguments: str) -> str:
    """Runs scontrol and returns its output.

    Raises:
        UserError: without scontrol, or with its reason if it refuses.
        SlurmFault: if Slurm does not answer.
    """
    return _call(["scontrol", *arguments])


def query_job_states(ids: Iterable[int], *, timeout_s: float = TIMEOUT_S) -> dict[int, JobState]:
    """The states of the jobs that Slurm still knows; it forgets a job some minutes after its end.

    The number of a job array gets the state of its task that is furthest on: running, then waiting, then ended.

    Raises:
        UserError: without squeue.
        SlurmFault: if Slurm does not answer.
    """
    asked = set(ids)
    if not asked:
        return {}
    form = "%A|%F|%T|%r|%N|%S|%L"
    names = ",".join(map(str, sorted(asked)))
    try:
        answer = _call(["squeue", "-h", "-a", "-t", "all", "-o", form, "-j", names], timeout_s)
    except UserError as error:
        # squeue fails if the only job it is asked about is forgotten.
        if "Invalid job id" in str(error):
            return {}
        raise
    found: dict[int, JobState] = {}
    for line in answer.splitlines():
        fields = line.split("|")
        if len(fields) != 7:
            continue
        state = _job_state(fields[2:])
        for number in {fields[0], fields[1]}:
            if number.isdigit() and int(number) in asked:
                known = found.get(int(number))
                if known is None or _progress(state) > _progress(known):
                    found[int(number)] = state
    return found


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment for Slurm's commands.

    It leaves out the variables of an allocation in which the command is called, whose numbers of tasks and cores would
    go into the new job, and the user's own output formats.
    """
    own = re.compile(r"SLURM_|SLURMD_|SQUEUE_|PMI|PMIX_|UNIEMOX_(POINT|LEAD_S|AFTER_JOB|BATCH_BEGAN)$")
    return {key: value for key, value in env.items() if key in KEPT or not own.match(key)}


def _job_state(fields: Sequence[str]) -> JobState:
    state, reason, nodes, start, left = (field.strip() for field in fields)
    began = None
    with suppress(ValueError):  # N/A
        began = datetime.fromisoformat(start).timestamp()
    return JobState(state, "" if reason == "None" else reason, nodes, began, parse_duration(left))


def _progress(state: JobState) -> int:
    """The progress of a task of a job array, for comparing tasks."""
    if state.state == "CONFIGURING":
        return 2
    return {Phase.RUNNING: 3, Phase.WAITING: 1, Phase.ENDED: 0}[find_phase(state.state)]


def _option(variable: str) -> str:
    """The option of sbatch that a variable sets; "none" if it sets none."""
    name = variable.removeprefix("SBATCH_")
    if name == variable:
        return "none"
    return {"TIMELIMIT": "time", "MEM_PER_NODE": "mem", "ARRAY_INX": "array"}.get(
        name, name.lower().replace("_", "-")
    )


def _call(
    command: Sequence[str],
    timeout_s: float = TIMEOUT_S,
    *,
    env: Mapping[str, str] | None = None,
    remarks: list[str] | None = None,
) -> str:
    tool = command[0]
    # sbatch passes its environment to the job; the other commands get a fixed output format.
    env = env or {**environment(), "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        # In its own session, because after Ctrl-C it would be unknown whether a job was submitted.
        done = subprocess.run(
            command,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NoSlurm(
            f"{tool}: there is no such command on this machine; run this on a login node of the cluster, "
            "or use `uniemox launch local`"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmFault(f"{tool}: no answer within {timeout_s:g} s; try again later") from None
    except OSError as error:
        raise SlurmFault(f"{tool}: cannot be started ({error.strerror})") from None
    if done.returncode == 0:
        if remarks is not None:
            remarks += [line for line in done.stderr.splitlines() if line.strip()]
        return done.stdout
    said = [re.sub(rf"^{tool}: (?:fatal: |error: )?", "", line) for line in done.stderr.splitlines() if line]
    reason = "; ".join(dict.fromkeys(said)) or f"exit code {done.returncode}, no message"
    if _UNREACHABLE.search(reason):
        raise SlurmFault(f"{tool}: {reason}")
    raise UserError(f"{tool}: {reason}")
