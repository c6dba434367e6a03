"""`uniemox evaluate gallery`: shows in a run's report what a release computes for held-out pictures.

One JSON holds the pictures, a map of their features, nearest neighbours, right and wrong zero-shot answers, and the
attention of the class token.

Shape legend: B and n pictures, T tokens, N patches, H heads, D width, C classes, S patches along one side.
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
from uniemox_dist.evaluate.metrics import unit
from uniemox_dist.evaluate.subject import ReleaseSubject, embed_views
from uniemox_dist.evaluate.tasks import embed_label_texts
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import read_release

FORMAT, FORMAT_VERSION = "uniemox-gallery", 1
MOST_PICTURES = 400
QUERIES, NEIGHBOURS = 10, 6
"""Number of pictures whose neighbours are listed, and of neighbours of each."""
ANSWERS = 8
"""Number of right and of wrong answers that are listed, each."""
ATTENTION_PICTURES = 6
THUMBNAIL_PX, ATTENTION_PX = 64, 128
BATCH = 64


def gallery(
    release: Path, data: str, *, teacher_name: str | None = None, device: str = "cpu", workers: int = 0
) -> dict[str, Any]:
    """Describes up to 400 pictures of a data set, spread evenly over it.

    Raises:
        UserError: like `ReleaseSubject`, or if the data are missing.
    """
    reader = ShardReader.from_folder(data, "DATA")
    with_teacher = read_release(release)["teacher"] is not None
    subject = ReleaseSubject(release, teacher_name=teacher_name, with_teacher=with_teacher, device=device)
    total = reader.manifest.samples
    chosen = set(np.linspace(0, total - 1, min(MOST_PICTURES, total)).round().astype(int).tolist())
    scenes: list[Tensor] = []
    persons: list[Tensor] = []
    records: list[dict[str, Any]] = []
    features: list[np.ndarray] = []
    fused: list[np.ndarray] = []
    for batch in evaluation_batches(reader, subject.settings, batch=BATCH, workers=workers):
        keep = [i for i, number in enumerate(batch.numbers) if number in chosen]
        if not keep:
            continue
        scenes.append(batch.scene_B3HW[keep])
        persons.append(batch.person_B3HW[keep])
        records += [batch.records[i] for i in keep]
        both = scenes[-1].to(subject.device), persons[-1].to(subject.device)
        class_tokens, gamma = embed_views(subject.student, *both)
        features.append(class_tokens)
        if gamma is not None:
            fused.append(gamma)
    scene, person, features_nD = torch.cat(scenes), torch.cat(persons), np.concatenate(features)
    labels = [record["label"] for record in records]
    pictures = [
        {
            "key": record["key"],
            "label": record["label"],
            "caption": (record["captions"] or [""])[0],
            "x": round(float(x), 4),
            "y": round(float(y), 4),
            "picture": thumbnail(view, THUMBNAIL_PX),
        }
        for record, view, (x, y) in zip(records, scene, project(features_nD))
    ]
    found: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "release": str(release),
        "step": subject.facts["step"],
        "data": {"path": str(reader.folder), "identity": reader.manifest.identity, "samples": total},
        "pictures": pictures,
        "neighbours": find_neighbours(features_nD),
        "attention": _attention(subject, scene, person),
        "zeroshot": None,
    }
    names = sorted({label for label in labels if label})
    if subject.teacher is not None and fused and len(names) > 1:
        texts_CE = embed_label_texts(subject.teacher, names)
        found["zeroshot"] = select_answers(
            subject.teacher.logit_scale * np.concatenate(fused) @ texts_CE.T, labels, names
        )
    return found


def project(features_nD: np.ndarray) -> np.ndarray:
    """The first two principal components of unit rows, each scaled to 0…1: n×2."""
    rows = unit(features_nD)
    centred = rows - rows.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    at = centred @ directions[:2].T
    if at.shape[1] < 2:
        at = np.pad(at, ((0, 0), (0, 2 - at.shape[1])))
    low, high = at.min(0), at.max(0)
    found: np.ndarray = (at - low) / np.maximum(high - low, 1e-12)
    return found


def find_neighbours(features_nD: np.ndarray) -> list[dict[str, Any]]:
    """The nearest other pictures by cosine, for ten pictures that are spread evenly over all."""
    rows = unit(features_nD)
    found = []
    for number in np.linspace(0, len(rows) - 1, min(QUERIES, len(rows))).round().astype(int):
        cosine = rows @ rows[number]
        cosine[number] = -np.inf
        order = np.argsort(-cosine)[: min(NEIGHBOURS, len(rows) - 1)]
        nearest = [{"picture": int(i), "cosine": round(float(cosine[i]), 4)} for i in order]
        found.append({"picture": int(number), "nearest": nearest})
    return found


def select_answers(logits_nC: np.ndarray, labels: list[str | None], names: list[str]) -> dict[str, Any]:
    """The right and the wrong zero-shot answers with the highest probabilities."""
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


@torch.no_grad()
def class_attention(student: Student, pictures_B3HW: Tensor) -> Tensor | None:
    """The attention of the class token over the patches in the last block, the mean of all heads, B×S×S; rows sum to 1.
    None for encoders whose attention has no joint projection to queries and keys."""
    attention: Any = student.encoder.blocks[-1].attn  # type: ignore[union-attr,index]
    if not hasattr(attention, "qkv") or not hasattr(attention, "num_heads"):
        return None
    seen: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        student.encode(pictures_B3HW)
    finally:
        hook.remove()
    tokens_BTD = seen[0]
    B, T, D = tokens_BTD.shape
    qkv = attention.qkv(tokens_BTD)
    if qkv.shape[-1] != 3 * D:
        return None
    q, k, _ = qkv.view(B, T, 3, attention.num_heads, D // attention.num_heads).permute(2, 0, 3, 1, 4)
    q, k = (getattr(attention, norm)(x) for norm, x in (("q_norm", q), ("k_norm", k)))
    share_BHT = ((q[:, :, :1] @ k.transpose(-1, -2)) * attention.scale).softmax(-1)[:, :, 0]
    side = student.model.patch_grid
    patches_BN = share_BHT.float().mean(1)[:, T - side * side :]
    return (patches_BN / patches_BN.sum(1, keepdim=True)).view(B, side, side)


def thumbnail(view_3HW: Tensor, side: int) -> str:
    """A view as a small JPEG in base64."""
    picture = Image.fromarray(view_3HW.permute(1, 2, 0).contiguous().numpy())
    out = io.BytesIO()
    picture.resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=80)
    return base64.b64encode(out.getvalue()).decode()


def make_heat_map(view_3HW: Tensor, share_SS: Tensor) -> str:
    """A view with its attention as a heat map, as a small JPEG in base64."""
    picture = Image.fromarray(view_3HW.permute(1, 2, 0).contiguous().numpy()).resize(
        (ATTENTION_PX, ATTENTION_PX)
    )
    share = (share_SS / share_SS.max().clamp(min=1e-12)).cpu().numpy()
    grown = Image.fromarray((255 * share).astype(np.uint8)).resize(
        (ATTENTION_PX, ATTENTION_PX), Image.Resampling.BICUBIC
    )
    colours = Image.fromarray(
        (255 * colormaps["inferno"](np.asarray(grown) / 255.0)[..., :3]).astype(np.uint8)
    )
    out = io.BytesIO()
    Image.blend(picture, colours, 0.62).save(out, "JPEG", quality=82)
    return base64.b64encode(out.getvalue()).decode()


def _attention(subject: ReleaseSubject, scene: Tensor, person: Tensor) -> list[dict[str, Any]]:
    """The attention of scene and person views of a few pictures, those with a person first."""
    alone = [i for i in range(len(scene)) if torch.equal(scene[i], person[i])]
    with_person = [i for i in range(len(scene)) if i not in set(alone)]
    numbers = (with_person[:: max(1, len(with_person) // ATTENTION_PICTURES)] + alone)[:ATTENTION_PICTURES]
    views = torch.cat([scene[numbers], person[numbers]]).to(subject.device)
    shares = class_attention(subject.student, views)
    if shares is None:
        return []
    found = []
    for place, number in enumerate(numbers):
        entry: dict[str, Any] = {
            "picture": number,
            "scene": make_heat_map(scene[number], shares[place]),
            "person": None,
        }
        entry["scene_view"] = thumbnail(scene[number], ATTENTION_PX)
        if number not in alone:
            entry["person_view"] = thumbnail(person[number], ATTENTION_PX)
            entry["person"] = make_heat_map(person[number], shares[len(numbers) + place])
        found.append(entry)
    return found
