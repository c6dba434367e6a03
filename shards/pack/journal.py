"""What an interrupted pack has done: settings, and one line for each shard that is whole."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.format.index import index_path
from shards.format.manifest import ShardEntry
from shards.pack.prepare import Rejected
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json


@dataclass(frozen=True)
class Step:
    """A shard that is whole, and how far the pack was then."""

    split: str
    entry: ShardEntry
    next: int
    """Place in the order of packing from which the next shard goes on."""
    refused: list[tuple[int, Rejected]]
    """(record number, why) of what was refused since the step before."""


class Journal:
    """The steps of a pack, appended durably, each line behind its own hash: one that is damaged was never written."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        """`plan` is what decides the bytes: settings and what the source listed.

        Raises:
            UserError: if the folder holds steps of another plan, or their plan cannot be read.
        """
        self.path = folder / "journal.jsonl"
        if has_steps(folder):
            plan = json.loads(canonical_json(plan))
            if changes := _changes(_read_plan(folder / "plan.json"), plan):
                raise UserError(
                    f"OUT={folder.parent}: an interrupted pack cannot go on: {changes}; use the settings and "
                    "source that it began with, or delete it"
                )
        else:
            write_json(folder / "plan.json", plan)
            self.path.touch()

    def steps(self, out: Path) -> list[Step]:
        """The steps done, up to the first that cannot be read, or whose files are not those that were written."""
        return list(self._whole(out))

    def append(self, step: Step) -> None:
        """Adds a step; it survives a power cut when this returns."""
        text = canonical_json(
            {
                "split": step.split,
                "entry": asdict(step.entry),
                "next": step.next,
                "refused": [[number, *vars(rejected).values()] for number, rejected in step.refused],
            }
        )
        with open(self.path, "ab") as file:
            file.write(sha256_bytes(text).encode() + b" " + text + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole(self, out: Path) -> Iterator[Step]:
        kept = 0
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            sha256, _, text = line.partition(b" ")
            if sha256 != sha256_bytes(text).encode():
                break
            record = json.loads(text)
            entry = ShardEntry(**record["entry"])
            if not _is_whole(out / record["split"], entry):
                break
            kept += len(line) + 1
            refused = [(int(number), Rejected(*rest)) for number, *rest in record["refused"]]
            yield Step(record["split"], entry, record["next"], refused)
        os.truncate(self.path, kept)


def has_steps(folder: Path) -> bool:
    """Whether an interrupted pack left anything worth going on with."""
    journal = folder / "journal.jsonl"
    return journal.is_file() and journal.stat().st_size > 0


def _is_whole(folder: Path, entry: ShardEntry) -> bool:
    """Whether a shard and its index are there with the bytes that were written; reading them again costs little
    beside packing them."""
    tar, index = folder / entry.name, index_path(folder, entry.name)
    return (
        tar.is_file()
        and index.is_file()
        and tar.stat().st_size == entry.bytes
        and sha256_file(index) == entry.index_sha256
        and sha256_file(tar) == entry.sha256
    )


def _read_plan(path: Path) -> dict[str, Any]:
    try:
        plan = read_json(path)
        return {**plan, "settings": {**plan["settings"]}}
    except (OSError, ValueError, KeyError, TypeError):
        partial = path.parent.parent
        raise UserError(
            f"OUT={partial}: an interrupted pack cannot go on: its {path.parent.name}/{path.name} is missing or "
            f"damaged; delete {partial} and pack again"
        ) from None


def _changes(stated: dict[str, Any], plan: dict[str, Any]) -> str:
    """What differs, in words; "" if nothing does."""
    before, now = stated["settings"], plan["settings"]
    settings = [
        f"{name}={now[name]!r} was {before.get(name)!r}" for name in now if now[name] != before.get(name)
    ]
    if plan["part"] != stated.get("part"):
        settings.append(f"part={_slashed(plan['part'])} was {_slashed(stated.get('part'))}")
    if settings:
        return f"other settings: {', '.join(settings)}"
    others = [name for name in plan if plan[name] != stated.get(name)]
    if not others:
        return ""
    return (
        "its source has changed"
        if others == ["source_sha256"]
        else f"its {' and '.join(others)} have changed"
    )


def _slashed(part: list[int] | None) -> str:
    return "/".join(map(str, part)) if isinstance(part, list) else "none"
