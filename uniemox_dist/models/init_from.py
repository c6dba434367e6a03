"""Initial weights from other models (`model.init_from`), matched to a student by name and shape.

The encoder must have the same architecture. Positions and the patch projection are resampled to the student's picture
and patch size. Projection, fusion and decoder are each loaded if the whole part fits.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uniemox_dist.checkpoints.foreign_weights import Weights, read_weights
from uniemox_dist.config.encoder_names import SIZES, list_shapes, timm_name
from uniemox_dist.core.errors import UserError
from uniemox_dist.models.classifier import Classifier
from uniemox_dist.models.resample import DECODER_POSITIONS, POSITIONS, PROJECTION, Resampler, format_shape
from uniemox_dist.models.student import Student

CORE = ("encoder.blocks.", "encoder.patch_embed.", "encoder.norm_pre.")
"""Prefixes that define an architecture: the source must have exactly the same parameters."""
PARTS = ("to_decoder.", "fusion.", "decoder.", "decoder.prediction.")
"""Parts that are loaded completely or not at all. The last one does not count as part of the decoder."""
HEAD = "head."
"""A classifier's last layer. It is never loaded, because its labels belong to another data set."""


@dataclass(frozen=True)
class InitReport:
    """The report about the weights loaded from `model.init_from`."""

    path: str
    layout: str
    loaded: tuple[str, ...]
    """Parameters of the student that were loaded."""
    missing: tuple[str, ...]
    """Parameters of the student that keep their random initial weights."""
    unexpected: tuple[str, ...]
    """Names in the source that were not loaded."""
    resampled: dict[str, str]
    """Loaded parameters that were resampled, with sizes before and after."""
    kept_positions: bool
    """True if the source's positions were learned and stay fixed in this run."""

    def facts(self) -> dict[str, Any]:
        """Returns the fields of the event in events.jsonl."""
        named = {
            "missing": list(self.missing),
            "unexpected": list(self.unexpected),
            "resampled": self.resampled,
        }
        return {"init_from": self.path, "layout": self.layout, "loaded": len(self.loaded), **named}

    def describe(self) -> str:
        """Describes the report in two lines for the log."""
        total = len(self.loaded) + len(self.missing)
        resampled = ", ".join(f"{name} {how}" for name, how in self.resampled.items()) or "nothing"
        positions = (
            "; its learned positions stay fixed (model.positions=fixed)" if self.kept_positions else ""
        )
        return (
            f"initial weights from {self.path} ({self.layout}): {len(self.loaded)} of {total} parameters; "
            f"resampled: {resampled}{positions}\n"
            f"missing: {_list_names(self.missing)}; not used: {_list_names(self.unexpected)}"
        )


@torch.no_grad()
def load_initial_weights(
    student: Student | Classifier, path: str | Path, key: str = "model.init_from"
) -> InitReport:
    """Loads the weights of a file, a release or a run (see `read_weights`) into a student or classifier on the CPU.

    A classifier's last layer keeps its random weights.

    Raises:
        UserError: if the source cannot be read, does not match, has another architecture or weights that are not
            finite. The student is unchanged then.
    """
    where = f"{key}={path}"
    weights = read_weights(Path(path), key)
    source = {
        name: tensor.float()
        for name, tensor in weights.tensors.items()
        if tensor.is_floating_point() and not name.startswith(HEAD)
    }
    parameters = dict(student.named_parameters())
    resampler = Resampler(source, where)
    resampler.projection(student.model.patch_size)
    _check_architecture(student, source, weights, where)
    side = student.model.patch_grid
    resampler.positions(student.encoder, side)
    resampler.decoder_positions(side)
    loaded = {name: source[name] for name in _find_matching(parameters, source)}
    for name, tensor in loaded.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{where}: {name} has weights that are NaN or infinite; use an earlier checkpoint or file"
            )
    for name, tensor in loaded.items():
        parameters[name].copy_(tensor)
    return InitReport(
        str(path),
        weights.layout,
        tuple(loaded),
        tuple(name for name in parameters if name not in loaded),
        tuple(name for name in weights.tensors if name not in loaded),
        {name: how for name, how in resampler.done.items() if name in loaded},
        resampler.learned_positions and not parameters[POSITIONS].requires_grad and POSITIONS in loaded,
    )


