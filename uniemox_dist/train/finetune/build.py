"""Builds the parts of a fine-tuning run: data, classifier, checkpoint, engine."""

import logging
from dataclasses import replace

import torch

from uniemox_dist.checkpoints.format import copy_fixed_parameters
from uniemox_dist.checkpoints.run_state import RunState, check_same_run
from uniemox_dist.checkpoints.zero_state import check
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.signals import StopFlag
from uniemox_dist.data.augment import Augment, LabelledDataset
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.masks import SlotDraws
from uniemox_dist.data.splits import Splits, make_train_sources, open_splits
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier, Outputs, category_weights
from uniemox_dist.models.drop_path import list_rates
from uniemox_dist.models.flops import classifier_flops
from uniemox_dist.train.engine import decide_compile, device_peak, make_engine, resolve_precision
from uniemox_dist.train.finetune.trainer import FinetuneTrainer
from uniemox_dist.train.finetune.validation import Validations
from uniemox_dist.train.loop import train
from uniemox_dist.train.resume import choose_checkpoint, initialise_weights
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.startup import StartupTimer
from uniemox_dist.train.trainer import Startup

log = logging.getLogger("uniemox")


def finetune(
    config: FinetuneRun,
    world: World,
    *,
    resume: str = "auto",
    stop: StopFlag | None = None,
    timer: StartupTimer | None = None,
) -> int:
    """Fine-tunes with a configuration; arguments and result are those of `loop.train`."""
    return train(config, world, build, resume=resume, stop=stop, timer=timer)


def build(config: FinetuneRun, startup: Startup) -> FinetuneTrainer:
    """Creates the parts of a run in this order: data, checkpoint, classifier, engine. Collective.

    Weights come from the checkpoint. In a new run the encoder's come from `model.init_from`, if it is set, and all
    others from the seed. `Trainer.load_checkpoint` later loads the engine's state.
    """
    world, device, expect = startup.world, startup.device, startup.expect
    expect("opening the data")
    hosts = collectives.hosts(world)
    compiles = decide_compile(config, world, device)
    splits = collectives.on_main(world, lambda: open_splits(config))
    collectives.on_all(world, lambda: Augment(config))
    sources = collectives.on_all(world, lambda: make_train_sources(config, splits, world.rank, world.size))
    _check_pairs(config, world)
    plan = sources.plan
    schedule = Schedule.from_config(config, sources.epoch_samples)
    expect("choosing a checkpoint, whose files are hashed")
    checkpoint = choose_checkpoint(world, startup.folder, startup.resume)
    precision: str = collectives.on_main(world, lambda: resolve_precision(config, device, checkpoint))
    if checkpoint is not None:
        state = RunState(checkpoint.step, config, sources.identity, precision, None, None)
        collectives.on_main(world, lambda: check_same_run(checkpoint, state))
    outputs = _make_outputs(config, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        classifier = Classifier(config.model, outputs)
    loaded = initialise_weights(classifier, config, world, device, checkpoint)
    if world.is_main:
        _log_outputs(outputs, splits)
    settings = replace(view_settings(config, with_person=outputs.persons), person_grid=0)
    dataset = LabelledDataset(
        sources,
        None,
        settings,
        config=config,
        draws=SlotDraws(config.model, config.run.seed, masks=False, drop_rates=list_rates(classifier)),
    )
    expect("making the engine, and loading the checkpoint")
    fixed = copy_fixed_parameters(classifier)
    engine = make_engine(classifier, config, world, precision, device, compiles=compiles)
    check(engine)
    step = checkpoint.step if checkpoint is not None else 0
    return FinetuneTrainer(
        config=config,
        world=world,
        device=device,
        folder=startup.folder,
        hosts=hosts,
        sources=sources,
        plan=plan,
        schedule=schedule,
        dataset=dataset,
        engine=engine,
        precision=precision,
        checkpoint=checkpoint,
        loaded=loaded,
        fixed=fixed,
        flops=classifier_flops(config.model, 2 if outputs.persons else 1, len(outputs.names)),
        peak_tflops=device_peak(config, precision, device),
        splits=splits,
        outputs=outputs,
        validations=Validations.read(startup.folder.path, step),
    )


def _make_outputs(config: FinetuneRun, splits: Splits) -> Outputs:
    """The outputs of a run's classifier."""
    settings = config.finetune
    weighted = settings.task == "multi" and settings.category_weights == "inverse_log"
    return Outputs(
        settings.task,
        splits.labels,
        splits.dimensions,
        settings.persons,
        settings.pooling,
        smoothing=settings.smoothing if settings.task == "single" else 0.0,
        weights=category_weights(splits.shares_C.tolist()) if weighted else None,
        dimension_weight=settings.dimension_weight,
        target=settings.target,
        ranges=splits.ranges,
    )


def _check_pairs(config: FinetuneRun, world: World) -> None:
    each = config.batch.streams // world.size
    if config.finetune.mixes and each % 2:
        text = (
            f"finetune.mixup and finetune.cutmix mix neighbouring slots: batch.streams={config.batch.streams} over "
            f"{world.size} ranks are {each} each, which is odd; change batch.streams or the ranks, or set "
            "finetune.mixup=0 finetune.cutmix=0"
        )
        raise UserError(text if world.is_main else "")  # one rank reports it


def _log_outputs(outputs: Outputs, splits: Splits) -> None:
    log.info(
        "%d outputs: %s; %d training, %d validation, %s test samples",
        len(outputs.names),
        ", ".join(outputs.names),
        splits.train.samples,
        splits.val.samples,
        splits.test.samples if splits.test is not None else "no",
    )
    for remark in splits.remarks:
        log.warning("%s", remark)
