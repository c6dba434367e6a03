"""Tars of small photographs, and what the layout `wds` reads from tars."""

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image
from skimage import data

from shards.sources import Record, Slice, SourceOptions, open_source

PHOTO = Image.fromarray(data.astronaut())


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    PHOTO.crop((number, 0, number + 64, 48)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def records(source: object, **options: Any) -> list[Record]:
    return list(open_source("wds", str(source), SourceOptions(**options)))


def bytes_of(record: Record) -> bytes:
    image = record.image
    assert isinstance(image, Slice)
    return Path(image.path).read_bytes()[image.offset : image.offset + image.length]
