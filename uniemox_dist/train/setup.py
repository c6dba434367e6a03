"""Everything that a run needs before its first step, made in one place and handed to the loop."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from uniemox_dist.checkpoints.files import fixed_parameters
from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import CaptionVectors, PlannedDataset, view_settings
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources
from uniemox_dist.models.flops import Flops, sample_flops
from uniemox_dist.models.init_from import Loaded
from uniemox_dist.models.student import Student
from uniemox_dist.models.teacher import Teacher
from uniemox_dist.models.teacher_facts import TeacherFacts
from uniemox_dist.models.towers import teacher_flops
from uniemox_dist.runtime.peaks import peak_tflops
from uniemox_dist.runtime.run_folder import RunFolder
from uniemox_dist.runtime.world import World
from uniemox_dist.teach import text_cache
from uniemox_dist.teach.replay import Replay, check_shards
from uniemox_dist.teach.replay import find as find_views
from uniemox_dist.train import comm
from uniemox_dist.train.checkpoint import RunState, check_same_run
from uniemox_dist.train.compute import check_compiler
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import choose_precision, make_engine
from uniemox_dist.train.fragments import check
from uniemox_dist.train.initial import choose_checkpoint, make_student
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.shown import Shown, choose

log = logging.getLogger("uniemox")


@dataclass
class Trainer:
    """The parts of a run."""

    config: Config
    world: World
    device: torch.device
    folder: RunFolder
    sources: Sources
    shown: Shown | None
    """Held-out pictures that are looked at while training; None on ranks that need not take part."""
    plan: Plan
    schedule: Schedule
    dataset: PlannedDataset
    teacher: Teacher | None
    """The live one; None where its cached views are replayed, or no loss compares with one."""
    facts: TeacherFacts | None
    """Of the teacher, live or away; None where no loss compares with one."""
    replay: Replay | None
    student: Student
    engine: Any
    precision: str
    chosen: Checkpoint | None
    """The checkpoint that the run goes on from."""
    loaded: Loaded | None
    """What came from `model.init_from`, in a run that does not go on from a checkpoint."""
    fixed: dict[str, torch.Tensor]
    """The student's parameters that are not trained, in fp32: the engine may round or partition its own."""
    ema: Ema | None
    flops: Flops
    """Of one sample."""
    peak_tflops: float | None
    """What the device can do at most, 10^12 operations per second, where that is known."""
    hosts: list[str]
    """Of the ranks."""

    def state(self, step: int) -> RunState:
        """What a checkpoint of `step` says of the run."""
        return _state(step, self.config, self.sources, self.precision, self.facts, self.replay)


