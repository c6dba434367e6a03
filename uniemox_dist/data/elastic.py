"""The elastic stream over plain tars, for any training loop. See docs/stream.md."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uniemox_dist.config.data_sections import check_streams
from uniemox_dist.data.cache import ShardCache
from uniemox_dist.data.elastic_sources import (
    check_number,
    check_whole,
    list_sources,
    make_index,
    name_source,
)
from uniemox_dist.data.sample_transforms import make_transform
from uniemox_dist.data.samples import open_samples
from uniemox_dist.data.stream import RawT, Reader, Source, Stream
from uniemox_dist.distributed.world import World, find_world

if TYPE_CHECKING:
    from uniemox_dist.data.adapters import ElasticSource, MicroBatchSampler, TrackedLoader
    from uniemox_dist.data.elastic_loader import ElasticLoader


class ElasticShards(Stream[RawT]):
    """The samples of one or several sets of tars, as an endless sequence of global batches that ranks share.

    What global batch t contains depends on the data, `seed`, `streams`, `window` and t alone: not on ranks, workers,
    micro-batches or restarts. In each epoch of a source every sample comes once. Two ways lead to the samples:

    - `micro_batches` and `loader` run loader processes, and keep the position for `state_dict`;
    - as a map-style data set, `stream[slot]` is one sample, and `sampler` yields the slots of this rank's
      micro-batches, for loaders of other libraries, which then report by `advance` what they used.

    Without `decode` and `transform` a sample is a dict in webdataset's form: `__key__`, `__url__` and the bytes of each
    member by its extension.
    """

    def __init__(
        self,
        data: "str | Path | Source[RawT] | Reader[RawT] | Sequence[str | Path | Source[RawT] | Reader[RawT]]",
        *,
        global_batch: int,
        streams: int,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        window: int = 512,
        index: str | Path | None = None,
        build_index: bool = False,
        decode: "str | Callable[..., Any] | Sequence[str | Callable[..., Any]] | None" = None,
        transform: Callable[[Any], Any] | None = None,
        strict: bool = False,
        max_bad_share: float = 0.01,
        verify_hash: bool = True,
        retry_s: float = 60.0,
        cache_dir: str | Path | None = None,
        cache_gb: float = 100.0,
    ) -> None:
        """Opens the data, and checks the sizes of this rank's part of the tars.

        Args:
            data: a folder, a URL, a tar or a brace pattern (`s3://bucket/{00000..01234}.tar`), or several, each alone
                or as a `Source` with a weight or repeat.
            global_batch: samples of one step over all ranks; a multiple of `streams`.
            streams: number of sequences that the data is divided into, fixed for a run; a multiple of every number of
                ranks that the run may have.
            rank, world_size: from torch.distributed if it is initialised, else from torchrun's or Slurm's variables.
            window: samples of one stream that are shuffled together.
            index: folder of the index of `data`, if it is not beside the tars.
            build_index: index tars that have no index. Rank 0 does it, in this process, while the others wait;
                `uniemox shards index --members` does it with several processes.
            decode: handlers of webdataset (`"pil"`, `"torchrgb"`, functions of key and bytes), applied to each sample
                as `wds.decode(…)` does. A sample that they cannot decode counts as damaged.
            transform: a function of the sample. One that raises DamagedSample has the sample replaced.
            strict: end at the first damaged sample instead of replacing it.
            max_bad_share: largest share of samples that may be damaged.
            verify_hash: check the SHA-256 of what is read.
            retry_s: seconds for which a read that fails is tried again.
            cache_dir, cache_gb: folder on the node's disk that keeps whole tars, and its largest size in 10^9 bytes.

        Raises:
            UserError: naming the argument, tar or index that is wrong, and the fix.
        """
        for name, value in (("global_batch", global_batch), ("streams", streams), ("window", window)):
            check_whole(name, value, 1)
        check_whole("seed", seed)
        check_number("max_bad_share", max_bad_share, 0, 1)
        check_number("retry_s", retry_s, 0)
        check_number("cache_gb", cache_gb, 0)
        world = find_world(rank, world_size)
        sources = list_sources(data, index)
        super().__init__(
            sources,
            [
                self._open(source, name_source(number, sources), world, build_index, verify_hash, retry_s)
                for number, source in enumerate(sources)
            ],
            world,
            global_batch=global_batch,
            streams=streams,
            seed=seed,
            window=window,
            strict=strict,
            max_bad_share=max_bad_share,
            transform=make_transform(decode, transform),
        )
        self.is_world_found = rank is None
        cache = (
            None
            if cache_dir is None
            else ShardCache(Path(cache_dir), int(min(cache_gb, 1e9) * 1e9), field="cache_dir")
        )
        for reader in self.readers:
            reader.origin.retry_s, reader.origin.cache = retry_s, cache
        self._check()

    def micro_batches(self, micro_batch: int, **options: Any) -> Iterator[Any]:
        """Yields this rank's micro-batches from the present position on, without end. Options are those of `loader`."""
        loader = self.loader(micro_batch, **options)
        try:
            while True:
                yield from loader
        finally:
            loader.close()

    def loader(
        self,
        micro_batch: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        timeout_s: float = 300.0,
    ) -> "ElasticLoader":
        """Returns a loader of this rank's micro-batches; each iteration over it is the rest of a pass: as many
        steps as an epoch needs.

        Args:
            micro_batch: samples of one micro-batch; micro-batch × ranks divides the global batch.
            workers: loader processes; 0 reads in this process.
            prefetch: micro-batches prepared ahead per loader process.
            collate: makes a micro-batch of the list of its samples, in the loader process; without it the list is the
                micro-batch.
            pin_memory: copy tensors to pinned memory, for asynchronous copies to a GPU.
            timeout_s: seconds to wait for a micro-batch before a Fault names the loader process and its sample.
        """
        from uniemox_dist.data.elastic_loader import ElasticLoader

        return ElasticLoader(
            self,
            micro_batch,
            workers=workers,
            prefetch=prefetch,
            collate=collate,
            pin_memory=pin_memory,
            timeout_s=timeout_s,
        )

    def sampler(self, micro_batch: int) -> "MicroBatchSampler":
        """Returns a batch sampler for `torch.utils.data.DataLoader(stream, batch_sampler=…)`: the slots of this rank's
        micro-batches. Each iteration over it goes from the position to the end of the pass."""
        from uniemox_dist.data.adapters import MicroBatchSampler

        return MicroBatchSampler(self, micro_batch)

    def source(self, micro_batch: int) -> "ElasticSource":
        """Returns an iterable data set of this rank's samples, the first stage of a `webdataset.DataPipeline`."""
        from uniemox_dist.data.adapters import ElasticSource

        return ElasticSource(self, micro_batch)

    def track(self, loader: Iterable[Any], micro_batch: int) -> "TrackedLoader":
        """Wraps a loader that reads `sampler` or `source`, so that its batches count in the position. Without it,
        report by `advance` what was used."""
        from uniemox_dist.data.adapters import TrackedLoader

        return TrackedLoader(self, loader, micro_batch)

    def _check(self) -> None:
        check_streams(self.global_batch, self.streams, self.world.size, self.PREFIX)
        _ = self.plan  # checks that every source gets a stream
        self.set_kept_rows()

    def _open(
        self,
        source: Source[RawT],
        field: str,
        world: World,
        build_index: bool,
        verify_hash: bool,
        retry_s: float,
    ) -> Reader[RawT]:
        if not isinstance(source.data, str | Path):
            return source.data
        data, index = str(source.data), None if source.index is None else str(source.index)
        if build_index:
            make_index(data, index, field, world)
        return open_samples(  # type: ignore[return-value]
            data,
            index=index,
            field=field,
            retry_s=retry_s,
            verify_hash=verify_hash,
            share=(world.rank, world.size),
        )
