"""`uniemox predict`: emotions of pictures with probabilities, by a fine-tuned head or zero-shot by texts of labels.

Shape legend: B pictures, C classes, E width of the teacher's space.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.loader import view_settings
from uniemox_dist.evaluate.subject import ReleaseSubject
from uniemox_dist.evaluate.tasks import TEMPLATES, embed_label_texts
from uniemox_dist.inference.inputs import Batch, Pictures, load_batches
from uniemox_dist.release.classifier import load_classifier, read_classifier
from uniemox_dist.release.format import list_altered
from uniemox_dist.release.load import load_uniemox

TEXTS_FORMAT = "uniemox-texts"


@dataclass(frozen=True)
class LabelTexts:
    """Labels with their vectors in a teacher's space, with which zero-shot prediction needs no teacher."""

    labels: tuple[str, ...]
    vectors_CE: np.ndarray
    logit_scale: float
    teacher_sha256: str


@dataclass(frozen=True)
class Answers:
    """The predictions for a batch of pictures."""

    probabilities_BL: np.ndarray
    """Probability of each label; its share, if a distribution was learned."""
    dimensions_BV: np.ndarray | None = None
    """Values of the dimensions, on the scale of the training data, of a classifier that estimates them."""


@dataclass(frozen=True)
class Predictor:
    """A model that makes predictions for batches of views."""

    labels: tuple[str, ...]
    settings: ViewSettings
    answer: Callable[[Batch], Answers]
    dimensions: tuple[str, ...] = ()


def load_classifier_predictor(folder: Path, device: str = "cpu") -> Predictor:
    """A predictor from a fine-tuned classifier, RUN/best of `uniemox finetune`. It uses the person's crop if the
    classifier was trained with it.

    Raises:
        UserError: if a file was altered or is missing, or a newer version wrote it.
    """
    for name, problem in list_altered(folder):
        raise UserError(f"MODEL={folder}: {name} {problem}; copy it again")
    config, outputs, _ = read_classifier(folder)
    classifier = load_classifier(folder).to(device)
    independent, first = outputs.task == "multi", len(outputs.labels)

    @torch.no_grad()
    def answer(some: Batch) -> Answers:
        person_B3HW = some.person_B3HW.to(device) if outputs.persons else None
        found_BC = classifier(some.scene_B3HW.to(device), person_B3HW)[0]
        logits_BL = found_BC[:, :first]
        probabilities = logits_BL.sigmoid() if independent else logits_BL.softmax(1)
        return Answers(probabilities.cpu().numpy(), found_BC[:, first:].cpu().numpy())

    settings = view_settings(config, with_person=outputs.persons)
    return Predictor(outputs.labels, replace(settings, person_grid=0), answer, outputs.dimensions)


def load_zeroshot_predictor(release: Path, texts: LabelTexts, device: str = "cpu") -> Predictor:
    """A zero-shot predictor: the softmax of similarities to texts, at the teacher's logit scale.

    Raises:
        UserError: if the texts are another teacher's, or the release has no fused space.
    """
    model = load_uniemox(release, verify=True, device=device)
    teacher = model.facts["teacher"]
    if teacher is None or not model.has_space:
        raise UserError(
            f"MODEL={release}: was trained without a teacher and cannot be compared with texts; give a classifier, "
            "or another release"
        )
    if teacher["weights_sha256"] != texts.teacher_sha256:
        raise UserError(
            f"--texts: are of another teacher than that of {release} ({teacher['name']}); write them with --save-texts"
        )

    def answer(some: Batch) -> Answers:
        gamma = model.embed_views(some.scene_B3HW.to(device), some.person_B3HW.to(device)).cpu().numpy()
        logits = texts.logit_scale * gamma @ texts.vectors_CE.T
        grown = np.exp(logits - logits.max(1, keepdims=True))
        return Answers(grown / grown.sum(1, keepdims=True))

    settings = view_settings(Config.model_validate(model.facts["config"]))
    return Predictor(texts.labels, settings, answer)


