"""`uniemox release`: writes a run's sharded checkpoint as a folder that timm loads directly.

    OUT/model.safetensors    the encoder, in timm's names      OUT/config.json     timm's local-dir configuration
    OUT/uniemox.safetensors  projection, fusion and decoder    OUT/uniemox.json    description and origin
    OUT/README.md            the model card                    OUT/SHA256SUMS      of all other files
    OUT/training_curves.png  of runs with metrics              OUT/encoder.onnx    on request

This needs one CPU and no deepspeed, for checkpoints of any ZeRO stage and number of ranks.
"""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models._hub import save_config_for_hf

from uniemox_dist.checkpoints.folders import (
    COMPLETE,
    Checkpoint,
    list_complete_checkpoints,
    open_checkpoint,
    step_folder,
)
from uniemox_dist.checkpoints.format import load_fixed
from uniemox_dist.config.encoder_names import timm_name
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError, missing_extra
from uniemox_dist.core.files import publish_dir, sha256_file, share, write_json, write_text
from uniemox_dist.models.classifier import TIMM_NAMES
from uniemox_dist.models.encoder import encoder_arguments
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import CARD, CONFIG, FACTS, ONNX, SUMS, check_run
from uniemox_dist.release.model_card import (
    collect_facts,
    draw_curves,
    find_evaluation,
    read_valid_metrics,
    render_card,
)
from uniemox_dist.release.preprocessing import timm_preprocessing
from uniemox_dist.release.weights import (
    DTYPES,
    Source,
    check_names,
    compare,
    open_source,
    read_config,
    write_weights,
)
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import column, read_metrics

