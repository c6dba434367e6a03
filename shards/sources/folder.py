"""Picture folders: label folders, with or without split folders above them.

`SOURCE/<split>/<label>/…/picture` when every top folder is called train, val, test or the like, otherwise
`SOURCE/<label>/…/picture`; pictures directly in SOURCE have no label. Folders between label and picture are
the record's group. A text file of the same name beside a picture (`x.txt` for `x.jpg`) is its caption.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from shards.sources import Record, SourceOptions
from shards.storage import Place, find_files, is_local, place
from shards.tars import PICTURES
from uniemox_dist.runtime.errors import UserError

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures by name; names are paths relative to the source."""
    root = place(source, "SOURCE")
    if not root.is_dir():
        raise UserError(f"SOURCE={source}: no such folder")
    paths = _walk(root) if is_local(root) else find_files(root)
    pictures = sorted(path for path in paths if _extension(path) in PICTURES)
    if not pictures:
        raise UserError(f"SOURCE={source}: holds no pictures ({', '.join(sorted(PICTURES))})")
    texts = {path for path in paths if path.endswith(".txt")}
    del paths
    tops = {path.split("/")[0] for path in pictures if "/" in path}
    has_splits = bool(tops) and tops <= SPLITS.keys()
    base = str(root).rstrip("/")
    for path in pictures:
        # File names are bytes; those that are no UTF-8 stand with \xff escapes in what is written down.
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        parts = name.split("/")[:-1]
        split = SPLITS[parts.pop(0)] if has_splits and parts else None
        beside = f"{path[: path.rindex('.')]}.txt"
        text = _caption(root / beside) if beside in texts else ""
        yield Record(
            name=name,
            image=f"{base}/{path}",
            captions=(text,) if text else (),
            label=parts[0] if parts else None,
            group="/".join(parts[1:]) or None,
            split=split,
        )


def _extension(path: str) -> str:
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def _walk(root: Path) -> list[str]:
    """Every file below a local folder, links followed, except into a folder that contains the link."""
    found: list[str] = []
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        relative, above = pending.pop()
        status = os.stat(root / relative)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            continue
        with os.scandir(root / relative) as entries:
            for entry in entries:
                path = f"{relative}{entry.name}"
                try:
                    is_folder = entry.is_dir()
                except OSError:  # a link to itself: offered as a file where it is called a picture
                    is_folder = False
                if is_folder:
                    pending.append((f"{path}/", above | {identity}))
                else:
                    found.append(path)
    return found


def _caption(path: Place) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not a UTF-8 text (byte {error.start}); convert it or take it away"
        ) from None
