"""From a run's sharded checkpoint to a folder that timm loads as it is.

    OUT/model.safetensors    the encoder, in timm's names      OUT/config.json     timm's local-dir configuration
    OUT/uniemox.safetensors  projection, fusion and decoder    OUT/uniemox.json    what it is and where it comes from
    OUT/README.md            the model card                    OUT/SHA256SUMS

Works on one CPU, whatever ZeRO stage and number of ranks wrote the checkpoint, and without deepspeed.
"""

import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor

from uniemox_dist import __version__
from uniemox_dist.checkpoints.files import EMA, FragmentReader, fixed_tensors, load_fixed
from uniemox_dist.checkpoints.folders import Checkpoint, open_checkpoint
from uniemox_dist.config.schema import Config
from uniemox_dist.config.vits import timm_name
from uniemox_dist.models.encoder import encoder_arguments
from uniemox_dist.models.student import Student
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import publish_dir, sha256_file, share, write_json, write_text
from uniemox_dist.runtime.run_folder import read_lines

ENCODER, REST, FACTS = "model.safetensors", "uniemox.safetensors", "uniemox.json"
FORMAT_VERSION = 1
# timm wants the name of an architecture; all that matters is stated in model_args.
TIMM_NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 1024: "vit_large_patch16_224"}


def release(run: Path, out: Path, *, ema: bool = False) -> dict[str, Any]:
    """Writes a release of a run's newest sound checkpoint (or of a checkpoint folder) to `out`.

    Args:
        ema: the encoder's weights are their moving average; projection, fusion and decoder are as they were trained.

    Raises:
        UserError: if the run has no complete checkpoint, or no moving average, or `out` exists.
    """
    if out.exists():
        raise UserError(f"OUT={out}: exists; give another folder or delete it")
    checkpoint = open_checkpoint(run, "RUN")
    if ema and not FragmentReader(checkpoint).has_ema:
        raise UserError(
            f"--ema: {checkpoint.folder} holds no moving average; train with optim.ema_decay=0.999, or leave --ema out"
        )
    student = student_of(checkpoint, ema=ema)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        facts = _write(temporary, checkpoint, student, run, ema)
        _verify(temporary, checkpoint, ema)
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            share(temporary / name)
        write_text(temporary / "SHA256SUMS", "".join(f"{sha256_file(temporary / n)}  {n}\n" for n in names))
        publish_dir(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def student_of(checkpoint: Checkpoint, *, ema: bool = False) -> Student:
    """The student of a checkpoint, in fp32 on the CPU, with all its weights; `ema`: with the encoder's average."""
    config = Config.model_validate(checkpoint.info["config"])
    student = Student(config.model, config.loss, checkpoint.info["embedding_width"])
    reader = FragmentReader(checkpoint)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(reader.parameter(name, _kind(name, ema)))
    load_fixed(student, checkpoint)
    return student.eval()


def _kind(name: str, ema: bool) -> str:
    return EMA if ema and name.startswith("encoder.") else "fp32"


def _write(out: Path, checkpoint: Checkpoint, student: Student, run: Path, ema: bool) -> dict[str, Any]:
    info, config = checkpoint.info, Config.model_validate(checkpoint.info["config"])
    arguments = encoder_arguments(config.model)
    name = TIMM_NAMES.get(config.model.width, "vit_base_patch16_224")
    if config.model.name is not None:
        name = timm_name(config.model.name)
    encoder: Any = timm.create_model(name, num_classes=0, **arguments)
    encoder.load_state_dict(student.encoder.state_dict())
    size = config.model.image_size
    statistics = {
        "input_size": [3, size, size],
        "mean": list(config.model.mean),
        "std": list(config.model.std),
        "interpolation": "bicubic",
        # The whole picture, squashed to a square: how our own evaluation looks at pictures.
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "num_classes": 0,
        # Not those of timm's own weights, whose configuration this one starts from.
        "tag": "",
        "license": None,
    }
    encoder.pretrained_cfg.update(statistics)
    save_for_hf(encoder, str(out), model_config={"model_args": arguments}, safe_serialization=True)
    save_file(_rest(student), out / REST)
    lines = read_lines((run if run.name != checkpoint.folder.name else run.parent.parent) / "metrics.jsonl")
    facts = {
        "format": "uniemox-release",
        "format_version": FORMAT_VERSION,
        "uniemox_dist": __version__,
        "run": config.run.name,
        "step": checkpoint.step,
        "slots": info["slots"],
        "parameters": sum(p.numel() for p in student.encoder.parameters()),
        "weights": "moving average" if ema else "trained",
        "feature": "class token",
        "embedding_width": info["embedding_width"],
        "teacher": info["teacher"],
        "data_identity": info["data_identity"],
        "losses": {k: lines[-1][k] for k in ("loss", "relation", "similarity", "reconstruction")}
        if lines
        else None,
        "config": info["config"],
    }
    write_json(out / FACTS, facts)
    template = (
        resources.files("uniemox_dist").joinpath("release/model_card.md.j2").read_text(encoding="utf-8")
    )
    card = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        template
    )
    write_text(out / "README.md", card.render(facts=facts, model=config.model, config=config))
    return facts


def _rest(student: Student) -> dict[str, Tensor]:
    """What is not the encoder: with it a release can fuse views and reconstruct pictures."""
    return {k: v.contiguous() for k, v in student.state_dict().items() if not k.startswith("encoder.")}


def _verify(out: Path, checkpoint: Checkpoint, ema: bool) -> None:
    """Compares every released tensor with the checkpoint's, as read back from disk."""
    written = {**{f"encoder.{k}": v for k, v in load_file(out / ENCODER).items()}, **load_file(out / REST)}
    reader, fixed = FragmentReader(checkpoint), fixed_tensors(checkpoint)
    for name in (*checkpoint.info["parameters"], *fixed):
        expected = fixed[name] if name in fixed else reader.parameter(name, _kind(name, ema))
        if not torch.equal(written[name], expected):
            raise RuntimeError(f"{out / ENCODER}: {name} differs from {checkpoint.folder}")
