"""A small release of weights that were never trained, for tests of what uses one."""

from pathlib import Path

import torch
from handmade import config_of, write_checkpoint

from uniemox_dist.config.schema import Config
from uniemox_dist.models.student import Student
from uniemox_dist.release.export import release
from uniemox_dist.teacher.model import Teacher

SHAPE = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 1, "heads": 2}
DECODER = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}


def make_release(folder: Path, *, embedding_width: int | None = 12, **loss: float) -> Path:
    config = config_of({**SHAPE, **DECODER}, **loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config.model, config.loss, embedding_width)
    write_checkpoint(folder / "run", student, config, embedding_width)
    release(folder / "run", folder / "out")
    return folder / "out"


def make_taught_release(folder: Path, teacher_folder: Path) -> Path:
    """A release in the space of a teacher."""
    plain = config_of({**SHAPE, **DECODER}).model_dump(mode="json")
    config = Config.model_validate({**plain, "teacher": {"name": f"local-dir:{teacher_folder}"}})
    teacher = Teacher(config.teacher)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        student = Student(config.model, config.loss, teacher.width)
    write_checkpoint(folder / "run", student, config, teacher.width, teacher=teacher.identity)
    release(folder / "run", folder / "out")
    return folder / "out"
