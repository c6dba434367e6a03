"""Scene views of every picture with a teacher's embeddings of them, one safetensors file per shard, row-aligned with
its index. docs/teacher_cache.md describes the layout.

What decides the views and embeddings of a picture is named once, in views.json, and hashed into the folder's name;
the metadata of each shard's file name that hash and the pictures, so that a file of others is never used.
Shape legend: R rows of a shard, K views of a picture, E embedding width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, write_json
from uniemox_dist.data.cached_views import StoredView
from uniemox_dist.data.crops import View, ViewPlan, ViewSettings
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher.facts import TeacherFacts
from uniemox_dist.teacher.shard_files import ShardFiles, metadata_of, shard_file
from uniemox_dist.teacher.text_cache import beside_shards

FORMAT, FORMAT_VERSION = "uniemox-views", 1
DESCRIPTION = "views.json"
PLANS = "plans_sha256"
"""Key of a file's metadata: the hash of how its views were drawn."""
_UNIT = 0.01
"""How far from 1 the length of an embedding may be: fp16 rounds by less, damage by more."""


@dataclass(frozen=True)
class ViewsMade:
    """What decides the views and embeddings of a picture."""

    facts: TeacherFacts
    image_size: int
    """Pixels a side of the views, and so of what the teacher is given."""
    scene_scale: tuple[float, float]
    flip: bool
    background: str
    colour_jitter: float
    count: int
    """K, views of each picture."""
    seed: int
    precision: str
    """Number format of the teacher's picture tower."""

    @property
    def settings(self) -> ViewSettings:
        """How the views are drawn."""
        return ViewSettings(
            self.image_size,
            self.scene_scale,
            self.flip,
            background=self.background,
            colour_jitter=self.colour_jitter,
            with_person=False,
        )

    @property
    def drawn(self) -> dict[str, Any]:
        """The settings that a run must share."""
        scale = [float(share) for share in self.scene_scale]
        return {
            "image_size": self.image_size,
            "scene_scale": scale,
            "flip": self.flip,
            "background": self.background,
            "colour_jitter": float(self.colour_jitter),
        }

    @cached_property
    def sha256(self) -> str:
        """Of everything but the teacher's name, which may change with the folder that it lies in."""
        pixels = {key: self.facts.identity[key] for key in ("size", "mean", "std")}
        content = {"format_version": FORMAT_VERSION, "teacher": self.facts.id, **pixels, **self.drawn}
        content.update(count=self.count, seed=self.seed, precision=self.precision)
        return sha256_bytes(canonical_json(content))

    @property
    def id(self) -> str:
        """Name of the folder of such views, below that of their teacher."""
        return f"views-{self.sha256[:16]}"

    def folder(self, reader: ShardReader) -> Path:
        """Where such views of a data set lie: beside its shards."""
        return beside_shards(reader, self.facts.id) / self.id

    def to_json(self, reader: ShardReader) -> dict[str, Any]:
        """What views.json says of the views of a data set."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "teacher": self.facts.to_json(),
            "views": self.drawn,
            "views_per_picture": self.count,
            "seed": self.seed,
            "precision": self.precision,
            "data_identity": reader.manifest.identity,
        }

    def describe(self, reader: ShardReader) -> None:
        """Writes views.json, if it does not say the same already."""
        path, record = self.folder(reader) / DESCRIPTION, self.to_json(reader)
        try:
            if read_json(path) == record:
                return
        except (OSError, ValueError):
            pass
        write_json(path, record)

    def metadata(self, reader: ShardReader, shard: int) -> dict[str, str]:
        """The metadata of a shard's file, but for PLANS, which its tensors give."""
        entry = reader.manifest.shards[shard]
        return {
            "format": f"{FORMAT}-{FORMAT_VERSION}",
            "views_sha256": self.sha256,
            "pictures_sha256": sha256_bytes(canonical_json(reader.pictures(shard))),
            "rows_sha256": entry.rows_sha256,
        }