def _find_matching(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> list[str]:
    """Lists the student's parameters to load: each matching one of the encoder, of other parts all or none."""
    fits = {name for name in target if name in source and source[name].shape == target[name].shape}
    groups = {name: _find_part(name) for name in target.keys() | source.keys()}
    # Earlier versions did not store the decoder's fixed positions.
    known = fits if DECODER_POSITIONS in source else fits | {DECODER_POSITIONS}
    broken = {part for name, part in groups.items() if part in PARTS and name not in known}
    return [name for name in target if name in fits and groups[name] not in broken]


def _find_part(name: str) -> str:
    return max((part for part in (*PARTS, "encoder.") if name.startswith(part)), key=len, default="")


def _check_architecture(
    student: Student | Classifier, source: Mapping[str, Tensor], weights: Weights, where: str
) -> None:
    target = dict(student.named_parameters())
    core = [name for name in target if name.startswith(CORE)]
    # Matrices of blocks come first, because users know an architecture by their sizes.
    core.sort(key=lambda name: (not name.startswith("encoder.blocks."), target[name].ndim < 2))
    extra = [name for name in source if name.startswith(CORE) and name not in target]
    unlike = next((n for n in core if n in source and source[n].shape != target[n].shape), None)
    missing = next((n for n in core if n not in source), None)
    heads = weights.stated.get("heads")
    if unlike is not None:
        how = f"{unlike} is {format_shape(source[unlike].shape)} there and {format_shape(target[unlike].shape)} here"
    elif missing is not None:
        how = f"{missing} is here and not there"
    elif extra:
        how = f"{extra[0]} is there and not here"
    elif heads is not None and heads != student.model.heads:
        how = f"it has {heads} heads there and {student.model.heads} here"
    else:
        return
    width, depth = _read_width_and_depth(source)
    of_size = f"it has width {width} and depth {depth}, " if depth else ""
    raise UserError(
        f"{where}: is of another architecture: {how}; {of_size}{_suggest_fix(weights, width, depth, student)}"
    )


def _suggest_fix(weights: Weights, width: int, depth: int, student: Student | Classifier) -> str:
    """Suggests settings for the source's encoder: its stated name, up to three names of its size, or numbers."""
    model, stated = student.model, weights.stated.get("name")
    same_size = (width, depth) == (model.width, model.depth)
    own = timm_name(model.name or "")
    sized = [name for name, s in list_shapes().items() if (s["width"], s["depth"]) == (width, depth)]
    names = [name for name in sized if timm_name(name) != own]
    # If the size is right, another property differs, so the plain names do not help.
    plain = [name for name in names if name in SIZES and not same_size]
    patch = weights.tensors[PROJECTION].shape[-1] if PROJECTION in weights.tensors else 0
    others = sorted(
        (n for n in names if n not in SIZES), key=lambda n: list_shapes()[n]["patch_size"] != patch
    )
    if stated is not None and timm_name(stated) != own:
        plain = [stated]
    name = " or ".join(plain or others[:3])
    numbers = "model.width/depth" if not same_size else "the other settings of model.* as they were there"
    return f"set model.name={name} or {numbers}" if name else f"set {numbers}"


def _read_width_and_depth(source: Mapping[str, Tensor]) -> tuple[int, int]:
    blocks = {name.split(".")[2] for name in source if name.startswith("encoder.blocks.")}
    return (source[PROJECTION].shape[0] if PROJECTION in source else 0), len(blocks)


def _list_names(names: Iterable[str]) -> str:
    """Lists names; many names of one part are shortened to the part and their number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    short = {part: len(group) <= (12 if part == "encoder" else 2) for part, group in groups.items()}
    texts = (", ".join(group) if short[part] else f"{part} ({len(group)})" for part, group in groups.items())
    return ", ".join(texts) or "nothing"
