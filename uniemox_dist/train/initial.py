"""What a run begins with: a checkpoint > weights of another model > weights drawn by the seed."""

import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from uniemox_dist.checkpoints.files import load_fixed
from uniemox_dist.checkpoints.folders import Checkpoint, complete_checkpoints, named_checkpoint, set_aside
from uniemox_dist.config.schema import Config
from uniemox_dist.models.init_from import Loaded, load_into
from uniemox_dist.models.student import Student
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.run_folder import RunFolder
from uniemox_dist.runtime.world import World
from uniemox_dist.train import comm

log = logging.getLogger("uniemox")
HASHING = 4
"""Files that a rank hashes at once."""


def choose_checkpoint(world: World, folder: RunFolder, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from: the newest whose files have their hashes. Collective: every rank hashes its share.

    Damaged ones are set aside, and said to be so.

    Raises:
        UserError: if there are checkpoints and all are damaged; or if the one that `resume` names is.
    """
    found: list[Checkpoint] = comm.on_main(world, lambda: _candidates(folder, resume))
    damaged: list[tuple[Checkpoint, str]] = []
    for checkpoint in found:
        problem = _problem(world, checkpoint)
        if problem is None:
            comm.on_main(world, lambda: _put_aside(folder, damaged))
            return checkpoint
        damaged.append((checkpoint, problem))
    if not damaged:
        return None
    others = f" (and so are {len(damaged) - 1} before it)" if len(damaged) > 1 else ""
    text = (
        f"run.dir/run.name={folder.path}: {damaged[0][1]}{others}: no sound checkpoint is left; restore one, or begin "
        "anew with another run.name"
    )
    if resume != "auto":
        text = f"--resume={resume}: {damaged[0][1]}; use another checkpoint"
    raise UserError(text if world.is_main else "")  # said once, not by every rank


def _candidates(folder: RunFolder, resume: str) -> list[Checkpoint]:
    """On rank 0: what could be gone on from, the newest first."""
    if resume == "never":
        if any(folder.checkpoints.glob("step_*")):
            raise UserError(
                f"--resume never: {folder.path} has checkpoints; give another run.name or delete them"
            )
        return []
    if resume == "auto":
        return complete_checkpoints(folder.checkpoints)[::-1]
    return [named_checkpoint(resume, "--resume")]


def _problem(world: World, checkpoint: Checkpoint) -> str | None:
    own = sorted(checkpoint.info["files"])[world.rank :: world.size]
    with ThreadPoolExecutor(HASHING) as pool:  # hashing frees Python's lock
        problems = list(pool.map(lambda name: checkpoint.problem(hashes=True, files=[name]), own))
    mine = next((problem for problem in problems if problem), None) or checkpoint.problem(
        hashes=False, files=[]
    )
    return next((problem for problem in comm.gather_objects(mine, world) if problem), None)


def _put_aside(folder: RunFolder, damaged: list[tuple[Checkpoint, str]]) -> None:
    for checkpoint, problem in damaged:
        try:
            aside: str | None = set_aside(checkpoint).name
        except OSError as error:
            log.warning("%s could not be renamed: %s", checkpoint.folder, error.strerror)
            aside = None
        log.warning("checkpoint not used, and set aside: %s", problem)
        folder.event("fault", error=problem, set_aside=aside)


def make_student(
    config: Config, world: World, device: torch.device, chosen: Checkpoint | None, embedding_width: int | None
) -> tuple[Student, Loaded | None]:
    """The student on the CPU, the same on every rank. A checkpoint gives what is not trained now, and the rest to the
    engine; `model.init_from` is read only without one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = Student(config.model, config.loss, embedding_width)
    path = config.model.init_from
    if chosen is not None:
        comm.on_all(world, lambda: load_fixed(student, chosen))
        return student, None
    if path is None:
        return student, None
    loaded: Loaded = comm.on_main(world, lambda: load_into(student, path))
    comm.give_to_all(student.parameters(), world, device)
    return student, loaded
