"""Submitting a command: check it, freeze its code and settings, hand it to a backend, record the jobs.

A training run keeps all of this in its own folder, RUN/jobs and RUN/code; a sweep in run.dir/sweeps/NAME-0001; every
other command in JOBS/NAME-0001 and JOBS/code, where JOBS is `jobs` in the working directory unless --jobs names another
folder.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from launch.checks import check_place, check_run, resolve, run_path
from launch.cluster import Cluster
from launch.conflicts import check_no_job, check_same_settings
from launch.freeze import code_name, frozen_code
from launch.submission import create_next_folder, find_next_folder, lock_submissions, run_folder, write_config
from launch.sweep import expand_grid, format_points, point_names
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import require_finetuning, require_pretraining
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.runs.folder import RunFolder, nodes_to_exclude

TRAINING = ("pretrain", "finetune")
"""Commands that train a run, in its own folder, by a recipe."""
PARALLEL = ("teach",)
"""Other commands whose ranks share the work and which continue after an interruption. All remaining commands are one
process."""


@dataclass(frozen=True)
class Request:
    """A command to submit."""

    recipe: str | Config | None
    """For a training command a recipe's path or name, or a configuration. None for other commands."""
    cluster: Cluster
    site: str
    """The path or name by which the user named the cluster."""
    overrides: tuple[str, ...] = ()
    """KEY=VALUE pairs on top of the recipe."""
    command: tuple[str, ...] = ()
    """`pretrain` or `finetune`; or empty, then the recipe decides; or the whole command line after `uniemox` of any
    other command."""
    name: str = ""
    """The job's name, for commands that do not train."""
    jobs: Path = Path("jobs")
    """Folder for the submissions of commands that do not train."""
    axes: tuple[str, ...] = ()
    """KEY=V1,V2,… of a sweep."""
    resume: bool = False
    """Continue a run that was started with other settings."""
    force_new: bool = False
    """Set the folder of an earlier run aside and start a new run."""
    after: int | None = None
    """The job that must have ended before this one starts."""
    singleton: bool = False
    """Wait for all jobs of the same name and user."""
    chain: int = 1
    """Jobs in a row, each waiting for the one before."""
    exclude: tuple[str, ...] = ()
    """Nodes to exclude, besides those on which the run's preflight failed."""
    data: bool = True
    """Whether this machine can read the shards and checks them."""
    origin: tuple[str, ...] = field(default_factory=lambda: ("uniemox", *sys.argv[1:]))
    """The command line that submits, for the record."""

    @property
    def waits_for(self) -> dict[str, Any]:
        """The jobs for which the new one may wait. With force_new there are none, because a folder in use is never set
        aside."""
        return {} if self.force_new else {"after": self.after, "singleton": self.singleton}


@dataclass(frozen=True)
class Prepared:
    """A request that passed its checks."""

    request: Request
    command: tuple[str, ...]
    """The command line after `uniemox`; for training commands only its first word."""
    name: str
    """The job's name."""
    configs: tuple[Config, ...] = ()
    """The configuration of each run; empty if the command does not train."""
    points: tuple[tuple[str, ...], ...] = ()
    """KEY=VALUE pairs of each run of a sweep."""
    remarks: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Path]:
        """The folder of each run."""
        return [run_path(config) for config in self.configs]

    @property
    def place(self) -> tuple[Path, str]:
        """The folder in which the submission makes its own folder, and the beginning of that folder's name."""
        if self.points:
            return self.runs[0].parent / "sweeps", f"{self.name}-"
        if self.configs:
            return self.runs[0] / "jobs", ""
        return Path(os.path.abspath(self.request.jobs)), f"{self.name}-"

    @property
    def table(self) -> list[str]:
        """Lines with each point of a sweep and its run."""
        return format_points(self.configs, self.points) if self.points else []

    def code_folder(self, folder: Path) -> Path:
        """The folder with the code of a submission in the given folder."""
        if self.points:
            return folder / "code"
        return self.runs[0] / "code" if self.configs else folder.parent / "code"

    def code_parts(self) -> dict[str, bool]:
        """The large optional files of the package that the command needs."""
        if not self.configs:
            return {"shipped_teacher": True, "detectors": self.command[0] == "shards"}
        return {"shipped_teacher": any(c.teacher.name.startswith("shipped:") for c in self.configs)}


