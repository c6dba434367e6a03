"""The models to evaluate: a release with its baselines, or any encoder of timm. Both turn batches of pictures into
rows.

Shape legend: B pictures, D width of features, E width of the teacher's space.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.evaluation_batches import EvaluationBatch
from uniemox_dist.data.loader import view_settings
from uniemox_dist.evaluate.baselines import colour_histogram, small_pixels
from uniemox_dist.evaluate.inputs import parse_timm
from uniemox_dist.evaluate.metrics import unit
from uniemox_dist.evaluate.reconstruction import masked_errors
from uniemox_dist.models.patches import normalise
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import read_release
from uniemox_dist.release.load import load_pretrained
from uniemox_dist.teacher.model import Teacher

RELEASE, UNTRAINED, TEACHER, HISTOGRAM, PIXELS = "release", "untrained", "teacher", "histogram", "pixels"
BASELINES = (UNTRAINED, TEACHER, HISTOGRAM, PIXELS)

Measured = Mapping[str, np.ndarray]
"""An array with one entry per sample, by name of the row."""


@dataclass(frozen=True)
class Rows:
    """The values of some samples (a batch or a whole split), by row of the table."""

    features: Measured = field(default_factory=dict)
    """n×D: class tokens of students, and the corresponding features of the other baselines."""
    in_space: Measured = field(default_factory=dict)
    """n×E unit rows in the teacher's space."""
    masked_errors: Measured = field(default_factory=dict)
    """n: the squared error of reconstructed pixels."""


def join(parts: Iterable[Rows]) -> Rows:
    """Joins the rows of consecutive batches."""
    every = list(parts)

    def joined(kind: Callable[[Rows], Measured]) -> Measured:
        return {row: np.concatenate([kind(part)[row] for part in every]) for row in kind(every[0])}

    return Rows(
        joined(lambda rows: rows.features),
        joined(lambda rows: rows.in_space),
        joined(lambda r: r.masked_errors),
    )


class ReleaseSubject:
    """A release and the requested baselines."""

    def __init__(
        self,
        release: Path,
        baselines: tuple[str, ...] = (),
        *,
        teacher_name: str | None = None,
        with_teacher: bool = False,
        device: str = "cpu",
    ) -> None:
        """Opens a release, and its teacher if it is a baseline or `with_teacher` is set.

        Raises:
            UserError: if the folder is not a release, a file was altered, or the teacher is missing or not the
            release's.
        """
        self.release, self.device, self.baselines = release, torch.device(device), baselines
        self.facts = read_release(release, verify=True)
        self.config = Config.model_validate(self.facts["config"])
        self.settings: ViewSettings = view_settings(self.config)
        self.students = {RELEASE: load_pretrained(release).to(self.device)}
        self.teacher = self._open_teacher(teacher_name) if with_teacher or TEACHER in baselines else None
        if UNTRAINED in baselines:
            self.students[UNTRAINED] = self._untrained()

    @property
    def student(self) -> Student:
        """The student of the release."""
        return self.students[RELEASE]

    def check_space(self) -> None:
        """Checks that the release and its baselines can be compared with texts.

        Raises:
            UserError: if the release has no fusion, or a baseline has no vectors in the teacher's space.
        """
        if self.student.fusion is None:
            raise UserError(
                f"RELEASE={self.release}: was trained without a teacher and cannot be compared with texts; use knn or "
                "probe"
            )
        for name in (HISTOGRAM, PIXELS):
            if name in self.baselines:
                raise UserError(
                    f"--baselines={name}: has no vectors in the texts' space; give untrained or teacher here"
                )

    @torch.no_grad()
    def embed(
        self, batch: EvaluationBatch, *, features: bool = True, in_space: bool = False, masked: bool = False
    ) -> Rows:
        """Computes the requested rows of one batch. Every model reads the batch once.

        Args:
            features: features of all rows.
            in_space: vectors of students and teacher in the teacher's space.
            masked: errors of reconstruction by students with a decoder and by trivial fillings.
        """
        in_features: dict[str, np.ndarray] = {}
        fused: dict[str, np.ndarray] = {}
        scene = batch.scene_B3HW.to(self.device)
        person = batch.person_B3HW.to(self.device) if in_space else None
        for row, student in self.students.items():
            in_features[row], gamma = embed_views(student, scene, person)
            if gamma is not None:
                fused[row] = gamma
        if self.teacher is not None and TEACHER in self.baselines:
            in_features[TEACHER] = self.teacher.embed_pictures(scene).cpu().numpy()
            fused[TEACHER] = in_features[TEACHER]
        in_features.update(pixel_rows(batch, self.baselines))
        errors: Measured = {}
        if masked and self.student.decoder is not None:
            errors = masked_errors(self.students, batch, self.config.run.seed)
        return Rows(in_features if features else {}, fused if in_space else {}, errors)

    def _open_teacher(self, name: str | None) -> Teacher:
        if self.facts["teacher"] is None:
            raise UserError(
                f"RELEASE={self.release}: was trained without a teacher; leave out tasks and baselines that need one"
            )
        # Compiling takes longer than one pass.
        wanted = self.config.teacher.model_copy(update={"compile": False, **({"name": name} if name else {})})
        try:
            teacher = Teacher(wanted, self.device)
        except UserError as error:
            raise UserError(
                str(error).replace("teacher.name=", "--teacher=", 1) if name else str(error)
            ) from None
        if teacher.identity["weights_sha256"] != self.facts["teacher"]["weights_sha256"]:
            raise UserError(
                f"--teacher={wanted.name}: is not the teacher of {self.release}: its weights differ"
            )
        return teacher

    def _untrained(self) -> Student:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.run.seed)  # the initial weights of a run without init_from
            fresh = Student(self.config.model, self.config.loss, self.facts["embedding_width"])
        return fresh.eval().to(self.device)


