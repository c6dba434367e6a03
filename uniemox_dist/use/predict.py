"""Pictures to emotions with probabilities: by a fine-tuned head, or zero-shot by texts of labels.

Shape legend: B pictures, C classes, E width of the teacher's space.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from tqdm import tqdm

from uniemox_dist.config.schema import Config
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.loader import view_settings
from uniemox_dist.models.patches import normalise
from uniemox_dist.release.checks import FACTS
from uniemox_dist.release.classifier import load_classifier
from uniemox_dist.release.load import load_uniemox
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json
from uniemox_dist.use.pictures import Batch, Pictures, batches
from uniemox_dist.use.texts import LabelTexts

CLASSIFIER = "uniemox-classifier"


@dataclass(frozen=True)
class Predictor:
    """What gives probabilities, B×C, of views."""

    labels: tuple[str, ...]
    settings: ViewSettings
    probabilities: Callable[[Batch], np.ndarray]
    independent: bool = False
    """Each label by itself (several may hold), not one of all."""


def is_classifier(folder: Path) -> bool:
    """Whether a folder holds a fine-tuned classifier."""
    try:
        return bool(read_json(folder / FACTS).get("format") == CLASSIFIER)
    except (OSError, ValueError, AttributeError):
        return False


def by_head(folder: Path, device: str = "cpu") -> Predictor:
    """A fine-tuned classifier in timm's local-dir layout.

    Raises:
        UserError: if it names other labels than it has outputs, or timm cannot build it.
    """
    facts = read_json(folder / FACTS)
    labels, independent = tuple(facts["labels"]), facts.get("task") == "multi"
    if facts.get("persons"):
        return _by_both(folder, device)
    try:
        model: Any = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(device)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"MODEL={folder}: timm {timm.__version__} cannot build it ({reason})") from None
    # Valence, arousal and dominance, where it knows them, stand behind the labels.
    if model.num_classes != len(labels) + len(facts.get("dimensions", ())):
        raise UserError(
            f"MODEL={folder}: has {model.num_classes} outputs and names {len(labels)} labels; copy it again"
        )
    cfg = model.pretrained_cfg
    settings = ViewSettings(image_size=cfg["input_size"][-1], person="largest")

    @torch.no_grad()
    def probabilities(some: Batch) -> np.ndarray:
        pixels = normalise(some.scene_B3HW.to(device), tuple(cfg["mean"]), tuple(cfg["std"]), torch.float32)
        logits = model(pixels).float()[:, : len(labels)]
        found: np.ndarray = (logits.sigmoid() if independent else logits.softmax(1)).cpu().numpy()
        return found

    return Predictor(labels, settings, probabilities, independent)


def _by_both(folder: Path, device: str) -> Predictor:
    """A classifier that looks at scene and person; the whole picture stands for a person that is not known."""
    classifier = load_classifier(folder).to(device)
    outputs, size = classifier.outputs, classifier.model.image_size
    independent = outputs.task == "multi"

    @torch.no_grad()
    def probabilities(some: Batch) -> np.ndarray:
        answers, _ = classifier(some.scene_B3HW.to(device), some.person_B3HW.to(device))
        logits = answers[:, : len(outputs.labels)]
        found: np.ndarray = (logits.sigmoid() if independent else logits.softmax(1)).cpu().numpy()
        return found

    return Predictor(
        outputs.labels, ViewSettings(image_size=size, person="largest"), probabilities, independent
    )


def by_texts(release: Path, texts: LabelTexts, device: str = "cpu") -> Predictor:
    """Zero-shot: the softmax of similarities to texts at the teacher's own logit scale.

    Raises:
        UserError: if the texts are another teacher's, or the release has no fused space.
    """
    model = load_uniemox(release, verify=True, device=device)
    teacher = model.facts["teacher"]
    if teacher is None or not model.has_space:
        raise UserError(f"MODEL={release}: was trained without a teacher: texts are in no space of its")
    if teacher["weights_sha256"] != texts.teacher_sha256:
        raise UserError(f"--texts: are of another teacher than that of {release} ({teacher['name']})")

    def probabilities(some: Batch) -> np.ndarray:
        gamma = model.embed_views(some.scene_B3HW.to(device), some.person_B3HW.to(device)).cpu().numpy()
        logits = texts.logit_scale * gamma @ texts.vectors_CE.T
        grown = np.exp(logits - logits.max(1, keepdims=True))
        found: np.ndarray = grown / grown.sum(1, keepdims=True)
        return found

    settings = view_settings(Config.model_validate(model.facts["config"]))
    return Predictor(texts.labels, settings, probabilities)


def predict(
    predictor: Predictor, pictures: Pictures, *, batch: int = 32, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """A line for each picture, in their order: `picture` and `probabilities` by label, highest first, or `error`."""
    with tqdm(total=len(pictures), desc="predicting", unit=" pictures", disable=None) as bar:
        for some in batches(pictures, predictor.settings, batch=batch, workers=workers):
            rows = predictor.probabilities(some)
            for name, row, error in zip(some.names, rows, some.errors):
                if error is not None:
                    yield {"picture": name, "error": error}
                    continue
                order = np.argsort(-row, kind="stable")
                found = {predictor.labels[i]: round(float(row[i]), 6) for i in order}
                yield {"picture": name, "label": predictor.labels[order[0]], "probabilities": found}
            bar.update(len(some.names))


def as_json(line: dict[str, Any], top: int | None) -> str:
    """One line of JSON; with `top` the highest labels only."""
    if top is not None and "probabilities" in line:
        line = {**line, "probabilities": dict(list(line["probabilities"].items())[:top])}
    return json.dumps(line, ensure_ascii=False)


def as_csv(line: dict[str, Any] | None, labels: Sequence[str]) -> str:
    """One line of CSV: picture, label, a column for each label, error. Without a line, the header."""
    out = io.StringIO()
    if line is None:
        row: list[Any] = ["picture", "label", *labels, "error"]
    else:
        found = line.get("probabilities", {})
        row = [
            line["picture"],
            line.get("label", ""),
            *(found.get(x, "") for x in labels),
            line.get("error", ""),
        ]
    csv.writer(out, lineterminator="").writerow(row)
    return out.getvalue()
