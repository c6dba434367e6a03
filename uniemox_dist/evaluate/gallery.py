"""Held-out pictures as a release sees them, for people: a map, nearest neighbours, answers right and wrong, attention.

The result is one JSON, pictures included, which the report of a run shows.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from uniemox_dist.data.evaluation_batches import evaluation_batches
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate.attention import class_attention
from uniemox_dist.evaluate.features import unit
from uniemox_dist.evaluate.tasks import TEMPLATES
from uniemox_dist.evaluate.vectors import Subject

FORMAT, FORMAT_VERSION = "uniemox-gallery", 1
MOST, NEIGHBOURS_OF, NEIGHBOURS, ANSWERS, LOOKS = 400, 10, 6, 8, 6
THUMB, LOOK = 64, 128
BATCH = 64


def gallery(
    release: Path, data: str, *, teacher_name: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Looks at up to 400 pictures of a data set, evenly over it.

    Raises:
        UserError: as `Subject`, or for data that are not there.
    """
    reader = ShardReader.from_folder(data, "DATA")
    with_teacher = _has_teacher(release)
    subject = Subject(release, (), teacher_name=teacher_name, with_teacher=with_teacher, device=device)
    total = reader.manifest.samples
    chosen = set(np.linspace(0, total - 1, min(MOST, total)).round().astype(int).tolist())
    scenes: list[Tensor] = []
    persons: list[Tensor] = []
    records: list[dict[str, Any]] = []
    for batch in evaluation_batches(reader, subject.settings, batch=BATCH):
        keep = [i for i, number in enumerate(batch.numbers) if number in chosen]
        scenes.append(batch.scene_B3HW[keep])
        persons.append(batch.person_B3HW[keep])
        records += [batch.records[i] for i in keep]
    scene, person = torch.cat(scenes), torch.cat(persons)
    features, fused = _embed(subject, scene, person)
    labels = [record["label"] for record in records]
    at = projected(features)
    pictures = [
        {
            "key": record["key"],
            "label": record["label"],
            "caption": (record["captions"] or [""])[0],
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "picture": thumbnail(view, THUMB),
        }
        for record, view, (x, y) in zip(records, scene, at)
    ]
    found: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "release": str(release),
        "step": subject.facts["step"],
        "data": {"path": str(reader.folder), "identity": reader.manifest.identity, "samples": total},
        "pictures": pictures,
        "neighbours": neighbours(features),
        "attention": _looks(subject, scene, person),
        "zeroshot": None,
    }
    names = sorted({label for label in labels if label})
    if subject.teacher is not None and fused is not None and len(names) > 1:
        words = [name.replace("-", " ").replace("_", " ") for name in names]
        texts = [subject.teacher.embed_texts([t.format(w) for w in words]).cpu().numpy() for t in TEMPLATES]
        logits = subject.teacher.logit_scale * fused @ unit(np.mean([unit(t) for t in texts], axis=0)).T
        found["zeroshot"] = answers(logits, labels, names)
    return found


def projected(features_nD: np.ndarray) -> np.ndarray:
    """The first two principal components of unit rows, each brought to 0…1: n×2."""
    rows = unit(features_nD)
    centred = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    at = centred @ directions[:2].T
    if at.shape[1] < 2:
        at = np.pad(at, ((0, 0), (0, 2 - at.shape[1])))
    low, high = at.min(0), at.max(0)
    found: np.ndarray = (at - low) / np.maximum(high - low, 1e-12)
    return found


def neighbours(features_nD: np.ndarray) -> list[dict[str, Any]]:
    """Of ten pictures, evenly over all, the nearest others by cosine."""
    rows = unit(features_nD)
    found = []
    for number in np.linspace(0, len(rows) - 1, min(NEIGHBOURS_OF, len(rows))).round().astype(int):
        cosine = rows @ rows[number]
        cosine[number] = -np.inf
        order = np.argsort(-cosine)[: min(NEIGHBOURS, len(rows) - 1)]
        nearest = [{"picture": int(i), "cosine": round(float(cosine[i]), 4)} for i in order]
        found.append({"picture": int(number), "nearest": nearest})
    return found


