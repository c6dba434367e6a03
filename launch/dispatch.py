"""From a recipe to a job in Slurm's queue: checked, frozen into the run's folder, submitted, written down."""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.checks import check, resolve, run_path
from launch.cluster import Cluster
from launch.conflicts import refuse_live, refuse_other_settings, require_sbatch
from launch.freeze import code_name, freeze_code
from launch.render import Frozen, render
from launch.submission import (
    interrupts_wait,
    new_folder,
    next_folder,
    one_at_a_time,
    record,
    run_folder,
    write_config,
)
from shards.storage import is_remote
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import write_text
from uniemox_dist.runs.bad_nodes import excluded
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.scheduler import commands

LOG = "slurm-%j.out"
"""The main log, in the run's logs/; %j is the job's number."""


@dataclass(frozen=True)
class Order:
    """What somebody wants submitted."""

    recipe: str | Config
    """A recipe's path or name, or a configuration as a value."""
    cluster: Cluster
    site: str
    """How the cluster was named."""
    overrides: tuple[str, ...] = ()
    resume: bool = False
    """Go on with a run that was begun with other settings."""
    force_new: bool = False
    """Set the folder of a run that was begun aside, and start anew."""
    after: int | None = None
    """Job that must have ended before."""
    singleton: bool = False
    """Wait for all jobs of the same name and user."""
    chain: int = 1
    """Submissions in a row, each after the one before."""
    exclude: tuple[str, ...] = ()
    """Nodes to leave out, besides those on which the run's preflight failed."""
    data: bool = True
    """Whether this machine sees the shards."""
    command: tuple[str, ...] = field(default_factory=lambda: ("uniemox", *sys.argv[1:]))
    """What is written down as the origin of the submission."""

    @property
    def waits_for(self) -> dict[str, Any]:
        """Which jobs of the run the new one starts after; a folder in use is never set aside."""
        return {} if self.force_new else {"after": self.after, "singleton": self.singleton}


@dataclass(frozen=True)
class Submitted:
    """A submission that Slurm took."""

    job_ids: tuple[int, ...]
    folder: Path
    """The submission's own."""
    run: Path
    """The run's folder, or the sweep's."""
    log: str
    """The main log of the first job."""
    watch: str
    """What `uniemox status` calls it."""
    aside: Path | None = None
    """What --force-new set aside."""


def prepare(order: Order, overrides: Sequence[str] | None = None) -> tuple[Config, list[str]]:
    """The checked configuration of an order, or of one point of a sweep with other pairs, and remarks.

    Raises:
        UserError: with a line for each thing that would make the job fail, or a run of that name with other settings.
    """
    config = resolve(order.recipe, order.overrides if overrides is None else overrides, order.cluster)
    remarks = check(config, order.cluster, data=order.data)
    refuse_other_settings(config, resume=order.resume, force_new=order.force_new)
    return config, remarks


def script_only(order: Order) -> tuple[str, list[str]]:
    """The script that would be submitted, and remarks; nothing is written."""
    config, remarks = prepare(order)
    run = run_path(config)
    code = run / "code" / code_name(shipped_teacher=needs_shipped_teacher(config))
    frozen = frozen_job(order, config, code, next_folder(run / "jobs"))
    return render("pretrain", order.cluster, frozen, mounts_of(config)), remarks


def submit(order: Order) -> tuple[Submitted, list[str]]:
    """Checks, freezes and submits; returns what came of it, and remarks.

    Raises:
        UserError: for what the user can mend; then nothing was submitted, and nothing was left behind.
    """
    require_sbatch()
    config, remarks = prepare(order)
    run = run_path(config)
    with ExitStack() as made:
        made.enter_context(one_at_a_time(run.parent))
        remarks += refuse_live([run], **order.waits_for)
        aside = made.enter_context(run_folder(run, aside=order.force_new))
        folder = made.enter_context(new_folder(run / "jobs"))
        code = freeze_code(run / "code", shipped_teacher=needs_shipped_teacher(config))
        write_config(folder, config)
        frozen = frozen_job(order, config, code, folder)
        script = folder / "job.sbatch"
        write_text(script, render("pretrain", order.cluster, frozen, mounts_of(config)))
        options, avoided = without_nodes(order, [aside or run])
        remarks += avoided
        with interrupts_wait() as came:
            ids, error = send(order, script, options, came, remarks)
            record(folder, ids, **submission_facts(order, code))
    if error is not None:
        raise Fault(
            f"{len(ids)} of {order.chain} jobs were submitted ({', '.join(map(str, ids))}), then: {error}"
        )
    log = run / "logs" / LOG.replace("%j", str(ids[0]))
    return Submitted(tuple(ids), folder, run, str(log), str(run), aside), remarks


