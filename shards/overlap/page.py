"""The page of `uniemox shards overlap`: near-copies side by side, most doubtful first.

Names and keys are untrusted text; the template escapes them. The page runs no script.
"""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from PIL import Image

from shards.format.index import index_path, read_index
from shards.overlap.pairs import Overlap, Sample
from shards.pictures.decode import check_picture
from shards.pictures.formats import BadPicture
from shards.storage import Place, read_range
from uniemox_dist.core.files import write_bytes

PAIRS_SHOWN = 200
THUMBNAIL_PX = 260


@dataclass(frozen=True)
class Side:
    """One picture of a pair."""

    title: str
    key: str
    size: str
    uri: str | None
    """None for a picture that cannot be shown."""


def write_page(out: Path, overlap: Overlap, folders: Sequence[Place]) -> None:
    """Writes the page; `folders` are those of the compared data sets.

    Raises:
        UserError: if a data set cannot be read any more.
    """
    doubtful = sorted(overlap.pairs, key=lambda pair: pair.score)  # stable: equal scores keep their order
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("shards.overlap", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        (pair, _side(pair.kept, overlap, folders), _side(pair.copy, overlap, folders))
        for pair in doubtful[:PAIRS_SHOWN]
    ]
    page = environment.get_template("page.html.j2").render(
        overlap=overlap,
        sets=list(enumerate(overlap.sets)),
        counts=overlap.counts(),
        kinds=Counter(pair.kind for pair in overlap.pairs).most_common(),
        shown=shown,
        hidden=len(doubtful) - len(shown),
        name=_name(overlap),
    )
    write_bytes(out, page.encode("utf-8", "backslashreplace"))


def _name(overlap: Overlap) -> str:
    names = list(dict.fromkeys(one.name for one in overlap.sets))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _side(sample: Sample, overlap: Overlap, folders: Sequence[Place]) -> Side:
    folder = folders[sample.set]
    table = read_index(index_path(folder, sample.shard), ["image_offset", "image_length"])
    offset, length = (table[name][sample.row].as_py() for name in ("image_offset", "image_length"))
    title = overlap.sets[sample.set].title
    try:
        picture = check_picture(read_range(folder / sample.shard, offset, length), pixels_side=THUMBNAIL_PX)
        assert picture.rgb_HW3 is not None
        small = Image.fromarray(picture.rgb_HW3)
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    except (BadPicture, OSError):
        return Side(title, sample.key, "cannot be shown", None)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Side(title, sample.key, f"{picture.width} × {picture.height}", uri)
