"""Text embeddings of all captions of a data set, one safetensors file per shard, row-aligned with its index.

`cache/<teacher-id>/<shard>.safetensors` holds `texts` (captions × E, fp16 unit rows) and `first` (rows + 1):
the captions of row r are texts[first[r]:first[r+1]]; a row without captions has the empty text. The metadata
name the teacher and hash the captions, so that a cache of other captions is never used.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from uniemox_dist.core.files import canonical_json, sha256_bytes, write_bytes
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher.model import Teacher
from uniemox_dist.teacher.shard_files import ShardFiles, metadata_of, shard_file

FORMAT = "uniemox-texts-1"
MEMO = 200_000
"""Captions remembered across shards while a cache is built; 512 fp16 numbers each make 200 MB."""


def cache_folder(reader: ShardReader, teacher_id: str, fallback: Path) -> Path:
    """Where the cache of a data set lies: beside its shards, or below `fallback` if those are remote or read-only."""
    if reader.is_local:
        beside = beside_shards(reader, teacher_id)
        if _can_write(beside if beside.is_dir() else reader.folder) or _has_all(reader, beside):
            return beside
    return fallback / reader.manifest.identity[:16] / teacher_id


def beside_shards(reader: ShardReader, teacher_id: str) -> Path:
    """Where the cache of a local data set lies if its folder can be written."""
    return reader.folder / "cache" / teacher_id


def _has_all(reader: ShardReader, folder: Path) -> bool:
    return all(shard_file(reader, folder, shard).is_file() for shard in range(len(reader.manifest.shards)))


def _can_write(folder: Path) -> bool:
    try:
        with tempfile.TemporaryFile(
            dir=folder
        ):  # permissions do not tell: root may write all but a read-only mount
            return True
    except OSError:
        return False


def build(
    reader: ShardReader,
    teacher: Teacher,
    folder: Path,
    *,
    batch: int,
    shards: Sequence[int] | None = None,
    progress: Callable[[int], Any] | None = None,
) -> int:
    """Embeds the captions of the given shards (default: all) that are not cached yet; returns how many captions.

    Each distinct caption is embedded once. Finished files are kept, so a build that was ended goes on.
    """
    embedded = 0
    memo: dict[str, Tensor] = {}
    for shard in range(len(reader.manifest.shards)) if shards is None else shards:
        rows = _rows(reader, shard)
        path = shard_file(reader, folder, shard)
        metadata = _metadata(teacher.id, rows)
        if metadata_of(path) != metadata:
            texts = [text for captions in rows for text in captions]
            new = sorted(set(texts) - memo.keys())
            if len(memo) + len(new) > MEMO:
                memo, new = {}, sorted(set(texts))
            for start in range(0, len(new), batch):
                piece = new[start : start + batch]
                memo.update(zip(piece, teacher.embed_texts(piece).half().cpu().unbind()))
            embedded += len(new)
            first = torch.tensor([0, *map(len, rows)]).cumsum(0)
            vectors_TE = torch.empty(
                0, teacher.width, dtype=torch.half
            )  # a shard may hold marked samples only
            if texts:
                vectors_TE = torch.stack([memo[text] for text in texts])
            write_bytes(path, save({"texts": vectors_TE, "first": first}, metadata))
        if progress is not None:
            progress(len(rows))
    return embedded


class TextVectors:
    """A finished cache, read row by row. Cheap to pickle: files are opened where they are used."""

    def __init__(self, reader: ShardReader, folder: Path) -> None:
        fix = "start again, and it is made anew"
        self.files = ShardFiles(reader, folder, _opened, what="the cache of caption embeddings", fix=fix)

    def vector(self, shard: int, row: int, caption: int) -> Tensor:
        """The unit row (E, fp16) of one caption."""
        texts, first = self.files.of(shard)
        vector: Tensor = texts[first[row] + caption]
        return vector


def is_current(reader: ShardReader, teacher_id: str, folder: Path, shard: int) -> bool:
    """Whether a shard's captions are cached, as they are now."""
    return metadata_of(shard_file(reader, folder, shard)) == _metadata(teacher_id, _rows(reader, shard))


def _opened(file: Any) -> tuple[Any, list[int]]:
    return file.get_slice("texts"), file.get_tensor("first").tolist()


def _rows(reader: ShardReader, shard: int) -> list[list[str]]:
    return [captions or [""] for captions in reader.captions(shard)]


def _metadata(teacher_id: str, rows: list[list[str]]) -> dict[str, str]:
    return {"format": FORMAT, "teacher": teacher_id, "captions_sha256": sha256_bytes(canonical_json(rows))}
