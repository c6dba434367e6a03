"""Chooses a fixed set of held-out pictures and captions to show during training.

Shape legend: B pictures, N patches, T texts, E the teacher's embedding width.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import View, ViewSettings, choose_person, find_person_patches
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.reader import RawSample, ShardReader
from uniemox_dist.data.views import evaluation_views
from uniemox_dist.teacher import text_cache

if TYPE_CHECKING:
    from uniemox_dist.teacher.model import Teacher

log = logging.getLogger("uniemox")
PICTURES = 8
TEXTS = 300
"""Number of distinct captions that pictures are compared with: the first ones of the data set, which packing has
shuffled."""
SCANNED = 20_000
"""Largest number of rows searched for them, because captions that consist of labels only may repeat over a billion
samples."""

Place = tuple[int, int]
"""Shard and row."""


@dataclass(frozen=True)
class Texts:
    """Captions of the held-out set, embedded by the teacher."""

    texts: tuple[str, ...]
    """The distinct captions."""
    vectors_TE: Tensor
    """fp32 unit rows."""
    pictures_BE: Tensor | None
    """The teacher's embeddings of the shown pictures; None without a live teacher."""


@dataclass(frozen=True)
class Shown:
    """The samples to show, on the CPU."""

    data: str
    """The data set that they come from."""
    keys: tuple[str, ...]
    captions: tuple[str, ...]
    """The first caption of each picture; empty if it has none."""
    scene_B3HW: Tensor
    """uint8: the whole picture."""
    person_B3HW: Tensor
    """uint8: the person's crop, or the whole picture."""
    boxes: tuple[tuple[float, float, float, float] | None, ...]
    """The person's x1, y1, x2, y2 in 0…1 of the picture."""
    on_person_BN: Tensor
    """bool: patches of the scene that show the person."""
    texts: Texts | None


def choose(
    reader: ShardReader,
    config: Config,
    *,
    teacher: "Teacher | None",
    teacher_id: str | None = None,
) -> Shown | None:
    """Chooses the first intact pictures of a data set, and its first captions; None if no picture is intact.

    Args:
        teacher: embeds the captions, before its text tower is dropped.
        teacher_id: without a teacher, its name in the caches beside the shards, which may contain the embeddings.
    """
    settings = view_settings(config)
    found = list(islice(_sound(reader, settings), PICTURES))
    if not found:
        log.warning("%s: has no intact picture to show during training", reader.url)
        return None
    raws, views = [raw for raw, _ in found], [view for _, view in found]
    how = "most_confident" if settings.person == "random" else settings.person
    persons = [choose_person(raw.persons, how, 0, 0) for raw in raws]
    side = config.model.patch_grid
    on = [
        find_person_patches(View((0, 0, raw.width, raw.height)), person, raw.width, raw.height, side)
        for raw, person in zip(raws, persons)
    ]
    scene_B3HW = torch.stack([scene for scene, _ in views])
    return Shown(
        data=reader.url,
        keys=tuple(raw.key for raw in raws),
        captions=tuple(_tidy(raw.captions[0]) if raw.captions else "" for raw in raws),
        scene_B3HW=scene_B3HW,
        person_B3HW=torch.stack([person for _, person in views]),
        boxes=tuple(person.box if person else None for person in persons),
        on_person_BN=torch.tensor(on),
        texts=_texts(reader, config, teacher, teacher_id, scene_B3HW) if config.loss.needs_teacher else None,
    )


def _sound(reader: ShardReader, settings: ViewSettings) -> Iterator[tuple[RawSample, tuple[Tensor, Tensor]]]:
    places = ((s, row) for s, entry in enumerate(reader.manifest.shards) for row in range(entry.samples))
    for place in islice(places, SCANNED):
        try:
            raw = reader.read(*place)
            yield raw, evaluation_views(raw.image, raw.persons, settings)
        except UserError:
            raise
        except ValueError:  # damaged: training reports it, and the next picture is used
            continue


def _texts(
    reader: ShardReader, config: Config, teacher: "Teacher | None", teacher_id: str | None, scene_B3HW: Tensor
) -> Texts | None:
    places = _captions(reader)
    if not places:
        return None
    vectors_TE = _cached(reader, teacher.id if teacher else teacher_id, list(places.values()))
    if vectors_TE is None and teacher is not None:
        texts, batch = list(places), config.teacher.text_batch
        parts = [teacher.embed_texts(texts[i : i + batch]).cpu() for i in range(0, len(texts), batch)]
        vectors_TE = torch.cat(parts)
    if vectors_TE is None:
        log.info(
            "nearest texts are not shown: %s has no cached captions; `uniemox teach` stores them", reader.url
        )
        return None
    pictures_BE = None
    if teacher is not None:
        pictures_BE = teacher.embed_pictures(scene_B3HW.to(teacher.device)).cpu()
    return Texts(tuple(map(_tidy, places)), vectors_TE, pictures_BE)


def _captions(reader: ShardReader) -> dict[str, Place]:
    """The first distinct captions of a data set, and their positions."""
    places: dict[str, Place] = {}
    tidied = set()
    scanned = 0
    for shard, entry in enumerate(reader.manifest.shards):
        if scanned >= SCANNED:
            break
        scanned += entry.samples
        for row, captions in enumerate(reader.captions(shard)):
            text = captions[0] if captions else ""
            if _tidy(text) and _tidy(text) not in tidied:
                tidied.add(_tidy(text))
                places[text] = (shard, row)
            if len(places) == TEXTS:
                return places
    return places


def _cached(reader: ShardReader, teacher_id: str | None, places: list[Place]) -> Tensor | None:
    """The captions' embeddings from the cache beside the shards, T×E; None if some are missing."""
    if teacher_id is None or not reader.is_local:
        return None
    folder = text_cache.folder_beside_shards(reader, teacher_id)
    shards = sorted({shard for shard, _ in places})
    if not all(text_cache.is_current(reader, teacher_id, folder, shard) for shard in shards):
        return None
    vectors = text_cache.TextVectors(reader, folder)
    return F.normalize(torch.stack([vectors.vector(shard, row, 0) for shard, row in places]).float(), dim=1)


def _tidy(text: str) -> str:
    """Joins a caption into one line."""
    return " ".join(text.split())