class TimmSubject:
    """`timm:NAME=FILE`: an architecture of timm with the weights of a safetensors file. It has only features."""

    def __init__(self, text: str, baselines: tuple[str, ...] = (), *, device: str = "cpu") -> None:
        """Builds the model.

        Raises:
            UserError: if timm does not know the name, the file is missing or does not fit the model, or a baseline
                needs a release.
        """
        name, file = parse_timm(text)
        for row in baselines:
            if row not in (HISTOGRAM, PIXELS):
                raise UserError(f"--baselines={row}: {text} has none; give {HISTOGRAM} or {PIXELS} here")
        try:
            model: Any = timm.create_model(name, checkpoint_path=file, num_classes=0)
        except Exception as error:  # timm raises many types for names and files that do not fit
            # The last line holds the cause; the first ones only state that something does not fit.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
            raise UserError(f"{text}: timm cannot build it ({reason})") from None
        self.model, self.device, self.baselines = model.eval().to(device), torch.device(device), baselines
        cfg = self.model.pretrained_cfg
        self.mean, self.std = tuple(cfg["mean"]), tuple(cfg["std"])
        self.settings = ViewSettings(image_size=cfg["input_size"][-1])
        self.facts: dict[str, Any] = {"step": None}

    @torch.no_grad()
    def embed(self, batch: EvaluationBatch) -> Rows:
        """Features of one batch: the output of timm's model before its head."""
        pixels = normalise(batch.scene_B3HW.to(self.device), self.mean, self.std, torch.float32)
        features = self.model(pixels).float().cpu().numpy()
        return Rows({RELEASE: features, **pixel_rows(batch, self.baselines)})


def embed_views(
    student: Student, scene_B3HW: Tensor, person_B3HW: Tensor | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Class tokens B×D, and unit rows γ B×E: None for a student without fusion, or without person views."""
    if person_B3HW is None:
        return student.encode(scene_B3HW).float().cpu().numpy(), None
    features, fused = student.embed(scene_B3HW, person_B3HW)
    return features.float().cpu().numpy(), None if fused is None else unit(fused.float().cpu().numpy())


def pixel_rows(batch: EvaluationBatch, baselines: Iterable[str]) -> dict[str, np.ndarray]:
    """Features of the baselines that use only pixels."""
    functions = {HISTOGRAM: colour_histogram, PIXELS: small_pixels}
    pictures_BHW3 = batch.scene_B3HW.permute(0, 2, 3, 1).numpy()
    return {
        name: np.stack([functions[name](picture) for picture in pictures_BHW3])
        for name in baselines
        if name in functions
    }
