"""`uniemox launch submitit` and `launch.submit(…)`: a command as a submitit job; submitit counts its time-outs and
preemptions.

submitit's own signal handler would save on one rank only, inside the handler, but all ranks must save together. This
project therefore installs its own handlers: all ranks save and end with 75, and then rank 0 calls submitit's handler,
which requeues the job.
"""

import atexit
import os
import shlex
import signal
import sys
import time
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.conflicts import require_commands
from launch.dispatch import PARALLEL, Frozen, Request, Submitted
from launch.plan.ranks import largest_legal
from launch.submission import record
from uniemox_dist.core.errors import (
    EXIT_DONE,
    EXIT_REQUEUE,
    Fault,
    UserError,
    exit_without_teardown,
    missing_extra,
)
from uniemox_dist.core.files import write_text
from uniemox_dist.scheduler import commands

MAX_TIMEOUTS = 20
"""How often a job may reach its time limit before submitit stops requeueing it."""
EXIT_WAIT_S = 600
"""Seconds that the other ranks wait for rank 0 to end the job."""


@dataclass(frozen=True)
class Task:
    """The function that every rank of the submitit job calls."""

    words: tuple[str, ...]
    """The command line after `uniemox`."""
    folder: str
    """The folder to which its relative paths refer."""
    requeue: bool = True

    def __call__(self) -> int:
        """Runs the command; returns 0, or 75 if jobs may not requeue themselves."""
        from submitit.core.job_environment import JobEnvironment

        requeue: Any = signal.getsignal(
            JobEnvironment._usr_sig()
        )  # submitit's handler, which training replaces
        os.chdir(self.folder)
        code = self._run()
        if code == EXIT_REQUEUE and self.requeue:
            _check_still_running(JobEnvironment())
            # On rank 0 the handler counts, writes the next attempt's pickle, requeues the job and ends this process.
            requeue(JobEnvironment._usr_sig())
            time.sleep(EXIT_WAIT_S)
            raise RuntimeError(f"rank 0 did not queue the job again within {EXIT_WAIT_S} s")
        if code not in (EXIT_DONE, EXIT_REQUEUE):
            raise RuntimeError(
                f"uniemox {self.words[0]} ended with exit code {code}; see the log for the cause"
            )
        return code

    def _run(self) -> int:
        """Runs the command line in this process and returns its exit code."""
        sys.argv[1:] = self.words
        # By name: `launch` does not import the command line, which imports it.
        code: int = import_module("uniemox_dist.cli.main").run(list(self.words))
        if code == EXIT_DONE:
            atexit.register(exit_without_teardown, [code])
        return code

    def checkpoint(self) -> Any:
        """Returns the call that submitit runs next time, which is the same one: a run resumes its newest complete
        checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class Submitit:
    """Submits through submitit."""

    queued = True

    def __init__(self, *, preview: bool = False, max_timeouts: int = MAX_TIMEOUTS) -> None:
        self._submitit = _import_submitit()
        self._preview, self._max_timeouts = preview, max_timeouts

    def adapt(self, request: Request) -> Request:
        """The request with a fixed number of nodes, as submitit needs it.

        Raises:
            UserError: for an option that submitit does not support.
        """
        if not self._preview:
            require_commands("sbatch", "srun", "sacct", user="submitit")
        kind = request.cluster.container.kind
        if kind != "none":
            raise UserError(
                f"container.kind={kind}: submitit starts no containers; use `uniemox launch slurm`"
            )
        if request.chain > 1:
            raise UserError(f"--chain={request.chain}: submitit counts attempts by itself; leave it out")
        if request.axes:
            raise UserError(f"--array={request.axes[0]}: only with `uniemox launch slurm`")
        fixed = request.cluster.with_options({"nodes": str(request.cluster.max_nodes)})
        return replace(request, cluster=fixed)

    def render_script(self, frozen: Frozen) -> str:
        """The script that submitit would submit."""
        from submitit.slurm.slurm import _make_sbatch_string

        command = (
            f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(frozen.folder))}"
        )
        text: str = _make_sbatch_string(
            command=command, folder=frozen.folder, **_make_parameters(frozen, _fit_cluster(frozen))
        )
        return text

    def start(self, frozen: Frozen) -> Submitted:
        """Submits one job; `Submitted.job` is submitit's."""
        prepared, cluster, folder = frozen.prepared, _fit_cluster(frozen), frozen.folder
        executor = self._submitit.SlurmExecutor(folder=str(folder), max_num_timeout=self._max_timeouts)
        executor.update_parameters(**_make_parameters(frozen, cluster))
        try:
            job = executor.submit(Task(frozen.words, os.getcwd(), cluster.requeue))
        except Exception as error:  # submitit.core.utils.FailedJobError, with the output of sbatch
            raise UserError(f"submitit: {' '.join(str(error).split())}") from None
        number = int(job.job_id)
        write_text(folder / "job.sbatch", Path(job.paths.submission_file).read_text(encoding="utf-8"))
        record(folder, [number], **frozen.facts(cluster), submitit=True)
        remarks = [*prepared.remarks, *frozen.excluded_nodes()[1]]
        return Submitted(frozen, remarks, (number,), str(job.paths.stdout), job=job)


