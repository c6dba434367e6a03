"""A sample at rest: its key, its JSON, and its members inside a tar. See FORMAT.md."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from shards.detect.types import Person
from uniemox_dist.core.files import sha256_bytes

FORMAT_NAME = "uniemox-shards"
FORMAT_VERSION = 1

_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, allow_nan=False)
KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
"""Pillow's name of a picture format -> the extension inside the tar. An MPO is a JPEG with more pictures (a preview, a
gain map) after the first one; phones write them as .jpg."""


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

    def to_json(self) -> dict[str, Any]:
        """The sample's `.json` member."""
        return {
            "label": self.label,
            "attributes": self.attributes,
            "captions": list(self.captions),
            "width": self.width,
            "height": self.height,
            "persons": [person.to_json() for person in self.persons],
            "source": self.source,
            "image_sha256": self.image_sha256,
        }

    def members(self) -> list[tuple[str, bytes]]:
        """(name, bytes) of the tar members, picture first; `.txt` exists even without a caption."""
        record = _JSON.encode(self.to_json())
        caption = (self.captions[0] if self.captions else "").encode("utf-8")
        return [
            (f"{self.key}.{self.extension}", self.image),
            (f"{self.key}.json", record.encode("utf-8")),
            (f"{self.key}.txt", caption),
        ]
