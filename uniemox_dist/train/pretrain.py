"""Pretraining: builds the data, the teacher, the student and the engine, and computes the loss of a micro-batch.

Shape legend: B samples of a micro-batch, K samples of a rank's step, G of the global batch, E the teacher's width.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from uniemox_dist.checkpoints.format import copy_fixed_parameters
from uniemox_dist.checkpoints.run_state import RunState, check_same_run
from uniemox_dist.checkpoints.zero_state import check
from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.config.schema import Config
from uniemox_dist.core.imports import collection_paused
from uniemox_dist.core.signals import StopFlag
from uniemox_dist.data.loader import CaptionVectors, MicroBatch, PlannedDataset, view_settings
from uniemox_dist.data.masks import SlotDraws
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.shared_manifests import read_shared_manifests
from uniemox_dist.data.sources import Sources, list_places
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.collectives import gather_rows
from uniemox_dist.distributed.world import World
from uniemox_dist.models.drop_path import list_rates
from uniemox_dist.models.flops import sample_flops
from uniemox_dist.models.student import Student, Targets, Views
from uniemox_dist.teacher import text_cache
from uniemox_dist.teacher.flops import count_teacher_flops
from uniemox_dist.teacher.identity import TeacherFacts
from uniemox_dist.teacher.view_selection import SelectedViews, select_for_ranks
from uniemox_dist.train.ema import Ema
from uniemox_dist.train.engine import (
    Engine,
    decide_compile,
    device_peak,
    find_clip_grad,
    make_engine,
    resolve_precision,
)
from uniemox_dist.train.loop import train
from uniemox_dist.train.monitor.metrics import Metrics
from uniemox_dist.train.monitor.stragglers import ComputeTimer
from uniemox_dist.train.resume import choose_checkpoint, initialise_weights
from uniemox_dist.train.samples.contact_sheet import draw, make_title
from uniemox_dist.train.samples.pictures import (
    collect_facts,
    encode_png,
    inspect_samples,
    render_markdown,
    save,
)
from uniemox_dist.train.samples.selection import Shown, choose
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.startup import StartupTimer
from uniemox_dist.train.step import ComputeLoss, RankStatus, StepResult, set_drop_paths, update_weights
from uniemox_dist.train.trainer import Expect, Startup, Trainer

if TYPE_CHECKING:
    from uniemox_dist.teacher.model import Teacher

log = logging.getLogger("uniemox")


def pretrain(
    config: Config,
    world: World,
    *,
    resume: str = "auto",
    stop: StopFlag | None = None,
    timer: StartupTimer | None = None,
) -> int:
    """Pretrains with a configuration; arguments and result are those of `loop.train`."""
    return train(config, world, build, resume=resume, stop=stop, timer=timer)


@dataclass(kw_only=True)
class PretrainTrainer(Trainer):
    """A pretraining run."""

    student: Student
    teacher: "Teacher | None"
    """The live teacher; None if cached views are replayed or no loss needs a teacher."""
    facts: TeacherFacts | None
    """Facts about the teacher, live or cached; None if no loss needs one."""
    replay: SelectedViews | None
    """The cached views; None with a live teacher, or without one."""
    average: Ema | None
    shown: Shown | None
    """Held-out samples shown during training; None on ranks that do not need them."""

    @property
    def ema(self) -> Ema | None:
        return self.average

    @property
    def teacher_source(self) -> str | None:
        return self.config.teacher.source if self.facts else None

    def describe_teacher(self) -> str:
        if self.facts is None:
            return "none"
        name = self.config.teacher.name
        return f"{name} (live)" if self.replay is None else f"{name} as {self.replay}"

    def run_state(self, step: int) -> RunState:
        return _run_state(step, self.config, self.sources, self.precision, self.facts, self.replay)

    def train_step(
        self, batches: Sequence[MicroBatch], step: int, lr: float, status: RankStatus, timer: ComputeTimer
    ) -> StepResult:
        compute_loss = prepare_loss(
            self.engine,
            self.teacher,
            batches,
            self.config,
            self.world,
            loss_weights=self.schedule.loss_weights(step),
            logit_scale=self.facts.logit_scale if self.facts else 100.0,
        )
        result = update_weights(
            self.engine,
            compute_loss,
            batches,
            self.world,
            lr=lr,
            term_names=LOSS_NAMES,
            clip_grad=find_clip_grad(self.config),
            step=step + 1,
            status=status,
            timer=timer,
        )
        if self.average is not None and result.applied:
            self.average.update()
        return result

    def finish(self, step: int, expect: Expect) -> None:
        """Does nothing: the checkpoint is the result."""

    def show_samples(self, step: int, metrics: Metrics) -> None:
        shown, model = self.shown, self.config.model
        if shown is None or (shown.texts is None and self.student.decoder is None):
            return
        self.student.eval()
        with torch.compiler.set_stance("force_eager"):  # these shapes are rare, not worth a compilation
            seen = inspect_samples(self.student, shown, self.config.run.seed, self.device)
        self.student.train()
        if not self.world.is_main:
            return
        record = collect_facts(seen, shown, step, model.mask)
        sheet = draw(seen, shown, make_title(self.config, record), boxes=model.mask == "person")
        png = encode_png(sheet)
        try:
            save(self.folder.samples, step, png, record)
        except OSError as error:
            log.warning("%s: %s; training continues without it", self.folder.samples, error.strerror)
        metrics.add_pictures(step, sheet.shape[:2], png, render_markdown(record))


def prepare_loss(
    engine: Engine,
    teacher: "Teacher | None",
    batches: Sequence[MicroBatch],
    config: Config,
    world: World,
    *,
    loss_weights: Mapping[str, float] | None = None,
    logit_scale: float = 100.0,
) -> ComputeLoss:
    """Gathers the texts of a step and returns the function that computes the loss of each micro-batch. Collective.

    Args:
        teacher: the live teacher; None if no loss needs it, or if the batches contain its embeddings.
        loss_weights: weights of this step by name; by default those of the configuration.
        logit_scale: the teacher's logit scale, for `loss.relation_form=kl`.
    """
    texts_GE = None
    if config.loss.needs_texts and config.loss.relation_over == "global":
        texts_GE = gather_texts(batches, config.batch.streams, world, engine.device)

    def compute_loss(batch: MicroBatch) -> tuple[Tensor, Tensor]:
        pictures_BE = batch.pictures_BE
        if pictures_BE is None and teacher is not None:
            pictures_BE = teacher.embed_pictures(batch.scene_B3HW)
        texts = batch.texts_BE if texts_GE is None else texts_GE
        targets = Targets(pictures_BE, texts, logit_scale, loss_weights)
        set_drop_paths(engine, batch)
        found: tuple[Tensor, Tensor] = engine(make_views(batch), targets)
        return found

    return compute_loss


def gather_texts(batches: Sequence[MicroBatch], streams: int, world: World, device: torch.device) -> Tensor:
    """Λ: the text embeddings of all samples of the step in slot order, G×E in fp32. Collective.

    Ranks exchange the cache's fp16 numbers. One copy puts them in order and converts them, which is exact.
    """
    texts_KE = torch.cat([b.texts_BE for b in batches if b.texts_BE is not None]).to(device)
    rows_GE = gather_rows(texts_KE, world.size)
    # For each turn of the streams, rank r has the slots of its own neighbouring streams; slot order is turn-major.
    turns = texts_KE.shape[0] * world.size // streams
    by_rank = rows_GE.view(world.size, turns, streams // world.size, -1)
    texts_GE = torch.empty(rows_GE.shape, device=device)
    texts_GE.view(by_rank.transpose(0, 1).shape).copy_(by_rank.transpose(0, 1))
    return texts_GE


def make_views(batch: MicroBatch) -> Views:
    """The two views of a micro-batch with their masks."""
    assert batch.scene_order_BN is not None
    return Views(batch.scene_B3HW, batch.person_B3HW, batch.scene_order_BN, batch.person_order_BN)


def build(config: Config, startup: Startup) -> PretrainTrainer:
    """Creates the parts of a run in this order: data, checkpoint, teacher, student, samples to show, engine.
    Collective.

    Parts that fail because of the user's settings or files come first. Weights come from the checkpoint; in a new run
    from `model.init_from` if it is set, otherwise from the seed. `Trainer.load_checkpoint` later loads the engine's
    state.
    """
    world, device, expect = startup.world, startup.device, startup.expect
    expect("opening the data")
    hosts = collectives.hosts(world)
    compiles = decide_compile(config, world, device)
    held_out = _open_held_out(config, world, device)
    manifests = read_shared_manifests(list_places(config), world, device, retry_s=config.data.retry_s)
    sources = collectives.on_all(
        world, lambda: Sources(config, rank=world.rank, world_size=world.size, manifests=manifests)
    )
    plan = sources.plan
    schedule = Schedule.from_config(config, sources.epoch_samples)
    expect("choosing a checkpoint, whose files are hashed")
    checkpoint = choose_checkpoint(world, startup.folder, startup.resume)
    expect("opening the teacher")
    precision: str = collectives.on_main(world, lambda: resolve_precision(config, device, checkpoint))
    teacher: Teacher | None = None
    replay: SelectedViews | None = None
    vectors: list[CaptionVectors] | None = None
    if config.loss.needs_teacher and config.teacher.source == "cache":
        replay = select_for_ranks(config, world, sources, checkpoint)
        if config.loss.needs_texts:
            vectors = [
                text_cache.TextVectors(r, text_cache.folder_beside_shards(r, replay.facts.id))
                for r in sources.readers
            ]
    elif config.loss.needs_teacher:
        teacher = _load_teacher(config, device)
    facts = replay.facts if replay else teacher.facts if teacher else None
    if checkpoint is not None:
        state = _run_state(checkpoint.step, config, sources, precision, facts, replay)
        collectives.on_main(world, lambda: check_same_run(checkpoint, state))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        student = Student(config.model, config.loss, facts.width if facts else None)
    loaded = initialise_weights(student, config, world, device, checkpoint)
    if teacher and config.loss.needs_texts:
        vectors = text_cache.prepare_caption_vectors(config, world, sources, teacher, startup.folder, expect)
    expect("choosing the pictures that are shown")
    shown = _choose_shown(config, world, held_out or sources.readers[0], teacher, facts.id if facts else None)
    if teacher:
        teacher.drop_text_tower()
        if compiles:
            teacher.compile(cuda_graphs=config.compute.cuda_graphs)
    dataset = PlannedDataset(
        sources,
        vectors,
        view_settings(config, with_person=student.has_person_branch),
        cached_views=replay.open(sources.readers) if replay else None,
        draws=SlotDraws(config.model, config.run.seed, drop_rates=list_rates(student)),
    )
    expect("making the engine, and loading the checkpoint")
    fixed = copy_fixed_parameters(student)
    engine = make_engine(student, config, world, precision, device, compiles=compiles)
    check(engine)
    return PretrainTrainer(
        config=config,
        world=world,
        device=device,
        folder=startup.folder,
        hosts=hosts,
        sources=sources,
        plan=plan,
        schedule=schedule,
        dataset=dataset,
        checkpoint=checkpoint,
        loaded=loaded,
        fixed=fixed,
        engine=engine,
        precision=precision,
        flops=sample_flops(config, facts.width if facts else None, count_teacher_flops(teacher)),
        peak_tflops=device_peak(config, precision, device),
        student=student,
        teacher=teacher,
        facts=facts,
        replay=replay,
        average=Ema(engine, config.optim.ema_decay) if config.optim.ema_decay else None,
        shown=shown,
    )


def _load_teacher(config: Config, device: torch.device) -> "Teacher":
    with collection_paused():
        # Imported late: it imports open_clip, which a run with cached views does not need.
        from uniemox_dist.teacher.model import Teacher
    return Teacher(config.teacher, device)


def _run_state(
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


def _open_held_out(config: Config, world: World, device: torch.device) -> ShardReader | None:
    """The data set whose pictures are shown during training, if the settings name one."""
    path = config.data.eval_path
    if not path:
        return None
    [manifest] = read_shared_manifests([(path, "data.eval_path")], world, device)
    share = world.rank, world.size
    return collectives.on_all(
        world, lambda: ShardReader.from_folder(path, "data.eval_path", share=share, manifest=manifest)
    )


def _choose_shown(
    config: Config, world: World, reader: ShardReader, teacher: "Teacher | None", teacher_id: str | None
) -> Shown | None:
    """The samples to show. Rank 0 chooses them; other ranks get them only if each pass gathers weights (ZeRO-3)."""
    if config.run.pictures_every is None:
        return None
    shown: Shown | None = collectives.on_main(
        world, lambda: choose(reader, config, teacher=teacher, teacher_id=teacher_id)
    )
    return shown if world.is_main or config.zero.stage == 3 else None