def send(
    order: Order, script: Path, options: Sequence[str], came: Sequence[int], remarks: list[str]
) -> tuple[list[int], Exception | None]:
    """Submits a script as often as asked, each job behind the one before, until a signal came. A refusal of the first
    is raised; one of a later is returned, since those before it are queued. sbatch's remarks go into `remarks`."""
    ids: list[int] = []
    for _ in range(order.chain):
        if came:
            if not ids:
                raise KeyboardInterrupt
            return ids, Fault("interrupted")
        try:
            ids.append(commands.sbatch([*options, *_dependency(order, ids)], script, remarks=remarks))
        except (UserError, Fault) as error:
            if not ids:
                raise
            return ids, error
    return ids, None


def frozen_job(order: Order, config: Config, code: Path, folder: Path) -> Frozen:
    """What the script of one run refers to."""
    run = run_path(config)
    return Frozen(
        name=config.run.name,
        run=str(run),
        site=order.site,
        folder=os.getcwd(),
        code=str(code),
        output=f"{str(run / 'logs').replace('%', '%%')}/{LOG}",
        uniemox=own_command(),
        config=str(folder / "config.yaml"),
    )


def submission_facts(order: Order, code: Path) -> dict[str, object]:
    """What submission.json says besides the jobs' numbers."""
    return {
        "cluster": order.site,
        "command": list(order.command),
        "nodes": order.cluster.nodes,
        "ranks_per_node": order.cluster.ranks,
        "code": code.name,
    }


def without_nodes(order: Order, runs: Sequence[Path]) -> tuple[list[str], list[str]]:
    """sbatch's option for the nodes to leave out, and a remark about those where a preflight failed."""
    now = time.time()
    failed = list(dict.fromkeys(node for run in runs for node in excluded(RunFolder(run), now)))
    nodes = list(dict.fromkeys([*order.exclude, *failed]))
    remark = f"leaves out {', '.join(failed)}: the preflight of this run failed there within the last day"
    return ([f"--exclude={','.join(nodes)}"] if nodes else []), ([remark] if failed else [])


def needs_shipped_teacher(config: Config) -> bool:
    """Whether a run reads the teacher that comes with the package."""
    return config.teacher.name.startswith("shipped:")


def mounts_of(config: Config) -> tuple[str, ...]:
    """Folders that a container needs to see: of runs, and of shards and teachers on local paths; where one is a link,
    also what it leads to."""
    paths = [config.run.dir, *(origin.path for origin in config.data.origins()), config.data.eval_path]
    kind, _, teacher = config.teacher.name.partition(":")
    paths += [teacher] if kind == "local-dir" else []
    local = [os.path.abspath(path) for path in paths if path and not is_remote(path)]
    local += [os.path.realpath(path) for path in local]
    inside = f"{os.getcwd()}{os.sep}"  # the working directory is mounted anyway
    return tuple(dict.fromkeys(path for path in local if not path.startswith(inside)))


def own_command() -> str:
    """The command that belongs to this Python."""
    beside = Path(sys.executable).with_name("uniemox")
    return str(beside) if beside.is_file() else "uniemox"


def follow(submitted: Submitted) -> list[str]:
    """How to watch and end what was submitted."""
    ids = " ".join(map(str, submitted.job_ids))
    word = "job" if len(submitted.job_ids) == 1 else "jobs, one after the other:"
    lines = [f"submitted {word} {ids}; run folder {submitted.run}"]
    if submitted.aside is not None:
        lines.append(f"  the run that was there is now {submitted.aside}")
    return [
        *lines,
        f"  log:    tail -F {shlex.quote(submitted.log)}",
        f"  status: uniemox status {shlex.quote(submitted.watch)} --watch",
        f"  end:    scancel {ids}",
    ]


def _dependency(order: Order, before: Sequence[int]) -> list[str]:
    kinds = [f"afterany:{before[-1]}"] if before else []
    kinds += [f"afterany:{order.after}"] if order.after is not None and not before else []
    kinds += ["singleton"] if order.singleton else []
    return [f"--dependency={','.join(kinds)}"] if kinds else []
