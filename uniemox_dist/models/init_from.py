"""Initial weights from elsewhere, matched to a student by name and shape.

The encoder must be of the same architecture; positions and the patch projection are resampled to the student's
picture and patch size. Projection, fusion and decoder are taken where they fit as a whole. Shape legend: D width, N
patches.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from uniemox_dist.checkpoints.weights import Weights, read_weights
from uniemox_dist.config.vits import SIZES, shapes
from uniemox_dist.models.patches import sincos_positions
from uniemox_dist.models.student import Student
from uniemox_dist.runtime.errors import UserError

CORE = ("encoder.blocks.", "encoder.patch_embed.", "encoder.norm_pre.")
"""What makes an architecture: all of it must be there and nothing more."""
PARTS = ("to_decoder.", "fusion.", "decoder.", "decoder.prediction.")
"""Taken as a whole or not at all; the last does not belong to the one before."""
POSITIONS, CLASS, REGISTERS = "encoder.pos_embed", "encoder.cls_token", "encoder.reg_token"
PROJECTION, DECODER_POSITIONS = "encoder.patch_embed.proj.weight", "decoder.pos_embed"


@dataclass(frozen=True)
class Loaded:
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
def load_into(student: Student, path: str | Path, key: str = "model.init_from") -> Loaded:
    """Gives a student on the CPU the weights of a file, a release or a run (see `read_weights`).

    Raises:
        UserError: if it cannot be read, nothing matches, it is of another architecture or has weights that are no
            numbers. The student is unchanged then.
    """
    where = f"{key}={path}"
    weights = read_weights(Path(path), key)
    there = {name: t.float() for name, t in weights.tensors.items() if t.is_floating_point()}
    here = dict(student.named_parameters())
    resampled: dict[str, str] = {}
    _resample_projection(student, there, resampled)
    _check_architecture(student, there, weights, where)
    learned = _place_positions(student, there, resampled, where)
    taken = {name: there[name] for name in _fitting(here, there)}
    for name, tensor in taken.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{where}: {name} has weights that are NaN or infinite; use a file from before that happened"
            )
    for name, tensor in taken.items():
        here[name].copy_(tensor)
    return Loaded(
        str(path),
        weights.layout,
        tuple(taken),
        tuple(name for name in here if name not in taken),
        tuple(name for name in weights.tensors if name not in taken),
        {name: how for name, how in resampled.items() if name in taken},
        learned and not here[POSITIONS].requires_grad and POSITIONS in taken,
    )


def _fitting(here: Mapping[str, Tensor], there: Mapping[str, Tensor]) -> list[str]:
    """The student's parameters that can be taken: of the encoder each one that fits, of other parts all or none."""
    fits = {name for name in here if name in there and there[name].shape == here[name].shape}
    groups = {name: _part(name) for name in here.keys() | there.keys()}
    broken = {part for name, part in groups.items() if part in PARTS and name not in fits}
    return [name for name in here if name in fits and groups[name] not in broken]


def _part(name: str) -> str:
    return max((part for part in (*PARTS, "encoder.") if name.startswith(part)), key=len, default="")


def _check_architecture(student: Student, there: Mapping[str, Tensor], weights: Weights, where: str) -> None:
    here = dict(student.named_parameters())
    core = [name for name in here if name.startswith(CORE)]
    # Blocks first: what they say is what people know architectures by.
    core.sort(key=lambda name: not name.startswith("encoder.blocks."))
    extra = [name for name in there if name.startswith(CORE) and name not in here]
    unlike = next((n for n in core if n in there and there[n].shape != here[n].shape), None)
    missing = next((n for n in core if n not in there), None)
    heads = weights.stated.get("heads")
    if unlike is not None:
        how = f"{unlike} is {_size(there[unlike])} there and {_size(here[unlike])} here"
    elif missing is not None:
        how = f"{missing} is here and not there"
    elif extra:
        how = f"{extra[0]} is there and not here"
    elif heads is not None and heads != student.model.heads:
        how = f"it has {heads} heads there and {student.model.heads} here"
    else:
        return
    width, depth = _width_and_depth(there)
    size = f"it has width {width} and depth {depth}, " if depth else ""
    raise UserError(
        f"{where}: is of another architecture: {how}; {size}{_fix(weights, width, depth, student)}"
    )


def _fix(weights: Weights, width: int, depth: int, student: Student) -> str:
    """What to set for the encoder of a source: the name it states, or up to three of its size, or numbers."""
    model, stated = student.model, weights.stated.get("name")
    same_size = (width, depth) == (model.width, model.depth)
    names = [n for n, s in shapes().items() if (s["width"], s["depth"]) == (width, depth) and n != model.name]
    # Where the size is right, something else of the name is not: the plain ones are no help.
    plain = [name for name in names if name in SIZES and not same_size]
    patch = weights.tensors[PROJECTION].shape[-1] if PROJECTION in weights.tensors else 0
    others = sorted((n for n in names if n not in SIZES), key=lambda n: shapes()[n]["patch_size"] != patch)
    if stated is not None and stated != model.name:
        plain = [stated]
    name = " or ".join(plain or others[:3])
    numbers = "model.width/depth" if not same_size else "the other settings of model.* as they were there"
    return f"set model.name={name} or {numbers}" if name else f"set {numbers}"


