"""EMOTIC as arrays, a public copy of the set: tables of persons, and whole pictures as `.npy`.

    SOURCE/annots_arrs/annot_arrs_train.csv     also val, test and extra_train, which belongs to train
    SOURCE/img_arrs/….npy                       uint8, height x width x 3; pictures are resized, boxes are not

A row is a person: Arr_name, Width, Height, X_min, Y_min, X_max, Y_max, a column of 0 and 1 for each category, and
Valence, Arousal, Dominance, Gender and Age. Columns are found by name; Crop_name, the person alone, is not used.
"""

import io
import re
from collections.abc import Iterator

import numpy as np
from PIL import Image

from shards.sources.tables import read_csv
from shards.sources.values import load_array
from shards.storage import Place
from uniemox_dist.core.errors import UserError

TABLE = re.compile(r"annot_arrs_(?P<split>(extra_)?train|val|test)\.csv", re.IGNORECASE)
COLUMNS = ("Arr_name", "Width", "Height", "X_min", "Y_min", "X_max", "Y_max")
MOST_SIDE = 16_384
"""Longest side of an array in pixels."""

Row = tuple[str, str, dict[str, str]]
"""(place for errors, name of the array, cells)"""


def split_of(table: Place) -> str:
    """The split of a table by its name."""
    match = TABLE.fullmatch(table.name)
    assert match is not None
    return match["split"].lower().removeprefix("extra_")


def read_rows(path: Place) -> Iterator[Row]:
    """The persons in a table.

    Raises:
        UserError: if it lacks a column.
    """

    def check(header: list[str]) -> None:
        if missing := [name for name in COLUMNS if name not in header]:
            raise UserError(
                f"{path}: lacks the columns {', '.join(missing)}; its columns are {', '.join(header)}"
            )

    for _, line, row in read_csv(path, check):
        name = row["Arr_name"].strip().replace("\\", "/").rpartition("/")[2]
        yield f"{path.name}, line {line}", name, row


def is_set(cell: str) -> bool:
    """Whether the cell of a category states that a person has it."""
    try:
        return float(cell) != 0
    except ValueError:
        return False


def read_picture(path: Place) -> tuple[bytes, tuple[str, str] | None]:
    """The PNG of an array, or why there is none."""
    try:
        array = load_array(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        return b"", ("unreadable", f"no such file: {path}")
    except ValueError as error:
        return b"", ("corrupt", f"{path.name}: {error}"[:300])
    fits = array.ndim == 3 and array.shape[2] == 3 and min(array.shape) > 0 and max(array.shape) <= MOST_SIDE
    if not fits or array.dtype != np.uint8:
        shape = " x ".join(map(str, array.shape))
        return b"", (
            "format",
            f"{path.name}: {array.dtype} of {shape}; height x width x 3 in uint8 is expected",
        )
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", compress_level=1)
    return file.getvalue(), None
