"""Picture folders: label folders, with or without split folders above them.

`SOURCE/<split>/<label>/…/picture` when every top folder is called train, val, test or the like, otherwise
`SOURCE/<label>/…/picture`; pictures directly in SOURCE have no label. A text file of the same name beside
a picture (`x.txt` for `x.jpg`) is its caption.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

from shards.sources import Record, SourceOptions
from uniemox_dist.runtime.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".webp"}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures in a seeded order; names are paths relative to the source."""
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"SOURCE={source}: no such folder")
    # os.walk does not follow links to folders, so that a loop of links ends.
    paths = sorted(
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root)
        for name in names
        if os.path.splitext(name)[1].lower() in PICTURES
    )
    if not paths:
        raise UserError(f"SOURCE={source}: holds no pictures ({', '.join(sorted(PICTURES))})")
    tops = {path.split(os.sep)[0] for path in paths if os.sep in path}
    has_splits = bool(tops) and tops <= SPLITS
    random.Random(str(options.seed)).shuffle(paths)
    for path in paths:
        # File names are bytes; those that are no UTF-8 stand with \xff escapes in what is written down.
        name = os.fsencode(path).decode("utf-8", "backslashreplace").replace(os.sep, "/")
        parts = name.split("/")[:-1]
        split = parts.pop(0) if has_splits and parts else None
        text = _caption((root / path).with_suffix(".txt"))
        yield Record(
            name=name,
            image=str(root / path),
            captions=(text,) if text else (),
            label=parts[0] if parts else None,
            split=split,
        )


def _caption(path: Path) -> str:
    if not path.is_file():
        return ""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a UTF-8 text (byte {error.start}); convert it or take it away"
        ) from None
