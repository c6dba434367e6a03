"""The data sets of a run: opened, weighed, and what the plan needs to know of them."""

import math
from pathlib import Path

from shards.format.index import ROW_GROUP
from shards.format.manifest import combined_identity
from uniemox_dist.config.schema import Config
from uniemox_dist.data.cache import ShardCache
from uniemox_dist.data.origin import ShardOrigin
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import ShardReader

ROW_BYTES = 400
"""Of one row of an index in memory, with a caption of ordinary length."""


class Sources:
    """The data sets of a mix, in order."""

    def __init__(self, config: Config, *, rank: int = 0, world_size: int = 1) -> None:
        """Opens every source. Each rank checks the sizes of its own part of the shards.

        Raises:
            UserError: naming the folder that is missing, empty or damaged.
        """
        data = config.data
        origins = data.origins()
        fields = ["data.path"] if data.path else [f"data.sources.{i}.path" for i in range(len(origins))]
        self.readers = [
            _open_reader(origin.path, field, config, (rank, world_size))
            for origin, field in zip(origins, fields)
        ]
        cache = ShardCache(Path(data.cache_dir), int(data.cache_gb * 1e9)) if data.cache_dir else None
        for reader in self.readers:
            reader.origin.retry_s, reader.origin.cache = data.retry_s, cache
        self.names = [origin.path for origin in origins]
        self.weights = [
            origin.repeat * reader.samples if origin.repeat is not None else origin.weight or 1.0
            for origin, reader in zip(origins, self.readers)
        ]

    @property
    def samples(self) -> int:
        """Samples of all sources."""
        return sum(reader.samples for reader in self.readers)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for reader in self.readers for shard in reader.manifest.shards)

    @property
    def identity(self) -> str:
        """The identity of the data, recorded by checkpoints."""
        return combined_identity([reader.manifest.identity for reader in self.readers])

    def epoch_samples(self, config: Config) -> int:
        """Samples of one epoch: as the settings say, by the repeats of a mix, or else of all data."""
        if config.data.epoch_samples is not None:
            return config.data.epoch_samples
        return round(sum(self.weights)) if config.data.by_repeats else self.samples

    def plan(self, config: Config) -> Plan:
        """The order of samples of a run over these sources."""
        return Plan(
            [reader.counts for reader in self.readers],
            self.weights,
            streams=config.batch.streams,
            global_batch=config.batch.global_batch,
            seed=config.run.seed,
            window=config.data.shuffle_window,
        )

    def bytes_in_use(self, streams: int, window: int) -> int:
        """Bytes of the shards that so many streams walk through at a time: a cache smaller than that reads them
        again and again. A stream is in one window, which may reach over several small shards."""
        largest = max(shard.bytes for reader in self.readers for shard in reader.manifest.shards)
        mean = self.samples / sum(len(reader.manifest.shards) for reader in self.readers)
        return min(self.bytes, streams * (1 + math.ceil(window / mean)) * largest)


def _open_reader(path: str, field: str, config: Config, share: tuple[int, int]) -> ShardReader:
    """A source; as every read later on, its manifest and sizes are asked for again while that may help."""
    origin = ShardOrigin(path, field)
    origin.retry_s = config.data.retry_s
    verify = config.data.verify_hash
    return origin.persistent(
        "its manifest and the sizes of its shards",
        lambda: ShardReader.from_folder(path, field, verify_hash=verify, share=share),
    )


def count_shared_micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches that one rank and its loader processes hold at a time: those ahead, and those of one step."""
    batch, data = config.batch, config.data
    return data.workers * data.prefetch + batch.global_batch // (batch.micro_batch * ranks) + 1


def estimate_loader_bytes(config: Config, ranks: int) -> tuple[int, int]:
    """Bytes of views that a rank shares with its loader processes, and of index rows in each of them, at most."""
    views = config.batch.micro_batch * 2 * 3 * config.model.image_size**2
    return count_shared_micro_batches(config, ranks) * views, count_kept_rows(config, ranks) * ROW_BYTES


def count_kept_rows(config: Config, ranks: int) -> int:
    """Rows of indexes that a loader process keeps. It meets all streams of its rank, and each is in one window, which
    lies in two row groups at most beyond its own length."""
    own = config.batch.streams // ranks
    return max(ShardReader.KEEP_ROWS, own * (config.data.shuffle_window + 2 * ROW_GROUP))


def describe_data(sources: Sources, plan: Plan, config: Config, ranks: int, local_ranks: int) -> list[str]:
    """What an operator should know of a run's data: how a mix is dealt, what loaders hold, what a cache needs."""
    data, batch = config.data, config.batch
    shared, rows = estimate_loader_bytes(config, ranks)
    lines = [
        f"loader: {data.workers} processes a rank; at most {shared / 1e6:.0f} MB of views shared among them "
        f"({count_shared_micro_batches(config, ranks)} micro-batches), and {rows / 1e6:.0f} MB of index rows in each"
    ]
    if len(sources.readers) > 1:
        total = sum(sources.weights)
        lines += [
            f"source {i} {name}: {reader.samples} samples, {share} of {plan.streams} streams = "
            f"{100 * share / plan.streams:.1f} % of the slots (asked: {100 * weight / total:.1f} %)"
            for i, (name, reader, share, weight) in enumerate(
                zip(sources.names, sources.readers, plan.shares, sources.weights)
            )
        ]
    if data.cache_dir:
        need = sources.bytes_in_use(batch.streams * local_ranks // ranks, data.shuffle_window)
        lines.append(
            f"cache {data.cache_dir}: {data.cache_gb:g} GB; this node walks through {need / 1e9:.2f} GB of shards at a "
            f"time, all data are {sources.bytes / 1e9:.2f} GB"
        )
        if need > data.cache_gb * 1e9:
            lines.append(
                f"data.cache_gb={data.cache_gb:g} is too small: shards leave the cache before they are read through; "
                f"set at least {need / 1e9:.2f}"
            )
    return lines
