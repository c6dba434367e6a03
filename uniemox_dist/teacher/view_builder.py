"""Builds the cache of views: loader processes draw views while the teacher embeds the previous ones.

Shape legend: R rows of a shard, P pictures of a task, K views of a picture, E embedding width.
"""

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
from uniemox_dist.data.batch_loader import WorkerError, worker_setup
from uniemox_dist.data.crops import ViewPlan, plan_cached_scene
from uniemox_dist.data.reader import DamagedSample, ShardReader
from uniemox_dist.data.views import allocate_views, render_scenes
from uniemox_dist.data.worker_transport import NO_BUFFER, ViewBuffers
from uniemox_dist.teacher.cache_files import cache_file, read_metadata
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.view_cache import PLANS_KEY, ViewSpec, has_intact_plans, hash_plans

PREFETCH = 2
"""Tasks that each loader process prepares in advance."""


@dataclass
class BuildResult:
    """Summary of a build."""

    pictures: int = 0
    """Pictures in the requested shards."""
    embedded: int = 0
    """Views embedded in this build; views of finished shards are kept and do not count."""
    bytes: int = 0
    """Size of all files of the requested shards."""
    unreadable: list[str] = field(default_factory=list)
    """One line for each picture that has no views."""


@dataclass(frozen=True)
class Task:
    """A range of pictures of one shard, and the buffer for their views."""

    shard: int
    first: int
    end: int
    """Exclusive."""
    buffer: int = NO_BUFFER


@dataclass(frozen=True)
class DrawnTask:
    """The views of a task. Pixels are in its buffer, or in `pixels` if no buffer was free."""

    task: Task
    pixels: Tensor | None
    plans: dict[str, np.ndarray]
    """Arrays of the cache file by name, P rows each."""
    unreadable: tuple[tuple[int, str], ...]
    """Row and reason of each picture without views."""


