"""`shards pack --near-duplicates mark|drop`: finds near-copies among the records of a source before they are packed.

Every picture is read once more for this. Fingerprints and thumbnails, about 14 kB for each picture, are kept in the
work folder. Only the records of this part are compared with each other.
"""

import json
import os
import struct
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from shards.overlap.align import SIDE
from shards.overlap.candidates import FingerprintRows, find_candidates
from shards.overlap.compare import Prepared, compare, prepare
from shards.overlap.fingerprint import WIDTH, Fingerprint
from shards.pack.spool import parse_record
from shards.pack.workers import Task
from shards.pictures.decode import BadPicture
from shards.sources.files import fetch_images
from uniemox_dist.core.errors import Fault
from uniemox_dist.core.files import read_json, write_json

NEAR_DUPLICATE = "near_duplicate"
"""The reason in rejected.parquet."""
PAIRS_PER_TASK = 128
_HEAD = struct.Struct("<IIBB")
Twins = Mapping[int, list[tuple[int, str]]]
"""Record -> the records that are packed before it and are near-copies of it, with the kinds."""


def load_twins(tasks: Iterator[Task], work: Path, roots: tuple[str, ...], workers: int, plan: Any) -> Twins:
    """The near-copies among the records of some tasks, which are in the order of packing. An interrupted pack of the
    same `plan` finds the result of its first try in the work folder.

    Raises:
        Fault: if a worker dies.
    """
    stored = work / "near_duplicates.json"
    if stored.is_file():
        try:
            known = read_json(stored)
            if known["plan"] == plan:
                return {number: [(twin, kind) for twin, kind in twins] for number, twins in known["twins"]}
        except (ValueError, KeyError, TypeError):
            pass  # an older or damaged file; the result is computed again
    found = _find_twins(tasks, work, roots, workers)
    write_json(stored, {"plan": plan, "twins": [[number, twins] for number, twins in found.items()]})
    return found


def _find_twins(tasks: Iterator[Task], work: Path, roots: tuple[str, ...], workers: int) -> Twins:
    path = work / "near_duplicates.bin"
    numbers: list[int] = []
    ends: list[int] = [0]
    values: list[np.ndarray] = []
    wholes: list[int] = []
    with open(path, "wb") as file:
        jobs = ((task.numbers, task.lines, task.images, work, roots) for task in tasks)
        for task_numbers, blobs in _in_order(_read_records, jobs, workers):
            for number, blob in zip(task_numbers, blobs):
                if blob is None:
                    continue
                picture = _unpack(blob)
                file.write(blob)
                numbers.append(number)
                ends.append(ends[-1] + len(blob))
                values.append(picture.fingerprint.values_FW)
                wholes.append(picture.fingerprint.wholes)
    frames = [len(rows) for rows in values]
    rows = FingerprintRows(
        np.concatenate(values) if values else np.zeros((0, WIDTH), np.int8),
        np.repeat(np.arange(len(values), dtype=np.int32), frames),
        np.concatenate([np.arange(n) < k for n, k in zip(frames, wholes)]) if values else np.zeros(0, bool),
    )
    pairs = find_candidates(rows, len(values)).tolist()
    places = [((ends[a], ends[a + 1]), (ends[b], ends[b + 1])) for a, b in pairs]
    blocks = ((path, places[i : i + PAIRS_PER_TASK]) for i in range(0, len(places), PAIRS_PER_TASK))
    kinds = [kind for block in _in_order(_compare_records, blocks, workers) for kind in block]
    found: dict[int, list[tuple[int, str]]] = {}
    for (first, second), kind in zip(pairs, kinds):
        if kind is not None:
            found.setdefault(numbers[second], []).append((numbers[first], kind))
    path.unlink()
    return found


def mark_line(line: bytes, twins: Twins, number: int, names: Any) -> bytes:
    """A spooled record whose attributes name the preferred one of its near-copies; `names` maps numbers to names."""
    if number not in twins:
        return line
    twin, kind = twins[number][0]
    fields = json.loads(line)
    marks = {"near_duplicate_of": names(twin), "near_duplicate_kind": kind}
    fields["attributes"] = {**fields.get("attributes", {}), **marks}
    return json.dumps(fields, ensure_ascii=True).encode()


def _in_order(function: Any, jobs: Iterator[tuple[Any, ...]], workers: int) -> Iterator[Any]:
    """Results in the order of the jobs, with a bounded number of jobs at a time. 0 workers: in this process."""
    if not workers:
        yield from (function(*job) for job in jobs)
        return
    running: deque[Future[Any]] = deque()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(function, *job))
                if len(running) >= 3 * workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        except BrokenProcessPool:
            raise Fault(
                "a packing worker died (killed, or out of memory); continue with --resume and fewer --workers"
            ) from None


def _read_records(
    numbers: list[int], lines: list[bytes], images: list[Any], folder: Path, roots: tuple[str, ...]
) -> tuple[list[int], list[bytes | None]]:
    """Runs in a worker: the packed pictures of some records; None for those that are refused or show nothing."""
    records = [parse_record(line, folder) for line in lines]
    given = [record.image if image is None else image for record, image in zip(records, images)]
    wanted = [image if record.refused is None else b"" for record, image in zip(records, given)]
    return numbers, [_pack(data) for data in fetch_images(wanted, roots)]


def _pack(data: bytes | BadPicture) -> bytes | None:
    if isinstance(data, BadPicture) or not data:
        return None
    try:
        picture = prepare(data)
    except BadPicture:
        return None
    prints = picture.fingerprint
    if not prints.wholes:
        return None
    head = _HEAD.pack(picture.width, picture.height, prints.wholes, len(prints.frames))
    frames = np.array(prints.frames, np.float64)
    return b"".join([head, frames.tobytes(), prints.values_FW.tobytes(), picture.thumbnail_SS3.tobytes()])


def _unpack(blob: bytes) -> Prepared:
    width, height, wholes, count = _HEAD.unpack_from(blob)
    start = _HEAD.size
    frames = np.frombuffer(blob, np.float64, 4 * count, start).reshape(count, 4)
    start += frames.nbytes
    values = np.frombuffer(blob, np.int8, WIDTH * count, start).reshape(count, WIDTH)
    start += values.nbytes
    thumbnail = np.frombuffer(blob, np.uint8, SIDE * SIDE * 3, start).reshape(SIDE, SIDE, 3)
    x: list[tuple[float, float, float, float]] = [(a, b, c, d) for a, b, c, d in frames.tolist()]
    return Prepared(None, width, height, Fingerprint(tuple(x), wholes, values), thumbnail)


def _compare_records(path: Path, places: list[tuple[tuple[int, int], tuple[int, int]]]) -> list[str | None]:
    """Runs in a worker: the kind of each pair; None for those that are no near-copies."""
    kinds: list[str | None] = []
    with open(path, "rb") as file:
        for pair in places:
            first, second = (_unpack(os.pread(file.fileno(), end - start, start)) for start, end in pair)
            relation = compare(first, second)
            kinds.append(None if relation is None else relation.kind)
    return kinds