def _width_and_depth(there: Mapping[str, Tensor]) -> tuple[int, int]:
    blocks = {name.split(".")[2] for name in there if name.startswith("encoder.blocks.")}
    return (there[PROJECTION].shape[0] if PROJECTION in there else 0), len(blocks)


def _resample_projection(student: Student, there: dict[str, Tensor], resampled: dict[str, str]) -> None:
    """The patch projection to the student's patch size (Beyer et al., FlexiViT, CVPR 2023), as timm does it."""
    weight = there.get(PROJECTION)
    side = student.model.patch_size
    if weight is not None and weight.ndim == 4 and weight.shape[-2:] != (side, side):
        resampled[PROJECTION] = f"{_size(weight.shape[-2:])} -> {side}x{side}"
        there[PROJECTION] = resample_patch_embed(weight, [side, side])


def _place_positions(
    student: Student, there: dict[str, Tensor], resampled: dict[str, str], where: str
) -> bool:
    """Puts the positions of the source into the student's tables; returns whether they were learned.

    Rows before the patches (class token, registers) are moved where the student has them: an encoder without such rows
    gets them added to its tokens, which is the same function.
    """
    encoder = student.encoder
    side = student.model.image_size // student.model.patch_size
    learned = False
    if POSITIONS in there and there[POSITIONS].ndim == 3:
        table_RD = there[POSITIONS][0]
        first = _prefix(table_RD.shape[0], there, prefer_none=encoder.no_embed_class, where=where)
        there[POSITIONS] = _grid(table_RD[len(first) :], side, POSITIONS, resampled)
        learned = not _is_sincos(table_RD[len(first) :])
        rows = {
            token: [r for name, r in zip(first, table_RD) if name == token] for token in (CLASS, REGISTERS)
        }
        if encoder.no_embed_class:
            for token, found in rows.items():
                if found and token in there:
                    there[token] = there[token] + torch.stack(found).view_as(there[token])
        else:
            prefix_KD = table_RD.new_zeros(encoder.num_prefix_tokens, table_RD.shape[1])
            if rows[CLASS]:
                prefix_KD[0] = rows[CLASS][0]
            if len(rows[REGISTERS]) == encoder.num_reg_tokens > 0:
                prefix_KD[1:] = torch.stack(rows[REGISTERS])
            there[POSITIONS] = torch.cat([prefix_KD[None], there[POSITIONS]], dim=1)
    if DECODER_POSITIONS in there and there[DECODER_POSITIONS].ndim == 3:
        table_1RD = there[DECODER_POSITIONS]
        if math.isqrt(table_1RD.shape[1] - 1) ** 2 == table_1RD.shape[1] - 1:
            grid_1ND = _grid(table_1RD[0, 1:], side, DECODER_POSITIONS, resampled)
            there[DECODER_POSITIONS] = torch.cat([table_1RD[:, :1], grid_1ND], dim=1)
    return learned


def _prefix(rows: int, there: Mapping[str, Tensor], *, prefer_none: bool, where: str) -> list[str]:
    """Which tokens the first rows of a table belong to: those that leave a square of patches."""
    tokens = [name for name in (CLASS, "encoder.dist_token") if name in there]
    registers = [REGISTERS] * (there[REGISTERS].shape[1] if REGISTERS in there else 0)
    choices = sorted(([*tokens, *registers], tokens, []), key=len, reverse=not prefer_none)
    for choice in choices:
        if rows > len(choice) and math.isqrt(rows - len(choice)) ** 2 == rows - len(choice):
            return choice
    raise UserError(
        f"{where}: {POSITIONS} has {rows} rows, which is no square of patches; pictures are square here"
    )


def _grid(table_ND: Tensor, side: int, name: str, resampled: dict[str, str]) -> Tensor:
    """Positions of the patches at the student's number of patches, 1×side²×D."""
    old = math.isqrt(table_ND.shape[0])
    if old != side:
        resampled[name] = f"{old}x{old} -> {side}x{side}"
    return resample_abs_pos_embed(table_ND[None], [side, side], [old, old], num_prefix_tokens=0)


def _is_sincos(table_ND: Tensor) -> bool:
    patches, width = table_ND.shape
    if width % 4:
        return False
    return torch.allclose(table_ND, sincos_positions(width, math.isqrt(patches))[0, 1:], atol=1e-3)


def _size(shape: Tensor | Iterable[int]) -> str:
    return "x".join(str(n) for n in (shape.shape if isinstance(shape, Tensor) else shape))


def _grouped(names: Iterable[str]) -> str:
    """Names, those of the encoder one by one and others by their first word where there are many."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.partition(".")[0], []).append(name)
    few = {part: len(group) <= (12 if part == "encoder" else 2) for part, group in groups.items()}
    shown = (", ".join(group) if few[part] else f"{part} ({len(group)})" for part, group in groups.items())
    return ", ".join(shown) or "nothing"
