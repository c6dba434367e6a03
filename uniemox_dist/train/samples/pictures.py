"""Reconstructions and nearest texts of held-out samples, for TensorBoard, the run's folder and its report.

Shape legend: B pictures, N patches, M masked, P values of a patch, T texts, E the teacher's embedding width.
"""

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.core.files import write_bytes, write_json
from uniemox_dist.data.masks import PERSON_VIEW, SCENE_VIEW, choose_patch_order
from uniemox_dist.models.patches import patchify, unpatchify
from uniemox_dist.models.student import Student
from uniemox_dist.train.samples.selection import Shown, Texts

GREY = 0.5
NEAREST = 3


@dataclass(frozen=True)
class Nearest:
    """The texts nearest to a picture's embedding; empty if the embedding is not finite."""

    texts: tuple[tuple[str, float], ...]
    """The texts with their cosines, the nearest first."""
    own: tuple[float, int] | None
    """Cosine of the picture's own caption, and its rank among all texts; None without a caption."""


@dataclass(frozen=True)
class Look:
    """The student's results for the samples at one step."""

    lines: tuple[Tensor, ...]
    """Views side by side, B×C×3×H×W in 0…1: for each reconstructed view the picture, the masked one and the
    reconstruction (visible patches kept); without a decoder the views that the student reads."""
    errors: tuple[float | None, ...]
    """Mean squared error of the scene's masked pixels, 0…1; None without a decoder."""
    student: tuple[Nearest, ...] | None
    teacher: tuple[Nearest, ...] | None


@torch.no_grad()
def inspect_samples(student: Student, shown: Shown, seed: int, device: torch.device) -> Look:
    """Runs the student on all samples. Under ZeRO-3 all ranks must call it, because weights are gathered."""
    scene, person = shown.scene_B3HW.to(device), shown.person_B3HW.to(device)
    nearest_student = nearest_teacher = None
    if shown.texts is not None:
        fused_BE = student.embed(scene, person)[1]
        assert fused_BE is not None
        nearest_student = find_nearest(fused_BE.float().cpu(), shown.texts, shown.captions)
        if shown.texts.pictures_BE is not None:
            nearest_teacher = find_nearest(shown.texts.pictures_BE, shown.texts, shown.captions)
    if student.decoder is None:
        views = [scene, person] if student.fuses_person else [scene]
        plain = torch.stack([view.float().cpu() / 255 for view in views], dim=1)
        return Look((plain,), (None,) * len(shown.keys), nearest_student, nearest_teacher)
    on_person_BN = shown.on_person_BN.to(device)
    line, error_B = reconstruct(student, scene, SCENE_VIEW, seed, on_person_BN)
    lines = [line]
    if student.loss.person_reconstruction:
        lines.append(reconstruct(student, person, PERSON_VIEW, seed)[0])
    errors = tuple(e if math.isfinite(e) else None for e in error_B.tolist())
    return Look(tuple(lines), errors, nearest_student, nearest_teacher)


