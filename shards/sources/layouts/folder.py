"""Picture folders: label folders, with or without split folders above them.

Paths are `SOURCE/<split>/<label>/…/picture` if the top folders are called train, val, test or similar (in any case),
and `SOURCE/<label>/…/picture` if none is. Pictures directly in SOURCE have no label. Folders between label and
picture are the record's group. A text file of the same name beside a picture (`x.txt` for `x.jpg`) is its caption.
Hidden folders and `__MACOSX` are skipped.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from shards.format.tars import PICTURES
from shards.sources import Record, SourceOptions
from shards.sources.files import SPLITS, is_clutter, read_side_file
from shards.storage import find_files, is_local, parse_place
from uniemox_dist.core.errors import UserError


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures by name; names are paths relative to the source.

    Raises:
        UserError: if the folder does not exist, has no pictures, or has folders of splits beside other folders.
    """
    root = parse_place(source, "SOURCE")
    if not root.is_dir():
        raise UserError(f"SOURCE={source}: no such folder; give a folder of pictures")
    paths = _walk(root) if is_local(root) else find_files(root)
    paths = [path for path in paths if not any(map(is_clutter, path.split("/")[:-1]))]
    pictures = sorted(path for path in paths if _extension(path) in PICTURES)
    if not pictures:
        raise UserError(
            f"SOURCE={source}: has no pictures ({', '.join(sorted(PICTURES))}); "
            f"give another folder, or another --layout"
        )
    texts = {path for path in paths if path.endswith(".txt")}
    del paths
    has_splits = _has_splits(source, {path.split("/")[0] for path in pictures if "/" in path})
    base = str(root).rstrip("/")
    for path in pictures:
        # File names are bytes; those that are not UTF-8 are written with \xff escapes.
        name = _escape(path)
        parts = name.split("/")[:-1]
        split = SPLITS[parts.pop(0).lower()] if has_splits and parts else None
        beside = f"{path[: path.rindex('.')]}.txt"
        text, refused = "", None
        if beside in texts:
            try:
                text = read_side_file(root / beside).decode("utf-8-sig").strip()
            except ValueError as error:
                refused = ("annotation", f"its caption {_escape(beside.rpartition('/')[2])}: {error}")
        yield Record(
            name=name,
            image=f"{base}/{path}",
            captions=(text,) if text else (),
            label=parts[0] if parts else None,
            group="/".join(parts[1:]) or None,
            split=split,
            refused=refused,
        )


def _has_splits(source: str, tops: set[str]) -> bool:
    """Whether the top folders are splits."""
    splits = {top for top in tops if top.lower() in SPLITS}
    if others := sorted(tops - splits)[:8]:
        if splits:
            raise UserError(
                f"SOURCE={source}: has folders of splits ({', '.join(sorted(splits))}) beside others "
                f"({_escape(', '.join(others))}); remove one kind, or rename a label that is called like a split"
            )
        return False
    return bool(splits)


def _extension(path: str) -> str:
    _, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def _walk(root: Path) -> list[str]:
    """Lists every file below a local folder. Follows links, except into a folder that contains the link."""
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
                except OSError:  # a link to itself; treated as a file
                    is_folder = False
                if is_folder:
                    pending.append((f"{path}/", above | {identity}))
                else:
                    found.append(path)
    return found


def _escape(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")
