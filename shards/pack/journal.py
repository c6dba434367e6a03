"""The journal of a pack, from which `--resume` continues: its plan, and one line per complete shard."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from shards.format.entries import ShardEntry
from shards.format.index import index_path
from shards.pack.prepare import Rejected
from shards.storage import Place
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, sha256_file, write_json


@dataclass(frozen=True)
class Step:
    """A complete shard, and the position of the pack at that time."""

    split: str
    entry: ShardEntry
    next: int
    """Position in the order of packing at which the next shard begins."""
    refused: list[tuple[int, Rejected]]
    """(record number, refusal) of the records refused since the previous step."""
    converted: dict[str, int] = field(default_factory=dict)
    """The shard's pictures that were converted, by their original format."""

    def to_json(self) -> dict[str, Any]:
        """The step as JSON values."""
        return {
            "split": self.split,
            "entry": asdict(self.entry),
            "next": self.next,
            "refused": [[number, *vars(rejected).values()] for number, rejected in self.refused],
            **({"converted": self.converted} if self.converted else {}),
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Step":
        """The step of `to_json`."""
        refused = [(int(number), Rejected(*rest)) for number, *rest in record["refused"]]
        entry, converted = ShardEntry(**record["entry"]), record.get("converted", {})
        return cls(record["split"], entry, record["next"], refused, converted)


class Journal:
    """The steps of a pack, appended durably. Each line begins with its own hash; a damaged line counts as not
    written."""

    def __init__(self, folder: Path, plan: dict[str, Any]) -> None:
        """Opens the journal in `folder`.

        Args:
            plan: everything that determines the bytes: the settings, and the listed records.

        Raises:
            UserError: if the folder contains steps of another plan, or their plan cannot be read.
        """
        self.path = folder / "journal.jsonl"
        self.shards: Place = folder.parent
        """The folder of the complete shards."""
        if has_steps(folder):
            plan = json.loads(canonical_json(plan))
            if changes := describe_changes(_read_plan(folder / "plan.json"), plan):
                raise UserError(
                    f"OUT={folder.parent}: an interrupted pack cannot resume: {changes}; use its original settings "
                    "and source, or delete it"
                )
        else:
            write_json(folder / "plan.json", plan)
            self.path.touch()

    def steps(self) -> list[Step]:
        """The finished steps, up to the first that is unreadable or whose files have changed. Removes the rest."""
        return list(self._read_steps())

    def append(self, step: Step) -> None:
        """Adds a step and returns once it would survive a power failure."""
        text = canonical_json(step.to_json())
        with open(self.path, "ab") as file:
            file.write(sha256_bytes(text).encode() + b" " + text + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def wait(self) -> None:
        """Returns when all steps are durable; here `append` does."""

    def _read_steps(self) -> Iterator[Step]:
        kept = 0
        for line in self.path.read_bytes().split(b"\n")[:-1]:
            sha256, _, text = line.partition(b" ")
            if sha256 != sha256_bytes(text).encode():
                break
            step = Step.from_json(json.loads(text))
            if not _is_complete(self.shards / step.split, step.entry):
                break
            kept += len(line) + 1
            yield step
        os.truncate(self.path, kept)


def has_steps(folder: Path) -> bool:
    """Whether an interrupted pack left any complete shard."""
    journal = folder / "journal.jsonl"
    return journal.is_file() and journal.stat().st_size > 0


def _is_complete(folder: Path, entry: ShardEntry) -> bool:
    """Whether a shard and its index have the bytes that were written. Reading them is fast compared with packing."""
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
            f"OUT={partial}: an interrupted pack cannot resume: its {path.parent.name}/{path.name} is missing or "
            f"damaged; delete {partial} and pack again"
        ) from None


def describe_changes(stated: dict[str, Any], plan: dict[str, Any]) -> str:
    """Describes the differences; "" if there are none."""
    if (begun := stated.get("command", "pack")) != plan.get("command", "pack"):
        return f"`shards {begun}` has begun it"
    before, now = stated["settings"], plan["settings"]
    settings = [
        f"{name}={now[name]!r} was {before.get(name)!r}" for name in now if now[name] != before.get(name)
    ]
    if plan["part"] != stated.get("part"):
        settings.append(f"part={_format_part(plan['part'])} was {_format_part(stated.get('part'))}")
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


def _format_part(part: list[int] | None) -> str:
    return "/".join(map(str, part)) if isinstance(part, list) else "none"
