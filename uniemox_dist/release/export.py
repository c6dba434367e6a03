"""From a run's sharded checkpoint to a folder that timm loads as it is.

    OUT/model.safetensors    the encoder, in timm's names      OUT/config.json     timm's local-dir configuration
    OUT/uniemox.safetensors  projection, fusion and decoder    OUT/uniemox.json    what it is and where it comes from
    OUT/README.md            the model card                    OUT/SHA256SUMS      of all other files
    OUT/training_curves.png  of runs with metrics              OUT/encoder.onnx    on request

Works on one CPU, whatever ZeRO stage and number of ranks wrote the checkpoint, and without deepspeed.
"""

import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models._hub import save_config_for_hf

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.format import load_fixed
from uniemox_dist.config.encoder_names import timm_name
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import publish_dir, sha256_file, share, write_json, write_text
from uniemox_dist.models.classifier import TIMM_NAMES
from uniemox_dist.models.encoder import encoder_arguments
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import CARD, CONFIG, FACTS, ONNX, SUMS
from uniemox_dist.release.model_card import card, draw_curves, evaluation_of, facts_of, standing
from uniemox_dist.release.select_checkpoint import choose
from uniemox_dist.release.timm_config import statistics
from uniemox_dist.release.weights import DTYPES, Source, check_names, compare, source_of, write_weights
from uniemox_dist.runs.folder import RunFolder

CURVES = "training_curves.png"


def release(
    run: Path,
    out: Path,
    *,
    step: str = "last",
    ema: bool = False,
    dtype: str = "fp32",
    onnx: bool = False,
    evaluation: Path | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Writes a release of a run's checkpoint (or of a checkpoint folder) to `out`; returns its facts.

    Args:
        step: `last` (the newest sound checkpoint), `best` (see `choose`) or a number.
        ema: the encoder's weights are their moving average; projection, fusion and decoder are as they were trained.
        dtype: number format of all weights: fp32, bf16 or fp16.
        onnx: also writes the encoder as ONNX, compared with torch.
        evaluation: of the protocol, for the model card; otherwise the run's evaluation.json of that step, if any.
        licence: of the weights, for the model card: an identifier of the Hugging Face Hub.

    Raises:
        UserError: if the run has no such checkpoint, or no moving average, or `out` exists.
        Fault: if what was written differs from the checkpoint.
    """
    if out.exists():
        raise UserError(f"OUT={out}: exists; give another folder or delete it")
    checkpoint = choose(run, step)
    if "finetune" in checkpoint.info["config"]:
        raise UserError(
            f"RUN={run}: is a run of fine-tuning, whose best weights lie in {run}/best as timm loads them"
        )
    source = source_of(checkpoint, ema=ema)
    folder = RunFolder(checkpoint.folder.parent.parent)
    found = evaluation_of(folder, evaluation, checkpoint.step)
    weights = "moving average" if ema else "trained"
    facts = facts_of(checkpoint, source, folder, weights=weights, dtype=dtype, licence=licence)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_config(temporary / CONFIG, Config.model_validate(checkpoint.info["config"]), source)
        write_weights(temporary, source, DTYPES[dtype])
        compare(temporary, source, DTYPES[dtype])
        curves = draw_curves(standing(folder), checkpoint.step, temporary / CURVES)
        if onnx:
            from uniemox_dist.release.onnx_file import export_onnx

            facts["onnx"] = export_onnx(temporary, temporary / ONNX)
        write_json(temporary / FACTS, facts)
        write_text(temporary / CARD, card(facts, found, onnx=onnx, curves=curves))
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            share(temporary / name)
        write_text(temporary / SUMS, "".join(f"{sha256_file(temporary / n)}  {n}\n" for n in names))
        publish_dir(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def student_of(checkpoint: Checkpoint, *, ema: bool = False) -> Student:
    """The student of a checkpoint, in fp32 on the CPU, with all its weights; `ema`: with the encoder's average."""
    config = Config.model_validate(checkpoint.info["config"])
    student = Student(config.model, config.loss, checkpoint.info["embedding_width"])
    source = source_of(checkpoint, ema=ema)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(source.read(name))
    load_fixed(student, checkpoint)
    return student.eval()


def _write_config(path: Path, config: Config, source: Source) -> None:
    """timm's config.json, by which `create_model` builds the encoder; its own weights are not kept."""
    arguments = encoder_arguments(config.model)
    name = TIMM_NAMES.get(config.model.width, "vit_base_patch16_224")
    if config.model.name is not None:
        name = timm_name(config.model.name)
    encoder: Any = timm.create_model(name, num_classes=0, **arguments)
    check_names(encoder.state_dict(), source)
    encoder.pretrained_cfg.update(statistics(config.model, 0))
    save_config_for_hf(encoder, str(path), model_config={"model_args": arguments})