@dataclass(frozen=True)
class Frozen:
    """A submission with its frozen code and settings, or with the paths that they would get."""

    prepared: Prepared
    folder: Path
    """The submission's folder, with script and record."""
    code: Path
    run_folders: tuple[Path, ...] = ()
    """For a sweep the folder RUN/jobs/0001 of each run; for one run the submission's folder."""
    set_aside: tuple[Path, ...] = ()
    """Folders that --force-new renamed."""

    @property
    def words(self) -> tuple[str, ...]:
        """The whole command line after `uniemox`, except for the configuration of a sweep's run."""
        one_run = self.prepared.configs and not self.prepared.points
        config = (str(self.folder / "config.yaml"),) if one_run else ()
        return (*self.prepared.command, *config)

    def facts(self, cluster: Cluster | None = None) -> dict[str, object]:
        """The content of submission.json, except the jobs' numbers."""
        request = self.prepared.request
        cluster = cluster or request.cluster
        return {
            "cluster": request.site,
            "command": list(request.origin),
            "nodes": cluster.nodes,
            "ranks_per_node": cluster.ranks,
            "code": self.code.name,
        }

    def excluded_nodes(self) -> tuple[list[str], list[str]]:
        """The nodes to exclude, and a remark about those on which the run's preflight failed."""
        now, request = time.time(), self.prepared.request
        runs = [*self.set_aside, *self.prepared.runs]
        failed = list(dict.fromkeys(node for run in runs for node in nodes_to_exclude(RunFolder(run), now)))
        nodes = list(dict.fromkeys([*request.exclude, *failed]))
        remark = f"leaves out {', '.join(failed)}: the preflight of this run failed there within the last day"
        return nodes, ([remark] if failed else [])


@dataclass(frozen=True)
class Submitted:
    """A submission that a backend accepted."""

    frozen: Frozen
    remarks: list[str]
    job_ids: tuple[int, ...] = ()
    log: str = ""
    """The main log of the first job."""
    failure: Exception | None = None
    """The reason why not all jobs of a chain were submitted."""
    job: Any = None
    """submitit's job."""
    wait: Callable[[], int] | None = None
    """Runs the command on this machine and returns its exit code."""

    def describe(self) -> list[str]:
        """Lines for the terminal: the submission's folder, and how to watch and end the job."""
        prepared, ids = self.frozen.prepared, " ".join(map(str, self.job_ids))
        word = "job" if len(self.job_ids) == 1 else "jobs, one after the other:"
        one_run = len(prepared.configs) == 1 and not prepared.points
        where = f"run folder {prepared.runs[0]}" if one_run else f"folder {self.frozen.folder}"
        lines = [f"submitted {word} {ids}; {where}"]
        lines += [f"  the earlier run is now {folder}" for folder in self.frozen.set_aside]
        lines.append(f"  log:    tail -F {shlex.quote(self.log)}")
        if prepared.configs:
            watch = prepared.runs[0] if one_run else prepared.runs[0].parent / f"{prepared.name}-*"
            lines.append(f"  status: uniemox status {shlex.quote(str(watch))} --watch")
        return [*lines, f"  end:    scancel {ids}"]


class Backend(Protocol):
    """A way to run a command."""

    queued: bool
    """Whether the command is queued in Slurm and runs on other nodes."""

    def adapt(self, request: Request) -> Request:
        """Returns the request adapted to this backend; raises UserError if it cannot run."""

    def render_script(self, frozen: Frozen) -> str:
        """The text that would be submitted."""

    def start(self, frozen: Frozen) -> Submitted:
        """Submits and records; raises UserError if nothing was submitted."""


def prepare(request: Request, *, queued: bool = True) -> Prepared:
    """Checks a request.

    Raises:
        UserError: with one line for each reason why it would fail, or for a run of that name with other settings.
    """
    if request.recipe is None:
        return _prepare_command(request, queued=queued)
    if not request.axes:
        config = _resolve(request, request.overrides)
        remarks = _check(request, config, queued=queued, data=request.data)
        return Prepared(request, (_build_training_command(config),), config.run.name, (config,), (), remarks)
    points = [tuple(point) for point in expand_grid(request.axes)]
    name = _resolve(request, request.overrides).run.name
    configs: list[Config] = []
    remarks, seen = [], []
    for point, suffix in zip(points, point_names(points)):
        try:
            config = _resolve(request, [*request.overrides, *point, f"run.name={name}-{suffix}"])
            inputs = (config.data, config.batch, config.teacher)  # equal inputs are checked once
            remarks += _check(request, config, queued=queued, data=request.data and inputs not in seen)
        except UserError as error:
            raise UserError(
                "\n".join(f"{', '.join(point)}: {line}" for line in str(error).splitlines())
            ) from None
        configs.append(config)
        seen.append(inputs)
    command = (_build_training_command(configs[0]),)
    return Prepared(request, command, name, tuple(configs), tuple(points), list(dict.fromkeys(remarks)))


