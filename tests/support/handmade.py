"""A complete checkpoint in the documented form, of a student that was never trained, for tests of what reads them."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, step_folder
from uniemox_dist.checkpoints.format import KINDS, copy_fixed_parameters
from uniemox_dist.checkpoints.fragment_index import fragment_key
from uniemox_dist.config.schema import Config, ModelConfig
from uniemox_dist.core.files import sha256_file, write_json
from uniemox_dist.models.student import Student

TINY_STUDENT = ModelConfig(
    image_size=32,
    patch_size=8,
    width=32,
    depth=2,
    heads=2,
    decoder_width=16,
    decoder_depth=1,
    decoder_heads=2,
)


def config_of(model: dict[str, object], **loss: float) -> Config:
    """A whole configuration around a model section."""
    return Config.model_validate(
        {
            "run": {"max_steps": 10},
            "data": {"path": "nowhere"},
            "teacher": {"name": "shipped:demo"},
            "model": model,
            "loss": loss,
        }
    )


def write_checkpoint(
    run: Path,
    student: Student,
    config: Config,
    embedding_width: int | None,
    *,
    parts: int = 2,
    fixed: bool = True,
    step: int = 7,
    teacher: dict[str, object] | None = None,
) -> Path:
    """Writes `student` as a step of a run's folder, cut into `parts`; without `fixed`, as earlier versions did."""
    folder = run / "checkpoints" / step_folder(step)
    folder.mkdir(parents=True)
    trained = {name: p.detach() for name, p in student.named_parameters() if p.requires_grad}
    files = [f"part_{rank:05d}.safetensors" for rank in range(parts)]
    for rank, file in enumerate(files):
        pieces = {}
        for name, p in trained.items():
            length = -(-p.numel() // parts)
            piece = p.flatten()[rank * length : (rank + 1) * length]
            for kind in KINDS if len(piece) else ():
                numbers = piece if kind == "fp32" else torch.zeros_like(piece)
                pieces[fragment_key(name, rank * length, kind)] = numbers.clone()
        save_file(pieces, folder / file)
    if fixed:
        save_file(copy_fixed_parameters(student), folder / FIXED)
        files.append(FIXED)
    facts = {f: {"bytes": (folder / f).stat().st_size, "sha256": sha256_file(folder / f)} for f in files}
    info = {
        "format": "uniemox-checkpoint",
        "format_version": 1,
        "step": step,
        "slots": step * config.batch.global_batch,
        "adam_step": float(step),
        "world_size": parts,
        "zero_stage": 1,
        "precision": "fp32",
        "data_identity": "0" * 64,
        "teacher": teacher,
        "embedding_width": embedding_width,
        "parameters": {name: list(p.shape) for name, p in trained.items()},
        "config": config.model_dump(mode="json"),
        "files": facts,
    }
    write_json(folder / COMPLETE, info)
    return run
