"""How the files of a source are called, and which folders are none of it."""

from glob import has_magic
from itertools import takewhile

from shards.storage import Place, place

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Folders, in any case, that are splits -> what the split is called here."""


def name_below(path: Place, source: str) -> str:
    """What one of a source's files is called: its path below SOURCE (of a pattern: below the folders before its
    first `*`), so that no two files have one name; where SOURCE is the file, its name."""
    base = "/".join(takewhile(lambda part: not has_magic(part), source.split("/")))
    root = str(place(base or ("/" if source.startswith("/") else ".")))
    return path.name if str(path) == root else str(path).removeprefix(root.rstrip("/") + "/")


def is_clutter(folder: str) -> bool:
    """Whether a folder is none of the source's: hidden ones, and what macOS adds to archives."""
    return folder.startswith(".") or folder == "__MACOSX"