def reconstruct(
    student: Student, pixels_B3HW: Tensor, view: int, seed: int, on_person_BN: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Picture, masked picture and reconstruction (visible patches kept) with the run's kind of mask, B×3×3×H×W in 0…1;
    and the mean squared error of the masked pixels, B."""
    patch = student.model.patch_size
    slots_B = torch.arange(pixels_B3HW.shape[0], device=pixels_B3HW.device)
    order_BN = choose_patch_order(student.model, slots_B, view, seed, on_person_BN)
    masked_BM = student.split(order_BN)[1]
    picture = pixels_B3HW.float() / 255
    patches_BNP = patchify(picture, patch)
    index_BMP = masked_BM[:, :, None].expand(-1, -1, patches_BNP.shape[2])
    found_BMP = student.reconstruct(pixels_B3HW, order_BN).clamp(0, 1)
    error_B = (found_BMP - patches_BNP.gather(1, index_BMP)).square().mean((1, 2))
    masked = patches_BNP.scatter(1, index_BMP, torch.full_like(found_BMP, GREY))
    filled = patches_BNP.scatter(1, index_BMP, found_BMP.nan_to_num(GREY))
    line = torch.stack([picture, unpatchify(masked, patch), unpatchify(filled, patch)], dim=1)
    return line.cpu(), error_B.cpu()


def find_nearest(rows_BE: Tensor, texts: Texts, captions: tuple[str, ...]) -> tuple[Nearest, ...]:
    """The nearest texts of each embedding, and the rank of its own caption among all texts."""
    cosines_BT = F.normalize(rows_BE, dim=1) @ texts.vectors_TE.T
    found = []
    for cosines_T, caption in zip(cosines_BT, captions):
        if not bool(cosines_T.isfinite().all()):
            found.append(Nearest((), None))
            continue
        values, numbers = cosines_T.topk(min(NEAREST, len(texts.texts)))
        own = None
        if caption in texts.texts:
            mine = cosines_T[texts.texts.index(caption)]
            own = (float(mine), 1 + int((cosines_T > mine).sum()))
        pairs = zip(numbers.tolist(), values.tolist())
        found.append(Nearest(tuple((texts.texts[number], value) for number, value in pairs), own))
    return tuple(found)


def collect_facts(seen: Look, shown: Shown, step: int, mask: str) -> dict[str, Any]:
    """The content of a step's .json file, as described in docs/run_folder.md."""
    sides = {"student": seen.student, "teacher": seen.teacher}
    pictures = []
    for i, key in enumerate(shown.keys):
        record: dict[str, Any] = {"key": key, "caption": shown.captions[i], "masked_mse": seen.errors[i]}
        record.update({side: _record(found[i]) for side, found in sides.items() if found is not None})
        pictures.append(record)
    return {
        "format": "uniemox-samples",
        "format_version": 1,
        "step": step,
        "data": shown.data,
        "mask": mask,
        "texts": len(shown.texts.texts) if shown.texts else 0,
        "pictures": pictures,
    }


def _record(found: Nearest) -> dict[str, Any]:
    texts = [{"text": text, "cosine": round(cosine, 4)} for text, cosine in found.texts]
    own = None if found.own is None else {"cosine": round(found.own[0], 4), "rank": found.own[1]}
    return {"nearest": texts, "own": own}


def render_markdown(record: dict[str, Any]) -> str:
    """The nearest texts as a Markdown table for TensorBoard; empty without texts."""
    if not record["texts"]:
        return ""
    sides = [side for side in ("student", "teacher") if side in record["pictures"][0]]
    lines = [
        f"The nearest of {record['texts']} held-out captions with their cosines, and the rank of the own caption.",
        "",
        f"| own caption | {' | '.join(f'nearest to the {side}' for side in sides)} |",
        f"|---{'|---' * len(sides)}|",
    ]
    for picture in record["pictures"]:
        cells = [_safe(picture["caption"]) or "–", *(_cell(picture[side]) for side in sides)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(found: dict[str, Any]) -> str:
    parts = [f"{line['cosine']:.2f} {_safe(line['text'])}" for line in found["nearest"]]
    if found["own"]:
        parts.append(f"(own: {found['own']['cosine']:.2f}, rank {found['own']['rank']})")
    return "; ".join(parts) or "not finite"


def _safe(text: str) -> str:
    """Escapes a caption for a cell of a Markdown table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"&#{ord(c)};" if c in "|*_`[]\\~#" else c for c in text)


def encode_png(sheet: np.ndarray) -> bytes:
    """Encodes a uint8 H×W×3 sheet as PNG: once for both the folder and TensorBoard, since it takes most of the time."""
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    return buffer.getvalue()


def save(folder: Path, step: int, png: bytes, record: dict[str, Any]) -> None:
    """Writes step_….png, and step_….json if there are texts; each atomically.

    Raises:
        OSError: if there is no space.
    """
    write_bytes(folder / f"step_{step:08d}.png", png)
    if record["texts"]:
        write_json(folder / f"step_{step:08d}.json", record)
