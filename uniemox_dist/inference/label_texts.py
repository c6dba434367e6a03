"""Texts of labels as vectors of a teacher's space, in a file: zero-shot prediction then needs no teacher.

A safetensors file with one tensor, `texts` (C×E, unit rows), and in its metadata the labels, the teacher's hash and its
logit scale.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path
from uniemox_dist.evaluate.subject import ReleaseSubject
from uniemox_dist.evaluate.tasks import TEMPLATES, label_vectors

FORMAT = "uniemox-texts"


@dataclass(frozen=True)
class LabelTexts:
    """Labels with their vectors."""

    labels: tuple[str, ...]
    vectors_CE: np.ndarray
    logit_scale: float
    teacher_sha256: str


def embed_labels(
    release: Path, labels: Sequence[str], templates: Sequence[str] = (), teacher_name: str | None = None
) -> LabelTexts:
    """Embeds labels by a release's teacher, the mean over templates.

    Raises:
        UserError: for fewer than two labels, templates without {}, or a teacher that is not the release's.
    """
    subject = ReleaseSubject(release, teacher_name=teacher_name, with_teacher=True)
    assert subject.teacher is not None
    vectors = label_vectors(subject.teacher, labels, templates or TEMPLATES)
    identity = subject.teacher.identity["weights_sha256"]
    return LabelTexts(tuple(labels), vectors, subject.teacher.logit_scale, identity)


def save_texts(texts: LabelTexts, path: Path) -> None:
    """Writes the file."""
    about = {
        "format": FORMAT,
        "labels": json.dumps(list(texts.labels), ensure_ascii=False),
        "logit_scale": repr(texts.logit_scale),
        "teacher_sha256": texts.teacher_sha256,
    }
    tensor = torch.from_numpy(np.ascontiguousarray(texts.vectors_CE, np.float32))
    with atomic_path(path) as temporary:
        save_file({"texts": tensor}, temporary, metadata=about)


def load_texts(path: Path) -> LabelTexts:
    """Reads the file.

    Raises:
        UserError: if it is none.
    """
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if about.get("format") != FORMAT:
                raise ValueError("is no file of label texts")
            vectors = file.get_tensor("texts").numpy()
            labels = tuple(json.loads(about["labels"]))
            if vectors.ndim != 2 or len(vectors) != len(labels):
                raise ValueError("has another number of labels than of texts")
            return LabelTexts(labels, vectors, float(about["logit_scale"]), about["teacher_sha256"])
    except FileNotFoundError:
        raise UserError(
            f"--texts={path}: no such file; write it with `uniemox predict … --save-texts`"
        ) from None
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise UserError(f"--texts={path}: {error}; write it with `uniemox predict … --save-texts`") from None
