"""Checks on the login node, which report a mistake before a job is queued. Torch-free."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cluster import Cluster
from launch.plan.pace import read_measured_pace
from launch.plan.ranks import explain_illegal, largest_legal
from launch.plan.saving import signal_lead
from launch.restarts import find_newest_step
from shards.format.manifest import read_manifest
from uniemox_dist.checkpoints.folders import find_missing_weights
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config, merge, parse_override, validate_config
from uniemox_dist.config.schema import Config, RunConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.formatting import counted
from uniemox_dist.data.sources import Sources
from uniemox_dist.data.splits import make_train_sources, open_splits
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.teacher.identity import find_local_folder, find_weights_file

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
LOCAL_PATHS = (
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/local",
    "/localscratch",
    "/scratch/local",
    "/mnt/local",
    "/run",
)
"""Folders that are on each node's own disk at most sites."""


def resolve(recipe: str | Config, overrides: Sequence[str], cluster: Cluster) -> Config:
    """Loads the configuration of a run on a cluster. The cluster's time-outs override the recipe; KEY=VALUE pairs
    override both.

    Raises:
        UserError: with one line for every mistake.
    """
    site = [f"run.{k}={v}" for k, v in cluster.run_settings().items() if k in RunConfig.model_fields]
    if isinstance(recipe, str):
        return load_config(recipe, [*site, *overrides])
    values: dict[str, Any] = {"finetune": {}} if isinstance(recipe, FinetuneRun) else {}
    for pair in site:
        values = merge(values, parse_override(pair))
    values = merge(values, recipe.model_dump(mode="json", exclude_unset=True))
    for pair in overrides:
        values = merge(values, parse_override(pair))
    return validate_config(values, "config")


def run_path(config: Config) -> Path:
    """The run's folder as an absolute path, since jobs start elsewhere."""
    return Path(os.path.abspath(Path(config.run.dir) / config.run.name))


def check_run(config: Config, cluster: Cluster, *, nodes: bool = True, data: bool = True) -> list[str]:
    """Checks a run on a cluster and returns remarks.

    Args:
        nodes: whether the run becomes a Slurm job; otherwise it runs on this machine, as one node.
        data: whether this machine can read the shards and the teacher.

    Raises:
        UserError: with a line for each thing that would make the job fail.
    """
    mistakes: list[str] = []
    remarks: list[str] = []
    parts = [_check_ranks(config, cluster, nodes=nodes), ([], _check_initial_weights(config, data=data))]
    if not str(run_path(config)).isprintable():
        mistakes.append(
            f"run.dir={config.run.dir!r}: has characters that a script cannot contain; give another folder"
        )
    if data:
        parts.append(([], _check_inputs(config)))
    if nodes:
        parts += [_check_times(config, cluster), (check_place(run_path(config).parent, "run.dir"), [])]
    for more, wrong in parts:
        remarks += more
        mistakes += wrong
    if mistakes:
        raise UserError("\n".join(mistakes))
    return remarks


Findings = tuple[list[str], list[str]]
"""Remarks, and mistakes."""


