"""The rate at which a rank's device multiplies matrices in bf16, compared with its data sheet."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from uniemox_dist.core.devices import peak_tflops
from uniemox_dist.core.formatting import format_range
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts

WHAT = "bf16 rate"
WARN_SHARE, FAIL_SHARE = 0.5, 0.2
"""Shares of the stated peak below which the check warns or fails."""
LAGGING = 0.7
"""A rank below this share of the ranks' median gives a warning, because all others wait for it."""
SIDE = {"cuda": 8192, "cpu": 512}
"""Side of the square matrices."""
WARM_UP_S, SECONDS = 0.3, 0.7
GPU_REMEDY = (
    "see nvidia-smi -q -d PERFORMANCE,CLOCK,TEMPERATURE there for throttling, a power cap or another process; take the "
    "node out (sbatch --exclude)"
)
CPU_REMEDY = "see what else runs there, and that each task has its own cores (srun --cpus-per-task)"


@dataclass(frozen=True)
class RateFacts:
    """The measurement of one rank."""

    device: str
    gpu: bool
    tflops: float
    """10^12 operations per second; a multiplication with its addition counts as two."""
    peak: float | None
    """The device's peak in its data sheet; None if unknown."""


def measure(device: Any, stated_peak: float | None = None) -> RateFacts:
    """Multiplies matrices for about a second; `stated_peak` overrides the table of devices."""
    import torch

    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)

    def run_for(seconds: float) -> float:
        """Seconds of one product. The host waits once for several products, since a wait costs as much as a small
        product."""
        at_once = 8 if device.type == "cuda" else 1
        done = 0
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            for _ in range(at_once):
                torch.mm(a, b, out=out)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            done += at_once
        return (time.perf_counter() - began) / done

    run_for(WARM_UP_S)  # raises clock rates and loads libraries
    tflops = 2 * side**3 / run_for(SECONDS) / 1e12
    if device.type != "cuda":
        return RateFacts("CPU", False, tflops, stated_peak)
    name = torch.cuda.get_device_name(device)
    return RateFacts(name, True, tflops, stated_peak or peak_tflops(name, "bf16"))


def judge(gathered: Sequence[RankFacts[RateFacts]]) -> list[Finding]:
    """Fails below a fifth of the stated peak, warns below half of it, or well below the ranks' median."""
    median = statistics.median([facts.tflops for _, facts in select_with_facts(gathered)] or [0.0])

    def of_rank(_: RankFacts[RateFacts], facts: RateFacts) -> Problem | None:
        rate = _rates([facts.tflops])
        remedy = GPU_REMEDY if facts.gpu else CPU_REMEDY
        share = facts.tflops / facts.peak if facts.peak else 1.0
        if share < WARN_SHARE:
            value = f"{rate}, {100 * share:.0f} % of the {facts.peak:g} that {facts.device} is stated to have"
            return Problem("fail" if share < FAIL_SHARE else "warn", value, remedy)
        if facts.tflops < LAGGING * median:
            return Problem("warn", f"{rate}, the ranks' median is {_rates([median])}", remedy)
        return None

    def all_well(all_facts: list[RateFacts]) -> str:
        rate = _rates([facts.tflops for facts in all_facts])
        shares = [100 * facts.tflops / facts.peak for facts in all_facts if facts.peak]
        if not shares:
            return f"{rate} on {all_facts[0].device}; no peak is known to compare with"
        return f"{rate} on {all_facts[0].device}, {format_range(shares, '%', 2)} of the stated peak"

    return make_findings(WHAT, gathered, of_rank, all_well)


def _rates(tflops: Sequence[float]) -> str:
    """Formats a rate in TFLOP/s, or in GFLOP/s if it is small."""
    if max(tflops) >= 1:
        return format_range(tflops, "TFLOP/s")
    return format_range((1e3 * rate for rate in tflops), "GFLOP/s")