def build(
    reader: ShardReader,
    teacher: Teacher,
    spec: ViewSpec,
    *,
    batch: int,
    workers: int,
    shards: Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> BuildResult:
    """Builds the views of the given shards (default: all) that are not cached yet.

    Finished files are kept, so a build that was killed continues. A single damaged picture is marked as invalid.

    Args:
        batch: views per forward pass of the teacher.
        workers: loader processes that draw views; 0 draws them in this process.
        progress: called with numbers of finished rows.

    Raises:
        UserError, Fault: if the data set cannot be read.
    """
    spec.write_description(reader)
    wanted = range(len(reader.manifest.shards)) if shards is None else shards
    samples = [shard.samples for shard in reader.manifest.shards]
    todo = [shard for shard in wanted if not _is_finished(reader, spec, shard)]
    if progress is not None:
        progress(sum(samples[shard] for shard in set(wanted) - set(todo)))
    result = BuildResult(pictures=sum(samples[shard] for shard in wanted))
    reasons: dict[tuple[int, int], str] = {}
    parts: list[dict[str, np.ndarray]] = []
    embedded: list[Tensor] = []
    try:
        for drawn, pixels_N3HW in _draw_tasks(reader, spec, todo, batch, workers):
            task = drawn.task
            reasons.update({(task.shard, row): text for row, text in drawn.unreadable})
            parts.append(drawn.plans)
            # Embeddings are copied to the host once per shard, so the host does not wait for a GPU after each batch.
            pieces = pixels_N3HW.split(batch) if len(pixels_N3HW) else ()
            embedded += [teacher.embed_pictures(piece.to(teacher.device)).half() for piece in pieces]
            result.embedded += len(pixels_N3HW)
            if task.end == samples[task.shard]:
                _write(reader, spec, task.shard, parts, embedded)
                parts, embedded = [], []
            if progress is not None:
                progress(task.end - task.first)
    except RuntimeError as error:
        # torch reports a dead loader process from a signal handler, which can interrupt any line.
        if "DataLoader worker" not in str(error):
            raise
        why = str(error).strip().splitlines()[0]
        raise Fault(
            f"{reader.url}: {why} (possibly out of memory); run the command again to continue"
        ) from None
    finally:
        reader.close()
    for shard in wanted:
        path = cache_file(reader, spec.folder(reader), shard)
        result.bytes += path.stat().st_size
        with safe_open(path, "pt") as file:
            rows = (~file.get_tensor("valid")).nonzero().flatten().tolist()
        name = reader.manifest.shards[shard].name
        result.unreadable += [reasons.get((shard, row), f"{name}: row {row}: marked before") for row in rows]
    return result


def _is_finished(reader: ShardReader, spec: ViewSpec, shard: int) -> bool:
    """True if a shard's views exist. Updates the metadata if only captions or labels of its rows have changed."""
    path = cache_file(reader, spec.folder(reader), shard)
    present = read_metadata(path)
    if present is None:
        return False
    wanted = {**spec.metadata(reader, shard), PLANS_KEY: present.get(PLANS_KEY, "")}
    if {**present, "rows_sha256": ""} != {**wanted, "rows_sha256": ""}:
        return False
    with safe_open(path, "pt") as file:
        if not has_intact_plans(file):
            return False
    if present != wanted:
        write_bytes(path, save(load_file(path), wanted))
    return True


def _write(
    reader: ShardReader,
    spec: ViewSpec,
    shard: int,
    parts: list[dict[str, np.ndarray]],
    embedded: list[Tensor],
) -> None:
    path = cache_file(reader, spec.folder(reader), shard)
    plans = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
    embedding_NE = torch.cat(embedded).cpu() if embedded else torch.zeros(0, spec.facts.width).half()
    embedding_RKE = embedding_NE.view(-1, spec.count, spec.facts.width)
    embedding_RKE[~plans["valid"]] = 0
    if not torch.isfinite(embedding_RKE).all():
        raise Fault(f"{path}: the teacher gives embeddings that are NaN or infinite; try --precision fp32")
    metadata = {**spec.metadata(reader, shard), PLANS_KEY: hash_plans(plans)}
    write_bytes(path, save({"embedding": embedding_RKE, **plans}, metadata))


def _draw_tasks(
    reader: ShardReader, spec: ViewSpec, shards: Sequence[int], batch: int, workers: int
) -> Iterator[tuple[DrawnTask, Tensor]]:
    """Yields the tasks of some shards in order, each with the pixels of its views, P·K×3×H×W."""
    per_task = max(1, batch // spec.count)
    buffers = None
    if workers:
        count = workers * PREFETCH + 2
        buffers = ViewBuffers(count, per_task * spec.count, spec.image_size)
    loader = DataLoader(
        ViewDataset(reader, spec, buffers),
        batch_size=None,
        sampler=_Tasks(reader, shards, per_task, buffers),
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=worker_setup(),
        multiprocessing_context="fork" if workers else None,
    )
    for drawn in loader:
        if isinstance(drawn, WorkerError):
            raise drawn.to_exception()
        pixels = drawn.pixels
        if pixels is None:
            assert buffers is not None
            pixels = buffers.lend(drawn.task.buffer)
        yield drawn, pixels[: (drawn.task.end - drawn.task.first) * spec.count]
        del pixels  # frees its buffer before the next task is requested


class _Tasks(Sampler[Task]):
    """Yields tasks of at most `pictures` pictures, shard by shard."""

    def __init__(
        self, reader: ShardReader, shards: Sequence[int], pictures: int, buffers: ViewBuffers | None
    ) -> None:
        self.reader, self.shards, self.pictures, self.buffers = reader, shards, pictures, buffers

    def __iter__(self) -> Iterator[Task]:
        for shard in self.shards:
            rows = self.reader.manifest.shards[shard].samples
            # An empty shard has one empty task, which writes its file.
            for first in range(0, max(1, rows), self.pictures):
                buffer = NO_BUFFER if self.buffers is None else self.buffers.acquire()
                yield Task(shard, first, min(rows, first + self.pictures), buffer)


class ViewDataset(Dataset[DrawnTask | WorkerError]):
    """`dataset[task]` reads the pictures of a task and draws their views."""

    def __init__(self, reader: ShardReader, spec: ViewSpec, buffers: ViewBuffers | None) -> None:
        self.reader, self.spec, self.buffers = reader, spec, buffers

    def __getitem__(self, task: Task) -> DrawnTask | WorkerError:
        K, spec = self.spec.count, self.spec
        if self.buffers is None or task.buffer == NO_BUFFER:
            views = allocate_views((task.end - task.first) * K, spec.image_size)
        else:
            views = self.buffers.tensor(task.buffer)
        plans: list[list[ViewPlan] | None] = []
        unreadable = []
        for i, row in enumerate(range(task.first, task.end)):
            views_K3HW = views[i * K : (i + 1) * K]
            try:
                plans.append(self._draw_picture(task.shard, row, views_K3HW))
            except DamagedSample as error:
                unreadable.append((row, str(error)))
                plans.append(None)
                views_K3HW.zero_()
            except (UserError, Fault) as error:
                return WorkerError.from_exception(error)
        pixels = views if task.buffer == NO_BUFFER else None
        return DrawnTask(task, pixels, _stack_plans(plans, spec), tuple(unreadable))

    def _draw_picture(self, shard: int, row: int, views_K3HW: Tensor) -> list[ViewPlan]:
        raw, spec = self.reader.read(shard, row), self.spec
        plans = [
            plan_cached_scene(raw.width, raw.height, spec.settings, spec.seed, raw.image_sha256, number)
            for number in range(spec.count)
        ]
        try:
            render_scenes(raw.image, (raw.width, raw.height), plans, views_K3HW)
        except ValueError as error:
            name = self.reader.manifest.shards[shard].name
            raise DamagedSample(f"{name}: {raw.key}: {error}") from None
        return plans


def _stack_plans(plans: Sequence[Sequence[ViewPlan] | None], spec: ViewSpec) -> dict[str, np.ndarray]:
    """Stacks the plans of P pictures into arrays of P×K rows; rows of a picture without plans are zero."""
    shape = (len(plans), spec.count)
    arrays: dict[str, np.ndarray] = {
        "box": np.zeros((*shape, 4), np.int32),
        "scale": np.zeros(shape, np.uint8),
        "mirror": np.zeros(shape, np.bool_),
        "background": np.zeros((*shape, 3), np.uint8),
        "valid": np.array([picture is not None for picture in plans], np.bool_),
    }
    if spec.colour_jitter:
        arrays["jitter"] = np.zeros((*shape, 3), np.float64)
    for row, picture in enumerate(plans):
        for number, plan in enumerate(picture or ()):
            at = row, number
            arrays["box"][at] = plan.scene.box
            arrays["scale"][at], arrays["mirror"][at] = plan.scale, plan.scene.mirror
            arrays["background"][at] = plan.background
            if plan.scene.jitter is not None:
                arrays["jitter"][at] = plan.scene.jitter
    return arrays
