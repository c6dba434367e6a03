"""The parts of a fine-tuning run (data, classifier, checkpoint, engine), made in one place and handed to the loop."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from uniemox_dist.checkpoints.format import fixed_parameters
from uniemox_dist.checkpoints.run_state import RunState, check_same_run
from uniemox_dist.checkpoints.zero_state import check
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.augment import Augment, LabelledDataset
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.splits import Splits, make_train_sources, open_splits
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.models.classifier import Classifier, Outputs, category_weights
from uniemox_dist.models.flops import classifier_flops
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.train.compute import check_compiler
from uniemox_dist.train.engine import make_engine
from uniemox_dist.train.finetune.trainer import FinetuneTrainer
from uniemox_dist.train.finetune.validation_log import History
from uniemox_dist.train.loop import train
from uniemox_dist.train.resume import begin_with, choose_checkpoint
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.trainer import device_peak, settled_precision

log = logging.getLogger("uniemox")


def finetune(config: FinetuneRun, world: World, **more: Any) -> int:
    """Fine-tunes by a configuration: `loop.train` with the parts of fine-tuning; returns the exit code."""
    return train(config, world, build, **more)


def build(
    config: Config,
    world: World,
    device: torch.device,
    folder: RunFolder,
    resume: str = "auto",
    *,
    expect: Callable[[str], None] = lambda doing: None,
) -> FinetuneTrainer:
    """As `setup.build`, for a classifier: its weights are those of the checkpoint, or the encoder of `model.init_from`
    with a last layer drawn by the seed, or all drawn by it."""
    assert isinstance(config, FinetuneRun)
    expect("opening the data")
    hosts = collectives.hosts(world)
    collectives.on_all(world, lambda: check_compiler(config.compute, device))
    splits = collectives.on_all(world, lambda: open_splits(config))
    collectives.on_all(world, lambda: Augment(config))
    sources = collectives.on_all(world, lambda: make_train_sources(config, splits, world.rank, world.size))
    _check_pairs(config, world)
    plan = sources.plan(config)
    schedule = Schedule.of(config, sources.epoch_samples(config))
    expect("choosing a checkpoint, whose files are hashed")
    chosen = choose_checkpoint(world, folder, resume)
    precision: str = collectives.on_main(world, lambda: settled_precision(config, device, chosen))
    if chosen is not None:
        state = RunState(chosen.step, config, sources.identity, precision, None, None)
        collectives.on_main(world, lambda: check_same_run(chosen, state))
    outputs = outputs_of(config, splits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        classifier = Classifier(config.model, outputs)
    loaded = begin_with(classifier, config, world, device, chosen)
    if world.is_main:
        _introduce(outputs, splits)
    settings = replace(view_settings(config, with_person=outputs.persons), person_grid=0)
    dataset = LabelledDataset(
        plan,
        sources.readers,
        None,
        settings,
        config.run.seed,
        config=config,
        strict=config.data.strict,
    )
    expect("making the engine, and loading the checkpoint")
    fixed = fixed_parameters(classifier)
    engine = make_engine(classifier, config, world, precision, device)
    check(engine)
    step = chosen.step if chosen is not None else 0
    return FinetuneTrainer(
        config=config,
        world=world,
        device=device,
        folder=folder,
        sources=sources,
        shown=None,
        plan=plan,
        schedule=schedule,
        dataset=dataset,
        teacher=None,
        facts=None,
        replay=None,
        student=classifier,  # type: ignore[arg-type]  # what shows pictures asks a student, and is not used
        engine=engine,
        precision=precision,
        chosen=chosen,
        loaded=loaded,
        fixed=fixed,
        ema=None,
        flops=classifier_flops(config.model, 2 if outputs.persons else 1, len(outputs.names)),
        peak_tflops=device_peak(config, precision, device),
        hosts=hosts,
        splits=splits,
        outputs=outputs,
        history=History.read(folder.path, step),
    )


def outputs_of(config: FinetuneRun, splits: Splits) -> Outputs:
    """What the classifier of a run answers."""
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
    )


def _check_pairs(config: FinetuneRun, world: World) -> None:
    each = config.batch.streams // world.size
    if config.finetune.mixes and each % 2:
        text = (
            f"finetune.mixup and finetune.cutmix mix neighbouring slots: batch.streams={config.batch.streams} over "
            f"{world.size} ranks are {each} each, which is odd; change batch.streams or the ranks, or set "
            "finetune.mixup=0 finetune.cutmix=0"
        )
        raise UserError(text if world.is_main else "")  # said once, not by every rank


def _introduce(outputs: Outputs, splits: Splits) -> None:
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
