"""The pretraining loop: read it first.

Start: resume > init_from > scratch. Every step takes the global batch that the plan gives it; at its boundary all ranks
agree on whether to stop. A stop is a complete save and exit code 75.
"""

import logging
import time
from pathlib import Path

import torch

from uniemox_dist.checkpoints.retention import prune
from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.data.draws import mix64
from uniemox_dist.data.sources import describe_data
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.runtime.errors import EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE
from uniemox_dist.runtime.files import write_json, write_text
from uniemox_dist.runtime.run_folder import RunFolder, environment, start_logging
from uniemox_dist.runtime.signals import StopFlag
from uniemox_dist.runtime.world import World
from uniemox_dist.train import checkpoint as checkpoints
from uniemox_dist.train import comm, damage, setup
from uniemox_dist.train.engine import grad_accum
from uniemox_dist.train.meter import Meter
from uniemox_dist.train.pictures import facts, look, markdown, save
from uniemox_dist.train.setup import Trainer
from uniemox_dist.train.sheet import draw, title
from uniemox_dist.train.step import train_step
from uniemox_dist.train.trace import Trace

log = logging.getLogger("uniemox")


def pretrain(config: Config, world: World, *, resume: str = "auto") -> int:
    """Runs a configuration to its end, or to a stop; returns the exit code."""
    stop = StopFlag().install()
    grad_accum(config, world.size)  # divisibility is the user's to mend: before anything is opened
    device = comm.init(world, config.run.timeout_s)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    comm.on_main(world, lambda: _open_folder(folder))
    start_logging(folder, world.rank)
    trainer = setup.build(config, world, device, folder, resume)
    first = _start(trainer)
    caches = config.data.cache_dir is not None
    meter = Meter(
        folder,
        trainer.schedule,
        trainer.plan,
        world,
        first_step=first,
        caches=caches,
        sample_flops=trainer.flops.training,
        peak_tflops=trainer.peak_tflops,
    )
    try:
        with StepBatches(
            trainer.dataset,
            config,
            first_step=first,
            rank=world.rank,
            world_size=world.size,
            pin=device.type == "cuda",
        ) as batches:
            return _train(trainer, meter, stop, first, batches)
    except Exception as error:
        folder.event("fault", rank=world.rank, error=f"{type(error).__name__}: {error}")
        raise
    finally:
        stop.ignore_from_now_on()
        meter.close()


def _train(trainer: Trainer, meter: Meter, stop: StopFlag, step: int, batches: StepBatches) -> int:
    config, world, schedule, folder = trainer.config, trainer.world, trainer.schedule, trainer.folder
    if step >= schedule.max_steps:
        log.info("%s is complete: %d of %d steps", folder.path, step, schedule.max_steps)
        return EXIT_DONE
    skipped_in_a_row = 0
    trace = Trace(folder, world.rank, config) if config.run.trace else None
    while step < schedule.max_steps:
        began = time.perf_counter()
        batch = batches.next_step()
        waited_s = time.perf_counter() - began
        lr = schedule.lr(step)
        if config.model.drop_path:  # so that a resumed run draws what the uninterrupted one would have drawn
            torch.manual_seed(mix64(config.run.seed, step, world.rank) >> 1)
        result = train_step(
            trainer.engine,
            trainer.teacher,
            batch,
            config,
            world,
            lr=lr,
            logit_scale=trainer.facts.logit_scale if trainer.facts else 100.0,
            loss_weights=schedule.loss_weights(step),
            stop=bool(stop),
        )
        if trainer.ema is not None and result.applied:
            trainer.ema.update()
        step += 1
        meter.count(result, batch, waited_s)
        if trace is not None:
            trace.write(step, batch)
        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        damage.report(folder, step, batch)
        batch.clear()  # the loader may use its memory again
        if not result.applied and world.is_main:
            folder.event("skip", step=step, loss=str(result.loss), in_a_row=skipped_in_a_row)
        if skipped_in_a_row >= config.optim.max_skipped:
            return _fault(
                folder, world, f"{skipped_in_a_row} steps in a row had a non-finite loss; lower optim.blr"
            )
        if meter.damaged > max(8, config.data.max_bad_share * meter.samples):
            comm.barrier()  # until every rank has reported its own
            share = f"more than data.max_bad_share={config.data.max_bad_share:g}"
            found = f"{meter.damaged} of {meter.samples} pictures are damaged, {share}"
            return _fault(folder, world, f"{found}: {damage.describe(folder)}")
        last = step == schedule.max_steps
        if step % config.run.log_every == 0 or last or result.stop:
            meter.write(step, result, lr)
        if step % config.run.save_every == 0 or last or result.stop:
            saved = _save(trainer, step)
            if last and not saved:
                return _fault(
                    folder, world, "the last checkpoint could not be saved; make room and start again"
                )
            if result.stop and not last:
                return _stopped(folder, world, stop, step, saved)
        if step % config.run.pictures_every == 0 or last:
            _pictures(trainer, meter, step)
    if world.is_main:
        folder.event("end", step=step)
        log.info(
            "done: %d steps, %d skipped, %d damaged samples replaced", step, meter.skipped, meter.damaged
        )
    return EXIT_DONE


def _open_folder(folder: RunFolder) -> None:
    folder.create()
    folder.lock()


