"""Checkpoint folders. A folder such as `step_00001000` holds one safetensors file of fragments per rank, and
`complete.json`, which is written last: a folder without it is not a checkpoint. Torch-free.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from uniemox_dist.checkpoints.complete_entries import COMPLETE, find_missing_entry, find_wrong_entry
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, sha256_file
from uniemox_dist.core.formatting import cut, short

FIXED = "fixed.safetensors"
FORMAT = "uniemox-checkpoint"
FORMAT_VERSION = 1
NAME = re.compile(r"step_(\d{8})")
UNREADABLE = "cannot be read"
"""Part of an error message about a file whose disk does not answer; its content may be intact."""
_NO_JSON = (json.JSONDecodeError, UnicodeDecodeError)
SET_ASIDE = re.compile(r"step_(\d{8})\.damaged.*")


def step_folder(step: int) -> str:
    """The folder name of a step's checkpoint."""
    return f"step_{step:08d}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the content of its complete.json."""

    folder: Path
    info: dict[str, Any]
    contents: dict[str, bytearray] = field(default_factory=dict, compare=False, repr=False)
    """Files in memory, by name. A rank that hashes its files before it loads them reads them once."""

    @property
    def step(self) -> int:
        """Steps done when it was saved."""
        return int(self.info["step"])

    def problem(self, *, hashes: bool, files: Iterable[str] | None = None, keep: bool = False) -> str | None:
        """Returns the first problem of its files, or None. Always checks sizes; checks hashes on request, and then can
        keep the files that it has read in `contents`."""
        own = self.own_problem()
        if own is not None:
            return own
        names = self.info["files"] if files is None else files
        for name in names:
            facts = self.info["files"][name]
            path = self.folder / name
            # Before memory is allocated for as many bytes as complete.json states.
            problem = find_file_problem(path, facts, hashes=False) if keep else None
            content = bytearray(facts["bytes"]) if keep and problem is None else None
            problem = problem or find_file_problem(path, facts, hashes=hashes, content=content)
            if problem is not None:
                return problem
            if content is not None:
                self.contents[name] = content
        return None

    def own_problem(self) -> str | None:
        """Returns the problem of complete.json if it changed since it was read or lacks an entry, otherwise None."""
        if self.info.get("sha256", digest(self.info)) != digest(self.info):
            return f"{self.folder / COMPLETE} was altered: its SHA-256 differs"
        missing = find_missing_entry(self.info)
        return None if missing is None else f"{self.folder / COMPLETE} {missing}"

    @property
    def completed(self) -> float | None:
        """When it was completed, in seconds since 1970; None if it was deleted meanwhile."""
        try:
            return (self.folder / COMPLETE).stat().st_mtime
        except OSError:
            return None

    @property
    def bytes(self) -> int:
        """Size of its files, according to complete.json."""
        return sum(facts["bytes"] for facts in self.info["files"].values())


def find_file_problem(
    path: Path, facts: dict[str, Any], *, hashes: bool, content: bytearray | None = None
) -> str | None:
    """Returns the problem of a file for which complete.json states these facts, or None. If it hashes the file,
    `content` receives the bytes."""
    try:
        found = path.stat().st_size
        if found != facts["bytes"]:
            return f"{path} has {found} bytes instead of {facts['bytes']}"
        if hashes and sha256_file(path, content) != facts["sha256"]:
            return f"{path} was altered: its SHA-256 differs"
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} {UNREADABLE}: {error.strerror}"
    return None


def digest(info: dict[str, Any]) -> str:
    """The hash of complete.json without its entry `sha256`, which contains this hash."""
    return sha256_bytes(canonical_json({key: value for key, value in info.items() if key != "sha256"}))


def list_complete_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints below a run's checkpoints/, oldest first."""
    return sorted(_complete(folder), key=lambda checkpoint: checkpoint.step)


