"""Finds pairs of pictures with similar fingerprints, without comparing every picture with every other one.

Rows of fingerprints are assigned to their most similar landmarks, which are fingerprints drawn from the data. Two rows
are compared if they share a landmark: the inverted file of Sivic and Zisserman (2003), with several probes. Memory does
not grow with the number of pairs, because a picture keeps its best candidates only.

Shapes: R rows (frames of all pictures), L landmarks, N pictures.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.overlap.fingerprint import MIRROR, WIDTH

LEAST_SIMILARITY = 0.88
"""Cosine of two fingerprints from which pixels are compared. Measured: 99 % of copies cropped by 10 % reach it."""
CANDIDATES = 24
"""Candidates that are kept for each picture."""
PROBES = 6
"""Landmarks that the rows of whole pictures are compared at; windows are at one."""
ALL_AT_ONCE = 30_000
"""Rows up to which one landmark is enough, so that every row is compared with every other."""
BLOCK = 4096


@dataclass(frozen=True)
class FingerprintRows:
    """The fingerprints of all pictures. The arrays may be mapped from files."""

    values_RW: np.ndarray
    """int8"""
    owner_R: np.ndarray
    """int32, the picture's number, ascending"""
    is_whole_R: np.ndarray
    """bool, False for windows"""


def find_candidates(rows: FingerprintRows, pictures: int) -> np.ndarray:
    """Pairs (a, b) of picture numbers, a < b, sorted: the candidates of every picture by decreasing similarity, at most
    CANDIDATES each."""
    best = _Best(pictures)
    for cell_rows, probe_rows, is_mirrored in _Cells(rows, _draw_landmarks(rows)):
        _compare_cell(rows, cell_rows, probe_rows, is_mirrored, best)
    return best.pairs()


def measure_part(rows: FingerprintRows, pictures: int, landmarks: int, assigned: int) -> dict[str, Any]:
    """CPU seconds of the search, for tools/bench_overlap.py. The first `assigned` rows are assigned to landmarks and
    the others are put where those are; the first `landmarks` landmarks are compared. The time of all is extrapolated by
    the number of rows and of comparisons."""
    started = time.process_time()
    cells = _Cells(rows, _draw_landmarks(rows), assigned)
    assigned_s = time.process_time() - started
    share = min(1.0, assigned / max(1, len(rows.owner_R)))
    best = _Best(pictures)
    sizes = cells.comparisons()
    done = 0
    started = time.process_time()
    for number, (cell_rows, probe_rows, is_mirrored) in enumerate(cells):
        if number == landmarks:
            break
        done += int(sizes[number])
        _compare_cell(rows, cell_rows, probe_rows, is_mirrored, best)
    compared_s = time.process_time() - started
    total = int(sizes.sum())
    return {
        "landmarks": len(sizes),
        "landmarks_compared": min(landmarks, len(sizes)),
        "comparisons": total,
        "rows_assigned": min(assigned, len(rows.owner_R)),
        "cpu_s_assign": round(assigned_s, 1),
        "cpu_s_assign_all_extrapolated": round(assigned_s / share, 1),
        "cpu_s_compare": round(compared_s, 1),
        "cpu_s_compare_all_extrapolated": round(compared_s * total / max(1, done), 1),
    }


def count_landmarks(rows: int) -> int:
    """Number of landmarks for so many rows: the square root, so that assigning and comparing cost about the same."""
    return 1 if rows <= ALL_AT_ONCE else int(np.sqrt(rows))


def _draw_landmarks(rows: FingerprintRows) -> np.ndarray:
    count = count_landmarks(len(rows.owner_R))
    wholes = np.flatnonzero(rows.is_whole_R)
    if not len(wholes):
        return np.zeros((0, WIDTH), np.float32)
    chosen = np.sort(np.random.default_rng(0).choice(wholes, min(count, len(wholes)), replace=False))
    return unit(rows.values_RW[chosen])


def unit(values_RW: np.ndarray) -> np.ndarray:
    """Rows as float32 of length 1."""
    values = values_RW.astype(np.float32)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6))


