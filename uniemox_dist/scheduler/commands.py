"""Slurm's own commands as functions, for login nodes. Jobs do not use them: inside a container there are none."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from uniemox_dist.core.errors import Fault, UserError

TIMEOUT_S = 60
"""Seconds that the controller may take to answer; a busy one needs tens of them."""
LIVE = frozenset(
    {
        *(
            "PENDING",
            "CONFIGURING",
            "RUNNING",
            "SUSPENDED",
            "STOPPED",
            "COMPLETING",
            "REQUEUED",
            "REQUEUE_HOLD",
        ),
        *("REQUEUE_FED", "SPECIAL_EXIT", "RESIZING", "SIGNALING", "STAGE_OUT", "RESV_DEL_HOLD"),
    }
)
"""States of jobs that run, or will run (again) by themselves."""
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_DEBUG_FLAGS")
"""Variables of that name are a site's, not those of an allocation in which the command happens to be called."""
_UNREACHABLE = re.compile(r"(?i)unable to contact|timed out|connection refused|connect failure|communication")


class NoSlurm(UserError):
    """This machine has no such command."""


class SlurmFault(Fault):
    """Slurm did not answer."""


@dataclass(frozen=True)
class JobState:
    """Where a job stands, as squeue tells."""

    state: str
    """Slurm's word, such as PENDING or RUNNING."""
    reason: str = ""
    """Why it does not run, such as Resources; empty for one that does."""
    nodes: str = ""
    """Its nodes in Slurm's short form, such as n[1-3]."""
    start: float | None = None
    """When it started, or is expected to start, in seconds since 1970."""
    time_left: float | None = None
    """Seconds until its time limit; None without one, or where Slurm does not say."""

    @property
    def live(self) -> bool:
        """Whether it runs, or will run by itself."""
        return self.state in LIVE


def has(tool: str) -> bool:
    """Whether this machine has a command of Slurm's."""
    return shutil.which(tool) is not None


def sbatch(
    options: Sequence[str], script: Path, arguments: Sequence[str] = (), *, remarks: list[str] | None = None
) -> int:
    """Submits a script and returns its job's number. What the script says itself is not overruled by variables such as
    SBATCH_PARTITION, as sbatch would have it. What sbatch says beside the number goes into `remarks`.

    Raises:
        UserError: without sbatch, or with its reason if it refuses the job.
        SlurmFault: if Slurm does not answer.
    """
    text = script.read_text(encoding="utf-8", errors="replace")
    env = {k: v for k, v in environment().items() if f"\n#SBATCH --{_option(k)}" not in text}
    answer = _call(["sbatch", "--parsable", *options, str(script), *arguments], env=env, remarks=remarks)
    match = re.search(r"^(\d+)(?:;\S*)?$", answer, re.M)
    if match is None:
        raise SlurmFault(f"sbatch answered {answer.strip()!r}, which is no job's number")
    return int(match.group(1))


def scontrol(*arguments: str) -> str:
    """What scontrol prints.

    Raises:
        UserError: without scontrol, or with its reason if it refuses.
        SlurmFault: if Slurm does not answer.
    """
    return _call(["scontrol", *arguments])


def job_states(ids: Iterable[int], *, timeout_s: float = TIMEOUT_S) -> dict[int, JobState]:
    """The states of those of the jobs that Slurm still knows; ended ones are forgotten after some minutes. The number
    of a job array stands for its task that goes on furthest.

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
        # Asked for one job alone that is forgotten, squeue calls it a mistake.
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
                if known is None or _rank(state) > _rank(known):
                    found[int(number)] = state
    return found


def environment(env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What Slurm's commands should see: nothing of an allocation in which they happen to be called, whose numbers of
    tasks and cores would go into the new job, and no formats of the user's."""
    own = re.compile(r"SLURM_|SLURMD_|SQUEUE_|PMI|PMIX_|UNIEMOX_(POINT|LEAD_S|AFTER_JOB|BATCH_BEGAN)$")
    return {key: value for key, value in env.items() if key in KEPT or not own.match(key)}


def parse_duration(text: str) -> float | None:
    """Seconds of a time as Slurm writes it (`minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours…`); None
    for anything else, such as UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if match is None:
        return None
    days, *parts = match.groups()
    numbers = [int(part) for part in parts if part is not None]
    if days is not None:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (numbers + [0, 0])[:3]
        return float(((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds)
    if len(numbers) == 3:
        return float((numbers[0] * 60 + numbers[1]) * 60 + numbers[2])
    return float(numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0))


def _job_state(fields: Sequence[str]) -> JobState:
    state, reason, nodes, start, left = (field.strip() for field in fields)
    began = None
    with suppress(ValueError):  # N/A
        began = datetime.fromisoformat(start).timestamp()
    return JobState(state, "" if reason == "None" else reason, nodes, began, parse_duration(left))


def _rank(state: JobState) -> int:
    return ("RUNNING", "COMPLETING", "CONFIGURING").count(state.state) * 2 + state.live


def _option(variable: str) -> str:
    """The option of sbatch that a variable stands for, or none."""
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
    # sbatch hands its own environment to the job; that of the others need not be the user's.
    env = env or {**environment(), "SLURM_TIME_FORMAT": "standard", "LC_ALL": "C"}
    try:
        # In a session of its own: Ctrl-C must not leave open whether a job was submitted.
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
            f"{tool}: there is no such command on this machine; call this on a login node of the cluster, "
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
    reason = "; ".join(dict.fromkeys(said)) or f"exit code {done.returncode}, and no word"
    if _UNREACHABLE.search(reason):
        raise SlurmFault(f"{tool}: {reason}")
    raise UserError(f"{tool}: {reason}")
