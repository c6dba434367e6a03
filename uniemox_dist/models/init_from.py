"""Initial weights from elsewhere, matched to a student by name and shape.

The encoder must be of the same architecture; positions and the patch projection are resampled to the student's
picture and patch size. Projection, fusion and decoder are taken where they fit as a whole.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.checkpoints.foreign_weights import Weights, read_weights
from uniemox_dist.config.encoder_names import SIZES, shapes, timm_name
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.resample import DECODER_POSITIONS, POSITIONS, PROJECTION, Resampler, size
from uniemox_dist.models.student import Student

CORE = ("encoder.blocks.", "encoder.patch_embed.", "encoder.norm_pre.")
"""What makes an architecture: all of it must be there and nothing more."""
PARTS = ("to_decoder.", "fusion.", "decoder.", "decoder.prediction.")
"""Taken as a whole or not at all; the last does not belong to the one before."""
HEAD = "head."
"""A classifier's last layer: its labels are another data set's, even where there are as many."""


@dataclass(frozen=True)
class InitReport:
    """What a student got from `model.init_from`."""

    path: str
    layout: str
    loaded: tuple[str, ...]
    """The student's parameters that have these weights now."""
    missing: tuple[str, ...]
    """Those that keep their initial weights."""
    unexpected: tuple[str, ...]
    """Names in the source that were not used."""
    resampled: dict[str, str]
    """Of the loaded ones, those that were resampled: from what to what."""
    kept_positions: bool
    """The source's positions were learned, and are fixed from here on."""

    def facts(self) -> dict[str, Any]:
        """What a line of events.jsonl says: names where they tell something, numbers elsewhere."""
        named = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "resampled": self.resampled,
        }
        return {"init_from": self.path, "layout": self.layout, "loaded": len(self.loaded), **named}

    def describe(self) -> str:
        """Two lines for the log."""
        total = len(self.loaded) + len(self.missing)
        resampled = ", ".join(f"{name} {how}" for name, how in self.resampled.items()) or "nothing"
        positions = (
            "; its learned positions stay fixed (model.positions=fixed)" if self.kept_positions else ""
        )
        return (
            f"initial weights from {self.path} ({self.layout}): {len(self.loaded)} of {total} parameters; "
            f"resampled: {resampled}{positions}\n"
            f"not there: {_grouped(self.missing)}; not used: {_grouped(self.unexpected)}"
        )


@torch.no_grad()
def load_initial_weights(
    student: Student | Classifier, path: str | Path, key: str = "model.init_from"
) -> InitReport:
    """Gives a student on the CPU the weights of a file, a release or a run (see `read_weights`); or a classifier, whose
    last layer stays new.

    Raises:
        UserError: if it cannot be read, nothing matches, it is of another architecture or has weights that are no
            numbers. The student is unchanged then.
    """
    where = f"{key}={path}"
    weights = read_weights(Path(path), key)
    there = {
        name: tensor.float()
        for name, tensor in weights.tensors.items()
        if tensor.is_floating_point() and not name.startswith(HEAD)
    }
    here = dict(student.named_parameters())
    resampler = Resampler(there, where)
    resampler.projection(student.model.patch_size)
    _check_architecture(student, there, weights, where)
    side = student.model.image_size // student.model.patch_size
    resampler.positions(student.encoder, side)
    resampler.decoder_positions(side)
    taken = {name: there[name] for name in _fitting(here, there)}
    for name, tensor in taken.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{where}: {name} has weights that are NaN or infinite; use a file from before that happened"
            )
    for name, tensor in taken.items():
        here[name].copy_(tensor)
    return InitReport(
        str(path),
        weights.layout,
        tuple(taken),
        tuple(name for name in here if name not in taken),
        tuple(name for name in weights.tensors if name not in taken),
        {name: how for name, how in resampler.done.items() if name in taken},
        resampler.learned_positions and not here[POSITIONS].requires_grad and POSITIONS in taken,
    )


def _fitting(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    """The student's parameters that can be taken: of the encoder each one that fits, of other parts all or none."""
    fits = {name for name in here if name in there and there[name].shape == here[name].shape}
    groups = {name: _part(name) for name in here.keys() | there.keys()}
    # Earlier versions stored no fixed positions, which all were made alike.
    known = fits if DECODER_POSITIONS in there else fits | {DECODER_POSITIONS}
    broken = {part for name, part in groups.items() if part in PARTS and name not in known}
    return [name for name in here if name in fits and groups[name] not in broken]


def _part(name: str) -> str:
    return max((part for part in (*PARTS, "encoder.") if name.startswith(part)), key=len, default="")


def _check_architecture(
    student: Student | Classifier, there: Mapping[str, Tensor], weights: Weights, where: str
) -> None:
    here = dict(student.named_parameters())
    core = [name for name in here if name.startswith(CORE)]
    # The blocks' matrices first: by their sizes people know an architecture.
    core.sort(key=lambda name: (not name.startswith("encoder.blocks."), here[name].ndim < 2))
    extra = [name for name in there if name.startswith(CORE) and name not in here]
    unlike = next((n for n in core if n in there and there[n].shape != here[n].shape), None)
    missing = next((n for n in core if n not in there), None)
    heads = weights.stated.get("heads")
    if unlike is not None:
        how = f"{unlike} is {size(there[unlike].shape)} there and {size(here[unlike].shape)} here"
    elif missing is not None:
        how = f"{missing} is here and not there"
    elif extra:
        how = f"{extra[0]} is there and not here"
    elif heads is not None and heads != student.model.heads:
        how = f"it has {heads} heads there and {student.model.heads} here"
    else:
        return
    width, depth = _width_and_depth(there)
    of_size = f"it has width {width} and depth {depth}, " if depth else ""
    raise UserError(
        f"{where}: is of another architecture: {how}; {of_size}{_fix(weights, width, depth, student)}"
    )


def _fix(weights: Weights, width: int, depth: int, student: Student | Classifier) -> str:
    """What to set for the encoder of a source: the name it states, or up to three of its size, or numbers."""
    model, stated = student.model, weights.stated.get("name")
    same_size = (width, depth) == (model.width, model.depth)
    own = timm_name(model.name or "")
    sized = [name for name, s in shapes().items() if (s["width"], s["depth"]) == (width, depth)]
    names = [name for name in sized if timm_name(name) != own]
    # Where the size is right, something else of the name is not: the plain ones are no help.
    plain = [name for name in names if name in SIZES and not same_size]
    patch = weights.tensors[PROJECTION].shape[-1] if PROJECTION in weights.tensors else 0
    others = sorted((n for n in names if n not in SIZES), key=lambda n: shapes()[n]["patch_size"] != patch)
    if stated is not None and timm_name(stated) != own:
        plain = [stated]
    name = " or ".join(plain or others[:3])
    numbers = "model.width/depth" if not same_size else "the other settings of model.* as they were there"
    return f"set model.name={name} or {numbers}" if name else f"set {numbers}"


def _width_and_depth(there: Mapping[str, Tensor]) -> tuple[int, int]:
    blocks = {name.split(".")[2] for name in there if name.startswith("encoder.blocks.")}
    return (there[PROJECTION].shape[0] if PROJECTION in there else 0), len(blocks)


def _grouped(names: Iterable[str]) -> str:
    """Names, those of the encoder one by one and others by their first word where there are many."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    few = {part: len(group) <= (12 if part == "encoder" else 2) for part, group in groups.items()}
    shown = (", ".join(group) if few[part] else f"{part} ({len(group)})" for part, group in groups.items())
    return ", ".join(shown) or "nothing"
