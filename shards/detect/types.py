"""`Person`, a person in a picture, and the interface of person detectors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

BOX_DECIMALS = 5  # 0.00001 of a side: finer than a pixel up to 100,000 px
SCORE_DECIMALS = 4


@dataclass(frozen=True)
class Person:
    """One person in one picture.

    `box` is clipped and rounded and `score` is rounded, because annotations often reach over the picture's edge, and
    fixed decimals keep the bytes of a shard independent of float noise.
    Raises ValueError for a box that is not finite or whose corners are swapped, and for a score outside 0..1.
    """

    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 as fractions (0..1) of the upright picture's width and height."""
    score: float
    """Confidence 0..1; 1 where a human annotated the person."""
    labels: dict[str, Any] = field(default_factory=dict)
    """The person's own labels, if the source has them."""

    def __post_init__(self) -> None:
        x1, y1, x2, y2 = (float(value) for value in self.box)
        if not all(map(math.isfinite, (x1, y1, x2, y2, self.score))):
            raise ValueError(f"a person's box and score must be finite, got {self.box} and {self.score}")
        if x2 < x1 or y2 < y1:
            raise ValueError(f"a person's box is (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, got {self.box}")
        if not 0 <= self.score <= 1:
            raise ValueError(f"a person's score is between 0 and 1, got {self.score}")
        object.__setattr__(self, "box", (_fraction(x1), _fraction(y1), _fraction(x2), _fraction(y2)))
        object.__setattr__(self, "score", round(float(self.score), SCORE_DECIMALS))

    def to_json(self) -> dict[str, Any]:
        """The person as JSON values; `labels` only if there are any."""
        entry: dict[str, Any] = {"box": list(self.box), "score": self.score}
        if self.labels:
            entry["labels"] = dict(self.labels)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Person:
        """The inverse of `to_json`."""
        x1, y1, x2, y2 = entry["box"]
        return cls(box=(x1, y1, x2, y2), score=entry["score"], labels=dict(entry.get("labels", {})))


NONE_INSIDE = "no annotated person's box is inside the picture"
"""Why a picture is refused of whose annotated persons none remains."""


def by_area(persons: Iterable[Person]) -> tuple[Person, ...]:
    """The persons of whom something is inside the picture, the largest first, and equally large ones in their order."""
    areas = [((p.box[2] - p.box[0]) * (p.box[3] - p.box[1]), p) for p in persons]
    # Boxes have 5 decimals, so an area beyond 10 decimals is float noise, which must not order equal boxes.
    return tuple(person for area, person in sorted(areas, key=lambda pair: -round(pair[0], 10)) if area > 0)


def _fraction(value: float) -> float:
    return round(min(max(value, 0.0), 1.0), BOX_DECIMALS)


class PersonDetector(Protocol):
    """Finds persons in pictures."""

    name: str
    """The detector's name for `--persons`."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON values that determine the results (weights, thresholds), for the manifest's provenance."""
        ...

    def detect(self, pictures: Sequence[np.ndarray]) -> list[list[Person]]:
        """The persons of each picture, by falling score.

        Each picture is H×W×3 uint8 RGB, upright; sizes may differ. The result for one picture does not depend on the
        others in the call.
        """
        ...
