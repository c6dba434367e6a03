"""The stream of a run, made from its configuration, and what the log says about it."""

import math
from collections.abc import Sequence

from shards.format.manifest import Manifest
from uniemox_dist.config.schema import Config
from uniemox_dist.core.formatting import size
from uniemox_dist.data.elastic import ElasticShards
from uniemox_dist.data.origin import ShardOrigin
from uniemox_dist.data.reader import RawSample, ShardReader
from uniemox_dist.data.stream import Source, count_kept_rows

ROW_BYTES = 400
"""Memory of one index row with a caption of ordinary length."""


class Sources(ElasticShards[RawSample]):
    """The stream of a run: the data sets of its configuration, in the configuration's order."""

    PREFIX, STRICT, SOURCE = "batch.", "data.strict", "data.sources.{}"
    readers: Sequence[ShardReader]

    def __init__(
        self,
        config: Config,
        *,
        rank: int = 0,
        world_size: int = 1,
        manifests: Sequence[Manifest] | None = None,
        readers: Sequence[ShardReader] | None = None,
    ) -> None:
        """Opens every source. Each rank checks the sizes of its part of the shards. Reads the manifests unless they are
        given, one for each of `list_places`, and opens no source if open readers are given.

        Raises:
            UserError: naming the folder that is missing, empty or damaged.
        """
        data = config.data
        opened = readers or [
            _open_reader(path, field, config, (rank, world_size), manifests[i] if manifests else None)
            for i, (path, field) in enumerate(list_places(config))
        ]
        entries = data.origins()
        super().__init__(
            [
                Source(reader, weight=entry.weight, repeat=entry.repeat)
                for reader, entry in zip(opened, entries)
            ],
            global_batch=config.batch.global_batch,
            streams=config.batch.streams,
            seed=config.run.seed,
            rank=rank,
            world_size=world_size,
            window=data.shuffle_window,
            strict=data.strict,
            retry_s=data.retry_s,
            cache_dir=data.cache_dir,
            cache_gb=data.cache_gb,
        )
        self.names = [entry.path for entry in entries]
        self._epoch_samples = data.epoch_samples

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch: data.epoch_samples, or the sum over repeats of a mix, or all samples."""
        return self._epoch_samples or super().epoch_samples

    def bytes_in_use(self, streams: int) -> int:
        """Returns the bytes of the shards that `streams` streams read at a time.

        A cache smaller than that loads the same shards repeatedly. A stream reads one window, which may span several
        small shards.
        """
        largest = max(max(reader.manifest.shard_bytes) for reader in self.readers)
        mean = self.samples / sum(len(reader.manifest.shards) for reader in self.readers)
        return min(self.bytes, streams * (1 + math.ceil(self.window / mean)) * largest)

    def _check(self) -> None:
        """The configuration has checked streams and batch; programs that do not train open sources on any ranks."""


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
    rows = count_kept_rows(config.batch.streams // ranks, config.data.shuffle_window)
    return count_shared_micro_batches(config, ranks) * views, rows * ROW_BYTES


def describe_data(sources: Sources, config: Config, ranks: int, local_ranks: int) -> list[str]:
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
            f"source {i} {name}: {reader.samples} samples, {share} of {sources.streams} streams = "
            f"{100 * share / sources.streams:.1f} % of the slots (asked: {100 * weight / total:.1f} %)"
            for i, (name, reader, share, weight) in enumerate(
                zip(sources.names, sources.readers, sources.plan.shares, sources.weights)
            )
        ]
    if data.cache_dir:
        need = sources.bytes_in_use(batch.streams * local_ranks // ranks)
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
