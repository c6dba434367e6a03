"""Makes the cache of views: loader processes draw them while the teacher embeds those before.

Shape legend: R rows of a shard, P pictures of a task, K views of a picture, E embedding width.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import write_bytes
from uniemox_dist.data.buffers import NONE, ViewBuffers
from uniemox_dist.data.crops import ViewPlan, stored_scene
from uniemox_dist.data.reader import DamagedSample, ShardReader
from uniemox_dist.data.step_batches import start_worker
from uniemox_dist.data.views import empty_views, render_scenes
from uniemox_dist.data.worker_transport import Failure
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.shard_files import metadata_of, shard_file
from uniemox_dist.teacher.view_cache import PLANS, ViewsMade, has_its_plans, plans_sha256

PREFETCH = 2
"""Tasks that each loader process prepares ahead."""


@dataclass
class Built:
    """What a build did."""

    pictures: int = 0
    """Of the shards that were asked for."""
    embedded: int = 0
    """Views that the teacher saw now; those of finished shards are kept."""
    bytes: int = 0
    """Of all files of these shards."""
    unreadable: list[str] = field(default_factory=list)
    """One line for each picture that has no views."""


@dataclass(frozen=True)
class Task:
    """Some neighbouring pictures of a shard, and the buffer that their views go into."""

    shard: int
    first: int
    end: int
    buffer: int = NONE


@dataclass(frozen=True)
class Drawn:
    """The views of a task: pixels in its buffer (or here, if no buffer was free), the rest by value."""

    task: Task
    pixels: Tensor | None
    plans: dict[str, np.ndarray]
    """Tensors of the file by name, of P rows."""
    unreadable: tuple[tuple[int, str], ...]
    """Row and reason of each picture without views."""


def build(
    reader: ShardReader,
    teacher: Teacher,
    made: ViewsMade,
    *,
    batch: int,
    workers: int,
    shards: Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Built:
    """Makes the views of the given shards (default: all) that are not there yet.

    Finished files are kept, so a build that was killed goes on. `batch` views are embedded at once.

    Raises:
        UserError, Fault: if the data set cannot be read. A single damaged picture is marked instead.
    """
    made.describe(reader)
    wanted = range(len(reader.manifest.shards)) if shards is None else shards
    samples = [shard.samples for shard in reader.manifest.shards]
    todo = [shard for shard in wanted if not _keep(reader, made, shard)]
    if progress is not None:
        progress(sum(samples[shard] for shard in set(wanted) - set(todo)))
    built = Built(pictures=sum(samples[shard] for shard in wanted))
    reasons: dict[tuple[int, int], str] = {}
    parts: list[dict[str, np.ndarray]] = []
    embedded: list[Tensor] = []
    try:
        for drawn, pixels_N3HW in _drawn(reader, made, todo, batch, workers):
            task = drawn.task
            reasons.update({(task.shard, row): text for row, text in drawn.unreadable})
            parts.append(drawn.plans)
            # Copied to the host shard by shard, so that a GPU is not waited for between batches.
            pieces = pixels_N3HW.split(batch) if len(pixels_N3HW) else ()
            embedded += [teacher.embed_pictures(piece.to(teacher.device)).half() for piece in pieces]
            built.embedded += len(pixels_N3HW)
            if task.end == samples[task.shard]:
                _write(reader, made, task.shard, parts, embedded)
                parts, embedded = [], []
            if progress is not None:
                progress(task.end - task.first)
    except RuntimeError as error:
        # torch reports a dead loader process from a signal handler: in whatever line this process was then.
        if "DataLoader worker" not in str(error):
            raise
        why = str(error).strip().splitlines()[0]
        raise Fault(
            f"{reader.url}: {why} (was it killed for its memory?); start again, and it goes on"
        ) from None
    finally:
        reader.close()
    for shard in wanted:
        path = shard_file(reader, made.folder(reader), shard)
        built.bytes += path.stat().st_size
        with safe_open(path, "pt") as file:
            rows = (~file.get_tensor("valid")).nonzero().flatten().tolist()
        name = reader.manifest.shards[shard].name
        built.unreadable += [reasons.get((shard, row), f"{name}: row {row}: marked before") for row in rows]
    return built


def _keep(reader: ShardReader, made: ViewsMade, shard: int) -> bool:
    """Whether a shard's views are there already. Where only its captions or labels are others, its file says so."""
    path = shard_file(reader, made.folder(reader), shard)
    found = metadata_of(path)
    if found is None:
        return False
    wanted = {**made.metadata(reader, shard), PLANS: found.get(PLANS, "")}
    if {**found, "rows_sha256": ""} != {**wanted, "rows_sha256": ""}:
        return False
    with safe_open(path, "pt") as file:
        if not has_its_plans(file):
            return False
    if found != wanted:
        write_bytes(path, save(load_file(path), wanted))
    return True


