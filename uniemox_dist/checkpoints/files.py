"""Checkpoints as files. A folder `step_00001000` holds one safetensors file of fragments per rank, and
`complete.json`, which is written last: a folder without it, or without its name, does not exist for anyone.

A fragment `NAME@START@KIND` holds the numbers START… of the flattened parameter NAME; kinds are the fp32 weights
and both Adam moments, and of the encoder, where the run keeps one, the moving average. Reading copies overlaps, so that
any number of ranks and any ZeRO stage reads any other's. Parameters that are not trained (fixed positions) stand whole,
under their names, in `fixed.safetensors`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, remove_dir, sha256_file

COMPLETE = "complete.json"
FIXED = "fixed.safetensors"
FORMAT = "uniemox-checkpoint"
FORMAT_VERSION = 1
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
EMA = "ema"
NAME = re.compile(r"step_(\d{8})")


def step_folder(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:08d}"


def fragment_key(name: str, start: int, kind: str) -> str:
    """The tensor name of a fragment."""
    return f"{name}@{start}@{kind}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder with its complete.json."""

    folder: Path
    info: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.info["step"])

    def problem(self, *, hashes: bool) -> str | None:
        """What is wrong with its files, if anything: sizes always, hashes on request."""
        for name, facts in self.info["files"].items():
            path = self.folder / name
            if not path.is_file():
                return f"{path} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{path} has {path.stat().st_size} bytes instead of {facts['bytes']}"
            if hashes and sha256_file(path) != facts["sha256"]:
                return f"{path} was altered: its SHA-256 differs"
        return None


def complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints below a run's checkpoints/, oldest first."""
    return sorted(_complete(folder), key=lambda checkpoint: checkpoint.step)


def _complete(folder: Path) -> Iterator[Checkpoint]:
    for path in folder.glob("step_*"):
        if NAME.fullmatch(path.name) and (path / COMPLETE).is_file():
            try:
                info = read_json(path / COMPLETE)
            except ValueError:
                continue
            if info.get("format") == FORMAT and info.get("format_version", 0) <= FORMAT_VERSION:
                yield Checkpoint(path, info)


def newest_sound(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint whose files have their hashes, and what was wrong with newer ones."""
    problems: list[str] = []
    for checkpoint in reversed(complete_checkpoints(folder)):
        problem = checkpoint.problem(hashes=True)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    return None, problems


def open_checkpoint(path: str | Path, field: str) -> Checkpoint:
    """A checkpoint by its folder, or the newest sound one of a run's folder.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = Path(path)
    if (path / COMPLETE).is_file():
        found = [c for c in _complete(path.parent) if c.folder.name == path.name]
        if not found:
            raise UserError(f"{field}={path}: {COMPLETE} is not one this version reads; update uniemox-dist")
        problem = found[0].problem(hashes=True)
        if problem is not None:
            raise UserError(f"{field}={path}: {problem}; use another checkpoint")
        return found[0]
    if not path.is_dir():
        raise UserError(f"{field}={path}: no such folder; give a run's folder (it holds checkpoints/)")
    checkpoint, problems = newest_sound(path / "checkpoints")
    if checkpoint is None:
        reason = f" ({problems[0]})" if problems else ""
        raise UserError(f"{field}={path}: has no complete checkpoint{reason}; let the run save one first")
    return checkpoint


def prune(folder: Path, keep_last: int) -> list[str]:
    """Deletes the oldest complete checkpoints beyond `keep_last`; returns their names."""
    doomed = complete_checkpoints(folder)[: -max(1, keep_last)]
    for checkpoint in doomed:
        remove_dir(checkpoint.folder)
    return [checkpoint.folder.name for checkpoint in doomed]


def fixed_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that are not trained, fp32 on the CPU, for checkpoints."""
    fixed = [(name, p) for name, p in module.named_parameters() if not p.requires_grad]
    return {name: p.detach().to("cpu", torch.float32, copy=True).contiguous() for name, p in fixed}


def fixed_tensors(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The parameters of a checkpoint that were not trained; none in one of an earlier version, which made them anew."""
    return load_file(checkpoint.folder / FIXED) if FIXED in checkpoint.info["files"] else {}


@torch.no_grad()
def load_fixed(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Gives a module the parameters that a checkpoint's run did not train: they may come from `model.init_from`.

    Raises:
        UserError: if one has another shape.
    """
    there = fixed_tensors(checkpoint)
    for name, p in module.named_parameters():
        if not p.requires_grad and name in there:
            if there[name].shape != p.shape:
                raise UserError(
                    f"{checkpoint.folder}: is of another model: {name} is {list(there[name].shape)} there and "
                    f"{list(p.shape)} here; set model.* as in its run"
                )
            p.copy_(there[name])


class FragmentReader:
    """Ranges of parameters from a checkpoint's files, which stay on disk."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.shapes: dict[str, list[int]] = checkpoint.info["parameters"]
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for name in checkpoint.info["files"]:
            if name.endswith(".safetensors") and name != FIXED:
                try:
                    file = safe_open(checkpoint.folder / name, "pt")
                except SafetensorError as error:
                    raise UserError(
                        f"{checkpoint.folder / name}: not readable ({error}); use another checkpoint"
                    ) from None
                for key in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                    parameter, start, kind = key.rsplit("@", 2)
                    self._pieces.setdefault((parameter, kind), []).append((int(start), file.get_slice(key)))

    @property
    def has_ema(self) -> bool:
        """Whether it holds a moving average of the encoder's weights."""
        return any(kind == EMA for _, kind in self._pieces)

    def read(self, name: str, kind: str, start: int, length: int) -> Tensor:
        """`length` fp32 numbers of the flattened parameter from `start` on.

        Raises:
            UserError: if the checkpoint does not cover that range.
        """
        out = torch.empty(length)
        covered = 0
        for first, piece in self._pieces.get((name, kind), []):
            a, b = max(start, first), min(start + length, first + piece.get_shape()[0])
            if a < b:
                out[a - start : b - start] = piece[a - first : b - first]
                covered += b - a
        if covered != length:
            raise UserError(
                f"{self.checkpoint.folder}: holds {covered} of {length} numbers of {name} ({kind})"
            )
        return out

    def parameter(self, name: str, kind: str = "fp32") -> Tensor:
        """A whole parameter in its shape."""
        shape = self.shapes[name]
        return self.read(name, kind, 0, int(torch.Size(shape).numel())).view(shape)
