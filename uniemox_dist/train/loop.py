"""The training loop, of pretraining and of fine-tuning: read it first.

Start: resume > init_from > scratch. Every step takes the global batch that the plan gives it; at its boundary all ranks
agree on whether to apply it, whether to stop, and whether a save under way is written. A stop is a complete save and
exit code 75.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.core.logs import Step, start_logging
from uniemox_dist.core.signals import StopFlag
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events import End, FaultEvent, Skip, Spike
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.rank_output import main_log
from uniemox_dist.train import exit_status
from uniemox_dist.train import trainer as setup
from uniemox_dist.train.checkpoint_policy import Saves
from uniemox_dist.train.engine import grad_accum
from uniemox_dist.train.monitor import bad_samples, nonfinite
from uniemox_dist.train.monitor.loss_spikes import Spikes
from uniemox_dist.train.monitor.metrics import Meter
from uniemox_dist.train.monitor.startup_timer import Started
from uniemox_dist.train.monitor.stragglers import OwnTime
from uniemox_dist.train.monitor.trace import Trace
from uniemox_dist.train.startup import begin, check
from uniemox_dist.train.step import StepResult
from uniemox_dist.train.trainer import Trainer

log = logging.getLogger("uniemox")
Build = Callable[..., Trainer]
"""As `setup.build`."""
LAST_TRIES_S = (1, 10, 60, 300)
"""Pauses after which the last checkpoint is tried again: without it the steps since the one before were for nothing."""


def pretrain(config: Config, world: World, **more: Any) -> int:
    """Pretrains by a configuration: `train` with the parts of pretraining."""
    return train(config, world, setup.build, **more)


def train(
    config: Config,
    world: World,
    build: Build,
    *,
    resume: str = "auto",
    stop: StopFlag | None = None,
    started: Started | None = None,
) -> int:
    """Runs a configuration to its end, or to a stop; returns the exit code. `build` makes the parts of the run, `stop`
    may have been installed before, and `started` tells how long that took."""
    if stop is None:
        stop = StopFlag().install()
    started = started or Started()
    grad_accum(config, world.size)  # divisibility is the user's to mend: before anything is opened
    device = collectives.init(world, config.run.timeout_s, preload=("deepspeed",))
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    collectives.on_main(world, lambda: _open_folder(folder))
    main_log.leave(folder, world)
    line = start_logging(folder.logs, world.rank, main_log.stream)
    watchdog = Watchdog(
        folder.logs / f"stacks_rank{world.rank:05d}.txt",
        lambda reason: exit_status.hung(folder, world.rank, reason),
    ).start()
    meter: Meter | None = None
    try:
        expect = started.expecting(watchdog, config.run.start_timeout_s)
        if config.run.preflight:
            expect("the preflight")
            check(config, world, device, folder)
        trainer = build(config, world, device, folder, resume, expect=expect)
        first = begin(trainer)
        meter = Meter(
            folder,
            trainer.schedule,
            trainer.plan,
            world,
            first_step=first,
            caches=config.data.cache_dir is not None,
            sample_flops=trainer.flops.training,
            peak_tflops=trainer.peak_tflops,
            hosts=trainer.hosts,
            straggler_factor=config.run.straggler_factor,
        )
        saves = Saves(trainer, watchdog)
        with StepBatches(
            trainer.dataset,
            config,
            first_step=first,
            rank=world.rank,
            world_size=world.size,
            pin=device.type == "cuda",
        ) as batches:
            started.begins("first batch")
            return _train(trainer, meter, saves, stop, watchdog, line, first, batches, started)
    except UserError as error:
        if world.is_main:
            folder.discard_unused()
        if folder.events.exists() and str(error):  # on some ranks it has no text: it is said once
            # The exit code of srun may be that of a rank that it killed.
            folder.write(
                FaultEvent(rank=world.rank, error=str(error), ends=True, restart=False, code=EXIT_USER)
            )
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and collectives.is_lost_peer(error):
            text = "another rank is gone; its own fault, or the launcher, says why"
        folder.write(FaultEvent(rank=world.rank, error=text, ends=True))
        raise
    finally:
        watchdog.close()
        stop.ignore_from_now_on()
        if meter is not None:
            meter.close()


def _train(
    trainer: Trainer,
    meter: Meter,
    saves: Saves,
    stop: StopFlag,
    watchdog: Watchdog,
    line: Step,
    step: int,
    batches: StepBatches,
    started: Started,
) -> int:
    config, world, schedule, folder = trainer.config, trainer.world, trainer.schedule, trainer.folder
    if step >= schedule.max_steps:
        trainer.look(step, saves, watchdog)
        trainer.conclude(step, watchdog)
        log.info("%s is complete: %d of %d steps", folder.path, step, schedule.max_steps)
        if world.is_main and not any(event.get("event") == "end" for event in read_lines(folder.events)):
            folder.write(End(step=step))  # it was killed after its last save
        return EXIT_DONE
    skipped_in_a_row = 0
    limit_s = config.run.compile_timeout_s if config.compute.compile else config.run.start_timeout_s
    own_time, spikes = OwnTime(trainer.device), Spikes(config.run.spike_factor)
    first = step
    trace = Trace(folder, world.rank, config) if config.run.trace else None
    enough: str | None = None
    while step < schedule.max_steps and (enough := trainer.look(step, saves, watchdog)) is None:
        line.now = step + 1
        watchdog.expect(f"step {step + 1}", limit_s)
        limit_s = config.run.step_timeout_s
        began = time.perf_counter()
        batch = batches.next_step()
        waited_s = time.perf_counter() - began
        if first == step:
            started.begins("first step")
        lr = schedule.lr(step)
        result = trainer.update(
            batch, step, lr=lr, stop=stop.received, written=saves.written, own_time=own_time
        )
        if trainer.ema is not None and result.applied:
            trainer.ema.update()
        if first == step and world.is_main:
            started.say(folder, step)
        step += 1
        meter.count(result, batch, waited_s, own_time.take())
        if trace is not None:
            trace.write(step, batch)
        skipped_in_a_row = 0 if result.applied else skipped_in_a_row + 1
        bad_samples.report(folder, step, batch)
        batch.clear()  # the loader may use its memory again
        saves.commit_if(result.written == world.size)
        _remarks(trainer, result, spikes, step, skipped_in_a_row)
        if fault := _endless(trainer, meter, skipped_in_a_row):
            saves.finish()
            return exit_status.fault(folder, world, fault)
        last = step == schedule.max_steps
        if step % config.run.log_every == 0 or last or result.stop:
            meter.write(step, result, lr)
        if last or result.stop:
            saved = saves.finish(step)
            for pause_s in LAST_TRIES_S if last else ():  # what is left to do is worth some patience
                if not saved:
                    time.sleep(pause_s)
                    saved = saves.finish(step)
            if last and not saved:
                return exit_status.fault(
                    folder, world, "the last checkpoint could not be saved; make room and start again"
                )
            if not last:
                return exit_status.stopped(folder, world, result.signal, step, saved)
        elif step % config.run.save_every == 0 and not skipped_in_a_row:
            saves.begin(
                step
            )  # while steps are skipped, the last good checkpoint is not pushed out by later ones
        if step % config.run.pictures_every == 0 or last:
            watchdog.expect(f"the pictures of step {step}", config.run.timeout_s)
            trainer.show(meter, step)
    if enough is None:
        trainer.look(step, saves, watchdog)
    trainer.conclude(step, watchdog)
    if world.is_main:
        folder.write(End(step=step, reason=enough or None))
        log.info(
            "done: %d steps, %d skipped, %d damaged samples replaced", step, meter.skipped, meter.damaged
        )
    return EXIT_DONE


def _open_folder(folder: RunFolder) -> None:
    folder.create()
    folder.lock()


def _remarks(trainer: Trainer, result: StepResult, spikes: Spikes, step: int, skipped_in_a_row: int) -> None:
    """Events of a step that was skipped, or whose loss leapt; every rank writes down its own evidence of the first and
    the last of a row of skipped ones."""
    folder, world, most = trainer.folder, trainer.world, trainer.config.optim.max_skipped
    if result.evidence is not None and skipped_in_a_row in (1, most):
        nonfinite.write(folder.logs / f"nonfinite_step_{step:08d}_rank{world.rank:05d}.json", result.evidence)
    if not result.applied and world.is_main:
        where = "gradients" if math.isfinite(result.loss) else "loss"
        folder.write(Skip(step=step, in_a_row=skipped_in_a_row, loss=str(result.loss), where=where))
        log.warning(
            "step %d is skipped: its %s not finite", step, "loss is" if where == "loss" else "gradients are"
        )
    median = spikes.seen(result.loss)
    if median is not None and world.is_main:
        folder.write(Spike(step=step, loss=result.loss, median=median))
        log.warning("step %d: the loss of %.4f is far above the median of %.4f", step, result.loss, median)


def _endless(trainer: Trainer, meter: Meter, skipped_in_a_row: int) -> str | None:
    """Why it makes no sense to go on, if so. All ranks decide alike."""
    folder, config = trainer.folder, trainer.config
    if skipped_in_a_row >= config.optim.max_skipped:
        return (
            f"{skipped_in_a_row} steps in a row had a non-finite loss or gradient; their evidence is in "
            f"{folder.logs}/nonfinite_*.json, the last good checkpoint is untouched; lower optim.blr or mend the data"
        )
    if meter.damaged > max(8, config.data.max_bad_share * meter.samples):
        collectives.barrier()  # until every rank has reported its own
        share = f"more than data.max_bad_share={config.data.max_bad_share:g}"
        found = f"{meter.damaged} of {meter.samples} pictures are damaged, {share}"
        return f"{found}: {bad_samples.describe(folder)}"
    return None