def _write(
    reader: ShardReader,
    made: ViewsMade,
    shard: int,
    parts: list[dict[str, np.ndarray]],
    embedded: list[Tensor],
) -> None:
    path = shard_file(reader, made.folder(reader), shard)
    plans = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    embedding_NE = torch.cat(embedded).cpu() if embedded else torch.zeros(0, made.facts.width).half()
    embedding_RKE = embedding_NE.view(-1, made.count, made.facts.width)
    embedding_RKE[~plans["valid"]] = 0
    if not torch.isfinite(embedding_RKE).all():
        raise Fault(f"{path}: the teacher gives embeddings that are no numbers; try --precision fp32")
    metadata = {**made.metadata(reader, shard), PLANS: plans_sha256(plans)}
    write_bytes(path, save({"embedding": embedding_RKE, **plans}, metadata))


def _drawn(
    reader: ShardReader, made: ViewsMade, shards: Sequence[int], batch: int, workers: int
) -> Iterator[tuple[Drawn, Tensor]]:
    """The tasks of some shards in order, with the pixels of their views: P·K×3×H×W."""
    per_task = max(1, batch // made.count)
    buffers = None
    if workers:
        count = workers * PREFETCH + 2
        buffers = ViewBuffers(count, per_task * made.count, made.image_size)
    parent = os.getpid()
    loader = DataLoader(
        ViewDataset(reader, made, buffers),
        batch_size=None,
        sampler=_Tasks(reader, shards, per_task, buffers),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=lambda _: start_worker(parent),
        multiprocessing_context="fork" if workers else None,
    )
    for found in loader:
        if isinstance(found, Failure):
            raise (UserError if found.user else Fault)(found.text)
        pixels = found.pixels
        if pixels is None:
            assert buffers is not None
            pixels = buffers.lend(found.task.buffer)
        yield found, pixels[: (found.task.end - found.task.first) * made.count]
        del pixels  # its buffer is free again when the next views are asked for


class _Tasks(Sampler[Task]):
    """The pictures of some shards, some at a time."""

    def __init__(
        self, reader: ShardReader, shards: Sequence[int], pictures: int, buffers: ViewBuffers | None
    ) -> None:
        self.reader, self.shards, self.pictures, self.buffers = reader, shards, pictures, buffers

    def __iter__(self) -> Iterator[Task]:
        for shard in self.shards:
            rows = self.reader.manifest.shards[shard].samples
            for first in range(
                0, max(1, rows), self.pictures
            ):  # a shard of marked samples only has one empty task
                buffer = NONE if self.buffers is None else self.buffers.take()
                yield Task(shard, first, min(rows, first + self.pictures), buffer)


class ViewDataset(Dataset[Drawn | Failure]):
    """`dataset[task]` reads the pictures of a task and draws their views."""

    def __init__(self, reader: ShardReader, made: ViewsMade, buffers: ViewBuffers | None) -> None:
        self.reader, self.made, self.buffers = reader, made, buffers

    def __getitem__(self, task: Task) -> Drawn | Failure:
        K, made = self.made.count, self.made
        if self.buffers is None or task.buffer == NONE:
            room = empty_views((task.end - task.first) * K, made.image_size)
        else:
            room = self.buffers.room(task.buffer)
        plans: list[list[ViewPlan] | None] = []
        unreadable = []
        for i, row in enumerate(range(task.first, task.end)):
            views_K3HW = room[i * K : (i + 1) * K]
            try:
                plans.append(self._picture(task.shard, row, views_K3HW))
            except DamagedSample as error:
                unreadable.append((row, str(error)))
                plans.append(None)
                views_K3HW.zero_()
            except (UserError, Fault) as error:
                return Failure(isinstance(error, UserError), str(error))
        pixels = room if task.buffer == NONE else None
        return Drawn(task, pixels, _plans(plans, made), tuple(unreadable))

    def _picture(self, shard: int, row: int, views_K3HW: Tensor) -> list[ViewPlan]:
        raw, made = self.reader.read(shard, row), self.made
        plans = [
            stored_scene(raw.width, raw.height, made.settings, made.seed, raw.image_sha256, number)
            for number in range(made.count)
        ]
        try:
            render_scenes(raw.image, (raw.width, raw.height), plans, views_K3HW)
        except ValueError as error:
            name = self.reader.manifest.shards[shard].name
            raise DamagedSample(f"{name}: {raw.key}: {error}") from None
        return plans


def _plans(plans: Sequence[Sequence[ViewPlan] | None], made: ViewsMade) -> dict[str, np.ndarray]:
    """The plans of P pictures as arrays of P×K rows; pictures without are marked, and zero."""
    shape = (len(plans), made.count)
    arrays: dict[str, np.ndarray] = {
        "box": np.zeros((*shape, 4), np.int32),
        "scale": np.zeros(shape, np.uint8),
        "mirror": np.zeros(shape, np.bool_),
        "background": np.zeros((*shape, 3), np.uint8),
        "valid": np.array([found is not None for found in plans], np.bool_),
    }
    if made.colour_jitter:
        arrays["jitter"] = np.zeros((*shape, 3), np.float64)
    for row, found in enumerate(plans):
        for number, plan in enumerate(found or ()):
            at = row, number
            arrays["box"][at] = plan.scene.box
            arrays["scale"][at], arrays["mirror"][at] = plan.scale, plan.scene.mirror
            arrays["background"][at] = plan.background
            if plan.scene.jitter is not None:
                arrays["jitter"][at] = plan.scene.jitter
    return arrays