def _complete(folder: Path) -> Iterator[Checkpoint]:
    for path in folder.glob("step_*"):
        checkpoint = read_checkpoint(path)
        if checkpoint is not None:
            yield checkpoint


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The complete checkpoint in a folder of that name; None if there is none that this version can read."""
    try:
        return _read(path) if NAME.fullmatch(path.name) else None
    except (OSError, ValueError):  # retention may just have deleted it
        return None


def _read(path: Path) -> Checkpoint:
    """Reads a checkpoint. Raises ValueError with the reason if complete.json is invalid, or OSError."""
    try:
        return _parse(path)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _parse(path: Path) -> Checkpoint:
    info = read_json(path / COMPLETE)
    if not isinstance(info, dict) or info.get("format") != FORMAT:
        raise ValueError(f"is not a {FORMAT}")
    version = info.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        raise ValueError(f"is of format {version}, which a newer uniemox-dist wrote")
    if "sha256" in info and info["sha256"] != digest(info):
        raise ValueError("was altered: its SHA-256 differs")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(f"has format_version={cut(short(version), 80)} instead of {FORMAT_VERSION}")
    if (wrong := find_wrong_entry(info)) is not None:
        raise ValueError(wrong)
    if info["step"] != _step(path):
        raise ValueError(f"is that of step {info['step']}")
    return Checkpoint(path, info)


def list_unreadable(folder: Path) -> list[tuple[Path, str]]:
    """Folders below a run's checkpoints/ with a checkpoint's name and an invalid complete.json, each with the reason. A
    folder without that file was never complete and is not listed.

    Raises:
        OSError: if one cannot be read; its content may be intact.
    """
    found = []
    for path in sorted(folder.glob("step_*")):
        if NAME.fullmatch(path.name) and (path / COMPLETE).exists():
            try:
                _read(path)
            except FileNotFoundError:
                continue
            except ValueError as error:
                text = "is not valid JSON" if isinstance(error, _NO_JSON) else error
                found.append((path, f"{path / COMPLETE} {text}"))
    return found


def find_newest_complete(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint below a run's checkpoints/, by its name; does not check its files."""
    names = sorted((p for p in folder.glob("step_*") if NAME.fullmatch(p.name)), reverse=True)
    return next((found for path in names if (found := read_checkpoint(path)) is not None), None)


def list_incomplete(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint and no complete.json that this version reads."""
    return sorted(p for p in folder.glob("step_*") if NAME.fullmatch(p.name) and read_checkpoint(p) is None)


def list_damaged(folder: Path) -> list[Path]:
    """Damaged checkpoints below a run's checkpoints/, which were renamed."""
    return sorted(p for p in folder.glob("step_*") if SET_ASIDE.fullmatch(p.name) and p.is_dir())


def list_unfinished(folder: Path) -> list[Path]:
    """Temporary folders of saves and deletions that were killed or are still running."""
    return sorted(
        p for p in folder.glob(".step_*") if NAME.match(p.name[1:]) and p.suffix in (".tmp", ".deleted")
    )


def count_bytes_below(path: Path) -> int:
    """Size of all files in a folder."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # deleted meanwhile
            continue
    return total


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def set_aside(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it is not read again and its step can be saved again."""
    for number in count(1):
        aside = folder.with_name(f"{folder.name}.damaged" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            break
    folder.rename(aside)
    return aside


def find_newest_sound(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint whose files match their hashes, and the problems of newer ones."""
    problems: list[str] = []
    for checkpoint in reversed(list_complete_checkpoints(folder)):
        problem = checkpoint.problem(hashes=True)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    return None, problems


def find_missing_weights(path: Path) -> str | None:
    """The reason why a path cannot name weights, as `model.init_from` takes them; None for a file, and for a folder of
    a release, classifier, run or checkpoint, or in timm's local-dir layout. Opens no file."""
    if path.is_file():
        return None
    if not path.is_dir():
        return "no such file or folder"
    if any((path / name).is_file() for name in ("uniemox.json", COMPLETE, "config.json")):
        return None
    if (path / "checkpoints").is_dir():
        return None
    return "holds no weights; give a folder in timm's local-dir layout, a release, or a run's folder"


def open_checkpoint(path: str | Path, field: str) -> Checkpoint:
    """Opens a checkpoint by its folder, or the newest intact one of a run's folder, and checks the hashes of its files.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    path = Path(path)
    if not (path / COMPLETE).is_file() and path.is_dir():
        checkpoint, problems = find_newest_sound(path / "checkpoints")
        if checkpoint is None:
            reason = f" ({problems[0]})" if problems else ""
            raise UserError(f"{field}={path}: has no complete checkpoint{reason}; let the run save one first")
        return checkpoint
    checkpoint = find_checkpoint(path, field)
    problem = checkpoint.problem(hashes=True)
    if problem is not None:
        raise UserError(f"{field}={path}: {problem}; use another checkpoint")
    return checkpoint


def find_checkpoint(path: str | Path, field: str) -> Checkpoint:
    """Opens a checkpoint by its folder, or the newest complete one of a run's folder; does not check its files.

    Raises:
        UserError: if there is none, or another version wrote it.
    """
    path = Path(path)
    if (path / COMPLETE).is_file():
        if not NAME.fullmatch(path.name):
            raise UserError(
                f"{field}={path}: a checkpoint's folder is named step_ and eight digits; give that one"
            )
        try:
            return _read(path)
        except (OSError, ValueError) as error:
            reason = "is not valid JSON" if isinstance(error, _NO_JSON) else error
            raise UserError(f"{field}={path}: {COMPLETE} {reason}; use another checkpoint") from None
    if path.is_file():
        raise UserError(
            f"{field}={path}: is a file; give a checkpoint's folder, or a run's (it holds checkpoints/)"
        )
    if not path.is_dir():
        raise UserError(f"{field}={path}: no such folder; give a run's folder (it holds checkpoints/)")
    complete = list_complete_checkpoints(path / "checkpoints")
    if not complete:
        raise UserError(f"{field}={path}: has no complete checkpoint; let the run save one first")
    return complete[-1]