def read_description(path: Path) -> tuple[ViewsMade, str]:
    """What a views.json says, and the identity of the data set that it was written for.

    Raises:
        UserError: if it says none of that, or is of a newer format.
    """
    try:
        record = read_json(path)
        if record["format"] != FORMAT or record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {record['format']} {record['format_version']} is not known here")
        drawn = record["views"]
        low, high = map(float, drawn["scene_scale"])
        made = ViewsMade(
            TeacherFacts.from_json(record["teacher"]),
            int(drawn["image_size"]),
            (low, high),
            bool(drawn["flip"]),
            str(drawn["background"]),
            float(drawn["colour_jitter"]),
            int(record["views_per_picture"]),
            int(record["seed"]),
            str(record["precision"]),
        )
        if made.count < 1 or made.id != path.parent.name or made.facts.id != path.parent.parent.name:
            raise ValueError("it does not fit the folder that it lies in")
        return made, str(record["data_identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: describes no cached views ({why}); delete {path.parent}, or run `uniemox teach` again"
        ) from None


def is_for(reader: ShardReader, made: ViewsMade, shard: int) -> bool:
    """Whether the views of a shard are there, and are those of its rows as the manifest knows them."""
    metadata = metadata_of(shard_file(reader, made.folder(reader), shard)) or {}
    stated = metadata.get("views_sha256"), metadata.get("rows_sha256")
    return stated == (made.sha256, reader.manifest.shards[shard].rows_sha256)


def plans_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the bytes of a file's tensors by name, without the embeddings, which are most of it: those are
    looked at row by row."""
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"embedding"}):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def has_its_plans(file: Any) -> bool:
    """Whether the views of an open file were drawn as it stated when it was written."""
    plans = {name: file.get_tensor(name) for name in file.keys() if name != "embedding"}  # noqa: SIM118
    return (file.metadata() or {}).get(PLANS) == plans_sha256(plans)


class ViewCache:
    """The finished cache of a data set, read view by view. Cheap to pickle: files are opened where they are used."""

    def __init__(self, reader: ShardReader, made: ViewsMade) -> None:
        self.made, self.count = made, made.count
        self.names = [shard.name for shard in reader.manifest.shards]
        fix = "run the same `uniemox teach` again, and it is made anew"
        folder = made.folder(reader)
        self.files = ShardFiles(reader, folder, _opened, what="the cache of views", fix=fix)

    def view(self, shard: int, row: int, number: int) -> StoredView:
        """One view of the picture at a place.

        Raises:
            ValueError: if the picture could not be read when its views were made.
            Fault: if the cache is damaged.
        """
        slices = self.files.of(shard)
        found = {name: part[row] if name == "valid" else part[row, number] for name, part in slices.items()}
        if not found["valid"]:
            raise ValueError("could not be read when its views were made")
        picture_E: Tensor = found["embedding"]
        if not abs(float(picture_E.float().norm()) - 1) < _UNIT:
            path = self.files.paths[shard]
            raise Fault(
                f"{path}: row {row}, view {number}: is no unit row, so the file is damaged; delete it"
            )
        left, top, width, height = found["box"].tolist()
        jitter = tuple(found["jitter"].tolist()) if "jitter" in found else None
        red, green, blue = found["background"].tolist()
        view = View((left, top, width, height), bool(found["mirror"]), jitter)  # type: ignore[arg-type]
        return StoredView(ViewPlan(view, None, (red, green, blue), int(found["scale"])), picture_E)


def _opened(file: Any) -> dict[str, Any]:
    """Its tensors, of which a view at a time is read: embedding, box, scale, mirror, background, valid and, where
    colours were changed, jitter. A wrong box would be another picture than the teacher saw."""
    if not has_its_plans(file):
        raise ValueError("its crops are not those that were written")
    return {name: file.get_slice(name) for name in list(file.keys())}
