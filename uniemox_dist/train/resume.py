"""What a run begins with: a checkpoint > weights of another model > weights drawn by the seed."""

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    UNREADABLE,
    Checkpoint,
    complete_checkpoints,
    named_checkpoint,
    set_aside,
    unreadable,
)
from uniemox_dist.checkpoints.format import load_fixed
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.init_from import InitReport, load_initial_weights
from uniemox_dist.models.student import Student
from uniemox_dist.runs.events import CheckpointSetAside
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")
HASHING = 4
"""Files that a rank hashes at once."""
NEEDED = (
    "slots",
    "adam_step",
    "world_size",
    "zero_stage",
    "precision",
    "data_identity",
    "teacher",
    "embedding_width",
    "parameters",
    "config",
)
"""What a run must know of a checkpoint, besides its files."""


def choose_checkpoint(world: World, folder: RunFolder, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from: the newest whose files have their hashes. Collective: every rank hashes its share.

    Damaged ones are set aside, and said to be so.

    Raises:
        UserError: if there are checkpoints and all are damaged, or a newer version wrote one; or if that which `resume`
            names cannot be gone on from.
        Fault: if a disk does not answer: what cannot be read now may be sound.
    """
    found: list[Checkpoint]
    damaged: list[tuple[Path, str]]
    found, damaged = collectives.on_main(world, lambda: _candidates(folder, resume))
    for checkpoint in found:
        problem = _problem(world, checkpoint)
        if problem is None:
            collectives.on_main(world, lambda: _put_aside(folder, damaged))
            return checkpoint
        if UNREADABLE in problem:
            raise Fault(problem)
        damaged.append((checkpoint.folder, problem))
    if not damaged:
        return None
    others = f" (damaged too: {len(damaged) - 1} more)" if len(damaged) > 1 else ""
    text = (
        f"run.dir/run.name={folder.path}: {damaged[0][1]}{others}: no sound checkpoint is left; restore one, or begin "
        "anew with another run.name"
    )
    if resume != "auto":
        text = f"--resume={resume}: {damaged[0][1]}; use another checkpoint"
    raise UserError(text if world.is_main else "")  # said once, not by every rank


def _candidates(folder: RunFolder, resume: str) -> tuple[list[Checkpoint], list[tuple[Path, str]]]:
    """On rank 0: what could be gone on from, the newest first, and what has the name of a checkpoint and is none."""
    if resume == "never":
        if any(folder.checkpoints.glob("step_*")):
            raise UserError(
                f"--resume never: {folder.path} has checkpoints; give another run.name or delete them"
            )
        return [], []
    own = complete_checkpoints(folder.checkpoints)[::-1]
    if resume != "auto":
        named = named_checkpoint(resume, "--resume")
        here = named.folder.resolve().parent == folder.checkpoints.resolve()
        if not own or (here and named.step == own[0].step):
            return [named], []
        if here:
            raise UserError(
                f"--resume={resume}: the run has newer checkpoints, up to step {own[0].step}; move them away, or give "
                "another run.name, which then begins from this one"
            )
        # What the run began from; by now it has come further, and the same command goes on.
        log.info("--resume %s: the run has checkpoints of its own and goes on from them", resume)
    try:
        none = unreadable(folder.checkpoints)
    except OSError as error:
        raise UserError(
            f"run.dir/run.name={folder.path}: {error.filename} {UNREADABLE}: {error.strerror}"
        ) from None
    if newer := [reason for _, reason in none if "newer uniemox-dist" in reason]:
        raise UserError(f"run.dir/run.name={folder.path}: {newer[0]}; update uniemox-dist")
    return own, none


def _problem(world: World, checkpoint: Checkpoint) -> str | None:
    if lacking := [key for key in NEEDED if key not in checkpoint.info]:
        return f"{checkpoint.folder / COMPLETE} lacks {lacking[0]}"
    own = sorted(checkpoint.info["files"])[world.rank :: world.size]
    with ThreadPoolExecutor(HASHING) as pool:  # hashing frees Python's lock
        problems = list(pool.map(lambda name: checkpoint.problem(hashes=True, files=[name]), own))
    mine = next((problem for problem in problems if problem), None)
    return next((problem for problem in collectives.gather_objects(mine, world) if problem), None)


def _put_aside(folder: RunFolder, damaged: list[tuple[Path, str]]) -> None:
    for path, problem in damaged:
        try:
            aside: str | None = set_aside(path).name
        except OSError as error:
            log.warning("%s could not be renamed: %s", path, error.strerror)
            aside = None
        log.warning("checkpoint not used, and set aside: %s", problem)
        folder.write(CheckpointSetAside(error=problem, set_aside=aside))


def make_student(
    config: Config, world: World, device: torch.device, chosen: Checkpoint | None, embedding_width: int | None
) -> tuple[Student, InitReport | None]:
    """The student on the CPU, the same on every rank. A checkpoint gives what is not trained now, and the rest to the
    engine; `model.init_from` is read only without one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = Student(config.model, config.loss, embedding_width)
    return student, begin_with(student, config, world, device, chosen)


def begin_with(
    student: Student | Classifier,
    config: Config,
    world: World,
    device: torch.device,
    chosen: Checkpoint | None,
) -> InitReport | None:
    """Gives what was made by the seed, on every rank alike, the weights that do not come from it. Collective."""
    path = config.model.init_from
    if chosen is not None:
        collectives.on_all(world, lambda: load_fixed(student, chosen))
        return None
    if path is None:
        return None
    loaded: InitReport = collectives.on_main(world, lambda: load_initial_weights(student, path))
    collectives.give_to_all(student.parameters(), world, device)
    return loaded
