"""What a run needs of its teacher before the first step: the captions' embeddings, or cached views in its place."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tqdm import tqdm

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import CaptionVectors
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.teacher import text_cache
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.replay import Replay, check_shards
from uniemox_dist.teacher.replay import find as find_views


def cached_views(config: Config, world: World, sources: Sources, chosen: Checkpoint | None) -> Replay:
    """The cached views that stand for the teacher; a resumed run goes on with those that it began with. Each rank
    checks its share of the shards."""
    earlier = (chosen.info["teacher"] or {}).get("views", []) if chosen else []
    replay: Replay = collectives.on_main(world, lambda: find_views(config, sources.readers, earlier))

    def check_own() -> None:
        for reader, made in zip(sources.readers, replay.made):
            check_shards(config, reader, made, range(world.rank, len(reader.manifest.shards), world.size))

    collectives.on_all(world, check_own)
    return replay


def caption_vectors(
    config: Config,
    world: World,
    sources: Sources,
    teacher: Teacher,
    folder: RunFolder,
    expect: Callable[[str], None],
) -> list[CaptionVectors]:
    """Text embeddings of all captions, from the caches beside the shards; what is missing is embedded now,
    each rank taking its share of the shards."""
    vectors: list[CaptionVectors] = []
    for reader in sources.readers:
        place = partial(text_cache.cache_folder, reader, teacher.id, folder.path / "cache")
        cache: Path = collectives.on_main(world, place)
        shards = range(world.rank, len(reader.manifest.shards), world.size)
        own = sum(reader.manifest.shards[shard].samples for shard in shards)
        with tqdm(
            total=own, desc="captions of rank 0", unit="", disable=None if world.is_main else True
        ) as bar:

            def progress(captions: int) -> None:
                bar.update(captions)
                expect("embedding captions")  # a large data set takes as long as it takes

            text_cache.build(
                reader, teacher, cache, batch=config.teacher.text_batch, shards=shards, progress=progress
            )
        collectives.barrier()
        vectors.append(text_cache.TextVectors(reader, cache))
    return vectors