def build(
    config: Config,
    world: World,
    device: torch.device,
    folder: RunFolder,
    resume: str = "auto",
    *,
    expect: Callable[[str], None] = lambda doing: None,
) -> Trainer:
    """Opens the data, the checkpoint, the teacher and the engine; `expect` is told what comes next and may take long.

    The order matters: what can be wrong in ways that only the user can mend is opened first. Weights are those of the
    checkpoint, or of `model.init_from`, or drawn by the seed.
    """
    expect("opening the data")
    hosts = comm.hosts(world)
    comm.on_all(world, lambda: check_compiler(config.compute, device))
    held_out = _held_out(config, world)
    sources = comm.on_all(world, lambda: Sources(config, rank=world.rank, world_size=world.size))
    plan = sources.plan(config)
    schedule = Schedule.of(config, sources.epoch_samples(config))
    expect("choosing a checkpoint, whose files are hashed")
    chosen = choose_checkpoint(world, folder, resume)
    expect("opening the teacher")
    precision: str = comm.on_main(world, lambda: _precision(config, device, chosen))
    teacher: Teacher | None = None
    replay: Replay | None = None
    vectors: list[CaptionVectors] | None = None
    if config.loss.needs_teacher and config.teacher.source == "cache":
        replay = _replay(config, world, sources, chosen)
        if config.loss.relation:
            vectors = [
                text_cache.TextVectors(r, text_cache.beside_shards(r, replay.facts.id))
                for r in sources.readers
            ]
    elif config.loss.needs_teacher:
        teacher = Teacher(config.teacher, device)
    facts = replay.facts if replay else teacher.facts if teacher else None
    if chosen is not None:
        state = _state(chosen.step, config, sources, precision, facts, replay)
        comm.on_main(world, lambda: check_same_run(chosen, state))
    student, loaded = make_student(config, world, device, chosen, facts.width if facts else None)
    if teacher and config.loss.relation:
        vectors = _vectors(config, world, sources, teacher, folder, expect)
    expect("choosing the pictures that are shown")
    shown = _shown(config, world, held_out or sources.readers[0], teacher, facts.id if facts else None)
    if teacher:
        teacher.drop_text_tower()
    settings = view_settings(config, with_person=student.has_person_branch)
    dataset = PlannedDataset(
        plan,
        sources.readers,
        vectors,
        settings,
        config.run.seed,
        stored=replay.caches(sources.readers) if replay else None,
        strict=config.data.strict,
    )
    expect("making the engine, and loading the checkpoint")
    fixed = fixed_parameters(student)
    engine = make_engine(student, config, world, precision, device)
    check(engine)
    return Trainer(
        config,
        world,
        device,
        folder,
        sources,
        shown,
        plan,
        schedule,
        dataset,
        teacher,
        facts,
        replay,
        student,
        engine,
        precision,
        chosen,
        loaded,
        fixed,
        Ema(engine, config.optim.ema_decay) if config.optim.ema_decay else None,
        sample_flops(config, facts.width if facts else None, teacher_flops(teacher)),
        _peak(config, precision, device),
        hosts,
    )


def _state(
    step: int,
    config: Config,
    sources: Sources,
    precision: str,
    facts: TeacherFacts | None,
    replay: Replay | None,
) -> RunState:
    teacher = None
    if facts is not None:
        teacher = {**facts.identity, "source": config.teacher.source}
        if replay is not None:
            teacher["views"] = replay.ids
    width = facts.width if facts is not None else None
    return RunState(step, config, sources.identity, precision, teacher, width)


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


def _shown(
    config: Config, world: World, reader: ShardReader, teacher: Teacher | None, teacher_id: str | None
) -> Shown | None:
    """What is looked at while training: chosen by rank 0, known to others where they must take part."""
    shown: Shown | None = comm.on_main(
        world, lambda: choose(reader, config, teacher=teacher, teacher_id=teacher_id)
    )
    return shown if world.is_main or config.zero.stage == 3 else None


def _precision(config: Config, device: torch.device, chosen: Checkpoint | None) -> str:
    """`auto` is decided once: a resumed run keeps what its checkpoints were made with, on whatever machine."""
    if config.optim.precision != "auto":
        return config.optim.precision
    if config.zero.stage == 0:
        return "fp32"
    if chosen is not None:
        return str(chosen.info["precision"])
    return choose_precision("auto", device)


def _replay(config: Config, world: World, sources: Sources, chosen: Checkpoint | None) -> Replay:
    """The cached views that stand for the teacher; a resumed run goes on with those that it began with. Each rank
    checks its share of the shards."""
    earlier = (chosen.info["teacher"] or {}).get("views", []) if chosen else []
    replay: Replay = comm.on_main(world, lambda: find_views(config, sources.readers, earlier))

    def check_own() -> None:
        for reader, made in zip(sources.readers, replay.made):
            check_shards(config, reader, made, range(world.rank, len(reader.manifest.shards), world.size))

    comm.on_all(world, check_own)
    return replay


def _vectors(
    config: Config,
    world: World,
    sources: Sources,
    teacher: Teacher,
    folder: RunFolder,
    expect: Callable[[str], None],
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

            def progress(captions: int) -> None:
                bar.update(captions)
                expect("embedding captions")  # a large data set takes as long as it takes

            text_cache.build(
                reader, teacher, cache, batch=config.teacher.text_batch, shards=shards, progress=progress
            )
        comm.barrier()
        vectors.append(text_cache.TextVectors(reader, cache))
    return vectors