def _check_still_running(environment: Any) -> None:
    """Checks that this job was not cancelled: it gets the same signals as a preempted one, and only Slurm knows the
    difference.

    Raises:
        RuntimeError: on rank 0 of a job that is ending, which must not be requeued.
    """
    if environment.global_rank:
        return
    number = int(environment.raw_job_id)
    try:
        state = commands.query_job_states([number]).get(number)
    except (UserError, Fault):  # Slurm does not answer
        return
    if state is not None and state.state != "RUNNING":
        raise RuntimeError(f"the run saved; its job is {state.state.lower()}, so it is not requeued")


def _fit_cluster(frozen: Frozen) -> Cluster:
    """Returns the cluster with a legal number of ranks, because submitit's number of tasks is fixed."""
    prepared, cluster = frozen.prepared, frozen.prepared.request.cluster
    if prepared.configs:
        nodes, each = largest_legal(prepared.configs[0], cluster.max_nodes, cluster.ranks)
        return cluster.with_options({"nodes": str(nodes), "ranks_per_node": each})
    return cluster if prepared.command[0] in PARALLEL else cluster.with_options({"ranks_per_node": 1})


def _make_parameters(frozen: Frozen, c: Cluster) -> dict[str, Any]:
    """submitit's parameters for a job of this cluster."""
    request, nodes = frozen.prepared.request, frozen.excluded_nodes()[0]
    more: dict[str, Any] = {option.removeprefix("--").partition("=")[0]: True for option in c.sbatch}
    more |= {k: v for k, _, v in (option.removeprefix("--").partition("=") for option in c.sbatch) if v}
    more |= {"exclude": ",".join(nodes)} if nodes else {}
    # `python -m` puts the working directory first in sys.path, so it must not contain packages.
    more |= {"chdir": str(frozen.folder), "requeue" if c.requeue else "no-requeue": True}
    named = {"partition": c.partition, "reservation": c.reservation}
    waits = [f"afterany:{request.after}"] if request.after is not None else []
    waits += ["singleton"] if request.singleton else []
    gpus = (f"{c.gpu_type}:" if c.gpu_type else "") + str(c.gpus_per_node)
    if c.gpus_per_node and c.gpu_request == "gpus-per-node":
        named["gpus-per-node"] = gpus
    parameters = {
        "job_name": frozen.prepared.name,
        "nodes": c.max_nodes,
        "ntasks_per_node": c.ranks,
        "time": -(-int(c.time_s) // 60),
        "cpus_per_task": c.cpus_per_task,
        "account": c.account,
        "qos": c.qos,
        "constraint": c.constraint,
        "mem": c.mem,
        "gres": f"gpu:{gpus}" if c.gpus_per_node and c.gpu_request == "gres" else None,
        "exclusive": c.exclusive or None,
        "dependency": ",".join(waits) or None,
        "signal_delay_s": c.signal_lead_s,
        "stderr_to_stdout": True,
        "setup": _setup(c, frozen.code),
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={c.cpus_per_task or 1}"],
        "additional_parameters": {**more, **{k: v for k, v in named.items() if v is not None}},
    }
    return {key: value for key, value in parameters.items() if value is not None}


def _setup(c: Cluster, code: Path) -> list[str]:
    lines = ["module purge", f"module load {shlex.join(c.modules)} || exit"] if c.modules else []
    lines += c.setup.strip().splitlines()
    lines += [f"export {name}={shlex.quote(value)}" for name, value in c.env.items()]
    scratch = c.node_tmp or "${SLURM_TMPDIR:-${TMPDIR:-/tmp}}"
    return [
        *lines,
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        f"export TORCHINDUCTOR_CACHE_DIR={scratch}/uniemox-$(id -u)/inductor",
        f"export TRITON_CACHE_DIR={scratch}/uniemox-$(id -u)/triton",
        "export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}",
        "export SLURM_EXPORT_ENV=ALL",  # otherwise srun passes no variables after sbatch --export=NONE
    ]


def _import_submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise missing_extra("submitit", "cluster") from None
    return submitit
