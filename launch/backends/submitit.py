"""The Python way into Slurm: a run as a submitit job, whose time-outs and pre-emptions submitit counts.

submitit's own handler would save in one rank, inside the handler, where ranks must save together. So the signals are
ours: the loop saves and ends with 75, and only then rank 0 takes submitit's own way to queue the job again.
"""

import os
import shlex
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.checks import run_path
from launch.cluster import Cluster, load_cluster
from launch.conflicts import refuse_live
from launch.dispatch import Order, Submitted, needs_shipped_teacher, prepare, submission_facts, without_nodes
from launch.freeze import code_name, freeze_code
from launch.plan.ranks import largest_legal
from launch.submission import (
    new_folder,
    next_folder,
    one_at_a_time,
    record,
    run_folder,
    write_config,
)
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import EXIT_DONE, EXIT_REQUEUE, Fault, UserError, missing_extra
from uniemox_dist.core.files import write_text
from uniemox_dist.scheduler import commands

if TYPE_CHECKING:
    import submitit

MAX_TIMEOUTS = 20
"""Time limits that a run may reach before submitit gives it up."""
LAST_S = 600
"""Seconds that the other ranks wait for the end that rank 0 brings about."""


@dataclass(frozen=True)
class Run:
    """What every rank of the submitit job calls."""

    config: str
    """The frozen configuration."""
    folder: str
    """Where relative paths in it start."""
    requeue: bool = True

    def __call__(self) -> int:
        """Trains; returns 0, or 75 where jobs may not queue themselves again."""
        from submitit.core.job_environment import JobEnvironment

        from uniemox_dist.cli.main import run

        requeue: Any = signal.getsignal(JobEnvironment._usr_sig())  # submitit's; ours take its place
        os.chdir(self.folder)
        code = run(["pretrain", self.config])
        if code == EXIT_REQUEUE and self.requeue:
            _refuse_if_cancelled(JobEnvironment())
            # On rank 0 it counts, writes the next attempt's pickle, queues the job again and ends this process.
            requeue(JobEnvironment._usr_sig())
            time.sleep(LAST_S)
            raise RuntimeError(f"rank 0 did not queue the job again within {LAST_S} s")
        if code not in (EXIT_DONE, EXIT_REQUEUE):
            raise RuntimeError(f"the run ended with exit code {code}; the log says why")
        return code

    def checkpoint(self) -> Any:
        """What submitit runs next time: the same. The run finds its newest complete checkpoint by itself."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _refuse_if_cancelled(environment: Any) -> None:
    """A job that somebody cancels is told to stop as one that is pre-empted; only Slurm knows the difference.

    Raises:
        RuntimeError: on rank 0 of a job that is ending, which must not be queued again.
    """
    if environment.global_rank:
        return
    number = int(environment.raw_job_id)
    try:
        state = commands.job_states([number]).get(number)
    except (UserError, Fault):  # Slurm does not answer just now
        return
    if state is not None and state.state != "RUNNING":
        raise RuntimeError(f"the run saved; its job is {state.state.lower()}, so it is not queued again")


def submit(run: str | Config, cluster: str | Cluster, *overrides: str, **options: Any) -> "submitit.Job[int]":
    """See `launch.submit`."""
    site = cluster if isinstance(cluster, str) else "given in Python"
    found = load_cluster(cluster) if isinstance(cluster, str) else cluster
    max_timeouts = options.pop("max_timeouts", MAX_TIMEOUTS)
    order = Order(run, found, site, overrides, **options)
    return submit_order(order, max_timeouts=max_timeouts)[1]


def submit_order(
    order: Order, *, max_timeouts: int = MAX_TIMEOUTS
) -> tuple[Submitted, "submitit.Job[int]", list[str]]:
    """Checks, freezes and submits; returns what came of it, submitit's job, and remarks.

    Raises:
        UserError: for what the user can mend; then nothing was submitted, and nothing was left behind.
    """
    submitit = _submitit()
    for tool in ("sbatch", "srun", "sacct"):
        if not commands.has(tool):
            raise commands.NoSlurm(
                f"{tool}: there is no such command on this machine, and submitit needs it; call this on a login node "
                "of the cluster, or use `uniemox launch local`"
            )
    config, remarks, order = _prepare(order)
    run = run_path(config)
    with ExitStack() as made:
        made.enter_context(one_at_a_time(run.parent))
        remarks += refuse_live([run], **order.waits_for)
        aside = made.enter_context(run_folder(run, aside=order.force_new))
        folder = made.enter_context(new_folder(run / "jobs"))
        code = freeze_code(run / "code", shipped_teacher=needs_shipped_teacher(config))
        frozen = write_config(folder, config)
        executor = submitit.SlurmExecutor(folder=str(folder), max_num_timeout=max_timeouts)
        options, avoided = without_nodes(order, [aside or run])
        executor.update_parameters(**_parameters(order, config, code, folder, options))
        try:
            job = executor.submit(Run(str(frozen), os.getcwd(), order.cluster.requeue))
        except Exception as error:  # submitit.core.utils.FailedJobError, with all that sbatch printed
            said = " ".join(str(error).split())
            raise UserError(f"submitit: {said}") from None
        number = int(job.job_id)
        write_text(folder / "job.sbatch", Path(job.paths.submission_file).read_text(encoding="utf-8"))
        record(folder, [number], **submission_facts(order, code), submitit=True)
    log = str(job.paths.stdout)
    return Submitted((number,), folder, run, log, str(run), aside), job, [*remarks, *avoided]


def script_only(order: Order) -> tuple[str, list[str]]:
    """The script that submitit would submit, and remarks; nothing is written."""
    _submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    config, remarks, order = _prepare(order)
    run = run_path(config)
    code = run / "code" / code_name(shipped_teacher=needs_shipped_teacher(config))
    folder = next_folder(run / "jobs")
    parameters = _parameters(order, config, code, folder, without_nodes(order, [run])[0])
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    text: str = _make_sbatch_string(command=command, folder=folder, **parameters)
    return text, remarks


def _prepare(order: Order) -> tuple[Config, list[str], Order]:
    cluster = order.cluster
    if cluster.container.kind != "none":
        raise UserError(
            f"container.kind={cluster.container.kind}: submitit starts no containers; use `uniemox launch slurm`"
        )
    if order.chain > 1:
        raise UserError(f"--chain={order.chain}: not with submitit, which counts by itself; leave it out")
    # submitit's number of tasks is fixed, so it must be a legal one from the beginning.
    config, remarks = prepare(replace(order, cluster=cluster.with_options({"nodes": str(cluster.max_nodes)})))
    nodes, each = largest_legal(config, cluster.max_nodes, cluster.ranks)
    fixed = cluster.with_options({"nodes": str(nodes), "ranks_per_node": each})
    return config, remarks, replace(order, cluster=fixed)


def _parameters(order: Order, config: Config, code: Path, folder: Path, options: list[str]) -> dict[str, Any]:
    """submitit's parameters for a job of this cluster."""
    c = order.cluster
    more: dict[str, Any] = {option.removeprefix("--").partition("=")[0]: True for option in c.sbatch}
    more |= {k: v for k, _, v in (option.removeprefix("--").partition("=") for option in c.sbatch) if v}
    more |= {k: v for k, _, v in (option.removeprefix("--").partition("=") for option in options)}
    # Python puts a module's working directory before everything else: there must be no packages in it.
    more |= {"chdir": str(folder), "requeue" if c.requeue else "no-requeue": True}
    named = {"partition": c.partition, "reservation": c.reservation}
    waits = [f"afterany:{order.after}"] if order.after is not None else []
    waits += ["singleton"] if order.singleton else []
    gpus = (f"{c.gpu_type}:" if c.gpu_type else "") + str(c.gpus_per_node)
    if c.gpus_per_node and c.gpu_request == "gpus-per-node":
        named["gpus-per-node"] = gpus
    parameters = {
        "job_name": config.run.name,
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
        "setup": _setup(c, code),
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
        "export SLURM_EXPORT_ENV=ALL",  # after sbatch --export=NONE srun would keep all of this from its tasks
    ]


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError:
        raise missing_extra("submitit", "cluster") from None
    return submitit
