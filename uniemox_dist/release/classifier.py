"""A fine-tuned classifier as a folder that timm loads directly.

    OUT/model.safetensors   in timm's names, with the last layer as `head`
    OUT/config.json         timm's local-dir configuration
    OUT/uniemox.json        labels, task, settings, measurements
    OUT/SHA256SUMS
    OUT/uniemox.safetensors with a person branch only: the last layer, over the features of scene and person

Outputs are logits of the labels, then valence, arousal and dominance on EMOTIC's scale of 1 to 10.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from uniemox_dist import __version__
from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.format import FragmentReader, load_fixed
from uniemox_dist.config.finetune import CLASSIFIER, FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import (
    publish_dir,
    read_json,
    remove_dir,
    sha256_file,
    share,
    write_json,
    write_text,
)
from uniemox_dist.models.classifier import (
    Classifier,
    Outputs,
    classifier_arguments,
    make_timm_model,
)
from uniemox_dist.release.preprocessing import timm_preprocessing

FORMAT_VERSION = 1
WEIGHTS, HEAD, FACTS = "model.safetensors", "uniemox.safetensors", "uniemox.json"


def write_classifier(
    out: Path, checkpoint: Checkpoint, config: FinetuneRun, outputs: Outputs, metrics: dict[str, Any]
) -> None:
    """Writes the weights of a checkpoint to `out`. Replaces an existing folder as a whole."""
    classifier = Classifier(config.model, outputs)
    reader = FragmentReader(checkpoint)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(reader.parameter(name))
    load_fixed(classifier, checkpoint)
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write_weights(temporary, classifier, config)
        write_json(temporary / FACTS, _facts(checkpoint, config, outputs, metrics))
        names = sorted(path.name for path in temporary.iterdir())
        for name in names:
            share(temporary / name)
        write_text(temporary / "SHA256SUMS", "".join(f"{sha256_file(temporary / n)}  {n}\n" for n in names))
        if out.exists():
            remove_dir(out)
        publish_dir(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@torch.no_grad()
def _write_weights(folder: Path, classifier: Classifier, config: FinetuneRun) -> None:
    outputs, model = classifier.outputs, config.model
    head = {name: tensor.clone() for name, tensor in classifier.head.state_dict().items()}
    first = len(outputs.labels)
    if outputs.dimensions:  # estimated on -1 … 1
        ones_V = torch.ones(len(outputs.dimensions))
        scale_V = outputs.from_unit(ones_V) - outputs.from_unit(torch.zeros_like(ones_V))
        head["weight"][first:] *= scale_V[:, None]
        head["bias"][first:] = outputs.from_unit(head["bias"][first:])
    whole = make_timm_model(model, outputs.pooling, num_classes=0 if outputs.persons else len(outputs.names))
    weights = dict(classifier.encoder.state_dict())
    if outputs.persons:
        save_file({f"head.{name}": tensor for name, tensor in head.items()}, folder / HEAD)
    else:
        weights |= {f"head.{name}": tensor for name, tensor in head.items()}
    whole.load_state_dict(weights)
    pretrained: Any = whole.pretrained_cfg
    pretrained.update(timm_preprocessing(model, whole.num_classes))
    about: dict[str, Any] = {"model_args": classifier_arguments(model, outputs.pooling)}
    if not outputs.persons:
        about["label_names"] = list(outputs.names)
    save_for_hf(whole, str(folder), model_config=about, safe_serialization=True)


def _facts(
    checkpoint: Checkpoint, config: FinetuneRun, outputs: Outputs, metrics: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": CLASSIFIER,
        "format_version": FORMAT_VERSION,
        "uniemox_dist": __version__,
        "run": config.run.name,
        "step": checkpoint.step,
        "task": outputs.task,
        "target": outputs.target,
        "labels": list(outputs.labels),
        "dimensions": list(outputs.dimensions),
        "dimension_ranges": dict(zip(outputs.dimensions, map(list, outputs.ranges))),
        "persons": outputs.persons,
        "feature": {"mean": "mean of the patches", "token": "class token"}[outputs.pooling],
        "data_identity": checkpoint.info["data_identity"],
        "metrics": metrics,
        "config": config.model_dump(mode="json"),
    }


def read_classifier(folder: str | Path) -> tuple[FinetuneRun, Outputs, dict[str, Any]]:
    """The settings, outputs and further facts of a fine-tuned classifier.

    Raises:
        UserError: if the folder contains no classifier, or one of a newer format.
    """
    path = Path(folder) / FACTS
    if not path.is_file() or (facts := read_json(path)).get("format") != CLASSIFIER:
        raise UserError(
            f"CLASSIFIER={folder}: holds no classifier; give the folder best/ of a run of `uniemox finetune`"
        )
    if facts["format_version"] > FORMAT_VERSION:
        raise UserError(f"CLASSIFIER={folder}: a newer uniemox-dist wrote it; update uniemox-dist")
    config = FinetuneRun.model_validate(facts["config"])
    outputs = Outputs(
        facts["task"],
        tuple(facts["labels"]),
        tuple(facts["dimensions"]),
        facts["persons"],
        config.finetune.pooling,
        target=facts.get("target", "label"),
        ranges=tuple((low, high) for low, high in facts.get("dimension_ranges", {}).values()),
    )
    return config, outputs, facts


def load_classifier(folder: str | Path) -> Classifier:
    """Loads a fine-tuned classifier with its person branch, in eval mode on the CPU. It takes uint8 views and returns
    logits of `outputs.labels` (their softmax is the estimated distribution, if that is the target), followed by values
    of `outputs.dimensions` on the scale of the data.

    Raises:
        UserError: like `read_classifier`.
    """
    config, outputs, _ = read_classifier(folder)
    classifier = Classifier(config.model, outputs)
    weights = load_file(Path(folder) / WEIGHTS)
    head = load_file(Path(folder) / HEAD) if outputs.persons else weights
    classifier.head.load_state_dict({name: head[f"head.{name}"] for name in ("weight", "bias")})
    encoder = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    classifier.encoder.load_state_dict(encoder)
    return classifier.eval()
