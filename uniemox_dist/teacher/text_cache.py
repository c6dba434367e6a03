"""Text embeddings of all captions of a data set: one safetensors file per shard, row-aligned with its index.

`cache/<teacher-id>/<shard>.safetensors` holds `texts` (captions × E, fp16 unit rows) and `first` (rows + 1). The
captions of row r are texts[first[r]:first[r+1]]; a row without captions has the empty text. The metadata hold the
teacher's id and a hash of the captions, so a cache of other captions is never used.

Shape legend: T captions, E embedding width.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from uniemox_dist.config.schema import Config
from uniemox_dist.core.files import canonical_json, sha256_bytes, write_bytes
from uniemox_dist.data.loader import CaptionVectors
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.teacher.cache_files import CacheFiles, cache_file, read_metadata

if TYPE_CHECKING:
    from uniemox_dist.teacher.model import Teacher

FORMAT = "uniemox-texts-1"
MAX_REMEMBERED = 200_000
"""Captions whose embeddings are kept in memory while a cache is built: 200 MB at 512 fp16 numbers each."""


def prepare_caption_vectors(
    config: Config,
    world: World,
    sources: Sources,
    teacher: "Teacher",
    folder: RunFolder,
    expect: Callable[[str], None],
) -> list[CaptionVectors]:
    """Returns the text embeddings of all sources. Collective.

    Embeddings come from the caches beside the shards. Each rank embeds the missing captions of its part of the shards.
    `expect(phase)` re-arms the startup watchdog after every shard.
    """
    vectors: list[CaptionVectors] = []
    for reader in sources.readers:
        choose = partial(choose_folder, reader, teacher.id, folder.path / "cache")
        cache: Path = collectives.on_main(world, choose)
        shards = range(world.rank, len(reader.manifest.shards), world.size)
        samples = sum(reader.manifest.shards[shard].samples for shard in shards)
        quiet = None if world.is_main else True
        with tqdm(total=samples, desc="captions of rank 0", unit="", disable=quiet) as bar:

            def report(captions: int) -> None:
                bar.update(captions)
                expect("embedding captions")

            build(reader, teacher, cache, batch=config.teacher.text_batch, shards=shards, progress=report)
        collectives.barrier()
        vectors.append(TextVectors(reader, cache))
    return vectors


def choose_folder(reader: ShardReader, teacher_id: str, fallback: Path) -> Path:
    """Returns a data set's cache folder: beside its shards, or below `fallback` if those are remote or read-only."""
    if reader.is_local:
        beside = folder_beside_shards(reader, teacher_id)
        if _can_write(beside if beside.is_dir() else reader.folder) or _has_all(reader, beside):
            return beside
    return fallback / reader.manifest.identity[:16] / teacher_id


def folder_beside_shards(reader: ShardReader, teacher_id: str) -> Path:
    """Returns the cache folder of a local, writable data set."""
    return reader.folder / "cache" / teacher_id


def _has_all(reader: ShardReader, folder: Path) -> bool:
    return all(cache_file(reader, folder, shard).is_file() for shard in range(len(reader.manifest.shards)))


def _can_write(folder: Path) -> bool:
    try:
        # os.access is not a sufficient test: for root it fails only on a read-only mount.
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def build(
    reader: ShardReader,
    teacher: "Teacher",
    folder: Path,
    *,
    batch: int,
    shards: Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Embeds the captions of the given shards (default: all) that are not cached yet.

    Each distinct caption is embedded once. Finished files are kept, so an interrupted build continues.

    Args:
        batch: captions per forward pass.
        progress: called with the number of rows after each shard.

    Returns:
        Number of captions embedded.
    """
    embedded = 0
    vector_of: dict[str, Tensor] = {}
    for shard in range(len(reader.manifest.shards)) if shards is None else shards:
        rows = _read_captions(reader, shard)
        path = cache_file(reader, folder, shard)
        metadata = _make_metadata(teacher.id, rows)
        if read_metadata(path) != metadata:
            texts = [text for captions in rows for text in captions]
            new = sorted(set(texts) - vector_of.keys())
            if len(vector_of) + len(new) > MAX_REMEMBERED:
                vector_of, new = {}, sorted(set(texts))
            for start in range(0, len(new), batch):
                piece = new[start : start + batch]
                vector_of.update(zip(piece, teacher.embed_texts(piece).half().cpu().unbind()))
            embedded += len(new)
            first = torch.tensor([0, *map(len, rows)]).cumsum(0)
            # A shard without samples has no captions to stack.
            vectors_TE = torch.empty(0, teacher.width, dtype=torch.half)
            if texts:
                vectors_TE = torch.stack([vector_of[text] for text in texts])
            write_bytes(path, save({"texts": vectors_TE, "first": first}, metadata))
        if progress is not None:
            progress(len(rows))
    return embedded


class TextVectors:
    """A finished cache, read row by row. Cheap to pickle: each process opens files on first use."""

    def __init__(self, reader: ShardReader, folder: Path) -> None:
        fix = "start the run again, which rebuilds it"
        self.files = CacheFiles(reader, folder, _load, what="the cache of caption embeddings", fix=fix)

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        """Returns the unit row (E, fp16) of one caption."""
        texts, first = self.files.open(shard)
        vector: Tensor = texts[first[row] + caption]
        return vector


def is_current(reader: ShardReader, teacher_id: str, folder: Path, shard: int) -> bool:
    """True if the cache contains the shard's present captions."""
    return read_metadata(cache_file(reader, folder, shard)) == _make_metadata(
        teacher_id, _read_captions(reader, shard)
    )


def _load(file: Any) -> tuple[Any, list[int]]:
    return file.get_slice("texts"), file.get_tensor("first").tolist()


def _read_captions(reader: ShardReader, shard: int) -> list[list[str]]:
    return [captions or [""] for captions in reader.captions(shard)]


def _make_metadata(teacher_id: str, rows: list[list[str]]) -> dict[str, str]:
    return {"format": FORMAT, "teacher": teacher_id, "captions_sha256": sha256_bytes(canonical_json(rows))}
