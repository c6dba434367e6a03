"""Everything that a run needs before its first step, made in one place and handed to the loop."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uniemox_dist.checkpoints.files import complete_checkpoints
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import CaptionVectors, PlannedDataset, view_settings
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources
from uniemox_dist.models.flops import Flops, sample_flops
from uniemox_dist.models.student import Student
from uniemox_dist.models.teacher import Teacher
from uniemox_dist.models.towers import teacher_flops
from uniemox_dist.runtime.peaks import peak_tflops
from uniemox_dist.runtime.run_folder import RunFolder
from uniemox_dist.runtime.world import World
from uniemox_dist.teach import text_cache
from uniemox_dist.train import comm
from uniemox_dist.train.checkpoint import RunState
from uniemox_dist.train.engine import choose_precision, make_engine
from uniemox_dist.train.fragments import check
from uniemox_dist.train.schedule import Schedule

log = logging.getLogger("uniemox")


@dataclass
class Trainer:
    """The parts of a run."""

    config: Config
    world: World
    device: torch.device
    folder: RunFolder
    sources: Sources
    shown: ShardReader
    """Of its pictures some are reconstructed while training."""
    plan: Plan
    schedule: Schedule
    dataset: PlannedDataset
    teacher: Teacher | None
    student: Student
    engine: Any
    precision: str
    flops: Flops
    """Of one sample."""
    peak_tflops: float | None
    """What the device can do at most, 10^12 operations per second, where that is known."""

    def state(self, step: int) -> RunState:
        """What a checkpoint of `step` says of the run."""
        return RunState(
            step,
            self.config,
            self.sources.identity,
            self.precision,
            self.teacher.identity if self.teacher else None,
            self.teacher.width if self.teacher else None,
        )


def build(config: Config, world: World, device: torch.device, folder: RunFolder) -> Trainer:
    """Opens the data, the teacher and the engine.

    The order matters: data and teacher can be wrong in ways that only the user can mend, and are opened first.
    """
    held_out = _held_out(config, world)
    sources = comm.on_all(world, lambda: Sources(config, rank=world.rank, world_size=world.size))
    plan = sources.plan(config)
    schedule = Schedule.of(config, sources.epoch_samples(config))
    precision: str = comm.on_main(world, lambda: _precision(config, device, folder))
    teacher = Teacher(config.teacher, device) if config.loss.needs_teacher else None
    vectors = _vectors(config, world, sources, teacher, folder) if teacher and config.loss.relation else None
    if teacher:
        teacher.drop_text_tower()
    # The initial weights depend on the seed alone: made on the CPU, the same on every rank.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = Student(config.model, config.loss, teacher.width if teacher else None)
    settings = view_settings(config, with_person=student.has_person_branch)
    dataset = PlannedDataset(
        plan, sources.readers, vectors, settings, config.run.seed, strict=config.data.strict
    )
    engine = make_engine(student, config, world, precision, device)
    check(engine)
    return Trainer(
        config,
        world,
        device,
        folder,
        sources,
        held_out or sources.readers[0],
        plan,
        schedule,
        dataset,
        teacher,
        student,
        engine,
        precision,
        sample_flops(config, teacher.width if teacher else None, teacher_flops(teacher)),
        _peak(config, precision, device),
    )


def _peak(config: Config, precision: str, device: torch.device) -> float | None:
    """The device's peak in the number format of the student's products."""
    if config.compute.peak_tflops is not None or device.type != "cuda":
        return config.compute.peak_tflops
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), "tf32" if tf32 else precision)


def _held_out(config: Config, world: World) -> ShardReader | None:
    """The data set whose pictures are shown while training, where the settings name one."""
    path = config.data.eval_path
    return comm.on_all(world, lambda: ShardReader.from_folder(path, "data.eval_path")) if path else None


def _precision(config: Config, device: torch.device, folder: RunFolder) -> str:
    """`auto` is decided once: a resumed run keeps what its checkpoints were made with, on whatever machine."""
    earlier = complete_checkpoints(folder.checkpoints)
    if config.optim.precision == "auto" and earlier:
        return str(earlier[-1].info["precision"])
    return choose_precision(config.optim.precision, device)


def _vectors(
    config: Config, world: World, sources: Sources, teacher: Teacher, folder: RunFolder
) -> list[CaptionVectors]:
    """Text embeddings of all captions, from the caches beside the shards; what is missing is embedded now,
    each rank taking its share of the shards."""
    vectors: list[CaptionVectors] = []
    for reader in sources.readers:
        place = partial(text_cache.cache_folder, reader, teacher.id, folder.path / "cache")
        cache: Path = comm.on_main(world, place)
        shards = range(world.rank, len(reader.manifest.shards), world.size)
        own = sum(reader.manifest.shards[shard].samples for shard in shards)
        with tqdm(
            total=own, desc="captions of rank 0", unit="", disable=None if world.is_main else True
        ) as bar:
            text_cache.build(
                reader, teacher, cache, batch=config.teacher.text_batch, shards=shards, progress=bar.update
            )
        comm.barrier()
        vectors.append(text_cache.TextVectors(reader, cache))
    return vectors
