"""What validations found, in RUN/validation.jsonl: by it a resumed run knows its best weights and its patience."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniemox_dist.runs.folder import append_line, read_lines

FILE = "validation.jsonl"


@dataclass(frozen=True)
class History:
    """The looks at the validation split up to some step, each step once, in order."""

    lines: tuple[dict[str, Any], ...]

    @classmethod
    def read(cls, folder: Path, step: int) -> "History":
        """Those up to `step`: what an attempt saw that came further is not this one's; a step's last line counts."""
        found = {
            line["step"]: line for line in read_lines(folder / FILE) if line.get("step", step + 1) <= step
        }
        return cls(tuple(found[number] for number in sorted(found)))

    @property
    def best(self) -> dict[str, Any] | None:
        """The first of those with the best value; a value that is None is worse than any."""
        return max(self.lines, key=_rank, default=None)

    @property
    def in_vain(self) -> int:
        """Looks since the best."""
        best = self.best
        return 0 if best is None else sum(line["step"] > best["step"] for line in self.lines)

    def knows(self, step: int) -> bool:
        """Whether that step was looked at."""
        return any(line["step"] == step for line in self.lines)

    def with_line(self, line: dict[str, Any]) -> "History":
        """With one more."""
        return History((*self.lines, line))


def append(folder: Path, line: dict[str, Any]) -> None:
    """Writes one look down."""
    append_line(folder / FILE, line)


def _rank(line: dict[str, Any]) -> float:
    value = line["value"]
    return float("-inf") if value is None else float(value)
