"""A small release of weights that were never trained, for tests of what uses one."""

from pathlib import Path

import torch
from handmade import config_of, write_checkpoint

from uniemox_dist.models.student import Student
from uniemox_dist.release.export import release

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
