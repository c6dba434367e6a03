"""Embeddings of a data set by a release and by what it is compared with: each sample once, in the order of the shards.

Shape legend: n samples, D width of features, E width of the teacher's space.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import EvaluationBatch, evaluation_batches
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate.baselines import colour_histogram, small_pixels
from uniemox_dist.evaluate.features import unit
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import read_release
from uniemox_dist.release.load import load_pretrained
from uniemox_dist.teacher.model import Teacher

RELEASE, UNTRAINED, TEACHER, HISTOGRAM, PIXELS = "release", "untrained", "teacher", "histogram", "pixels"
BASELINES = (UNTRAINED, TEACHER, HISTOGRAM, PIXELS)
BATCH = 64
Embed = Callable[[EvaluationBatch], np.ndarray]


@dataclass(frozen=True)
class Vectors:
    """One split of a data set."""

    path: str
    identity: str
    keys: list[str]
    labels: list[str | None]
    captions: list[list[str]]
    groups: list[str]
    """Samples of one group are look-alikes: they are drawn together in intervals, and never on both sides of a fold."""
    rows: dict[str, np.ndarray]
    """By name of the row, n×D or n×E."""

    def __len__(self) -> int:
        return len(self.keys)


class Subject:
    """A release, opened, with the baselines that are asked for."""

    def __init__(
        self,
        release: Path,
        baselines: tuple[str, ...],
        *,
        teacher_name: str | None = None,
        with_teacher: bool = False,
        device: str = "cpu",
    ) -> None:
        """Opens a release; its teacher too, if it is a baseline or `with_teacher` says so.

        Raises:
            UserError: if it is no release, was altered, or its teacher is wanted and is not there or another one.
        """
        self.release, self.device = release, torch.device(device)
        self.facts = read_release(release, verify=True)
        self.config = Config.model_validate(self.facts["config"])
        self.settings: ViewSettings = view_settings(self.config)
        self.baselines = baselines
        self.student = load_pretrained(release).to(self.device)
        self.teacher = self._open_teacher(teacher_name) if with_teacher or TEACHER in baselines else None
        self.untrained = self._begin() if UNTRAINED in baselines else None

    @property
    def has_space(self) -> bool:
        """Whether pictures go into the teacher's space."""
        return self.student.fusion is not None

    def features(self) -> dict[str, Embed]:
        """Rows for methods that look at features: class tokens, and what the baselines see."""
        rows: dict[str, Embed] = {RELEASE: lambda batch: self._student(self.student, batch)[0]}
        if (untrained := self.untrained) is not None:
            rows[UNTRAINED] = lambda batch: self._student(untrained, batch)[0]
        if TEACHER in self.baselines:
            rows[TEACHER] = self._teacher
        return {**rows, **plain_rows(self.baselines)}

    def in_space(self) -> dict[str, Embed]:
        """Rows for methods that compare pictures with texts: unit rows γ, and the teacher's own Ω.

        Raises:
            UserError: if the release has no fusion, or a baseline has no place in that space.
        """
        if not self.has_space:
            raise UserError(
                f"RELEASE={self.release}: was trained without a teacher: texts are in no space of its; use knn or probe"
            )
        odd = [name for name in self.baselines if name in (HISTOGRAM, PIXELS)]
        if odd:
            raise UserError(
                f"--baselines={odd[0]}: has no vectors in the texts' space; give untrained or teacher here"
            )
        rows: dict[str, Embed] = {RELEASE: lambda batch: unit(self._student(self.student, batch)[1])}
        if (untrained := self.untrained) is not None:
            rows[UNTRAINED] = lambda batch: unit(self._student(untrained, batch)[1])
        if TEACHER in self.baselines:
            rows[TEACHER] = self._teacher
        return rows

    def _student(self, student: Student, batch: EvaluationBatch) -> tuple[np.ndarray, np.ndarray]:
        scene, person = batch.scene_B3HW.to(self.device), batch.person_B3HW.to(self.device)
        features, fused = student.embed(scene, person)
        return features.float().cpu().numpy(), (features if fused is None else fused).float().cpu().numpy()

    def _teacher(self, batch: EvaluationBatch) -> np.ndarray:
        assert self.teacher is not None
        found: np.ndarray = self.teacher.embed_pictures(batch.scene_B3HW.to(self.device)).cpu().numpy()
        return found

    def _open_teacher(self, name: str | None) -> Teacher:
        if self.facts["teacher"] is None:
            raise UserError(
                f"RELEASE={self.release}: was trained without a teacher; leave out what asks for one"
            )
        wanted = self.config.teacher.model_copy(update={"compile": False, **({"name": name} if name else {})})
        teacher = Teacher(wanted, self.device)
        if teacher.identity["weights_sha256"] != self.facts["teacher"]["weights_sha256"]:
            raise UserError(
                f"--teacher={wanted.name}: is not the teacher of {self.release}: its weights differ"
            )
        return teacher

    def _begin(self) -> Student:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)  # the very weights that the run began with
            fresh = Student(self.config.model, self.config.loss, self.facts["embedding_width"])
        return fresh.eval().to(self.device)


def plain_rows(baselines: Sequence[str]) -> dict[str, Embed]:
    """The rows of baselines that look at pixels alone."""
    kinds = {HISTOGRAM: colour_histogram, PIXELS: small_pixels}

    def row(see: Callable[[np.ndarray], np.ndarray]) -> Embed:
        return lambda batch: np.stack([see(p) for p in batch.scene_B3HW.permute(0, 2, 3, 1).numpy()])

    return {name: row(kinds[name]) for name in baselines if name in kinds}


def embed_split(
    reader: ShardReader,
    settings: ViewSettings,
    rows: Mapping[str, Embed],
    *,
    group_by: str | None,
    progress: Callable[[int], Any] = lambda _: None,
    workers: int = 0,
) -> Vectors:
    """Embeds one split by all rows; the pictures themselves are not kept."""
    arrays: dict[str, list[np.ndarray]] = {name: [] for name in rows}
    records: list[dict[str, Any]] = []
    for batch in evaluation_batches(reader, settings, batch=BATCH, workers=workers):
        for name, embed in rows.items():
            arrays[name].append(embed(batch))
        records += batch.records
        progress(len(batch.records))
    groups = [str(r["attributes"].get(group_by, r["key"])) if group_by else r["key"] for r in records]
    return Vectors(
        str(reader.folder),
        reader.manifest.identity,
        [r["key"] for r in records],
        [r["label"] for r in records],
        [r["captions"] for r in records],
        groups,
        {name: np.concatenate(parts) for name, parts in arrays.items()},
    )