CURVES = "training_curves.png"
ONNX_AGREES = 1e-3
"""Largest difference of a feature between onnxruntime and torch, in standard deviations of the features."""
ONNX_BATCHES = (1, 3)


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
    overlap: Path | None = None,
) -> dict[str, Any]:
    """Writes a release of a run's checkpoint (or of a checkpoint folder) to `out`. Returns its facts.

    Args:
        step: `last` (the newest intact checkpoint), `best` (see `select_checkpoint`) or a number.
        ema: release the moving average of the encoder's weights; projection, fusion and decoder stay as trained.
        dtype: number format of all weights: fp32, bf16 or fp16.
        onnx: also writes the encoder as ONNX, compared with torch.
        evaluation: result of the protocol for the model card; by default the run's evaluation.json of that step.
        licence: licence of the weights for the model card, an identifier of the Hugging Face Hub.
        overlap: file of `shards overlap` with the training data and benchmarks, for the model card.

    Raises:
        UserError: if the run has no such checkpoint, or no moving average, or `out` exists.
        Fault: if a written tensor differs from the checkpoint.
    """
    if out.exists():
        raise UserError(f"OUT={out}: exists; give another folder or delete it")
    check_run(run)
    checkpoint = select_checkpoint(run, step)
    source = open_source(checkpoint, ema=ema)
    folder = RunFolder(checkpoint.folder.parent.parent)
    found = find_evaluation(folder, evaluation, checkpoint.step)
    weights = "moving average" if ema else "trained"
    facts = collect_facts(
        checkpoint, source, folder, weights=weights, dtype=dtype, licence=licence, overlap=overlap
    )
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_config(temporary / CONFIG, read_config(checkpoint), source)
        write_weights(temporary, source, DTYPES[dtype])
        compare(temporary, source, DTYPES[dtype])
        curves = draw_curves(read_valid_metrics(folder), checkpoint.step, temporary / CURVES)
        if onnx:
            facts["onnx"] = export_onnx(temporary, temporary / ONNX)
        write_json(temporary / FACTS, facts)
        write_text(temporary / CARD, render_card(facts, found, onnx=onnx, curves=curves))
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            share(temporary / name)
        write_text(temporary / SUMS, "".join(f"{sha256_file(temporary / n)}  {n}\n" for n in names))
        publish_dir(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return facts


def load_student(checkpoint: Checkpoint, *, ema: bool = False) -> Student:
    """The student of a checkpoint in fp32 on the CPU; with `ema` its encoder has the moving average."""
    config = read_config(checkpoint)
    student = Student(config.model, config.loss, checkpoint.info["embedding_width"])
    source = open_source(checkpoint, ema=ema)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(source.read(name))
    load_fixed(student, checkpoint)
    return student.eval()


def _write_config(path: Path, config: Config, source: Source) -> None:
    """Writes timm's config.json, from which `create_model` builds the encoder."""
    arguments = encoder_arguments(config.model)
    name = TIMM_NAMES.get(config.model.width, "vit_base_patch16_224")
    if config.model.name is not None:
        name = timm_name(config.model.name)
    encoder: Any = timm.create_model(name, num_classes=0, **arguments)
    check_names(encoder.state_dict(), source)
    encoder.pretrained_cfg.update(timm_preprocessing(config.model, 0))
    save_config_for_hf(encoder, str(path), model_config={"model_args": arguments})


def export_onnx(release: Path, path: Path) -> dict[str, Any]:
    """Writes the encoder of a release folder (config.json and model.safetensors) as one ONNX file and compares it with
    torch. Input `pixels` is B×3×size×size, normalised; output `features` is B×D; B is free. Returns facts for
    uniemox.json.

    Raises:
        UserError: if the extra `onnx` is not installed.
        Fault: if onnxruntime's features differ from torch's.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise missing_extra(error.name or "onnx", "onnx") from None
    encoder: Any = timm.create_model(f"local-dir:{release}", pretrained=True, num_classes=0).eval().float()
    size = encoder.pretrained_cfg["input_size"][-1]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn((max(ONNX_BATCHES), 3, size, size), generator=generator)
    with torch.no_grad():
        program = torch.onnx.export(
            encoder,
            (pixels[:2],),
            input_names=["pixels"],
            output_names=["features"],
            dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1)}},
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(path), external_data=False)
        expected = encoder(pixels).numpy()
    onnx.checker.check_model(str(path))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in ONNX_BATCHES:
        found = session.run(["features"], {"pixels": pixels[:batch].numpy()})[0]
        worst = max(worst, float(np.abs(found - expected[:batch]).max() / expected.std()))
    if not worst < ONNX_AGREES:
        raise Fault(
            f"{path.name}: onnxruntime's features differ from torch's by {worst:.2g} standard deviations (at most "
            f"{ONNX_AGREES:g}); release without --onnx"
        )
    opset = max(entry.version for entry in onnx.load(str(path), load_external_data=False).opset_import)
    return {"opset": opset, "differs_by": round(worst, 8), "onnxruntime": onnxruntime.__version__}


def select_checkpoint(run: Path, step: str) -> Checkpoint:
    """The checkpoint of a run (or of a checkpoint's own folder) by `step`: `last` is the newest intact one, `best` the
    one with the lowest recent loss; otherwise it is a number. Its hashes are checked.

    The recent loss is the mean over metrics.jsonl of the `run.save_every` steps before the checkpoint, without skipped
    steps. Of equal checkpoints the newest is the best.

    Raises:
        UserError: if there is no such checkpoint, it is damaged, or the run has no losses to choose by.
    """
    if step == "last":
        return open_checkpoint(run, "RUN")
    if (run / COMPLETE).is_file():
        raise UserError(
            f"--step={step}: RUN={run} is one checkpoint; give its run's folder, or leave --step out"
        )
    there = list_complete_checkpoints(run / "checkpoints")
    if not there:
        return open_checkpoint(run, "RUN")  # raises the error
    if step == "best":
        return open_checkpoint(_best_checkpoint(run, there).folder, "RUN")
    if step.isascii() and step.isdigit() and int(step) in {c.step for c in there}:
        return open_checkpoint(run / "checkpoints" / step_folder(int(step)), "RUN")
    known = [f"{c.step}" for c in there]
    shown = ", ".join(known if len(known) <= 8 else [*known[:3], "…", *known[-3:]])
    raise UserError(f"--step={step}: RUN={run} has no such checkpoint; it has {shown} (or give last or best)")


def mean_loss(steps: np.ndarray, losses: np.ndarray, step: int, window: int) -> float:
    """The mean of the finite losses in the `window` steps up to `step`; infinite if there is none."""
    recent = losses[(steps > step - window) & (steps <= step)]
    finite = recent[np.isfinite(recent)].tolist()
    return sum(finite) / len(finite) if finite else math.inf


def _save_every(checkpoint: Checkpoint) -> int:
    """The number of steps between saves; 1 if complete.json lacks it, because it was damaged."""
    steps = checkpoint.info.get("config", {}).get("run", {}).get("save_every")
    return steps if isinstance(steps, int) else 1


def _best_checkpoint(run: Path, there: Sequence[Checkpoint]) -> Checkpoint:
    folder = RunFolder(run)
    past = History(read_metrics(folder.metrics), read_lines(folder.events))
    steps, losses = (np.asarray(column(past.lines, key)) for key in ("step", "loss"))
    taken = ~np.isin(steps, past.skips)
    steps, losses = steps[taken], losses[taken]
    window = max(1, *(_save_every(c) for c in there))
    means = {c.step: mean_loss(steps, losses, c.step, window) for c in there}
    if not any(map(math.isfinite, means.values())):
        raise UserError(
            f"--step=best: {folder.metrics} has no finite losses; give --step last or a step's number"
        )
    return min(reversed(there), key=lambda checkpoint: means[checkpoint.step])