def predict(
    predictor: Predictor, pictures: Pictures, *, batch: int = 32, workers: int = 0
) -> Iterator[dict[str, Any]]:
    """Yields a line for each picture, in order: `picture`; `label` and `probabilities` by label, highest first, of a
    classifier with labels; `dimensions` of a classifier that estimates them. Or `picture` and `error`."""
    with tqdm(total=len(pictures), desc="predicting", unit=" pictures", disable=None) as bar:
        for some in load_batches(pictures, predictor.settings, batch=batch, workers=workers):
            answers = predictor.answer(some)
            for i, (name, error) in enumerate(zip(some.names, some.errors)):
                yield (
                    {"picture": name, "error": error}
                    if error is not None
                    else _line(predictor, name, answers, i)
                )
            bar.update(len(some.names))


def _line(predictor: Predictor, name: str, answers: Answers, number: int) -> dict[str, Any]:
    row = answers.probabilities_BL[number]
    order = np.argsort(-row, kind="stable")
    line: dict[str, Any] = {"picture": name}
    if predictor.labels:
        found = {predictor.labels[i]: round(float(row[i]), 6) for i in order}
        line |= {"label": predictor.labels[order[0]], "probabilities": found}
    if predictor.dimensions and answers.dimensions_BV is not None:
        values = answers.dimensions_BV[number]
        line["dimensions"] = {d: round(float(x), 4) for d, x in zip(predictor.dimensions, values)}
    return line


def format_json(line: dict[str, Any], top: int | None) -> str:
    """One line of JSON; `top` limits it to the labels with the highest probabilities."""
    if top is not None and "probabilities" in line:
        line = {**line, "probabilities": dict(list(line["probabilities"].items())[:top])}
    return json.dumps(line, ensure_ascii=False)


def format_csv(line: dict[str, Any] | None, predictor: Predictor) -> str:
    """Formats a line of CSV: picture, label, a column for each label and dimension, error. Without a line, returns the
    header."""
    labels, dimensions = predictor.labels, predictor.dimensions
    out = io.StringIO()
    if line is None:
        row: list[Any] = ["picture", "label", *labels, *dimensions, "error"]
    else:
        found = {**line.get("probabilities", {}), **line.get("dimensions", {})}
        cells = [found.get(name, "") for name in (*labels, *dimensions)]
        row = [line["picture"], line.get("label", ""), *cells, line.get("error", "")]
    csv.writer(out, lineterminator="").writerow(row)
    return out.getvalue()


def embed_labels(
    release: Path, labels: Sequence[str], templates: Sequence[str] = (), teacher_name: str | None = None
) -> LabelTexts:
    """Embeds labels by a release's teacher; see `embed_label_texts`.

    Raises:
        UserError: for fewer than two labels, templates without {}, or a teacher that is not the release's.
    """
    subject = ReleaseSubject(release, teacher_name=teacher_name, with_teacher=True)
    assert subject.teacher is not None
    vectors = embed_label_texts(subject.teacher, labels, templates or TEMPLATES)
    identity = subject.teacher.identity["weights_sha256"]
    return LabelTexts(tuple(labels), vectors, subject.teacher.logit_scale, identity)


def save_texts(texts: LabelTexts, path: Path) -> None:
    """Writes a safetensors file with one tensor, `texts` (C×E, unit rows); its metadata hold the labels, the teacher's
    hash and its logit scale."""
    about = {
        "format": TEXTS_FORMAT,
        "labels": json.dumps(list(texts.labels), ensure_ascii=False),
        "logit_scale": repr(texts.logit_scale),
        "teacher_sha256": texts.teacher_sha256,
    }
    tensor = torch.from_numpy(np.ascontiguousarray(texts.vectors_CE, np.float32))
    with atomic_path(path) as temporary:
        save_file({"texts": tensor}, temporary, metadata=about)


def load_texts(path: Path) -> LabelTexts:
    """Reads a file that `save_texts` wrote.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != TEXTS_FORMAT:
                raise ValueError(f"its format is {about.get('format')}")
            vectors = file.get_tensor("texts").numpy()
            labels = tuple(json.loads(about["labels"]))
            if vectors.ndim != 2 or len(vectors) != len(labels):
                raise ValueError("it has another number of labels than of texts")
            return LabelTexts(labels, vectors, float(about["logit_scale"]), about["teacher_sha256"])
    except FileNotFoundError:
        raise UserError(
            f"--texts={path}: no such file; write it with `uniemox predict … --save-texts`"
        ) from None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(
            f"--texts={path}: is not a file of label texts ({error}); write it with `uniemox predict … --save-texts`"
        ) from None
