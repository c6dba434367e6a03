"""Decides whether two pictures are near-copies, and of which kind."""

from dataclasses import dataclass

import numpy as np

from shards.overlap.align import (
    LEAST_SIDE,
    SIDE,
    WHOLE,
    Alignment,
    Frame,
    align,
    make_thumbnail,
    shrink_thumbnail,
)
from shards.overlap.fingerprint import DECODED_SIDE, MIRROR, Fingerprint, take_fingerprint
from shards.pictures.decode import check_picture, decode_picture

HYPOTHESES = 3
"""Pairs of frames that are tried, the most similar first."""
LEAST_CORRELATION, LEAST_DETAIL = 0.85, 0.75
MOST_RESIDUAL, MOST_RESIDUAL_CLIPPED = 32.0, 48.0
"""Grey levels; the second for pictures whose detail agrees very well, since brightening clips light colours."""
CLEAR_DETAIL = 0.9
LEAST_CONTRAST = 2.5
"""Grey levels of fine detail; plain pictures and gradients have too little to be recognised by."""
GAINS = (0.4, 2.5)
LEAST_OVERLAP, MOST_LOST = 0.66, 0.15
"""Share of the larger picture, and share of the smaller one that may lie outside the larger one."""
THIN = 0.012
"""Of the side: thinner margins do not count as cropped or bordered."""


@dataclass(frozen=True)
class Prepared:
    """A decoded picture, ready to be compared."""

    data: bytes | None
    """The encoded picture; without it, equal pixels count as re-encoded."""
    width: int
    height: int
    fingerprint: Fingerprint
    thumbnail_SS3: np.ndarray


@dataclass(frozen=True)
class NearCopy:
    """The relation of two pictures."""

    kind: str
    """`bytes`, `pixels`, `reencoded`, `resized`, `cropped`, `bordered` or `mirrored`; a mirrored picture may be
    `mirrored+resized`, `mirrored+cropped` or `mirrored+bordered`."""
    score: float
    """The lower one of the correlations of brightness and of fine detail; 1 for equal pixels."""
    residual: float
    """The largest local difference of colours in grey levels."""


def prepare(data: bytes) -> Prepared:
    """Decodes a picture.

    Raises:
        BadPicture: if it cannot be decoded.
    """
    picture = check_picture(data, pixels_side=DECODED_SIDE)
    assert picture.rgb_HW3 is not None
    rgb = picture.rgb_HW3
    return Prepared(data, picture.width, picture.height, take_fingerprint(rgb), make_thumbnail(rgb))


def compare(first: Prepared, second: Prepared) -> NearCopy | None:
    """The relation of two pictures; None if they are not near-copies."""
    if (
        first.data is not None
        and second.data is not None
        and (first.width, first.height) == (second.width, second.height)
        and np.array_equal(first.thumbnail_SS3, second.thumbnail_SS3)
    ):
        if first.data == second.data:
            return NearCopy("bytes", 1.0, 0.0)
        if np.array_equal(decode_picture(first.data), decode_picture(second.data)):
            return NearCopy("pixels", 1.0, 0.0)
    sides = (first.width, first.height, second.width, second.height)
    side = SIDE if min(sides) >= SIDE else LEAST_SIDE
    a = shrink_thumbnail(first.thumbnail_SS3, side)
    b = shrink_thumbnail(second.thumbnail_SS3, side)
    for mirrored, i, j in _hypotheses(first.fingerprint, second.fingerprint):
        start = first.fingerprint.frames[i], second.fingerprint.frames[j]
        limits = (
            start[0] if i < first.fingerprint.wholes else WHOLE,
            start[1] if j < second.fingerprint.wholes else WHOLE,
        )
        other = b
        if mirrored:
            other = np.ascontiguousarray(b[:, ::-1])
            start, limits = (start[0], _flip(start[1])), (limits[0], _flip(limits[1]))
        found = align(a, other, start, limits)
        if found is not None and _is_copy(found):
            kind = _kind(first, second, found, mirrored)
            return NearCopy(kind, min(found.correlation, found.detail), found.residual)
    return None


def _hypotheses(first: Fingerprint, second: Fingerprint) -> list[tuple[bool, int, int]]:
    """(mirrored, frame of the first, frame of the second), the most similar first. Windows are not compared with each
    other."""
    if not first.wholes or not second.wholes:
        return []
    a, b = _unit(first.values_FW), _unit(second.values_FW)
    both_2FF = np.stack([a @ b.T, a @ (b * MIRROR).T])
    both_2FF[:, first.wholes :, second.wholes :] = -2.0
    best = np.argsort(-both_2FF, axis=None, kind="stable")[:HYPOTHESES]
    found = np.stack(np.unravel_index(best, both_2FF.shape), 1).tolist()
    return [(bool(mirrored), i, j) for mirrored, i, j in found if both_2FF[mirrored, i, j] > 0]


def _unit(values_FW: np.ndarray) -> np.ndarray:
    values = values_FW.astype(np.float32)
    return np.asarray(values / np.linalg.norm(values, axis=1, keepdims=True))


def _is_copy(found: Alignment) -> bool:
    residual = MOST_RESIDUAL_CLIPPED if found.detail >= CLEAR_DETAIL else MOST_RESIDUAL
    return (
        found.correlation >= LEAST_CORRELATION
        and found.detail >= LEAST_DETAIL
        and found.residual <= residual
        and found.contrast >= LEAST_CONTRAST
        and GAINS[0] <= found.gain <= GAINS[1]
        and min(found.first, found.second) >= LEAST_OVERLAP
        and max(found.first, found.second) >= 1 - MOST_LOST
    )


def _kind(first: Prepared, second: Prepared, found: Alignment, mirrored: bool) -> str:
    contents = second.fingerprint.contents
    if mirrored:
        contents = tuple(_flip(frame) for frame in contents)
    lost = _lost(found.frame, first.fingerprint.contents) | _lost(_invert(found.frame), contents)
    parts = ["mirrored"] if mirrored else []
    if lost:
        parts.append("cropped" if "cropped" in lost else "bordered")
    elif (first.width, first.height) != (second.width, second.height):
        parts.append("resized")
    return "+".join(parts) or "reencoded"


def _lost(frame: Frame, contents: tuple[Frame, ...]) -> set[str]:
    """How a picture's margins beyond the other one's frame were lost: they are borders if they lie outside one of its
    contents, or else they were cropped."""
    found = set()
    for axis in range(4):
        margin = frame[axis] if axis < 2 else 1 - frame[axis]
        if margin > THIN:
            borders = [content[axis] if axis < 2 else 1 - content[axis] for content in contents]
            found.add("bordered" if any(border >= 0.7 * margin for border in borders) else "cropped")
    return found


def _invert(frame: Frame) -> Frame:
    """The first picture's place in the second one, from the second one's place in the first."""
    x1, y1, x2, y2 = frame
    width, height = x2 - x1, y2 - y1
    return -x1 / width, -y1 / height, (1 - x1) / width, (1 - y1) / height


def _flip(frame: Frame) -> Frame:
    return 1 - frame[2], frame[1], 1 - frame[0], frame[3]
