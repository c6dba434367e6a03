"""The short form of the doctor, which training runs first: checks by all ranks together that take a second or two."""

from pathlib import Path
from typing import Any

from uniemox_dist.config.schema import Config
from uniemox_dist.distributed.world import World, is_joined
from uniemox_dist.doctor import clock, collective, disk, limits, versions
from uniemox_dist.doctor.findings import Finding
from uniemox_dist.doctor.ranks import gather, select, try_measure
from uniemox_dist.doctor.subject import LoaderNeeds, count_sizes_if_known


def preflight(
    config: Config | None, world: World, device: Any, folder_path: Path, *, training: bool = True
) -> list[Finding]:
    """Checks versions, results of collective operations, clocks, the run folder, /dev/shm and limits.

    Collective; every rank returns the same findings. `device` is this rank's torch device, or None without torch.
    Several ranks need a process group. With `training`, the packages that only training needs are compared too.
    """
    gpu = device is not None and device.type == "cuda"
    own = (
        try_measure(lambda: versions.measure(training=training)),
        try_measure(lambda: disk.measure(folder_path, disk.SHORT_BYTES)),
        try_measure(lambda: limits.measure(gpu=gpu)),
    )
    everyone = gather(world, own)
    sizes = count_sizes_if_known(config)
    loader = LoaderNeeds.from_config(config, len(everyone)) if config is not None else None
    keep = config.run.keep_last if config is not None else 1
    found = versions.judge(select(everyone, 0), bounds=False)
    if is_joined():
        found += collective.judge_results(gather(world, collective.measure(world, device, short=True)))
    found += clock.judge(gather(world, clock.measure()))
    found += disk.judge(select(everyone, 1), sizes, keep, speed=False, lenient=True)
    found += limits.judge_shm(select(everyone, 2), loader)
    found += limits.judge_files(select(everyone, 2), loader)
    return found + limits.judge_processes(select(everyone, 2), loader)
