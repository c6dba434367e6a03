"""What an interrupted pack has done: settings, and one line for each shard that is whole."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.manifest import ShardEntry
from shards.prepare import Rejected
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import canonical_json, write_json


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
    """The steps of a pack, appended durably: a line that is not whole was never written."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        """`plan` is what decides the bytes: settings and what the source listed.

        Raises:
            UserError: if the folder holds steps of another plan.
        """
        self.path = folder / "journal.jsonl"
        if self.path.is_file():
            stated = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
            stated, plan = json.loads(canonical_json(stated)), json.loads(canonical_json(plan))
            if stated != plan:
                changed = [key for key in plan if plan[key] != stated.get(key)]
                what = "its source has changed" if changed == ["source_sha256"] else _changed(stated, plan)
                raise UserError(
                    f"OUT={folder.parent}: an interrupted pack cannot go on: {what}; use the settings and source "
                    f"that it began with, or delete it"
                )
        else:
            write_json(folder / "plan.json", plan)
            self.path.touch()

    def steps(self, out: Path) -> list[Step]:
        """The steps done, up to the first whose files are not there."""
        return list(self._whole(out))

    def append(self, step: Step) -> None:
        """Adds a step; it survives a power cut when this returns."""
        line = {
            "split": step.split,
            "entry": asdict(step.entry),
            "next": step.next,
            "refused": [[number, *vars(rejected).values()] for number, rejected in step.refused],
        }
        with open(self.path, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _whole(self, out: Path) -> Iterator[Step]:
        kept = 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            record = json.loads(line)
            entry = ShardEntry(**record["entry"])
            tar = out / record["split"] / entry.name
            if not tar.is_file() or tar.stat().st_size != entry.bytes:
                break
            kept += len(line)
            refused = [(int(number), Rejected(*rest)) for number, *rest in record["refused"]]
            yield Step(record["split"], entry, record["next"], refused)
        os.truncate(self.path, kept)


def has_steps(folder: Path) -> bool:
    """Whether an interrupted pack left anything worth going on with."""
    journal = folder / "journal.jsonl"
    return journal.is_file() and journal.stat().st_size > 0


def _changed(stated: dict[str, Any], plan: dict[str, Any]) -> str:
    """Which settings differ, in words."""
    before, now = stated.get("settings", {}), plan.get("settings", {})
    names = [name for name in now if now[name] != before.get(name)]
    return "other settings: " + ", ".join(f"{name}={now[name]!r} was {before.get(name)!r}" for name in names)
