"""Memory of DeepSpeed's engine on one rank: weights, gradients, optimizer states and buffers of a model.

The rules are those of DeepSpeed 0.19 with the settings of train/engine.py; tests/distributed compares them with the
tensors of real engines.
Symbols: P trained numbers, W ranks, s bytes of a number (2 in bf16, 4 in fp32).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from uniemox_dist.config.schema import Config
from uniemox_dist.models.parameters import ENCODER, Parameter, optimizer_group

BUCKET = 25_000_000
"""Numbers in a bucket of gradients, as train/engine.py sets it."""
STAGE_0_BUCKET = 500_000_000
PERSISTENT = 100_000
"""ZeRO-3 does not shard parameters up to this size."""
REUSE, LIVE, PREFETCH = 1_000_000_000, 1_000_000_000, 50_000_000
"""In numbers of parameters. ZeRO-3 keeps a gathered parameter that is needed again within REUSE, holds at most LIVE,
and gathers PREFETCH ahead."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the rank that has the most."""

    weights: int
    """Weights during a pass, including those that ZeRO-3 has gathered."""
    resting: int
    """Weights between steps."""
    gradients: int
    """Gradients at their peak."""
    optimiser: int
    """Both moments, and the fp32 master weights that ZeRO keeps in every number format."""
    ema: int
    buffers: int
    """Buckets in which gradients are reduced."""
    step_copy: int
    """A copy of the gradients in fp32. It exists only during the update, when there are no activations."""


def engine_memory(
    config: Config, parameters: tuple[Parameter, ...], *, stage: int, ranks: int, precision: str, gpu: bool
) -> EngineMemory:
    """Counts the engine's memory in one ZeRO stage."""
    s = 2 if precision == "bf16" else 4
    zero = config.deepspeed.get("zero_optimization") or {}
    groups = _group_parameters(config, parameters)
    fixed = sum(p.numbers for p in parameters if not p.trained)
    trained = sum(p.numbers for p in parameters if p.trained)
    own = sum(p.numbers for p in parameters if p.trained and p.name.startswith(ENCODER))
    averages = config.optim.ema_decay > 0
    if stage == 0:
        weights = s * (trained + fixed)
        copy = s * min(trained, STAGE_0_BUCKET) if ranks > 1 else 0
        return EngineMemory(
            weights, weights, s * trained, 8 * trained, averages * 4 * _round_up(own, ranks), 0, copy
        )
    bucket = s * int(zero.get("reduce_bucket_size", BUCKET))
    overlap = bool(zero.get("overlap_comm", gpu and ranks > 1))
    if stage == 3:
        return _stage_3(parameters, zero, ranks, s, bucket, averages)
    partitions = {
        key: _round_up(sum(p.numbers for p in group), 2 * ranks) * 2 for key, group in groups.items()
    }
    weights = s * (ranks * sum(partitions.values()) + fixed)
    return EngineMemory(
        weights=weights,
        resting=weights,
        # ZeRO-1 keeps all gradients until the end of the backward pass.
        gradients=s * (trained if stage == 1 else sum(partitions.values())),
        optimiser=12 * sum(partitions.values()),
        ema=averages * 4 * _encoder_in_partition(groups, partitions, ranks),
        # In ZeRO-2 the gradients that wait until they fill a bucket. With other ranks also the bucket, a second one if
        # reductions overlap the backward pass, and a flat copy of the one that is being reduced.
        buffers=bucket * ((stage == 2) + (3 if overlap else 2 if ranks > 1 else 0)),
        step_copy=4 * max(partitions.values()) if precision == "bf16" else 0,
    )


def _stage_3(
    parameters: tuple[Parameter, ...],
    zero: Mapping[str, Any],
    ranks: int,
    s: int,
    bucket: int,
    averages: bool,
) -> EngineMemory:
    """Counts ZeRO-3: every parameter is cut into W pieces. Small ones also stay whole; the others are gathered for
    use."""

    def setting(name: str, default: int) -> int:
        return int(zero.get(f"stage3_{name}", zero.get(name, default)))

    shards = sum(_round_up(p.numbers, ranks) for p in parameters if p.trained)
    fixed = sum(_round_up(p.numbers, ranks) for p in parameters if not p.trained)
    own = sum(_round_up(p.numbers, ranks) for p in parameters if p.trained and p.name.startswith(ENCODER))
    whole = sum(p.numbers for p in parameters)
    small = sum(
        p.numbers for p in parameters if p.numbers <= setting("param_persistence_threshold", PERSISTENT)
    )
    # A weight is used again in the backward pass; in between, the weights that follow it are used twice.
    ahead = min(setting("max_reuse_distance", REUSE) // 2, setting("max_live_parameters", LIVE))
    gathered = min(whole, small + ahead + setting("prefetch_bucket_size", PREFETCH))
    alone = ranks == 1  # a piece is then the whole parameter
    resting = s * (shards + fixed + (0 if alone else small))
    return EngineMemory(
        weights=s * (shards + fixed + (0 if alone else gathered)),
        resting=resting,
        gradients=s * shards,
        optimiser=12 * shards,
        ema=averages * 4 * own,
        buffers=bucket * (1 if alone else 2),
        step_copy=4 * shards,
    )


def _group_parameters(
    config: Config, parameters: tuple[Parameter, ...]
) -> dict[tuple[float, bool], list[Parameter]]:
    """The optimizer's groups. DeepSpeed flattens and divides each group separately."""
    found: dict[tuple[float, bool], list[Parameter]] = {}
    for p in parameters:
        if p.trained:
            key = optimizer_group(p.name, len(p.shape), config.model.depth, config.optim.layer_decay)
            found.setdefault(key, []).append(p)
    return found


def _encoder_in_partition(
    groups: Mapping[tuple[float, bool], list[Parameter]],
    partitions: Mapping[tuple[float, bool], int],
    ranks: int,
) -> int:
    """Numbers of the encoder in the partitions of the rank that has most. The encoder is first in each group."""
    total_W = np.zeros(ranks, np.int64)
    for key, group in groups.items():
        encoder = sum(p.numbers for p in group if p.name.startswith(ENCODER))
        total_W += np.clip(encoder - np.arange(ranks) * partitions[key], 0, partitions[key])
    return int(total_W.max())


def _round_up(number: int, parts: int) -> int:
    return -(-number // parts)
