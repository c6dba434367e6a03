"""A sample at rest: its key, its JSON, and its members inside a tar. See FORMAT.md."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from shards.detect.types import Person
from uniemox_dist.core.files import sha256_bytes

FORMAT_NAME = "uniemox-shards"
FORMAT_VERSION = 2
MEMBERS_NAME = "uniemox-members"
MEMBERS_VERSION = 1

_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False)
DIMENSIONS = ("valence", "arousal", "dominance")
"""Attributes of pictures, and labels of persons, that are continuous emotion values."""
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a picture format -> the extension inside the tar. An MPO is a JPEG with more pictures (a preview, a
gain map) after the first one; phones write them as .jpg."""
PICTURE = "jpg"
"""The extension of every picture in a tar, whatever its format. Hugging Face `datasets` and plain readers of columns
need one extension in a whole data set, and its formats are not known before it is packed."""


def make_key(name: str) -> str:
    """A sample's key: `name` itself if it is a legal key, otherwise 16 hex digits of its SHA-256.

    webdataset splits names at the first dot of the base name, so a key has no dots, slashes or spaces.
    """
    return name if KEY_PATTERN.fullmatch(name) else sha256_bytes(name.encode("utf-8"))[:16]


@dataclass(frozen=True)
class Sample:
    """A picture with its annotations; `image` holds the encoded bytes as stored in the tar."""

    key: str
    image: bytes
    extension: str
    """The usual one of the picture's format; the member is called `.jpg` in any case."""
    width: int
    """Pixels, of the upright picture (EXIF rotation applied)."""
    height: int
    source: str
    """The name of the picture in its source."""
    captions: tuple[str, ...] = ()
    label: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    persons: tuple[Person, ...] = ()
    image_sha256: str = ""
    distribution: dict[str, float] | None = None
    """Labels and their shares."""

    def to_json(self) -> dict[str, Any]:
        """The sample's `.json` member. Every field has the same JSON type in all samples, because Hugging Face
        `datasets` infers the types from the first samples of a tar: there is no null, no empty list, and what may
        differ in form is text that holds JSON."""
        return {
            "label": self.label or "",
            "label_distribution": _JSON.encode(self.distribution or {}),
            "attributes": _JSON.encode(self.attributes),
            "captions": list(self.captions) or [""],
            "width": self.width,
            "height": self.height,
            "persons": _JSON.encode([person.to_json() for person in self.persons]),
            "source": self.source,
            "image_sha256": self.image_sha256,
        }

    def members(self) -> list[tuple[str, bytes]]:
        """(name, bytes) of the tar members, picture first; `.txt` exists even without a caption."""
        record = _JSON.encode(self.to_json())
        caption = (self.captions[0] if self.captions else "").encode("utf-8")
        return [
            (f"{self.key}.{PICTURE}", self.image),
            (f"{self.key}.json", record.encode("utf-8")),
            (f"{self.key}.txt", caption),
        ]


def parse_record(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a `.json` member of ours: `label` as text or None, `label_distribution` as an object or None,
    `attributes` as an object, `captions` and `persons` as lists. The members of earlier versions have these forms
    themselves; those of other programs are returned as they are.

    Raises:
        ValueError: if a text that should hold JSON does not.
    """
    if not {"source", "image_sha256"} <= fields.keys():
        return fields
    found = {**fields, "label": fields.get("label") or None}
    for name in ("attributes", "persons", "label_distribution"):
        if isinstance(found.get(name), str):
            found[name] = json.loads(found[name])
    found["label_distribution"] = found.get("label_distribution") or None
    if isinstance(captions := found.get("captions"), list):
        found["captions"] = [caption for caption in captions if caption]
    return found
