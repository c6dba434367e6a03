"""The data of a run: how evenly an epoch is divided among streams and ranks, and the cores that loading needs.

Shapes: M shards, S streams, W ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from shards.format.manifest import Manifest, read_manifest
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.schema import Config
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.splits import open_splits


@dataclass(frozen=True)
class Spread:
    """Minimum, mean and maximum over ranks or streams in one epoch."""

    least: float
    mean: float
    most: float

    @property
    def ratio(self) -> float:
        """Maximum over mean."""
        return self.most / self.mean if self.mean else 1.0


@dataclass(frozen=True)
class Balance:
    """The share of each stream and rank in the first epoch of each source."""

    samples_per_stream: Spread
    samples_per_rank: Spread
    bytes_per_rank: Spread
    """Bytes per rank; all samples of a shard count as equally large."""
    shards_per_rank: Spread
    """Shards that a rank reads from; a shard counts for each such rank."""
    shards_at_a_time: int
    """Largest number of shards in one stream's window, which may span several small shards."""
    streams: tuple[int, ...]
    """Streams of each source."""


@dataclass(frozen=True)
class Data:
    """Facts about a run's data that a plan needs."""

    samples: int
    epoch_samples: int
    bytes: int | None
    shards: int | None
    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    labels: int | None = None
    """Labels of the training split of a fine-tuning run."""


def open_data(config: Config) -> Data:
    """Reads the manifests of a run's data, and for fine-tuning the labels in their indexes; shards are not opened.

    Raises:
        UserError: naming the folder that is missing or damaged.
    """
    if isinstance(config, FinetuneRun):
        return _open_labelled(config)
    origins = config.data.origins()
    fields = ["data.path"] if config.data.path else [f"data.sources.{i}.path" for i in range(len(origins))]
    manifests = tuple(read_manifest(origin.path, field) for origin, field in zip(origins, fields))
    # Weights as in uniemox_dist/data/sources.py.
    weights = tuple(
        origin.repeat * manifest.samples if origin.repeat is not None else origin.weight or 1.0
        for origin, manifest in zip(origins, manifests)
    )
    samples = sum(manifest.samples for manifest in manifests)
    epoch = config.data.epoch_samples
    if epoch is None:
        epoch = round(sum(weights)) if config.data.by_repeats else samples
    return Data(
        samples,
        epoch,
        sum(manifest.bytes for manifest in manifests),
        sum(len(manifest.shards) for manifest in manifests),
        manifests,
        weights,
        tuple(origin.path for origin in origins),
    )