def preview(request: Request, backend: Backend) -> tuple[str, Prepared]:
    """Returns the text that would be submitted; writes nothing.

    Raises:
        UserError: as `submit`.
    """
    prepared = prepare(backend.adapt(request), queued=backend.queued)
    folder = find_next_folder(*prepared.place)
    code = prepared.code_folder(folder) / code_name(**prepared.code_parts())
    own = () if not prepared.configs else (folder,) if not prepared.points else tuple(prepared.runs)
    return backend.render_script(Frozen(prepared, folder, code, own)), prepared


def submit(request: Request, backend: Backend) -> Submitted:
    """Checks, freezes, submits and records a command.

    Raises:
        UserError: for a mistake of the user; then nothing was submitted, and all new files are removed.
        Fault: if only some jobs of a chain were submitted.
    """
    prepared = prepare(backend.adapt(request), queued=backend.queued)
    with ExitStack() as undo:
        if backend.queued and prepared.runs:
            undo.enter_context(lock_submissions(prepared.runs[0].parent))
            prepared.remarks.extend(check_no_job(prepared.runs, **request.waits_for))
        submitted = backend.start(undo.enter_context(freeze(prepared)))
    if submitted.failure is not None:
        ids = submitted.job_ids
        what = "job arrays" if prepared.points else "jobs"
        numbers = ", ".join(map(str, ids))
        raise Fault(
            f"{len(ids)} of {request.chain} {what} were submitted ({numbers}), then: {submitted.failure}"
        )
    return submitted


@contextmanager
def freeze(prepared: Prepared) -> Iterator[Frozen]:
    """Makes the folders of a submission and copies its code and settings into them; removes them if the block fails."""
    with ExitStack() as made:
        force_new = prepared.request.force_new
        aside = [made.enter_context(run_folder(run, aside=force_new)) for run in prepared.runs]
        folder = made.enter_context(create_next_folder(*prepared.place))
        code = made.enter_context(frozen_code(prepared.code_folder(folder), folder, **prepared.code_parts()))
        own = [folder] if not prepared.points else []
        own += (
            [made.enter_context(create_next_folder(run / "jobs")) for run in prepared.runs]
            if prepared.points
            else []
        )
        for place, config in zip(own, prepared.configs):
            write_config(place, config)
        runs = tuple(own) if prepared.configs else ()
        yield Frozen(prepared, folder, code, runs, tuple(old for old in aside if old is not None))


def _resolve(request: Request, overrides: Sequence[str]) -> Config:
    assert request.recipe is not None
    config = resolve(request.recipe, overrides, request.cluster)
    if request.command:
        (require_finetuning if request.command[0] == "finetune" else require_pretraining)(config)
    return config


def _build_training_command(config: Config) -> str:
    return "finetune" if isinstance(config, FinetuneRun) else "pretrain"


def _check(request: Request, config: Config, *, queued: bool, data: bool) -> list[str]:
    remarks = check_run(config, request.cluster, nodes=queued, data=data)
    check_same_settings(run_path(config), config, resume=request.resume, force_new=request.force_new)
    return remarks


def _prepare_command(request: Request, *, queued: bool) -> Prepared:
    command = request.command
    given = {"--array": request.axes, "--resume": request.resume, "--force-new": request.force_new}
    for option, value in given.items():
        if value:
            raise UserError(
                f"{option}: only for pretrain and finetune, which have a run folder; leave it out"
            )
    cluster = request.cluster
    if command[0] not in PARALLEL:
        if request.chain > 1:
            raise UserError(
                f"--chain={request.chain}: {command[0]} does not continue where it was stopped, so that a second job "
                "would start from the beginning; leave it out"
            )
        one = {"nodes": "1", "ranks_per_node": 1, "gpus_per_node": min(1, cluster.gpus_per_node)}
        cluster = cluster.with_options(one)
    remarks = check_place(Path(os.path.abspath(request.jobs)), "--jobs") if queued else []
    name = request.name or command[0]
    return Prepared(replace(request, cluster=cluster), command, name, remarks=remarks)
