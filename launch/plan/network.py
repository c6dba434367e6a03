"""Bytes that ranks exchange in a step, and the time of these exchanges.

The model is a ring. In an all-reduce of N bytes each of W ranks sends 2 N (W - 1) / W bytes, in an all-gather or a
reduce-scatter half of that (Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009). A ring over nodes leaves each
node once, so a node's network carries as much as one rank sends. Only bandwidth counts, not latency, because NCCL uses
trees with very many ranks. The traffic of ZeRO follows Rajbhandari et al., SC 2020, section 7, except that DeepSpeed's
stages 1 and 2 reduce whole buckets on all ranks (`use_multi_rank_bucket_allreduce`), which costs twice a
reduce-scatter.
Symbols: P trained numbers, s bytes of a number.
"""

from dataclasses import dataclass
from typing import Literal

from launch.plan.engine import PERSISTENT, REUSE
from uniemox_dist.config.schema import Config
from uniemox_dist.models.parameters import Parameter

CPU_LINK_GB_S = 2.0
"""Assumed between ranks of one node without GPUs (gloo over the loopback device)."""


@dataclass(frozen=True)
class Traffic:
    """All exchanges of one kind in a step."""

    what: str
    operation: Literal["all-reduce", "all-gather", "reduce-scatter"]
    bytes: int
    """N, summed over all calls in a step."""

    def sent(self, ranks: int) -> float:
        """Bytes that a rank sends."""
        return (2 if self.operation == "all-reduce" else 1) * self.bytes * (ranks - 1) / ranks


def list_exchanges(
    config: Config,
    parameters: tuple[Parameter, ...],
    embedding_width: int | None,
    *,
    stage: int,
    precision: str,
    micro_batches: int,
) -> list[Traffic]:
    """Lists the exchanges of a step with so many micro-batches, except those of a few numbers."""
    s = 2 if precision == "bf16" else 4
    trained = sum(p.numbers for p in parameters if p.trained)
    found = []
    if stage in (0, 1):
        found.append(Traffic("gradients, once a step", "all-reduce", s * trained))
    if stage == 2:
        found.append(Traffic("gradients, each micro-batch", "all-reduce", s * trained * micro_batches))
    if stage in (1, 2):
        found.append(Traffic("updated weights", "all-gather", s * trained))
    if stage == 3:
        whole = sum(p.numbers for p in parameters)
        small = sum(p.numbers for p in parameters if p.numbers <= PERSISTENT)
        # Weights whose second use is far away are freed and gathered again for the backward pass.
        twice = max(0, whole - small - REUSE // 2)
        found += [
            Traffic("weights for each pass", "all-gather", s * (whole - small + twice) * micro_batches),
            Traffic("gradients, each micro-batch", "reduce-scatter", s * trained * micro_batches),
            Traffic("updated small weights", "all-gather", s * small),
        ]
    if config.loss.needs_texts and config.loss.relation_over == "global" and embedding_width is not None:
        # train/pretrain.py gathers the step's caption vectors once, in fp16.
        found.append(
            Traffic("caption vectors", "all-gather", 2 * config.batch.global_batch * embedding_width)
        )
    return found


@dataclass(frozen=True)
class NetworkTime:
    """Seconds of a step's exchanges if nothing overlaps."""

    seconds: float | None
    """None if a required bandwidth is unknown."""
    within_s: float | None
    """Between the GPUs of a node."""
    between_s: float | None
    """Between nodes; 0 for one node."""


def network_time(
    sent_bytes: float, *, nodes: int, per_node: int, link_gb_s: float | None, network_gbit_s: float | None
) -> NetworkTime:
    """Computes the time of the exchanges; the slowest link of a ring decides.

    Args:
        link_gb_s: bandwidth from a GPU to the others of its node, 10^9 bytes per second in one direction.
        network_gbit_s: bandwidth from a node to the others, 10^9 bits per second in one direction.
    """
    within = 0.0 if per_node == 1 else sent_bytes / (link_gb_s * 1e9) if link_gb_s else None
    between = 0.0 if nodes == 1 else sent_bytes * 8 / (network_gbit_s * 1e9) if network_gbit_s else None
    if between is None or (within is None and nodes == 1):
        return NetworkTime(None, within, between)
    return NetworkTime(max(within or 0.0, between), within, between)
