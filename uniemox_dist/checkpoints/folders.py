"""Checkpoint folders. One, `step_00001000`, holds a safetensors file of fragments per rank, and `complete.json`, which
is written last: a folder without it, or without its name, does not exist for anyone. Torch-free.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, sha256_file

COMPLETE = "complete.json"
FIXED = "fixed.safetensors"
FORMAT = "uniemox-checkpoint"
FORMAT_VERSION = 1
NAME = re.compile(r"step_(\d{8})")


def step_folder(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:08d}"


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
