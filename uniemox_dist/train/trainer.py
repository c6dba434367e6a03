"""Everything that a run needs before its first step, made in one place and handed to the loop."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.checkpoints.format import fixed_parameters
from uniemox_dist.checkpoints.run_state import RunState, check_same_run
from uniemox_dist.checkpoints.zero_state import check
from uniemox_dist.config.schema import Config
from uniemox_dist.core.devices import peak_tflops
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.data.loader import CaptionVectors, MicroBatch, PlannedDataset, view_settings
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.models.flops import Flops, sample_flops
from uniemox_dist.models.init_from import InitReport
from uniemox_dist.models.student import Student
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.teacher import text_cache
from uniemox_dist.teacher.flops import count_teacher_flops
from uniemox_dist.teacher.identity import TeacherFacts
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.view_selection import SelectedViews, select_for_ranks
from uniemox_dist.train.compute import check_compiler
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import choose_precision, make_engine
from uniemox_dist.train.monitor.metrics import Meter
from uniemox_dist.train.resume import choose_checkpoint, make_student
from uniemox_dist.train.samples.selection import Shown, choose
from uniemox_dist.train.samples.showing import show
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.step import StepResult, train_step

if TYPE_CHECKING:
    from uniemox_dist.train.checkpoint_policy import Saves

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
    replay: SelectedViews | None
    student: Student
    engine: Any
    precision: str
    chosen: Checkpoint | None
    """The checkpoint that the run goes on from."""
    loaded: InitReport | None
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

    def update(self, batches: Sequence[MicroBatch], step: int, **more: Any) -> StepResult:
        """The update that ends step `step` (0-based); `more` is what `train_step` is told by the loop. Collective."""
        return train_step(
            self.engine,
            self.teacher,
            batches,
            self.config,
            self.world,
            logit_scale=self.facts.logit_scale if self.facts else 100.0,
            loss_weights=self.schedule.loss_weights(step),
            step=step + 1,
            **more,
        )

    def look(self, step: int, saves: "Saves", watchdog: Watchdog) -> str | None:
        """What is done when `step` steps are, before the next one: here nothing. Returns why the run ends with it, if
        it does. Done again by an attempt that goes on from this step. Collective."""
        return None

    def conclude(self, step: int, watchdog: Watchdog) -> None:
        """What is done once the last step is saved, and again by an attempt that finds it saved. Collective."""

    def show(self, meter: Meter, step: int) -> None:
        """Pictures to look at, while training."""
        if self.shown is not None:
            show(self, self.shown, meter, step)


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
    hosts = collectives.hosts(world)
    collectives.on_all(world, lambda: check_compiler(config.compute, device))
    held_out = _held_out(config, world)
    sources = collectives.on_all(world, lambda: Sources(config, rank=world.rank, world_size=world.size))
    plan = sources.plan(config)
    schedule = Schedule.of(config, sources.epoch_samples(config))
    expect("choosing a checkpoint, whose files are hashed")
    chosen = choose_checkpoint(world, folder, resume)
    expect("opening the teacher")
    precision: str = collectives.on_main(world, lambda: settled_precision(config, device, chosen))
    teacher: Teacher | None = None
    replay: SelectedViews | None = None
    vectors: list[CaptionVectors] | None = None
    if config.loss.needs_teacher and config.teacher.source == "cache":
        replay = select_for_ranks(config, world, sources, chosen)
        if config.loss.needs_texts:
            vectors = [
                text_cache.TextVectors(r, text_cache.folder_beside_shards(r, replay.facts.id))
                for r in sources.readers
            ]
    elif config.loss.needs_teacher:
        teacher = Teacher(config.teacher, device)
    facts = replay.facts if replay else teacher.facts if teacher else None
    if chosen is not None:
        state = _state(chosen.step, config, sources, precision, facts, replay)
        collectives.on_main(world, lambda: check_same_run(chosen, state))
    student, loaded = make_student(config, world, device, chosen, facts.width if facts else None)
    if teacher and config.loss.needs_texts:
        vectors = text_cache.prepare_caption_vectors(config, world, sources, teacher, folder, expect)
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
        cached_views=replay.open(sources.readers) if replay else None,
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
        sample_flops(config, facts.width if facts else None, count_teacher_flops(teacher)),
        device_peak(config, precision, device),
        hosts,
    )


def _state(
    step: int,
    config: Config,
    sources: Sources,
    precision: str,
    facts: TeacherFacts | None,
    replay: SelectedViews | None,
) -> RunState:
    teacher = None
    if facts is not None:
        teacher = {**facts.identity, "source": config.teacher.source}
        if replay is not None:
            teacher["views"] = replay.ids
    width = facts.width if facts is not None else None
    return RunState(step, config, sources.identity, precision, teacher, width)


def device_peak(config: Config, precision: str, device: torch.device) -> float | None:
    """The device's peak in the number format of the student's products."""
    if config.compute.peak_tflops is not None or device.type != "cuda":
        return config.compute.peak_tflops
    tf32 = precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
    return peak_tflops(torch.cuda.get_device_name(device), "tf32" if tf32 else precision)


def _held_out(config: Config, world: World) -> ShardReader | None:
    """The data set whose pictures are shown while training, where the settings name one."""
    path = config.data.eval_path
    return (
        collectives.on_all(world, lambda: ShardReader.from_folder(path, "data.eval_path")) if path else None
    )


def _shown(
    config: Config, world: World, reader: ShardReader, teacher: Teacher | None, teacher_id: str | None
) -> Shown | None:
    """What is looked at while training: chosen by rank 0, known to others where they must take part."""
    shown: Shown | None = collectives.on_main(
        world, lambda: choose(reader, config, teacher=teacher, teacher_id=teacher_id)
    )
    return shown if world.is_main or config.zero.stage == 3 else None


def settled_precision(config: Config, device: torch.device, chosen: Checkpoint | None) -> str:
    """`auto` is decided once: a resumed run keeps what its checkpoints were made with, on whatever machine."""
    if config.optim.precision != "auto":
        return config.optim.precision
    if config.zero.stage == 0:
        return "fp32"
    if chosen is not None:
        return str(chosen.info["precision"])
    return choose_precision("auto", device)
