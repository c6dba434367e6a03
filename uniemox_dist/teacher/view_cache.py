"""Scene views of every picture with the teacher's embeddings: one safetensors file per shard, aligned with its rows.

docs/teacher_cache.md describes the layout. `views.json` states everything that determines the views and embeddings,
and its hash names the folder. The metadata of each shard's file hold that hash and a hash of the pictures, so a cache
of other views or pictures is never used.

Shape legend: R rows of a shard, K views of a picture, E embedding width.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from torch import Tensor

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import canonical_json, read_json, sha256_bytes, write_json
from uniemox_dist.data.crops import View, ViewPlan, ViewSettings
from uniemox_dist.data.loader import CachedView
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher.cache_files import CacheFiles, cache_file, read_metadata
from uniemox_dist.teacher.identity import TeacherFacts
from uniemox_dist.teacher.text_cache import folder_beside_shards

if TYPE_CHECKING:
    from uniemox_dist.config.schema import DataConfig

FORMAT, FORMAT_VERSION = "uniemox-views", 1
DESCRIPTION = "views.json"
PLANS_KEY = "plans_sha256"
"""Metadata key: hash of the crops, flips and colours of a file's views."""
_NORM_TOLERANCE = 0.01
"""Largest deviation of an embedding's length from 1. Rounding to fp16 stays below it; damage does not."""


@dataclass(frozen=True)
class ViewSpec:
    """Everything that determines the cached views of a picture and their embeddings."""

    facts: TeacherFacts
    image_size: int
    """Side of a view in pixels; the teacher resizes from it."""
    scene_scale: tuple[float, float]
    flip: bool
    background: str
    colour_jitter: float
    count: int
    """K, views of each picture."""
    seed: int
    precision: str
    """Number format of the teacher's image tower: fp32 or bf16."""
    resize: str = "bicubic"

    @property
    def settings(self) -> ViewSettings:
        """Settings for drawing the views."""
        return ViewSettings(
            self.image_size,
            self.scene_scale,
            self.flip,
            background=self.background,
            colour_jitter=self.colour_jitter,
            resize=self.resize,
            with_person=False,
        )

    @property
    def shared_settings(self) -> dict[str, Any]:
        """The settings that a run must share to use these views."""
        return shared_settings(self.image_size, self)

    @cached_property
    def sha256(self) -> str:
        """Hash of the spec. It leaves out the teacher's name, which changes with the folder of the weights."""
        pixels = {key: self.facts.identity[key] for key in ("size", "mean", "std")}
        content = {"format_version": FORMAT_VERSION, "teacher": self.facts.id, **pixels}
        content.update(self.shared_settings, count=self.count, seed=self.seed, precision=self.precision)
        if self.resize == "bicubic":  # the only filter when the first caches were made, which keep their hash
            del content["resize"]
        return sha256_bytes(canonical_json(content))

    @property
    def id(self) -> str:
        """Name of the folder that holds these views."""
        return f"views-{self.sha256[:16]}"

    def folder(self, reader: ShardReader) -> Path:
        """Returns the folder of these views beside the shards of a data set."""
        return folder_beside_shards(reader, self.facts.id) / self.id

    def to_json(self, reader: ShardReader) -> dict[str, Any]:
        """Returns the content of views.json for a data set."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "teacher": self.facts.to_json(),
            "views": self.shared_settings,
            "views_per_picture": self.count,
            "seed": self.seed,
            "precision": self.precision,
            "data_identity": reader.manifest.identity,
        }

    def write_description(self, reader: ShardReader) -> None:
        """Writes views.json unless the file has this content already."""
        path, record = self.folder(reader) / DESCRIPTION, self.to_json(reader)
        try:
            if read_json(path) == record:
                return
        except (OSError, ValueError):
            pass
        write_json(path, record)

    def metadata(self, reader: ShardReader, shard: int) -> dict[str, str]:
        """Returns the metadata of a shard's file without `PLANS_KEY`, which depends on its tensors."""
        entry = reader.manifest.shards[shard]
        return {
            "format": f"{FORMAT}-{FORMAT_VERSION}",
            "views_sha256": self.sha256,
            "pictures_sha256": sha256_bytes(canonical_json(reader.pictures(shard))),
            "rows_sha256": entry.rows_sha256,
        }


