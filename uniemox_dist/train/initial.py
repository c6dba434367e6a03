"""What a run begins with: a checkpoint > weights of another model > weights drawn by the seed."""

import logging

import torch

from uniemox_dist.checkpoints.files import load_fixed
from uniemox_dist.checkpoints.folders import Checkpoint, newest_sound, open_checkpoint
from uniemox_dist.config.schema import Config
from uniemox_dist.models.init_from import Loaded, load_into
from uniemox_dist.models.student import Student
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.run_folder import RunFolder
from uniemox_dist.runtime.world import World
from uniemox_dist.train import comm

log = logging.getLogger("uniemox")


def choose_checkpoint(folder: RunFolder, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from; on rank 0 alone, since hashing them takes its time."""
    if resume == "never":
        if any(folder.checkpoints.glob("step_*")):
            raise UserError(
                f"--resume never: {folder.path} has checkpoints; give another run.name or delete them"
            )
        return None
    if resume != "auto":
        return open_checkpoint(resume, "--resume")
    chosen, problems = newest_sound(folder.checkpoints)
    for problem in problems:
        log.warning("checkpoint not used: %s", problem)
        folder.event("fault", error=problem)
    return chosen


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
