"""The fragment index of complete.json: which part file holds which range of which parameter. Torch-free.

Readers find the files that overlap a range without opening the others. The index is the entry `fragments`:

    {"encoder.blocks.0.attn.qkv.weight": {"fp32,exp_avg,exp_avg_sq,ema": "0:0+4608*384"}}

The inner keys are kinds of state that are cut alike. A run `PART:START+LENGTH*COUNT` describes COUNT part files, the
first with number PART: each holds LENGTH numbers of the flattened parameter, one range after the other, the first from
START on. Runs are separated by spaces. ZeRO cuts evenly, so a parameter has few runs for any number of ranks.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

FRAGMENTS = "fragments"
"""The entry of complete.json."""
_RUN = re.compile(r"(\d+):(\d+)\+(\d+)\*(\d+)")


def part_name(number: int) -> str:
    """The file name of a rank's part."""
    return f"part_{number:05d}.safetensors"


def fragment_key(name: str, start: int, kind: str) -> str:
    """The tensor name of a fragment in its file."""
    return f"{name}@{start}@{kind}"


def parse_key(key: str) -> tuple[str, int, str]:
    """The parameter, start and kind of a fragment's tensor name.

    Raises:
        ValueError: if it is no such name.
    """
    name, start, kind = key.rsplit("@", 2)
    return name, int(start), kind


@dataclass(frozen=True)
class Run:
    """Ranges of equal length, one after the other, in part files with consecutive numbers."""

    part: int
    start: int
    length: int
    count: int = 1

    @property
    def end(self) -> int:
        """The end of the last range."""
        return self.start + self.length * self.count

    def overlaps(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The ranges that overlap [start, end): (part, start, length) of each."""
        first = max(0, (start - self.start) // self.length)
        last = min(self.count - 1, (end - 1 - self.start) // self.length)
        for i in range(first, last + 1):
            yield self.part + i, self.start + i * self.length, self.length

    def __str__(self) -> str:
        return f"{self.part}:{self.start}+{self.length}*{self.count}"


class FragmentIndex:
    """The runs of every parameter and kind."""

    def __init__(self, runs: Mapping[tuple[str, str], Sequence[Run]]) -> None:
        self._runs = runs
        self.kinds = {kind for _, kind in runs}

    def find(self, name: str, kind: str, start: int, length: int) -> list[tuple[int, int, int]]:
        """The stored ranges that overlap `length` numbers of a parameter from `start` on: (part, start, length)."""
        return [
            found for run in self._runs.get((name, kind), ()) for found in run.overlaps(start, start + length)
        ]

    @classmethod
    def parse(cls, info: Mapping[str, Any]) -> "FragmentIndex | None":
        """Reads the index of a complete.json; None if it has none, as those of earlier versions.

        Raises:
            ValueError: if it is invalid, names files that the checkpoint lacks, or does not cover each parameter once.
        """
        if FRAGMENTS not in info:
            return None
        runs: dict[tuple[str, str], list[Run]] = {}
        try:
            for name, cuts in info[FRAGMENTS].items():
                size = math.prod(info["parameters"][name])
                for kinds, text in cuts.items():
                    found = _parse_runs(name, text, size, info["files"])
                    runs.update({(name, kind): found for kind in kinds.split(",")})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"is invalid: {error!r}") from None
        if lacking := [name for name in info["parameters"] if (name, "fp32") not in runs]:
            raise ValueError(f"lacks {lacking[0]}")
        return cls(runs)


def _parse_runs(name: str, text: str, size: int, files: Mapping[str, Any]) -> list[Run]:
    found = []
    for word in text.split():
        match = _RUN.fullmatch(word)
        if match is None or not int(match[3]) or not int(match[4]):
            raise ValueError(f"has the invalid run {word} of {name}")
        run = Run(*map(int, match.groups()))
        for part in (run.part, run.part + run.count - 1):
            if part_name(part) not in files:
                raise ValueError(f"names {part_name(part)}, which is not in files")
        found.append(run)
    end = 0
    for run in sorted(found, key=lambda run: run.start):
        if run.start != end:
            raise ValueError(f"does not cover {name} exactly once at element {min(end, run.start)}")
        end = run.end
    if end != size:
        raise ValueError(f"covers {end} of {size} numbers of {name}")
    return found


Cuts = list[tuple[str, str, int, int]]
"""The fragments of one part: parameter, kinds joined by commas, start, length."""


def list_cuts(lengths: Mapping[str, int]) -> Cuts:
    """The fragments of a part, from the lengths of its tensors by their keys."""
    kinds: dict[tuple[str, int, int], list[str]] = {}
    for key, length in lengths.items():
        name, start, kind = parse_key(key)
        kinds.setdefault((name, start, length), []).append(kind)
    return [(name, ",".join(found), start, length) for (name, start, length), found in kinds.items()]


def build_index(parts: Iterable[Cuts]) -> dict[str, dict[str, str]]:
    """The entry `fragments` of a checkpoint whose parts, in the order of their numbers, hold these fragments."""
    found: dict[str, dict[str, list[Run]]] = {}
    for part, cuts in enumerate(parts):
        for name, kinds, start, length in cuts:
            if not length:
                continue
            runs = found.setdefault(name, {}).setdefault(kinds, [])
            last = runs[-1] if runs else None
            if last and (part, start, length) == (last.part + last.count, last.end, last.length):
                runs[-1] = replace(last, count=last.count + 1)
            else:
                runs.append(Run(part, start, length))
    return {
        name: {kinds: " ".join(map(str, runs)) for kinds, runs in cuts.items()}
        for name, cuts in found.items()
    }