class _Cells:
    """The landmarks' cells. Iterating yields, for each landmark, the rows that lie there, and the rows of whole
    pictures that are compared with them, as they are or mirrored."""

    def __init__(self, rows: FingerprintRows, landmarks_LW: np.ndarray, limit: int | None = None) -> None:
        """Assigns all rows. With `limit`, for measurements, only so many, and repeats their places for the others."""
        count = len(landmarks_LW)
        probes = min(PROBES, count)
        home_R = np.zeros(len(rows.owner_R), np.int32)
        wholes_W = np.flatnonzero(rows.is_whole_R).astype(np.int32)
        cell_2WP = np.zeros((2, len(wholes_W), probes), np.int32)
        done = 0
        end = len(home_R) if limit is None else min(limit, len(home_R))
        for start in range(0, end if count else 0, BLOCK):
            block = slice(start, start + BLOCK)
            values = unit(rows.values_RW[block])
            home_R[block] = (values @ landmarks_LW.T).argmax(1)
            wholes = np.flatnonzero(rows.is_whole_R[block])
            for mirrored in (0, 1):
                near = (values[wholes] * (MIRROR if mirrored else 1)) @ landmarks_LW.T
                cell_2WP[mirrored, done : done + len(wholes)] = _highest(near, probes)
            done += len(wholes)
        if end < len(home_R):
            home_R[:] = np.resize(home_R[:end], len(home_R))
            cell_2WP[:, done:] = np.resize(
                cell_2WP[:, :done].swapaxes(0, 1), (len(wholes_W) - done, 2, probes)
            ).swapaxes(0, 1)
        cells = cell_2WP.ravel()
        self._by_home, self._by_cell = np.argsort(home_R, kind="stable"), np.argsort(cells, kind="stable")
        self._homes = np.searchsorted(home_R[self._by_home], np.arange(count + 1))
        self._cells = np.searchsorted(cells[self._by_cell], np.arange(count + 1))
        self._wholes_W, self._probes = wholes_W, max(1, probes)

    def comparisons(self) -> np.ndarray:
        """Number of comparisons of each cell."""
        return np.asarray(np.diff(self._homes) * np.diff(self._cells))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        count = len(self._wholes_W)
        for cell in range(len(self._homes) - 1):
            entries = self._by_cell[self._cells[cell] : self._cells[cell + 1]] // self._probes
            probe_rows = self._wholes_W[entries % count] if count else entries
            yield self._by_home[self._homes[cell] : self._homes[cell + 1]], probe_rows, entries >= count


def _highest(near: np.ndarray, count: int) -> np.ndarray:
    """The columns of the `count` highest values of each row."""
    if count == near.shape[1]:
        return np.broadcast_to(np.arange(count), near.shape)
    return np.argpartition(-near, count - 1, axis=1)[:, :count]


def _compare_cell(
    rows: FingerprintRows,
    cell_rows: np.ndarray,
    probe_rows: np.ndarray,
    is_mirrored: np.ndarray,
    best: "_Best",
) -> None:
    for first in range(0, len(cell_rows), BLOCK):
        members = np.sort(cell_rows[first : first + BLOCK])
        there = unit(rows.values_RW[members])
        for start in range(0, len(probe_rows), BLOCK):
            probes = probe_rows[start : start + BLOCK]
            values = unit(rows.values_RW[probes])
            values[is_mirrored[start : start + BLOCK]] *= MIRROR
            near = values @ there.T
            p, m = np.nonzero(near >= LEAST_SIMILARITY)
            a, b = rows.owner_R[probes[p]], rows.owner_R[members[m]]
            other = a != b
            best.add(a[other], b[other], near[p, m][other])


class _Best:
    """The most similar others of every picture."""

    def __init__(self, pictures: int) -> None:
        self._other = np.full((pictures, CANDIDATES), -1, np.int32)
        self._near = np.full((pictures, CANDIDATES), -1.0, np.float32)

    def add(self, a: np.ndarray, b: np.ndarray, near: np.ndarray) -> None:
        """Adds pairs in both directions."""
        one, two = np.concatenate([a, b]).astype(np.int64), np.concatenate([b, a]).astype(np.int64)
        near = np.round(np.concatenate([near, near]), 4)  # BLAS rounds differently in blocks of other shapes
        touched = np.unique(one)
        if not len(touched):
            return
        old_one = np.repeat(touched, CANDIDATES)
        old_two, old_near = self._other[touched].ravel().astype(np.int64), self._near[touched].ravel()
        is_set = old_two >= 0
        one = np.concatenate([one, old_one[is_set]])
        two = np.concatenate([two, old_two[is_set]])
        near = np.concatenate([near, old_near[is_set]])
        order = np.lexsort((-near, two, one))  # the best of each pair comes first
        one, two, near = one[order], two[order], near[order]
        is_first = np.ones(len(one), bool)
        is_first[1:] = (one[1:] != one[:-1]) | (two[1:] != two[:-1])
        one, two, near = one[is_first], two[is_first], near[is_first]
        order = np.lexsort((two, -near, one))
        one, two, near = one[order], two[order], near[order]
        rank = np.arange(len(one)) - np.searchsorted(one, one)
        keep = rank < CANDIDATES
        self._other[touched], self._near[touched] = -1, -1.0
        self._other[one[keep], rank[keep]], self._near[one[keep], rank[keep]] = two[keep], near[keep]

    def pairs(self) -> np.ndarray:
        """All pairs as rows (a, b), a < b, sorted."""
        one, place = np.nonzero(self._other >= 0)
        two = self._other[one, place]
        pairs = np.stack([np.minimum(one, two), np.maximum(one, two)], 1)
        return np.unique(pairs, axis=0) if len(pairs) else np.zeros((0, 2), np.int64)