def answers(logits_nC: np.ndarray, labels: list[str | None], names: list[str]) -> dict[str, Any]:
    """The surest right and the surest wrong zero-shot answers, with probabilities."""
    grown = np.exp(logits_nC - logits_nC.max(1, keepdims=True))
    shares = grown / grown.sum(1, keepdims=True)
    best = shares.argmax(1)
    known = [i for i, label in enumerate(labels) if label]
    right = [i for i in known if names[best[i]] == labels[i]]
    wrong = [i for i in known if names[best[i]] != labels[i]]

    def some(numbers: list[int]) -> list[dict[str, Any]]:
        order = sorted(numbers, key=lambda i: -shares[i].max())[:ANSWERS]
        return [
            {"picture": i, "answer": names[best[i]], "probability": round(float(shares[i].max()), 4)}
            for i in order
        ]

    accuracy = len(right) / len(known) if known else 0.0
    return {"labels": names, "accuracy": round(accuracy, 4), "right": some(right), "wrong": some(wrong)}


def thumbnail(view_3HW: Tensor, side: int) -> str:
    """A view as a small JPEG, base64."""
    picture = Image.fromarray(view_3HW.permute(1, 2, 0).contiguous().numpy())
    out = io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()


def heat(view_3HW: Tensor, share_SS: Tensor) -> str:
    """A view under its attention, as a small JPEG, base64: bright where the class token looks."""
    picture = Image.fromarray(view_3HW.permute(1, 2, 0).contiguous().numpy()).resize((LOOK, LOOK))
    share = (share_SS / share_SS.max().clamp(min=1e-12)).cpu().numpy()
    grown = Image.fromarray((255 * share).astype(np.uint8)).resize((LOOK, LOOK), Image.Resampling.BICUBIC)
    colours = Image.fromarray(
        (255 * colormaps["inferno"](np.asarray(grown) / 255.0)[..., :3]).astype(np.uint8)
    )
    out = io.BytesIO()
    Image.blend(picture, colours, 0.62).save(out, "JPEG", quality=82)
    return base64.b64encode(out.getvalue()).decode()


def _embed(subject: Subject, scene: Tensor, person: Tensor) -> tuple[np.ndarray, np.ndarray | None]:
    features, fused = [], []
    for some, other in zip(scene.split(BATCH), person.split(BATCH)):
        cls, gamma = subject.student.embed(some.to(subject.device), other.to(subject.device))
        features.append(cls.float().cpu().numpy())
        if gamma is not None:
            fused.append(unit(gamma.float().cpu().numpy()))
    return np.concatenate(features), np.concatenate(fused) if fused else None


def _looks(subject: Subject, scene: Tensor, person: Tensor) -> list[dict[str, Any]]:
    """Attention of scene and person view, of pictures with a person first."""
    alone = [i for i in range(len(scene)) if torch.equal(scene[i], person[i])]
    with_person = [i for i in range(len(scene)) if i not in set(alone)]
    numbers = (with_person[:: max(1, len(with_person) // LOOKS)] + alone)[:LOOKS]
    views = torch.cat([scene[numbers], person[numbers]]).to(subject.device)
    shares = class_attention(subject.student, views)
    if shares is None:
        return []
    found = []
    for place, number in enumerate(numbers):
        look: dict[str, Any] = {
            "picture": number,
            "scene": heat(scene[number], shares[place]),
            "person": None,
        }
        look["scene_view"] = thumbnail(scene[number], LOOK)
        if number not in alone:
            look["person_view"] = thumbnail(person[number], LOOK)
            look["person"] = heat(person[number], shares[len(numbers) + place])
        found.append(look)
    return found


def _has_teacher(release: Path) -> bool:
    from uniemox_dist.release.format import read_release

    return read_release(release)["teacher"] is not None
