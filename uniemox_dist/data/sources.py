"""The data sets of a run: opens them, weighs them, and makes the plan of samples."""

import math
from collections.abc import Sequence
from pathlib import Path

from shards.format.index import ROW_GROUP
from shards.format.manifest import Manifest, combined_identity
from uniemox_dist.config.schema import Config
from uniemox_dist.core.formatting import size
from uniemox_dist.data.cache import ShardCache
from uniemox_dist.data.origin import ShardOrigin
from uniemox_dist.data.plan import Plan
from uniemox_dist.data.reader import ShardReader

ROW_BYTES = 400
"""Memory of one index row with a caption of ordinary length."""


class Sources:
    """The data sets of a mix, in the order of the configuration."""

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        manifests: Sequence[Manifest] | None = None,
    ) -> None:
        """Opens every source. Each rank checks the sizes of its part of the shards. Reads the manifests unless they are
        given, one for each of `list_places`.

        Raises:
            UserError: naming the folder that is missing, empty or damaged.
        """
        data = config.data
        entries = data.origins()
        self.readers = [
            _open_reader(path, field, config, (rank, world_size), manifests[i] if manifests else None)
            for i, (path, field) in enumerate(list_places(config))
        ]
        cache = ShardCache(Path(data.cache_dir), int(data.cache_gb * 1e9)) if data.cache_dir else None
        for reader in self.readers:
            reader.origin.retry_s, reader.origin.cache = data.retry_s, cache
        self.names = [entry.path for entry in entries]
        self.weights = [
            entry.repeat * reader.samples if entry.repeat is not None else entry.weight or 1.0
            for entry, reader in zip(entries, self.readers)
        ]

    @property
    def samples(self) -> int:
        """Number of samples of all sources."""
        return sum(reader.samples for reader in self.readers)

    @property
    def bytes(self) -> int:
        """Size of all tars."""
        return sum(reader.manifest.bytes for reader in self.readers)

    @property
    def identity(self) -> str:
        """Hash of all manifests, recorded in checkpoints."""
        return combined_identity([reader.manifest.identity for reader in self.readers])

    def epoch_samples(self, config: Config) -> int:
        """Returns the samples of one epoch: data.epoch_samples, or the sum over repeats of a mix, or all samples."""
        if config.data.epoch_samples is not None:
            return config.data.epoch_samples
        return round(sum(self.weights)) if config.data.by_repeats else self.samples

    def plan(self, config: Config) -> Plan:
        """Makes the order of samples of a run over these sources."""
        return Plan(
            [reader.counts for reader in self.readers],
            self.weights,
            streams=config.batch.streams,
            global_batch=config.batch.global_batch,
            seed=config.run.seed,
            window=config.data.shuffle_window,
        )

    def bytes_in_use(self, streams: int, window: int) -> int:
        """Returns the bytes of the shards that `streams` streams read at a time.

        A cache smaller than that loads the same shards repeatedly. A stream reads one window, which may span several
        small shards.
        """
        largest = max(max(reader.manifest.shard_bytes) for reader in self.readers)
        mean = self.samples / sum(len(reader.manifest.shards) for reader in self.readers)
        return min(self.bytes, streams * (1 + math.ceil(window / mean)) * largest)


def list_places(config: Config) -> list[tuple[str, str]]:
    """The folders of a configuration's sources, each with the name of its setting."""
    paths = [entry.path for entry in config.data.origins()]
    if config.data.path:
        return [(path, "data.path") for path in paths]
    return [(path, f"data.sources.{i}.path") for i, path in enumerate(paths)]


def _open_reader(
    path: str, field: str, config: Config, share: tuple[int, int], manifest: Manifest | None
) -> ShardReader:
    """Opens a source. Retries reads of its manifest and shard sizes for data.retry_s."""
    origin = ShardOrigin(path, field)
    origin.retry_s = config.data.retry_s
    verify = config.data.verify_hash
    return origin.retry(
        "its manifest and the sizes of its shards",
        lambda: ShardReader.from_folder(path, field, verify_hash=verify, share=share, manifest=manifest),
    )


def count_shared_micro_batches(config: Config, ranks: int) -> int:
    """Returns how many micro-batches a rank and its loader processes hold: prefetched ones and those of a step."""
    batch, data = config.batch, config.data
    return data.workers * data.prefetch + batch.global_batch // (batch.micro_batch * ranks) + 1


def estimate_loader_bytes(config: Config, ranks: int) -> tuple[int, int]:
    """Returns the memory of the views that a rank shares with its loaders, and of the index rows in each of them."""
    views = config.batch.micro_batch * 2 * 3 * config.model.image_size**2
    return count_shared_micro_batches(config, ranks) * views, count_kept_rows(config, ranks) * ROW_BYTES


def count_kept_rows(config: Config, ranks: int) -> int:
    """Returns how many index rows a loader process keeps.

    It serves all streams of its rank. Each stream reads one window, which overlaps at most two more row groups.
    """
    own = config.batch.streams // ranks
    return max(ShardReader.KEEP_ROWS, own * (config.data.shuffle_window + 2 * ROW_GROUP))


def describe_data(sources: Sources, plan: Plan, config: Config, ranks: int, local_ranks: int) -> list[str]:
    """Describes a run's data for the log: memory of the loaders, slots of each source, size that the cache needs."""
    data, batch = config.data, config.batch
    shared, rows = estimate_loader_bytes(config, ranks)
    lines = [
        f"loader: {data.workers} processes per rank; at most {size(shared)} of views in shared memory "
        f"({count_shared_micro_batches(config, ranks)} micro-batches), and {size(rows)} of index rows in each"
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
            f"cache {data.cache_dir}: {data.cache_gb:g} GB; this node reads {size(need)} of shards at a "
            f"time out of {size(sources.bytes)}"
        )
        if need > data.cache_gb * 1e9:
            lines.append(
                f"data.cache_gb={data.cache_gb:g} is too small: shards are evicted before they are read completely; "
                f"set at least {need / 1e9:.2f}"
            )
    return lines
