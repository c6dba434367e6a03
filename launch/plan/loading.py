"""Cores that the loader of a node needs."""

import math
from dataclasses import dataclass

from uniemox_dist.config.schema import Config

MS_PER_SAMPLE = 1.47
"""Milliseconds of one core for a sample of 500 x 375 pixels, from tar to two views: 678 samples/s and core,
docs/benchmarks/stream.md (256 pixels wide: 0.69, 1024: 4.2)."""


@dataclass(frozen=True)
class Loading:
    """Of one node."""

    samples_per_s: float
    busy: float
    """Cores that loading keeps busy."""
    workers: int
    """data.workers that are enough for it: loader processes of one rank."""
    cores: int
    """With those, and one core for each rank itself."""


def loading(samples_per_s: float, per_node: int, ms_per_sample: float | None = None) -> Loading:
    """For a node with so many ranks that together take so many samples per second."""
    busy = samples_per_s * (MS_PER_SAMPLE if ms_per_sample is None else ms_per_sample) / 1000
    workers = max(1, math.ceil(busy / per_node))
    return Loading(samples_per_s, busy, workers, per_node * (1 + workers))


def loading_remarks(
    need: Loading, config: Config, per_node: int, cpus_per_node: int | None
) -> list[tuple[str, str]]:
    """What is wrong, with what would mend it, as (status, text): status is ok or warn."""
    remarks = []
    have = config.data.workers
    if have < need.workers:
        remarks.append(
            (
                "warn",
                f"data.workers={have} is too few: loading fills {need.busy:.1f} cores; set data.workers={need.workers}",
            )
        )
    else:
        remarks.append(("ok", f"data.workers={have} is enough"))
    if cpus_per_node is not None:
        wanted = per_node * (1 + max(have, need.workers))
        if cpus_per_node < math.ceil(need.busy) + per_node:
            slower = max(0, cpus_per_node - per_node) / need.busy
            remarks.append(
                (
                    "warn",
                    f"--cpus-per-node={cpus_per_node} is too few: GPUs would wait for data "
                    f"({100 * slower:.0f} % of the pace); smaller pictures, or more nodes with fewer GPUs",
                )
            )
        elif cpus_per_node < wanted:
            remarks.append(("ok", f"{cpus_per_node} cores a node are enough, with less than one a process"))
        else:
            remarks.append(("ok", f"{cpus_per_node} cores a node are enough"))
    return remarks
