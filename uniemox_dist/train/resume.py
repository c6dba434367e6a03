"""Chooses the checkpoint that a run resumes, and loads the weights of a new run."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import torch

from uniemox_dist.checkpoints.folders import (
    UNREADABLE,
    Checkpoint,
    find_checkpoint,
    list_complete_checkpoints,
    list_unreadable,
    set_aside,
)
from uniemox_dist.checkpoints.format import load_fixed, own_files
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.init_from import InitReport, load_initial_weights
from uniemox_dist.models.student import Student
from uniemox_dist.runs.events.training import CheckpointSetAside
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")
HASH_THREADS = 4
"""Files that a rank hashes at the same time."""
KEPT_SHARE = 1 / 16
"""Share of the node's available memory that files may take which a rank keeps from hashing to loading. With more, or
with many ranks on a node, it reads them again."""


def choose_checkpoint(world: World, folder: RunFolder, resume: str) -> Checkpoint | None:
    """The checkpoint to resume: the newest whose files match their hashes. Collective: every rank reads and hashes its
    share of the files, and keeps it in memory until the engine loads it.

    Damaged checkpoints are renamed, and reported.

    Raises:
        UserError: if there are checkpoints and all are damaged, or a newer version wrote one; or if the checkpoint that
            `resume` names cannot be resumed.
        Fault: if a disk does not answer, because its files may be intact.
    """
    found: list[Checkpoint] = []  # on rank 0; the others need the one that is examined

    def find() -> tuple[int, list[tuple[Path, str]]]:
        candidates, unreadable_ones = _candidates(folder, resume)
        found.extend(candidates)
        return len(found), unreadable_ones

    count, damaged = collectives.on_main(world, find)
    for number in range(count):
        checkpoint: Checkpoint = collectives.on_main(world, lambda number=number: found[number])  # type: ignore[misc]
        problem = _find_damage(world, checkpoint)
        if problem is None:
            collectives.on_main(world, lambda: _set_aside_damaged(folder, damaged))
            return checkpoint
        if UNREADABLE in problem:
            raise Fault(problem)
        damaged.append((checkpoint.folder, problem))
    if not damaged:
        return None
    others = f" (damaged too: {len(damaged) - 1} more)" if len(damaged) > 1 else ""
    text = (
        f"run.dir/run.name={folder.path}: {damaged[0][1]}{others}: no intact checkpoint is left; restore one, or start "
        "a new run with another run.name"
    )
    if resume != "auto":
        text = f"--resume={resume}: {damaged[0][1]}; use another checkpoint"
    raise UserError(text if world.is_main else "")  # one rank reports it


def _candidates(folder: RunFolder, resume: str) -> tuple[list[Checkpoint], list[tuple[Path, str]]]:
    """On rank 0: the checkpoints that could be resumed, newest first, and folders with the name of a checkpoint that
    do not contain one."""
    if resume == "never":
        if any(folder.checkpoints.glob("step_*")):
            raise UserError(
                f"--resume never: {folder.path} has checkpoints; give another run.name or delete them"
            )
        return [], []
    own = list_complete_checkpoints(folder.checkpoints)[::-1]
    if resume != "auto":
        named = find_checkpoint(resume, "--resume")
        here = named.folder.resolve().parent == folder.checkpoints.resolve()
        if not own or (here and named.step == own[0].step):
            return [named], []
        if here:
            raise UserError(
                f"--resume={resume}: the run has newer checkpoints, up to step {own[0].step}; move them away, or give "
                "another run.name, which then starts from this one"
            )
        # The checkpoint that the run started from; the same command now resumes the run itself.
        log.info("--resume %s: the run has checkpoints of its own and resumes them", resume)
    try:
        none = list_unreadable(folder.checkpoints)
    except OSError as error:
        raise UserError(
            f"run.dir/run.name={folder.path}: {error.filename} {UNREADABLE}: {error.strerror}"
        ) from None
    if newer := [reason for _, reason in none if "newer uniemox-dist" in reason]:
        raise UserError(f"run.dir/run.name={folder.path}: {newer[0]}; update uniemox-dist")
    return own, none


def _find_damage(world: World, checkpoint: Checkpoint) -> str | None:
    if (problem := checkpoint.own_problem()) is not None:
        return problem
    own = own_files(checkpoint, world.rank, world.size)
    size = sum(checkpoint.info["files"][name]["bytes"] for name in own)
    keep = size <= psutil.virtual_memory().available * KEPT_SHARE
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing releases the GIL
        problems = list(pool.map(lambda name: checkpoint.problem(hashes=True, files=[name], keep=keep), own))
    everyone = collectives.gather_on_main(next((problem for problem in problems if problem), None), world)
    return collectives.on_main(world, lambda: next((problem for problem in everyone if problem), None))


def _set_aside_damaged(folder: RunFolder, damaged: list[tuple[Path, str]]) -> None:
    for path, problem in damaged:
        try:
            aside: str | None = set_aside(path).name
        except OSError as error:
            log.warning("%s could not be renamed: %s", path, error.strerror)
            aside = None
        log.warning("skipped a damaged checkpoint and renamed it: %s", problem)
        folder.write(CheckpointSetAside(error=problem, set_aside=aside))


def initialise_weights(
    module: Student | Classifier,
    config: Config,
    world: World,
    device: torch.device,
    checkpoint: Checkpoint | None,
) -> InitReport | None:
    """Loads the weights that do not come from the seed into a module on the CPU. Collective.

    From a checkpoint it loads only the parameters that are not trained, because the engine loads the others. In a new
    run it loads the weights of `model.init_from` and returns the report about them.
    """
    path = config.model.init_from
    if checkpoint is not None:
        collectives.on_main(world, lambda: load_fixed(module, checkpoint))
        collectives.give_to_all((p for p in module.parameters() if not p.requires_grad), world, device)
        return None
    if path is None:
        return None
    loaded: InitReport = collectives.on_main(world, lambda: load_initial_weights(module, path))
    collectives.give_to_all(module.parameters(), world, device)
    return loaded