def shared_settings(image_size: int, settings: Union["DataConfig", ViewSpec]) -> dict[str, Any]:
    """Returns the settings in which a run and the views it uses must agree."""
    return {
        "image_size": image_size,
        "scene_scale": [float(share) for share in settings.scene_scale],
        "flip": settings.flip,
        "background": settings.background,
        "colour_jitter": float(settings.colour_jitter),
        "resize": settings.resize,
    }


def read_description(path: Path) -> tuple[ViewSpec, str]:
    """Reads a views.json: the spec of the views and the identity of the data set they were drawn from.

    Raises:
        UserError: if the file is damaged, of another format version, or in the wrong folder.
    """
    try:
        record = read_json(path)
        if record["format"] != FORMAT or record["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format {record['format']} {record['format_version']} is not supported")
        shared = record["views"]
        low, high = map(float, shared["scene_scale"])
        spec = ViewSpec(
            TeacherFacts.from_json(record["teacher"]),
            int(shared["image_size"]),
            (low, high),
            bool(shared["flip"]),
            str(shared["background"]),
            float(shared["colour_jitter"]),
            int(record["views_per_picture"]),
            int(record["seed"]),
            str(record["precision"]),
            str(shared.get("resize", "bicubic")),
        )
        if spec.count < 1 or spec.id != path.parent.name or spec.facts.id != path.parent.parent.name:
            raise ValueError("its content does not match the folder's name")
        return spec, str(record["data_identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{path}: describes no cached views ({why}); delete {path.parent}, or run `uniemox teach` again"
        ) from None


def is_current(reader: ShardReader, spec: ViewSpec, shard: int) -> bool:
    """True if the views of a shard exist and belong to the rows that the manifest states."""
    metadata = read_metadata(cache_file(reader, spec.folder(reader), shard)) or {}
    stated = metadata.get("views_sha256"), metadata.get("rows_sha256")
    return stated == (spec.sha256, reader.manifest.shards[shard].rows_sha256)


def hash_plans(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 of a file's tensors in the order of their names, embeddings left out.

    Embeddings are most of the file; `ViewCache.view` checks them row by row.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors.keys() - {"embedding"}):
        digest.update(tensors[name].contiguous().numpy().data)
    return digest.hexdigest()


def has_intact_plans(file: Any) -> bool:
    """True if the crops, flips and colours in an open file have the hash that its metadata state."""
    plans = {name: file.get_tensor(name) for name in file.keys() if name != "embedding"}  # noqa: SIM118
    return (file.metadata() or {}).get(PLANS_KEY) == hash_plans(plans)


class ViewCache:
    """The finished cache of a data set, read view by view. Cheap to pickle: each process opens files on first use."""

    def __init__(self, reader: ShardReader, spec: ViewSpec) -> None:
        self.spec, self.count = spec, spec.count
        fix = "run the same `uniemox teach` again, which rebuilds it"
        self.files = CacheFiles(reader, spec.folder(reader), _load, what="the cache of views", fix=fix)

    def view(self, shard: int, row: int, number: int) -> CachedView:
        """Returns view `number` of the picture in a row.

        Raises:
            ValueError: if the picture was unreadable when its views were drawn.
            Fault: if the cache is damaged.
        """
        slices = self.files.open(shard)
        values = {name: part[row] if name == "valid" else part[row, number] for name, part in slices.items()}
        if not values["valid"]:
            raise ValueError("was unreadable when its views were drawn")
        picture_E: Tensor = values["embedding"]
        if not abs(float(picture_E.float().norm()) - 1) < _NORM_TOLERANCE:
            path = self.files.path(shard)
            raise Fault(
                f"{path}: row {row}, view {number}: the embedding is not a unit vector, so the file "
                "is damaged; delete it"
            )
        left, top, width, height = values["box"].tolist()
        jitter = tuple(values["jitter"].tolist()) if "jitter" in values else None
        red, green, blue = values["background"].tolist()
        box = left, top, width, height
        view = View(box, bool(values["mirror"]), jitter, self.spec.resize)  # type: ignore[arg-type]
        return CachedView(ViewPlan(view, None, (red, green, blue), int(values["scale"])), picture_E)


def _load(file: Any) -> dict[str, Any]:
    """Returns the sliceable tensors: embedding, box, scale, mirror, background, valid and, with colour jitter, jitter.

    Checks the plans first, because a wrong box would show other pixels than the teacher embedded.
    """
    if not has_intact_plans(file):
        raise ValueError("its crops are not those that were written")
    return {name: file.get_slice(name) for name in list(file.keys())}
