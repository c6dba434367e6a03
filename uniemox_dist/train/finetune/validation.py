"""Validation during fine-tuning: a classifier's outputs for a whole split, and RUN/validation.jsonl, from which a
resumed run restores its best weights and its patience.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.data.evaluation_batches import evaluation_batches
from uniemox_dist.data.labels import LabelledReader
from uniemox_dist.data.loader import view_settings
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.evaluate.intervals import LOOK_ALIKES, find_group
from uniemox_dist.runs.folder import append_line, read_lines

FILE = "validation.jsonl"
KL = "kl_divergence"
"""The only metric of validations that is better if it is lower."""


@dataclass(frozen=True)
class Validations:
    """The validations up to some step, each step once, in order."""

    lines: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, folder: Path, step: int) -> "Validations":
        """Reads the validations up to `step`; later ones belong to an earlier attempt that came further. If a step has
        several lines, the last one counts."""
        found = {
            line["step"]: line for line in read_lines(folder / FILE) if line.get("step", step + 1) <= step
        }
        return cls(tuple(found[number] for number in sorted(found)))

    @property
    def best(self) -> dict[str, Any] | None:
        """The first line with the best value; a value of None is worse than any other."""
        return max(self.lines, key=_rank, default=None)

    @property
    def since_best(self) -> int:
        """Validations since the best one."""
        best = self.best
        return 0 if best is None else sum(line["step"] > best["step"] for line in self.lines)

    def has(self, step: int) -> bool:
        """True if that step is validated."""
        return any(line["step"] == step for line in self.lines)

    def with_line(self, line: dict[str, Any]) -> "Validations":
        """Returns a copy with one more line."""
        return Validations((*self.lines, line))


def append_validation(folder: Path, line: dict[str, Any]) -> None:
    """Appends a line to RUN/validation.jsonl."""
    append_line(folder / FILE, line)


def _rank(line: dict[str, Any]) -> float:
    value = line["value"]
    if value is None:
        return float("-inf")
    return -float(value) if line.get("metric") == KL else float(value)


@torch.no_grad()
def predict_split(
    classifier: Any, reader: LabelledReader, config: FinetuneRun, world: World, device: torch.device
) -> np.ndarray:
    """Returns the classifier's outputs for every sample, n×C in the order of the split, on every rank. Collective.

    The first call for a split also reads the samples' groups of look-alikes (`reader.groups`), which intervals need.

    Raises:
        UserError: naming the first sample that cannot be read, on all ranks.
    """
    persons = config.finetune.persons
    settings = view_settings(config, with_person=persons)
    batch = config.finetune.eval_batch
    read_groups = reader.groups is None and config.finetune.task == "single"

    def predict_own_part() -> tuple[list[np.ndarray], list[str]]:
        found: list[np.ndarray] = []
        groups: list[str] = []
        views: tuple[Any, ...] = ()
        for number, part in enumerate(
            evaluation_batches(
                reader,
                settings,
                batch=batch,
                rank=world.rank,
                world_size=world.size,
                workers=config.data.workers,
                records=read_groups,
            ),
            start=1,
        ):
            person = part.person_B3HW.to(device) if persons else None
            views = (part.scene_B3HW.to(device), person)
            found.append(classifier(*views)[0].cpu().numpy())
            if read_groups:
                groups += [find_group(record, LOOK_ALIKES) for record in part.records]
            passes = number
        if config.zero.stage == 3:
            # Every pass gathers weights from all ranks, so a rank that finishes early joins the remaining passes.
            most = math.ceil(math.ceil(reader.samples / world.size) / batch)
            size = config.model.image_size
            empty = torch.zeros((1, 3, size, size), dtype=torch.uint8, device=device)
            for _ in range(most - (passes if found else 0)):
                classifier(*(views or (empty, empty if persons else None)))
        return found, groups

    with torch.compiler.set_stance("force_eager"):  # these shapes are rare, not worth a compilation
        rows, groups = collectives.on_all(world, predict_own_part)
    empty = np.zeros((0, reader.targets_nC.shape[1]), np.float32)
    everyone = collectives.gather_objects((np.concatenate(rows) if rows else empty, groups), world)
    if read_groups:
        reader.groups = [group for _, of_rank in everyone for group in of_rank]
    return np.concatenate([of_rank for of_rank, _ in everyone])
