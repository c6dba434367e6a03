"""The training loop of pretraining and of fine-tuning: read this file first.

A run starts in this order: process group, run folder, log, watchdog, preflight, the parts of the run (`build`),
checkpoint, data loader. Every step uses the global batch that the plan assigns to it. At the end of a step all ranks
agree, in one reduction, on whether to apply it, whether to stop, and whether all parts of the current checkpoint are
written. A run that is stopped saves its step and exits with code 75.
"""

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from uniemox_dist.checkpoints.async_writer import AsyncWriter
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import (
    EXIT_DONE,
    EXIT_FAULT,
    EXIT_REQUEUE,
    EXIT_USER,
    UserError,
    describe_lost_contact,
    is_lost_contact,
)
from uniemox_dist.core.logs import Step, start_logging
from uniemox_dist.core.signals import StopFlag
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.data.step_batches import StepBatches
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events.training import End, FaultEvent, Signal
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.rank_output import main_log
from uniemox_dist.train.checkpoint_policy import CheckpointPolicy
from uniemox_dist.train.monitor.health import Health
from uniemox_dist.train.monitor.metrics import Metrics, Trace
from uniemox_dist.train.monitor.stragglers import ComputeTimer
from uniemox_dist.train.startup import StartupTimer, announce, run_preflight
from uniemox_dist.train.step import RankStatus
from uniemox_dist.train.trainer import Startup, Trainer

log = logging.getLogger("uniemox")
C = TypeVar("C", bound=Config)
LAST_SAVE_PAUSES_S = (1, 10, 60, 300)
"""Pauses before saving the last checkpoint is retried. Without it, all steps since the previous checkpoint would be
lost."""


def train(
    config: C,
    world: World,
    build: Callable[[C, Startup], Trainer],
    *,
    resume: str = "auto",
    stop: StopFlag | None = None,
    timer: StartupTimer | None = None,
) -> int:
    """Trains to the end of a configuration, or until a stop signal; returns the exit code.

    Args:
        build: creates the parts of the run.
        resume: auto, never, or the folder of a checkpoint or run.
        stop: the signal handler, if the caller has installed one.
        timer: the startup timer, if the caller has started one.
    """
    stop = stop or StopFlag().install()
    timer = timer or StartupTimer()
    config.batch.grad_accum(world.size)  # reports a user's mistake before any file is opened
    device = collectives.init(world, config.run.timeout_s)
    folder = RunFolder(Path(config.run.dir) / config.run.name)
    collectives.on_main(world, lambda: _open_folder(folder))
    main_log.redirect_output(folder, world)
    line = start_logging(folder.logs, world.rank, main_log.stream)
    watchdog = Watchdog(
        folder.logs / f"stacks_rank{world.rank:05d}.txt", lambda reason: _report_hang(folder, world, reason)
    ).start()
    metrics: Metrics | None = None
    try:
        expect = timer.expecting(watchdog, config.run.start_timeout_s)
        if config.run.preflight:
            expect("the preflight")
            run_preflight(config, world, device, folder)
        trainer = build(config, Startup(world, device, folder, resume, expect))
        step = trainer.load_checkpoint()
        announce(trainer, step)
        metrics = _make_metrics(trainer, step)
        saves = _make_saves(trainer, watchdog)
        with StepBatches(trainer.dataset, config, first_step=step, pin=device.type == "cuda") as batches:
            timer.start("first batch")
            return _run_steps(trainer, step, batches, saves, metrics, stop, watchdog, line, timer)
    except UserError as error:
        if world.is_main:
            folder.discard_unused()
        if folder.events.exists() and str(error):  # only one rank's error has a text
            # srun's exit code may be that of a rank that it killed, so the event records this one.
            folder.write(
                FaultEvent(rank=world.rank, error=str(error), ends=True, restart=False, code=EXIT_USER)
            )
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if isinstance(error, RuntimeError) and is_lost_contact(str(error)):
            text = describe_lost_contact(str(error))
        folder.write(FaultEvent(rank=world.rank, error=text, ends=True))
        raise
    finally:
        watchdog.close()
        stop.ignore_from_now_on()
        if metrics is not None:
            metrics.close()


