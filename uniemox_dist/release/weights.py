"""The weights of a release: read from a checkpoint's fragments and written tensor by tensor, for any ZeRO stage and
number of ranks. One tensor is in memory at a time.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from uniemox_dist.checkpoints.folders import COMPLETE, Checkpoint
from uniemox_dist.checkpoints.format import (
    EMA,
    FragmentReader,
    copy_fixed_parameters,
    read_fixed_tensors,
    write_tensors,
)
from uniemox_dist.config.schema import Config
from uniemox_dist.config.sections import explain_errors
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.formatting import cut
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import ENCODER, REST

PREFIX = "encoder."
READ_SHARE, READ_BYTES = 16, 64 << 20
"""Released files are mapped into memory, and pages that were read count as used memory until the file is reopened. A
file is reopened after a sixteenth of the model or this many bytes, whichever is more."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """All weights of a checkpoint's student by name, trained and fixed (positions)."""

    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    """A tensor in fp32 on the CPU."""

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters of the encoder, and of all other modules, by file."""
        counts = {ENCODER: 0, REST: 0}
        for name, shape in self.shapes.items():
            counts[find_file(name)] += torch.Size(shape).numel()
        return counts


def find_file(name: str) -> str:
    """The file of a release that holds a weight of the student."""
    return ENCODER if name.startswith(PREFIX) else REST


def read_config(checkpoint: Checkpoint) -> Config:
    """The configuration that a checkpoint records.

    Raises:
        UserError: if it is not one that this version reads.
    """
    try:
        return Config.model_validate(checkpoint.info["config"])
    except ValidationError as error:
        reason = cut(next(explain_errors(error, Config)))
        raise UserError(
            f"{checkpoint.folder / COMPLETE}: config: {reason}; update uniemox-dist, or use another checkpoint"
        ) from None


def open_source(checkpoint: Checkpoint, *, ema: bool = False) -> Source:
    """The weights of a checkpoint; with `ema` the moving average of the encoder's.

    Raises:
        UserError: if there is no moving average.
    """
    reader, fixed = FragmentReader(checkpoint), read_fixed_tensors(checkpoint)
    if ema and not reader.has_ema:
        raise UserError(
            f"--ema: {checkpoint.folder} holds no moving average; train with optim.ema_decay=0.999, or leave --ema out"
        )
    if not fixed:  # the checkpoint is of an early version, which recomputed them, or there are none
        config = read_config(checkpoint)
        fixed = copy_fixed_parameters(Student(config.model, config.loss, checkpoint.info["embedding_width"]))
    shapes = {name: tuple(shape) for name, shape in reader.shapes.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in fixed.items()}

    def read(name: str) -> Tensor:
        averaged = ema and name.startswith(PREFIX)
        if name in fixed:
            return fixed[name]
        return reader.parameter(name, EMA if averaged else "fp32")

    return Source(checkpoint, shapes, read)


class Renewed(Generic[T]):
    """Open files that are reopened from time to time, which frees their pages."""

    def __init__(self, open_: Callable[[], T], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._open, self._opened, self._bytes = open_, open_(), 0
        self._of = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
        self._most = max(READ_BYTES, sum(self._of.values()) // READ_SHARE)

    def use(self, name: str) -> T:
        """Returns the open files, for reading one tensor."""
        self._bytes += self._of[name]
        if self._bytes > self._most:
            del self._opened  # closed before it is opened again
            self._opened, self._bytes = self._open(), self._of[name]
        return self._opened


def write_weights(out: Path, source: Source, dtype: torch.dtype) -> dict[str, str]:
    """Writes both files in a number format; returns their SHA-256.

    Raises:
        UserError: if a weight is not finite, or too large for the format.
    """
    return {
        file: write_tensors(
            out / file,
            {
                make_released_name(name): (dtype, shape)
                for name, shape in source.shapes.items()
                if find_file(name) == file
            },
            lambda name, file=file: _cast(source, _own_name(name, file), dtype),  # type: ignore[misc]
        )[1]
        for file in (ENCODER, REST)
    }


def compare(out: Path, source: Source, dtype: torch.dtype) -> None:
    """Compares every released tensor, as read back from the disk, with the checkpoint's.

    Raises:
        Fault: naming the first that differs.
    """
    for file in (ENCODER, REST):
        names = {make_released_name(name): name for name in source.shapes if find_file(name) == file}
        shapes = {released: source.shapes[name] for released, name in names.items()}
        written: Renewed[Any] = Renewed(lambda file=file: safe_open(out / file, "pt"), shapes)  # type: ignore[misc]
        with safe_open(out / file, "pt") as header:
            if set(header.keys()) != set(names):
                raise Fault(f"{out / file}: holds other tensors than {source.checkpoint.folder}")
        for released, name in names.items():
            if not torch.equal(written.use(released).get_tensor(released), source.read(name).to(dtype)):
                raise Fault(f"{out / file}: {released} differs from {source.checkpoint.folder}")


def check_names(encoder: Mapping[str, Tensor], source: Source) -> None:
    """Checks that timm's own model has exactly the tensors that are released for it.

    Raises:
        Fault: naming a tensor that differs.
    """
    here = {name: tuple(tensor.shape) for name, tensor in encoder.items()}
    there = {
        make_released_name(name): shape for name, shape in source.shapes.items() if find_file(name) == ENCODER
    }
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise Fault(
                f"{source.checkpoint.folder}: timm's encoder has {name} of {here.get(name)}, the checkpoint of "
                f"{there.get(name)}; use the timm that it was trained with"
            )


def make_released_name(name: str) -> str:
    """The name of a student's weight in its file; for the encoder it is timm's name."""
    return name.removeprefix(PREFIX)


def _own_name(released: str, file: str) -> str:
    return f"{PREFIX}{released}" if file == ENCODER else released


def _cast(source: Source, name: str, dtype: torch.dtype) -> Tensor:
    tensor = source.read(name)
    cast = tensor.to(dtype)
    if not cast.isfinite().all():
        if tensor.isfinite().all():
            raise UserError(
                f"--dtype: {name} has values up to {tensor.abs().max():.3g}, too large for {dtype}; give bf16 or fp32"
            )
        raise UserError(
            f"RUN: {name} in {source.checkpoint.folder} is not finite; release an earlier step (--step)"
        )
    return cast
