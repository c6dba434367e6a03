"""The fingerprint of a picture: the low frequencies of its brightness, for the whole picture and for parts of it.

It is the transform of pHash (Zauner 2010) without the last step, which keeps only the signs. In drawings many
coefficients are close to zero, and there re-encoding flips their signs.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from shards.overlap.align import WHOLE, Frame

DECODED_SIDE = 256
"""JPEGs are decoded at a reduced size with no side below this."""
PROFILE_SIDE = 256
GRID, KEPT = 32, 8
WIDTH = KEPT * KEPT - 1
SCALE = 127.0
WINDOWS: tuple[Frame, ...] = (
    (0.05, 0.05, 0.95, 0.95),
    (0.0, 0.0, 0.925, 0.925),
    (0.075, 0.0, 1.0, 0.925),
    (0.0, 0.075, 0.925, 1.0),
    (0.075, 0.075, 1.0, 1.0),
)
"""Parts that are compared with the whole of another picture, which may be a crop of this one."""
SAME_COLOUR = 24
"""Grey levels by which pixels of a border may differ from its colour; JPEG adds noise."""
PAPER = 0.9
"""Smallest share of a row that has the border's colour."""
PAPER_WITH_TEXT = 0.5
"""The same for a whole caption bar, text included."""
LEAST_BORDER, MOST_BORDER = 0.015, 0.7
"""Of the side; thinner borders do not matter, and what is nearly all border has no content to compare."""
HIGHEST_BAR = 0.35
FLAT = 2.0
"""Standard deviation, in grey levels, below which a picture shows nothing."""

_FREQUENCIES = np.arange(KEPT)
_COSINES = np.cos(np.pi * _FREQUENCIES[:, None] * (2 * np.arange(GRID)[None] + 1) / (2 * GRID)).astype(
    np.float32
)
_WEIGHT = np.hypot(_FREQUENCIES[:, None], _FREQUENCIES[None]).astype(np.float32) ** 0.5
MIRROR = np.where(np.arange(1, KEPT * KEPT) % KEPT % 2 == 1, -1, 1).astype(np.int8)
"""Turns a fingerprint into that of the mirrored picture: odd horizontal frequencies change their sign."""


@dataclass(frozen=True)
class Fingerprint:
    """The parts of one picture that are compared with others. Empty if it shows nothing: plain colour."""

    frames: tuple[Frame, ...]
    """The whole picture, its content if it has a border or a caption bar, and the windows."""
    wholes: int
    """Number of leading frames that are not windows."""
    values_FW: np.ndarray
    """int8, one row for each frame."""

    @property
    def contents(self) -> tuple[Frame, ...]:
        """The parts inside a border or beside a caption bar."""
        return tuple(frame for frame in self.frames[: self.wholes] if frame != WHOLE)


def take_fingerprint(rgb_HW3: np.ndarray) -> Fingerprint:
    """The fingerprint of a decoded picture."""
    grey = Image.fromarray(rgb_HW3).convert("L")
    rows: list[np.ndarray] = []
    kept: list[Frame] = []
    wholes = 0
    contents = find_contents(grey)
    for number, frame in enumerate([WHOLE, *contents, *WINDOWS]):
        values = _transform(grey, frame)
        if values is not None:
            rows.append(values)
            kept.append(frame)
            wholes += number <= len(contents)
    return Fingerprint(tuple(kept), wholes, np.array(rows, np.int8).reshape(-1, WIDTH))


def _transform(grey: Image.Image, frame: Frame) -> np.ndarray | None:
    width, height = grey.size
    box = (frame[0] * width, frame[1] * height, frame[2] * width, frame[3] * height)
    small = np.asarray(grey.resize((GRID, GRID), Image.Resampling.BILINEAR, box=box), np.float32)
    if small.std() < FLAT:
        return None
    found_KK = (_COSINES @ small @ _COSINES.T) * _WEIGHT
    values = found_KK.ravel()[1:]
    return np.round(values / np.linalg.norm(values) * SCALE).astype(np.int8)


def find_contents(grey: Image.Image) -> list[Frame]:
    """The part inside a plain border, and the part that remains without a caption bar and a border; up to two."""
    size = (min(grey.width, PROFILE_SIDE), min(grey.height, PROFILE_SIDE))
    values = np.asarray(grey.resize(size, Image.Resampling.NEAREST), np.int16)
    height = len(values)
    found: list[Frame] = []
    above, below = _bar(values), _bar(values[::-1])
    for top, bottom in ((0, 0), (above, 0), (0, below)):
        if (top, bottom) != (0, 0) and not top + bottom:
            continue
        frame = _inside_border(values[top : height - bottom], top / height, bottom / height)
        if frame is not None and frame not in found:
            found.append(frame)
    return found


def _inside_border(values_RC: np.ndarray, above: float, below: float) -> Frame | None:
    """The part inside a border; `above` and `below` were cut off before. None if nothing is cut off."""
    share = 1 - above - below
    top, bottom = (_border(values) * share for values in (values_RC, values_RC[::-1]))
    left, right = _border(values_RC.T), _border(values_RC.T[::-1])
    top, bottom = top + above, bottom + below
    if top + bottom > MOST_BORDER or left + right > MOST_BORDER:
        return None
    if max(top, bottom, left, right) < LEAST_BORDER:
        return None
    return left, top, 1 - right, 1 - bottom


def _paper(values_RC: np.ndarray) -> np.ndarray:
    """The share of each row that has the colour of the first one."""
    return np.asarray((np.abs(values_RC - np.median(values_RC[0])) <= SAME_COLOUR).mean(1))


def _border(values_RC: np.ndarray) -> float:
    """The share of leading rows that have the colour of the first one."""
    inside = np.flatnonzero(_paper(values_RC) < PAPER)
    return (int(inside[0]) if len(inside) else len(values_RC)) / len(values_RC)


def _bar(values_RC: np.ndarray) -> int:
    """The number of leading rows that are a caption bar: text on paper, ended by a row of paper and one that is not.
    The highest such block counts; 0 if there is none."""
    paper_R = _paper(values_RC)
    ends = np.flatnonzero((paper_R[:-1] >= PAPER) & (paper_R[1:] < PAPER)) + 1
    ends = ends[(ends <= HIGHEST_BAR * len(values_RC))]
    shares_R = np.cumsum(paper_R) / np.arange(1, len(paper_R) + 1)
    ends = ends[shares_R[ends - 1] >= PAPER_WITH_TEXT]
    plain = np.flatnonzero(paper_R < PAPER)
    first = int(plain[0]) if len(plain) else len(paper_R)
    return int(ends[-1]) if len(ends) and ends[-1] > first else 0
