"""All checks, one after the other; all ranks run each at the same time, as in training."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from uniemox_dist.distributed.world import World, is_joined
from uniemox_dist.doctor import (
    clock,
    collective,
    devices,
    disk,
    inputs,
    limits,
    memory,
    rate,
    reading,
    versions,
)
from uniemox_dist.doctor.findings import Finding, RankFacts
from uniemox_dist.doctor.ranks import HOST, barrier, gather, limit_time, try_measure
from uniemox_dist.doctor.subject import LoaderNeeds, Sizes, Subject, count_sizes_if_known

LONGEST_S = 120
"""Seconds after which a check counts as hanging."""
Check = Callable[[], list[Finding]]


def examine(subject: Subject, world: World, device: Any) -> Iterator[list[Finding]]:
    """Yields the findings of each check, the same on all ranks. Collective.

    `device` is this rank's torch device, or None without torch; then each process checks only its own node. A rank on
    which a check hangs ends its process (see `limit_time`).
    """
    for name, check in _checks(subject, world, device):
        with limit_time(LONGEST_S, name, world):
            barrier()
            yield check()


def _checks(subject: Subject, world: World, device: Any) -> Iterator[tuple[str, Check]]:
    config = subject.config
    ranks = world.size if is_joined() else 1
    loader = LoaderNeeds.from_config(config, ranks) if config is not None else None
    sizes = count_sizes_if_known(config)
    yield (
        versions.WHAT,
        lambda: versions.judge(gather(world, try_measure(_versions(config is not None, device)))),
    )
    yield devices.DEVICES, partial(_devices, world, loader)
    yield memory.HOST, partial(_memory, world, loader, sizes, config.zero.stage if config else 1)
    yield limits.SHM, partial(_limits, world, loader, device is not None and device.type == "cuda")
    yield clock.WHAT, lambda: clock.judge(gather(world, clock.measure()))
    if is_joined():
        yield collective.RESULTS, partial(_collectives, world, device, sizes)
    if device is not None:
        peak = config.compute.peak_tflops if config else None
        yield rate.WHAT, lambda: rate.judge(gather(world, try_measure(lambda: rate.measure(device, peak))))
    keep = config.run.keep_last if config else 1
    folder = subject.run_folder
    yield disk.WHAT, lambda: disk.judge(gather(world, try_measure(lambda: disk.measure(folder))), sizes, keep)
    for field, path in subject.data:
        yield reading.WHAT, partial(_reading, world, field, path)
    if config is not None:
        yield from _inputs(config, world)


def check_alone(world: World) -> list[Finding]:
    """Finds what keeps this rank from joining the others, such as a missing device. Not collective."""
    found = devices.judge_devices([RankFacts(world.rank, HOST, try_measure(lambda: devices.measure(world)))])
    return [finding for finding in found if finding.status == "fail"]


def describe_failed_meeting(error: Exception, world: World) -> Finding:
    """The finding for a process group, or an operation in it, that failed."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    where = f"ranks meet at {world.master_addr}:{world.master_port}" if world.size > 1 else "one rank"
    remedy = (
        "see the other ranks' lines; MASTER_ADDR must be rank 0's host, reached by all, and MASTER_PORT free"
    )
    return Finding("fail", "meeting", f"{first} ({where})", remedy, world.rank, HOST)


def _versions(training: bool, device: Any) -> Callable[[], versions.VersionFacts]:
    return lambda: versions.measure(training=training and device is not None)


def _devices(world: World, loader: LoaderNeeds | None) -> list[Finding]:
    everyone = gather(world, try_measure(lambda: devices.measure(world)))
    workers = loader.workers if loader else None
    return devices.judge_devices(everyone) + devices.judge_cores(everyone, workers)


def _memory(world: World, loader: LoaderNeeds | None, sizes: Sizes | None, stage: int) -> list[Finding]:
    everyone = gather(world, try_measure(lambda: memory.measure(world)))
    return memory.judge_host(everyone, loader) + memory.judge_gpu(everyone, sizes, stage)


def _limits(world: World, loader: LoaderNeeds | None, gpu: bool) -> list[Finding]:
    everyone = gather(world, try_measure(lambda: limits.measure(gpu=gpu)))
    found = limits.judge_shm(everyone, loader) + limits.judge_files(everyone, loader)
    return found + limits.judge_processes(everyone, loader)


def _collectives(world: World, device: Any, sizes: Sizes | None) -> list[Finding]:
    everyone = gather(world, collective.measure(world, device))
    gradients = sizes.gradient_bytes if sizes else None
    found = collective.judge_results(everyone) + collective.judge_speed(everyone, gradients)
    return found + collective.judge_links(everyone)


def _reading(world: World, field: str, path: str) -> list[Finding]:
    return reading.judge(gather(world, try_measure(lambda: reading.measure(field, path, world))))


def _inputs(config: Any, world: World) -> Iterator[tuple[str, Check]]:
    """The checks of the teacher and of the initial weights that a recipe names."""
    teacher, initial = config.teacher, config.model.init_from
    if config.loss.needs_teacher:
        look = inputs.measure_teacher if teacher.source == "live" else None
        measure = partial(look, teacher) if look else partial(inputs.measure_cache, config, world)
        yield inputs.TEACHER, lambda: inputs.judge(inputs.TEACHER, gather(world, try_measure(measure)))
    if initial is not None:
        first = partial(inputs.measure_initial, Path(initial))
        yield inputs.INITIAL, lambda: inputs.judge(inputs.INITIAL, gather(world, try_measure(first)))