def _open_labelled(config: FinetuneRun) -> Data:
    """The training split without the samples for validation and those that finetune.split_ratio leaves out; the bytes
    of a shard are reduced in proportion."""
    splits = open_splits(config)
    train = splits.train
    shards = tuple(
        replace(shard, samples=count, bytes=shard.bytes * count // max(1, shard.samples))
        for shard, count in zip(train.manifest.shards, train.counts)
    )
    manifest = Manifest(shards, train.manifest.provenance)
    samples, labels = manifest.samples, len(splits.labels)
    return Data(samples, samples, manifest.bytes, len(shards), (manifest,), (1.0,), (train.url,), labels)


def make_stated_data(config: Config, samples: int) -> Data:
    """Data that are not packed yet; only the number of samples is known."""
    return Data(samples, config.data.epoch_samples or samples, None, None, (), (), ())


def compute_balance(config: Config, data: Data, ranks: int) -> Balance:
    """Computes what each stream and rank reads in the first epoch.

    Raises:
        UserError: if a source of a mix gets no stream.
    """
    counts = [manifest.counts for manifest in data.manifests]
    plan = Plan(
        counts,
        data.weights,
        streams=config.batch.streams,
        global_batch=config.batch.global_batch,
        seed=config.run.seed,
        window=config.data.shuffle_window,
    )
    samples_S, bytes_S, shards_S = np.zeros((3, plan.streams))
    for number, (source, manifest) in enumerate(zip(plan.sources, data.manifests)):
        own_S = plan.owner_S == number
        first, end = (rows[plan.nth_S[own_S]] for rows in source.ranges(0))
        order_M, ends = source.shard_order(0)
        bytes_M = np.array(manifest.shard_bytes)[order_M]
        before = np.concatenate([[0], np.cumsum(bytes_M)])
        samples_S[own_S] = end - first
        bytes_S[own_S] = np.interp(end, ends, before) - np.interp(first, ends, before)
        touched = np.searchsorted(ends, end, "left") - np.searchsorted(ends, first, "right") + 1
        shards_S[own_S] = np.where(end > first, touched, 0)
    return Balance(
        samples_per_stream=_compute_spread(samples_S),
        samples_per_rank=_compute_spread(samples_S, ranks),
        bytes_per_rank=_compute_spread(bytes_S, ranks),
        shards_per_rank=_compute_spread(shards_S, ranks),
        shards_at_a_time=_at_a_time(config, data),
        streams=plan.shares,
    )


def _at_a_time(config: Config, data: Data) -> int:
    assert data.shards
    return min(data.shards, 1 + math.ceil(config.data.shuffle_window * data.shards / data.samples))


def count_bytes_in_use(config: Config, data: Data, streams: int) -> int:
    """Largest total bytes of the shards that so many streams read at a time, as in uniemox_dist/data/sources.py. A
    smaller cache would fetch shards repeatedly."""
    assert data.bytes is not None
    largest = max(max(manifest.shard_bytes) for manifest in data.manifests)
    return min(data.bytes, streams * _at_a_time(config, data) * largest)


def _compute_spread(values_S: np.ndarray, ranks: int | None = None) -> Spread:
    """The spread over streams, or over ranks, each of which has neighbouring streams."""
    values = values_S if ranks is None else values_S.reshape(ranks, -1).sum(1)
    return Spread(float(values.min()), float(values.mean()), float(values.max()))


def describe_balance(
    config: Config, data: Data, found: Balance | None, node_streams: int
) -> list[tuple[str, str]]:
    """Remarks for operators, as (status, text)."""
    G = config.batch.global_batch
    remarks = []
    if data.samples < G:
        remarks.append(
            ("warn", f"{data.samples:,} samples are fewer than batch.global_batch={G}: steps repeat samples")
        )
    if found is not None and data.shards is not None and data.shards < config.batch.streams:
        remarks.append(
            (
                "ok",
                f"{data.shards} shards for {config.batch.streams} streams: several streams read parts of one shard",
            )
        )
    if found is not None and config.data.cache_dir is not None:
        need = count_bytes_in_use(config, data, node_streams)
        if need > config.data.cache_gb * 1e9:
            remarks.append(
                (
                    "warn",
                    f"data.cache_gb={config.data.cache_gb:g} is too small: a node reads from {need / 1e9:.2f} GB of "
                    f"shards at a time; set at least {need / 1e9:.2f}",
                )
            )
    if found is not None and found.bytes_per_rank.ratio > 1.25:
        remarks.append(
            ("warn", f"the rank with most bytes reads {found.bytes_per_rank.ratio:.2f} times the mean")
        )
    return remarks


def count_epochs_of_sources(config: Config, data: Data, steps: int, streams: Sequence[int]) -> list[float]:
    """Epochs of each source in the whole run."""
    per_stream = steps * config.batch.global_batch / config.batch.streams
    return [per_stream * share / manifest.samples for share, manifest in zip(streams, data.manifests)]


MS_PER_SAMPLE = 1.47
"""Milliseconds of one core for a sample of 500 x 375 pixels, from tar to two views: 678 samples/s and core,
docs/benchmarks/stream.md (256 pixels wide: 0.69, 1024: 4.2)."""


@dataclass(frozen=True)
class Loading:
    """The loader of one node."""

    samples_per_s: float
    busy: float
    """Cores that loading keeps busy."""
    workers: int
    """Loader processes that one rank needs: data.workers."""
    cores: int
    """Cores for the loader processes and for the ranks themselves."""


def compute_loading(samples_per_s: float, per_node: int, ms_per_sample: float | None = None) -> Loading:
    """The loader of a node whose `per_node` ranks together consume so many samples per second."""
    busy = samples_per_s * (MS_PER_SAMPLE if ms_per_sample is None else ms_per_sample) / 1000
    workers = max(1, math.ceil(busy / per_node))
    return Loading(samples_per_s, busy, workers, per_node * (1 + workers))


def describe_loading(
    need: Loading, config: Config, per_node: int, cpus_per_node: int | None
) -> list[tuple[str, str]]:
    """Whether workers and cores are enough, with fixes, as (status, text); status is ok or warn."""
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
            remarks.append(
                ("ok", f"{cpus_per_node} cores per node are enough, with less than one per process")
            )
        else:
            remarks.append(("ok", f"{cpus_per_node} cores per node are enough"))
    return remarks