def _check_ranks(config: Config, cluster: Cluster, *, nodes: bool) -> Findings:
    counts = range(cluster.min_nodes, cluster.max_nodes + 1) if nodes else range(1, 2)
    asked = counts[-1] * cluster.ranks
    remarks = []
    most = cluster.min_nodes * cluster.ranks
    if nodes and cluster.ranks > 1 and most < cluster.max_nodes:
        # Slurm counts the tasks of the fewest nodes, and gives no node without a task.
        least = -(-cluster.max_nodes // cluster.ranks)
        remarks.append(
            f"nodes={cluster.nodes}: of {counted(cluster.ranks, 'rank')} on each of at least "
            f"{counted(cluster.min_nodes, 'node')} Slurm makes a job of at most {counted(most, 'node')}; "
            f"give {least}-{cluster.max_nodes} to get more"
        )
    problem = explain_illegal(config, asked)
    if problem is None and len(counts) == 1:
        return remarks, []
    try:
        fits = {count: largest_legal(config, count, cluster.ranks) for count in counts}
    except UserError as error:
        return [], [str(error)]
    if asked > config.batch.streams and problem:
        return [], [f"{counted(counts[-1], 'node')} of {counted(cluster.ranks, 'rank')}: {problem}"]
    for count, (used, each) in fits.items():
        idle = count * cluster.ranks - used * each
        if idle:
            remarks.append(
                f"of {counted(count, 'node')} with {counted(cluster.ranks, 'rank')} each, "
                f"{counted(used * each, 'rank')} ({used} x {each}) can run, and {idle} stay idle: "
                f"{explain_illegal(config, count * cluster.ranks)}"
            )
    return remarks, []


ELSEWHERE = "; if only compute nodes see it, give --unseen-data"


def _check_inputs(config: Config) -> list[str]:
    mistakes = []
    try:
        if isinstance(config, FinetuneRun):
            sources = make_train_sources(config, open_splits(config))
        else:
            sources = Sources(config)
        _ = sources.plan  # checks that every source gets a stream
    except UserError as error:
        mistakes += [f"{line}{ELSEWHERE}" for line in str(error).splitlines()]
    for check in (check_eval_path, check_teacher):
        try:
            check(config)
        except UserError as error:
            mistakes.append(f"{error}{ELSEWHERE}")
    return mistakes


def check_eval_path(config: Config) -> None:
    """
    Raises:
        UserError: if the held-out data are missing or damaged.
    """
    if config.data.eval_path:
        read_manifest(config.data.eval_path, "data.eval_path")


def check_teacher(config: Config) -> None:
    """
    Raises:
        UserError: if a file of a teacher that runs in each step is missing.
    """
    teacher = config.teacher
    if not config.loss.needs_teacher or teacher.source == "cache":
        return
    if (folder := find_local_folder(teacher)) is not None:
        if not folder.is_dir():
            raise UserError(f"teacher.name={teacher.name}: no such folder")
        find_weights_file(teacher, folder)
    elif teacher.weights is not None and not Path(teacher.weights).is_file():
        raise UserError(f"teacher.weights={teacher.weights}: no such file")


def find_missing_start(config: Config) -> str | None:
    """The line about a `model.init_from` that does not exist or holds no weights; None if it does, or if the run has a
    checkpoint and no longer needs it."""
    start = config.model.init_from
    problem = None if start is None else find_missing_weights(Path(start))
    if problem is None or find_newest_step(RunFolder(run_path(config))) is not None:
        return None
    return f"model.init_from={start}: {problem}"


def _check_initial_weights(config: Config, *, data: bool) -> list[str]:
    """Reports a missing `model.init_from`. Fine-tuning reads its architecture from there when it is submitted, so this
    machine must be able to read it."""
    finetunes = isinstance(config, FinetuneRun)
    missing = find_missing_start(config) if data or finetunes else None
    if missing is None:
        return []
    why = ", and a fine-tuning run takes its architecture from there; submit where it can be seen"
    return [f"{missing}{why if finetunes else ELSEWHERE}"]


def _check_times(config: Config, cluster: Cluster) -> Findings:
    folder = RunFolder(run_path(config))
    try:
        lead = signal_lead(config, folder, ranks=cluster.max_nodes * cluster.ranks)
    except UserError:  # this machine cannot read the teacher; the check of the inputs reports it
        return [], []
    lead_s, limit_s, needed = cluster.signal_lead_s, cluster.time_s, lead.seconds
    if limit_s <= max(lead_s, needed):
        least = _minutes(max(lead_s, needed) + 600)
        return [], [
            f"time={cluster.time}: the limit of {limit_s:.0f} s leaves no time to train: Slurm signals the run "
            f"{lead_s} s before it, and a save may take {needed:.0f} s ({lead.source}); give at least --time {least}"
        ]
    if lead_s < needed:
        text = (
            f"signal_lead_s={lead_s}: a save before the limit may take {needed:.0f} s ({lead.source}); give "
            f"--signal-lead-s {int(needed) + 1} or more"
        )
        seen = read_measured_pace(folder) if folder.path.is_dir() else None
        # The estimate uses neither the site's disk nor its processors.
        return ([], [text]) if seen is not None and seen.save_s is not None else ([text], [])
    return [], []


def check_place(folder: Path, setting: str) -> list[str]:
    """Returns a remark if other nodes cannot read a folder; `setting` names the setting that chose it."""
    local = next((f for f in _list_local_folders() if Path(os.path.realpath(folder)).is_relative_to(f)), None)
    kind = _find_file_system(folder)
    if kind in MEMORY_FILE_SYSTEMS or local is not None:
        what = f"a {kind}" if kind in MEMORY_FILE_SYSTEMS else f"below {local}"
        return [
            f"{setting}={folder} is {what}, which is most likely this machine's own: compute nodes would not "
            f"find it, nor would a requeued job that starts on another node; give a {setting} on a shared disk"
        ]
    return []


def _list_local_folders() -> list[str]:
    own = os.environ.get("TMPDIR")
    return [*([os.path.realpath(own)] if own and os.path.isabs(own) else []), *LOCAL_PATHS]


def _find_file_system(path: Path) -> str | None:
    """The type of the file system of a path, which need not exist yet; None if unknown."""
    real = Path(os.path.realpath(path))
    best: tuple[int, str | None] = (0, None)
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    for line in mounts:
        fields = line.split()
        if len(fields) > 2:
            where = fields[1].replace("\\040", " ")
            if real.is_relative_to(where) and len(where) >= best[0]:
                best = (len(where), fields[2])
    return best[1]


def _minutes(seconds: float) -> str:
    minutes = -(-int(seconds) // 60)
    return f"{minutes // 60}:{minutes % 60:02d}:00"