def _start(trainer: Trainer) -> int:
    """Loads the checkpoint that rank 0 chose, writes down what runs, and returns the first step."""
    folder, world, config, chosen = trainer.folder, trainer.world, trainer.config, trainer.chosen
    local_ranks = comm.ranks_on_this_node(world)
    step = 0
    if chosen is not None:
        step = checkpoints.load(trainer.engine, chosen)
        if trainer.ema is not None and not trainer.ema.load(chosen) and world.is_main:
            log.warning("%s holds no moving average: it starts from the weights", chosen.folder.name)
    if world.is_main:
        write_text(folder.config, dump_yaml(config))
        facts = environment()
        write_json(folder.environment, facts)
        # Where the teacher's embeddings come from: live, cache, or None without one.
        source = config.teacher.source if trainer.facts else None
        folder.event(
            "start",
            step=step,
            ranks=world.size,
            precision=trainer.precision,
            teacher=source,
            host=facts["host"],
        )
        if chosen is not None:
            saved = chosen.info
            folder.event("resume", step=step, checkpoint=chosen.folder.name, ranks=saved["world_size"])
            if (saved["world_size"], saved["zero_stage"]) != (world.size, config.zero.stage):
                log.info("checkpoint of %d ranks, ZeRO-%d", saved["world_size"], saved["zero_stage"])
        if trainer.loaded is not None:
            folder.event("init", **trainer.loaded.facts())
        _introduce(trainer, step, local_ranks)
    comm.barrier()
    return step


def _introduce(trainer: Trainer, step: int, local_ranks: int) -> None:
    config, world, schedule, chosen = trainer.config, trainer.world, trainer.schedule, trainer.chosen
    trained = sum(
        p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in trainer.student.parameters()
    )
    log.info(
        "run %s: %s at step %d of %d; student %.1f M parameters, teacher %s; %d samples; ranks %d x micro-batch %d x "
        "accumulation %d = global batch %d; ZeRO-%d, %s on %s",
        trainer.folder.path,
        f"resumes {chosen.folder.name}" if chosen else "starts",
        step,
        schedule.max_steps,
        trained / 1e6,
        _teacher(trainer),
        trainer.sources.samples,
        world.size,
        config.batch.micro_batch,
        grad_accum(config, world.size),
        config.batch.global_batch,
        config.zero.stage,
        trainer.precision,
        trainer.device,
    )
    if trainer.loaded is not None:
        for line in trainer.loaded.describe().splitlines():
            log.info("%s", line)
    log.info("%s", trainer.flops.describe(trainer.peak_tflops))
    for line in describe_data(trainer.sources, trainer.plan, config, world.size, local_ranks):
        log.info("%s", line)
    if trainer.sources.samples < config.batch.global_batch:
        log.warning(
            "batch.global_batch exceeds the %d samples: a batch repeats samples", trainer.sources.samples
        )


def _teacher(trainer: Trainer) -> str:
    if trainer.facts is None:
        return "none"
    name = trainer.config.teacher.name
    return f"{name} (live)" if trainer.replay is None else f"{name} as {trainer.replay}"


def _save(trainer: Trainer, step: int) -> bool:
    folder, world = trainer.folder, trainer.world
    facts = checkpoints.save(
        trainer.engine, folder.checkpoints, trainer.state(step), world, trainer.fixed, trainer.ema
    )
    if world.is_main:
        if "error" in facts:
            folder.event("fault", step=step, error=f"save failed: {facts['error']}")
            log.error("save of step %d failed, training goes on: %s", step, facts["error"])
        else:
            removed = prune(folder.checkpoints, trainer.config.run.keep_last, trainer.config.run.keep_every)
            folder.event("save", step=step, **facts, removed=removed)
            log.info("saved step %d: %.1f MB in %.2f s", step, facts["bytes"] / 1e6, facts["seconds"])
    return "error" not in facts


def _stopped(folder: RunFolder, world: World, stop: StopFlag, step: int, saved: bool) -> int:
    if world.is_main:
        folder.event("signal", step=step, signal=stop.received, saved=saved)
        log.info(
            "stopped by %s after step %d; start the same command again to go on",
            stop.received or "a rank",
            step,
        )
    return EXIT_REQUEUE if saved else EXIT_FAULT


def _fault(folder: RunFolder, world: World, reason: str) -> int:
    if world.is_main:
        folder.event("fault", error=reason)
        log.error("ended: %s", reason)
    return EXIT_FAULT


def _pictures(trainer: Trainer, meter: Meter, step: int) -> None:
    """Reconstructions and nearest texts of held-out pictures, on all ranks that know them."""
    shown, model = trainer.shown, trainer.config.model
    if shown is None or (shown.texts is None and trainer.student.decoder is None):
        return
    trainer.student.eval()
    with torch.compiler.set_stance("force_eager"):  # other shapes, rarely: not worth graphs of their own
        seen = look(trainer.student, shown, trainer.config.run.seed, trainer.device)
    trainer.student.train()
    if trainer.world.is_main:
        record = facts(seen, shown, step, model.mask)
        sheet = draw(seen, shown, title(trainer.config, record), boxes=model.mask == "person")
        try:
            save(trainer.folder.samples, step, sheet, record)
        except OSError as error:
            log.warning("%s: %s; training goes on without it", trainer.folder.samples, error.strerror)
        meter.pictures(step, sheet, markdown(record))
