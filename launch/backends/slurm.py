"""`uniemox launch slurm`: jobs, chains and arrays by sbatch, with batch scripts of our own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import render
from launch.conflicts import require_commands
from launch.dispatch import PARALLEL, Frozen, Request, Submitted
from launch.submission import delay_interrupts, record
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import is_remote, write_text
from uniemox_dist.scheduler import commands

LOG = "slurm-%j.out"
"""The main log, in the run's logs/ or the submission's folder; %j is the job's number."""
SWEEP_LOG = "slurm-%A_%a.out"


class Slurm:
    """Submits by sbatch."""

    queued = True

    def __init__(self, *, preview: bool = False) -> None:
        self._preview = preview

    def adapt(self, request: Request) -> Request:
        """Checks that this machine has Slurm's commands, unless the script is only printed."""
        if not self._preview:
            require_commands("sbatch")
        return request

    def render_script(self, frozen: Frozen) -> str:
        """The batch script."""
        prepared = frozen.prepared
        mounts = (
            _list_mounts(prepared.configs[0]) if prepared.configs else _list_mounts_of_words(prepared.command)
        )
        return render.render(prepared.command[0], prepared.request.cluster, self._job(frozen), mounts)

    def start(self, frozen: Frozen) -> Submitted:
        """Submits the script once per job of the chain."""
        prepared, request = frozen.prepared, frozen.prepared.request
        script = frozen.folder / "job.sbatch"
        write_text(script, self.render_script(frozen))
        facts: dict[str, Any] = frozen.facts()
        if prepared.points:
            _write_points(frozen, script)
        nodes, remark = frozen.excluded_nodes()
        options = [f"--exclude={','.join(nodes)}"] if nodes else []
        with delay_interrupts() as received:
            ids, failure = _send(request, script, options, received, prepared.remarks)
            if prepared.points:
                record(frozen.folder, ids, **facts, points=len(prepared.points))
                for number, folder in enumerate(frozen.run_folders):
                    record(folder, ids, **facts, array_task=number, sweep=str(frozen.folder))
            else:
                record(frozen.folder, ids, **facts)
        log = self._log(frozen).replace("%j", str(ids[0])).replace("%A", str(ids[0])).replace("%a", "0")
        return Submitted(frozen, [*prepared.remarks, *remark], tuple(ids), log, failure)

    def _job(self, frozen: Frozen) -> render.Job:
        prepared = frozen.prepared
        one_run = bool(prepared.configs) and not prepared.points
        folder, _, name = self._log(frozen).rpartition("/")
        return render.Job(
            name=prepared.name,
            run=str(prepared.runs[0] if one_run else frozen.folder),
            site=prepared.request.site,
            folder=os.getcwd(),
            code=str(frozen.code),
            output=f"{folder.replace('%', '%%')}/{name}",
            uniemox=find_own_command(),
            config=str(frozen.folder / "config.yaml") if one_run else "",
            points=len(prepared.points),
            tasks=str(frozen.folder / "tasks.tsv") if prepared.points else "",
            words=() if prepared.configs else prepared.command,
            parallel=prepared.command[0] in PARALLEL,
        )

    def _log(self, frozen: Frozen) -> str:
        """The main log, with sbatch's patterns."""
        prepared = frozen.prepared
        if prepared.points:
            return f"{frozen.folder}/{SWEEP_LOG}"
        return f"{prepared.runs[0] / 'logs' if prepared.configs else frozen.folder}/{LOG}"


def find_own_command() -> str:
    """The command `uniemox` that belongs to this Python."""
    beside = Path(sys.executable).with_name("uniemox")
    return str(beside) if beside.is_file() else "uniemox"


def _write_points(frozen: Frozen, script: Path) -> None:
    """Writes the table of a sweep, once for people and once for the script; links the script into each run's
    folder."""
    write_text(frozen.folder / "points.txt", "\n".join(frozen.prepared.table) + "\n")
    pairs = zip(frozen.run_folders, frozen.prepared.runs)
    write_text(
        frozen.folder / "tasks.tsv", "".join(f"{folder / 'config.yaml'}\t{run}\n" for folder, run in pairs)
    )
    for folder in frozen.run_folders:
        os.symlink(os.path.relpath(script, folder), folder / "job.sbatch")


def _send(
    request: Request, script: Path, options: Sequence[str], received: Sequence[int], remarks: list[str]
) -> tuple[list[int], Exception | None]:
    """Submits a script once per job of a chain, each job dependent on the one before, until a signal is received. If
    sbatch refuses the first job, the error is raised; if it refuses a later one, the error is returned, because
    earlier jobs are queued. Other output of sbatch is appended to `remarks`."""
    ids: list[int] = []
    for _ in range(request.chain):
        if received:
            if not ids:
                raise KeyboardInterrupt
            return ids, Fault("interrupted")
        try:
            ids.append(
                commands.sbatch([*options, *_format_dependency(request, ids)], script, remarks=remarks)
            )
        except (UserError, Fault) as error:
            if not ids:
                raise
            return ids, error
    return ids, None


def _format_dependency(request: Request, before: Sequence[int]) -> list[str]:
    kinds = [f"afterany:{before[-1]}"] if before else []
    kinds += [f"afterany:{request.after}"] if request.after is not None and not before else []
    kinds += ["singleton"] if request.singleton else []
    return [f"--dependency={','.join(kinds)}"] if kinds else []


def _list_mounts(config: Config) -> tuple[str, ...]:
    """Folders that must be mounted in a run's container: the run's, and those of local shards, weights and
    teachers."""
    paths = [config.run.dir, *(origin.path for origin in config.data.origins()), config.data.eval_path]
    kind, _, teacher = config.teacher.name.partition(":")
    paths += [teacher] if kind == "local-dir" else []
    paths.append(config.model.init_from)
    return _list_outside_paths([path for path in paths if path and not is_remote(path)])


def _list_mounts_of_words(words: Sequence[str]) -> tuple[str, ...]:
    """The files and folders that a command line names, also after `=` and `local-dir:`."""
    candidates = [part for word in words for part in (word, word.partition("=")[2])]
    paths = [path.removeprefix("local-dir:") for path in candidates if path]
    return _list_outside_paths([path for path in paths if os.path.exists(path)])


def _list_outside_paths(paths: Sequence[str]) -> tuple[str, ...]:
    """The absolute paths outside the working directory (which is always mounted), and the targets of links."""
    found = [os.path.abspath(path) for path in paths]
    found += [os.path.realpath(path) for path in found]
    inside = f"{os.getcwd()}{os.sep}"
    return tuple(dict.fromkeys(path for path in found if not path.startswith(inside)))
