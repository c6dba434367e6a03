"""Everything that the evaluation needs of a data set, each sample once, in the order of its shards.

Shape legend: n samples, D encoder width, E teacher embedding width, C captions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import evaluation_batches
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate.baselines import colour_histogram, small_pixels
from uniemox_dist.models.student import Student
from uniemox_dist.teacher.model import Teacher

BATCH = 64


@dataclass(frozen=True)
class Features:
    """One data set, as student, teacher and baselines see it."""

    keys: list[str]
    labels: list[str | None]
    captions: list[str]
    groups: list[str]
    """Samples of one group are resampled together: look-alikes are not independent."""
    valence: np.ndarray
    """n; NaN where the source states none."""
    scenes: Tensor
    """n×3×H×W uint8."""
    encoder: dict[str, np.ndarray]
    """Row name -> features n×D."""
    fused: dict[str, np.ndarray]
    """Row name -> unit rows n×E in the teacher's space; student and untrained."""
    teacher: np.ndarray
    """Ω, n×E."""
    texts: np.ndarray
    """Λ, n×E: the first caption of each sample."""


def compute(
    reader: ShardReader,
    students: dict[str, Student],
    teacher: Teacher,
    settings: ViewSettings,
    *,
    group_by: str | None,
    valence: str,
    progress: Callable[[int], Any],
) -> Features:
    """Embeds a data set. `group_by` and `valence` name attributes of the samples."""
    rows: dict[str, list[Any]] = {name: [] for name in ("key", "label", "caption", "group", "valence")}
    arrays: dict[str, list[np.ndarray]] = {}
    scenes: list[Tensor] = []
    for batch in evaluation_batches(reader, settings, batch=BATCH):
        scene_B3HW, person_B3HW = batch.scene_B3HW, batch.person_B3HW
        scenes.append(scene_B3HW)
        for record in batch.records:
            attributes = record["attributes"]
            rows["key"].append(record["key"])
            rows["label"].append(record["label"])
            rows["caption"].append((record["captions"] or [""])[0])
            rows["group"].append(str(attributes.get(group_by, record["key"])) if group_by else record["key"])
            rows["valence"].append(float(attributes.get(valence, "nan")))
        pictures = scene_B3HW.permute(0, 2, 3, 1).numpy()
        found = {
            "encoder/colour histogram": np.stack([colour_histogram(p) for p in pictures]),
            "encoder/24x24 pixels": np.stack([small_pixels(p) for p in pictures]),
            "teacher": teacher.embed_pictures(scene_B3HW).numpy(),
            "texts": teacher.embed_texts(rows["caption"][-len(batch.records) :]).numpy(),
        }
        found["encoder/teacher"] = found["teacher"]
        for name, student in students.items():
            features, fused = student.embed(scene_B3HW, person_B3HW)
            found[f"encoder/{name}"] = features.float().numpy()
            if fused is not None:
                found[f"fused/{name}"] = unit(fused.float().numpy())
        for name, array in found.items():
            arrays.setdefault(name, []).append(array)
        progress(len(batch.records))
    whole = {name: np.concatenate(parts) for name, parts in arrays.items()}
    return Features(
        keys=rows["key"],
        labels=rows["label"],
        captions=rows["caption"],
        groups=rows["group"],
        valence=np.array(rows["valence"]),
        scenes=torch.cat(scenes),
        encoder={n.partition("/")[2]: a for n, a in whole.items() if n.startswith("encoder/")},
        fused={n.partition("/")[2]: a for n, a in whole.items() if n.startswith("fused/")},
        teacher=whole["teacher"],
        texts=whole["texts"],
    )


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    lengths: np.ndarray = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.maximum(lengths, 1e-12)