def _run_steps(
    trainer: Trainer,
    step: int,
    batches: StepBatches,
    saves: CheckpointPolicy,
    metrics: Metrics,
    stop: StopFlag,
    watchdog: Watchdog,
    line: Step,
    startup_timer: StartupTimer,
) -> int:
    """Trains from `step` on; returns the exit code."""
    config, world, schedule, folder = trainer.config, trainer.world, trainer.schedule, trainer.folder
    health, timer = Health(folder, world, config, metrics), ComputeTimer(trainer.device)
    trace = Trace(folder, world.rank, config) if config.run.trace else None
    limit_s = config.run.compile_timeout_s if config.compute.compile else config.run.start_timeout_s
    first, reason = step, None

    def expect(doing: str) -> None:
        watchdog.expect(doing, config.run.start_timeout_s)

    while step < schedule.max_steps and (reason := trainer.validate(step, saves, expect)) is None:
        line.now = step + 1
        watchdog.expect(f"step {step + 1}", limit_s)
        limit_s = config.run.step_timeout_s
        began = time.perf_counter()
        batch = batches.next_step()
        waited_s = time.perf_counter() - began
        if step == first:
            startup_timer.start("first step")
        lr = schedule.lr(step)
        result = trainer.train_step(batch, step, lr, RankStatus(stop.received, saves.written), timer)
        if step == first and world.is_main:
            startup_timer.report(folder, step)
        step += 1
        metrics.add(result, batch, waited_s, timer.read_and_reset())
        if trace is not None:
            trace.write(step, batch)
        must_end = health.check(step, result, batch)
        batch.clear()  # the loader may use its memory again
        saves.commit_if(result.ranks_written == world.size)
        if must_end:
            saves.finish()
            return _end_with_fault(folder, world, health.describe_end())
        last = step == schedule.max_steps
        if step % config.run.log_every == 0 or last or result.stop:
            metrics.write(step, result, lr)
        if last and not _save_last(saves, step):
            return _end_with_fault(
                folder, world, "the last checkpoint could not be saved; free disk space and start again"
            )
        if result.stop and not last:
            return _end_with_stop(folder, world, result.signal, step, saves.finish(step))
        # Saves nothing while steps are skipped, so that retention does not delete the last good checkpoint.
        if step % config.run.save_every == 0 and not last and not health.skipped_in_a_row:
            saves.start(step)
        if config.run.pictures_every and (step % config.run.pictures_every == 0 or last):
            watchdog.expect(f"the pictures of step {step}", config.run.timeout_s)
            trainer.show_samples(step, metrics)
    if reason is None:
        trainer.validate(step, saves, expect)
    trainer.finish(step, expect)
    _report_end(trainer, step, reason, None if step == first else metrics)
    return EXIT_DONE


def _save_last(saves: CheckpointPolicy, step: int) -> bool:
    """Saves the last step, with pauses in which the user may free disk space."""
    for pause_s in (0, *LAST_SAVE_PAUSES_S):
        time.sleep(pause_s)
        if saves.finish(step):
            return True
    return False


def _open_folder(folder: RunFolder) -> None:
    folder.create()
    folder.lock()


def _make_metrics(trainer: Trainer, step: int) -> Metrics:
    return Metrics(
        trainer.folder,
        trainer.schedule,
        trainer.plan,
        trainer.world,
        first_step=step,
        caches=trainer.config.data.cache_dir is not None,
        sample_flops=trainer.flops.training,
        peak_tflops=trainer.peak_tflops,
        hosts=trainer.hosts,
        straggler_factor=trainer.config.run.straggler_factor,
    )


def _make_saves(trainer: Trainer, watchdog: Watchdog) -> CheckpointPolicy:
    run = trainer.config.run
    writer = AsyncWriter(
        trainer.engine,
        trainer.folder.checkpoints,
        trainer.world,
        trainer.fixed,
        trainer.ema,
        keep_last=run.keep_last,
        keep_every=run.keep_every,
    )
    return CheckpointPolicy(
        writer,
        trainer.run_state,
        trainer.folder,
        trainer.world,
        watchdog,
        timeout_s=run.timeout_s,
        saved_step=trainer.checkpoint.step if trainer.checkpoint else -1,
    )


def _report_hang(folder: RunFolder, world: World, reason: str) -> None:
    """Reports why the watchdog ends this rank."""
    host = socket.gethostname()
    folder.write(FaultEvent(rank=world.rank, host=host, error=f"rank {world.rank}: {reason}", ends=True))
    log.error("ended: %s", reason)


def _end_with_stop(folder: RunFolder, world: World, signal: str | None, step: int, saved: bool) -> int:
    """Reports a stop by a signal to any rank; returns 75 if the step is saved, and otherwise the code of a fault."""
    if world.is_main:
        folder.write(Signal(step=step, signal=signal, saved=saved))
        log.info(
            "stopped by %s after step %d; run the same command again to resume", signal or "a rank", step
        )
    return EXIT_REQUEUE if saved else EXIT_FAULT


def _end_with_fault(folder: RunFolder, world: World, reason: str) -> int:
    """Reports a fault after which the launcher does not restart the run, because it would happen again."""
    if world.is_main:
        folder.write(FaultEvent(error=reason, ends=True, restart=False))
        log.error("ended: %s", reason)
    return EXIT_FAULT


def _report_end(trainer: Trainer, step: int, reason: str | None, metrics: Metrics | None) -> None:
    """Reports that training is complete; `metrics` is None if this attempt made no step."""
    folder = trainer.folder
    if not trainer.world.is_main:
        return
    if metrics is None and reason is None:
        log.info("%s is complete: %d of %d steps", folder.path, step, trainer.schedule.max_steps)
        # The previous attempt may have been killed after its last save.
        if not any(event.get("event") == "end" for event in read_lines(folder.events)):
            folder.write(End(step=step))
        return
    folder.write(End(step=step, reason=reason))
    skipped, damaged = (metrics.skipped, metrics.damaged) if metrics else (0, 0)
    log.info("done: %d steps, %d skipped, %d damaged samples replaced", step, skipped, damaged)
