"""EMOTIC: annotated persons in pictures of four collections.

    SOURCE/Annotations/Annotations.mat
    SOURCE/train.csv, val.csv, test.csv instead of it: the usual conversion, one row per person
    SOURCE/emotic/mscoco/images/….jpg   or SOURCE/images/mscoco/…, or SOURCE/mscoco/…
    SOURCE/annots_arrs/, img_arrs/      instead of all these: a copy as arrays (emotic_arrays.py)

All of these may be up to three folders further below, in any case (`emotic_pre/train.csv`, `emotic/emotic/mscoco/…`).

A CSV has the columns Folder, Filename, Image Size ([width, height]), BBox ([x1, y1, x2, y2]) and
Categorical_Labels, and may have Continuous_Labels ([valence, arousal, dominance]), Gender and Age.

There is one record per picture with all of its persons, each with its own labels: `categories` (of the 26),
`valence`, `arousal`, `dominance` (1 to 10), `gender`, `age`. If there were several annotators (val and test), their
combined labels are used. Boxes are in pixels of the stored picture, unless the stated size has the other orientation.
Boxes that reach over the edge are clipped, and dropped if nothing remains. A value beyond 1 to 10, and a row that
cannot be read, refuse their picture.
"""

import ast
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from shards.detect.types import NONE_INSIDE, Person, by_area
from shards.format.sample import DIMENSIONS
from shards.sources import Record, SourceOptions, emotic_arrays
from shards.sources.files import find_file, find_split_files, try_path
from shards.sources.find_set import levels, search
from shards.sources.tables import read_csv
from shards.storage import Place, parse_place
from uniemox_dist.core.errors import UserError, missing_extra

USES = ("--persons source", "--allow-outside")
SPLITS = ("train", "val", "test")
CATEGORIES = (
    *("Affection", "Anger", "Annoyance", "Anticipation", "Aversion", "Confidence", "Disapproval"),
    *("Disconnection", "Disquietment", "Doubt/Confusion", "Embarrassment", "Engagement", "Esteem"),
    *("Excitement", "Fatigue", "Fear", "Happiness", "Pain", "Peace", "Pleasure", "Sadness"),
    *("Sensitivity", "Suffering", "Surprise", "Sympathy", "Yearning"),
)
RANGE = (1.0, 10.0)
"""Of valence, arousal and dominance."""
COLUMNS = ("Folder", "Filename", "Image Size", "BBox", "Categorical_Labels")
"""Required columns of EMOTIC's CSV."""

_SPELLINGS = {
    **{name.casefold(): name for name in CATEGORIES},
    **dict.fromkeys(("disquitement", "disquiet"), "Disquietment"),  # both occur in published files
}
_PROBES = 16
"""Number of pictures that are tried to find the picture folder."""


class _BadRow(ValueError):
    """An annotation of a person that cannot be read."""


@dataclass
class _Picture:
    persons: list[Person] = field(default_factory=list)
    categories: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    size: tuple[float, float] | None = None
    """Width and height, pixels."""

    def add(self, size: Sequence[float], box: Sequence[float], labels: dict[str, Any]) -> None:
        self.categories.update(labels["categories"])
        if len(size) != 2 or not all(math.isfinite(side) and side > 0 for side in size):
            self.problems.append(f"image size {list(size)} cannot scale a box")
            return
        width, height = self.size = (size[0], size[1])
        try:
            fractions = (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
            self.persons.append(Person(fractions, 1.0, labels))
        except ValueError as error:
            self.problems.append(str(error))

    def record(self, root: Place, name: str, split: str, *, allow_outside: bool) -> Record:
        inside = by_area(self.persons)
        if not inside and not self.problems:
            self.problems.append(NONE_INSIDE)
        place, refused = try_path(root, name, allow_outside=allow_outside)
        return Record(
            name=name,
            image=place,
            attributes={"categories": sorted(self.categories)},
            split=split,
            persons=inside,
            boxes_size=self.size,
            refused=("annotation", self.problems[0]) if self.problems else refused,
        )


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures by split (train, val, test), then by path.

    Raises:
        UserError: if there is neither a .mat nor a CSV, or one is damaged.
    """
    options.findings.dimension_ranges |= dict.fromkeys(DIMENSIONS, RANGE)
    top = parse_place(source, "SOURCE")
    mats = search(top, ["Annotations.mat"])
    tables = search(top, ["train.csv", "val.csv", "test.csv"])
    arrays = search(top, ["annot_arrs_*.csv"])
    if mats:
        splits = _from_mat(mats[0])
    elif tables:
        lists = find_split_files(tables[0].parent, ".csv")
        splits = ((split, _from_csv(path)) for split, path in lists)
    elif arrays:
        yield from _from_arrays(top, arrays)
        return
    else:
        raise UserError(
            f"SOURCE={source}: has neither Annotations.mat nor train.csv, val.csv or test.csv; "
            "give EMOTIC's folder"
        )
    for split, pictures in splits:
        names = sorted(pictures)
        folder = _picture_folder(top, names[:_PROBES])
        for name in names:
            yield pictures[name].record(folder, name, split, allow_outside=options.allow_outside)


def _picture_folder(top: Place, names: list[str]) -> Place:
    """The first folder below SOURCE that contains one of these pictures; the published one if none does."""
    usual = [top / "emotic", top / "images", top]
    for folder in (*usual, *(folder for level in levels(top) for folder in level)):
        if any(find_file(folder, name).is_file() for name in names):
            return folder
    return usual[0]


def _from_arrays(top: Place, tables: list[Place]) -> Iterator[Record]:
    folders = search(top, ["img_arrs"])
    if not folders:
        raise UserError(f"SOURCE={top}: lacks img_arrs/, the pictures of {tables[0].name}; copy it there")
    by_split: dict[str, dict[str, _Picture]] = {}
    for table in tables:
        pictures = by_split.setdefault(emotic_arrays.split_of(table), {})
        for where, name, row in emotic_arrays.read_rows(table):
            categories = [category for category in CATEGORIES if emotic_arrays.is_set(row.get(category, ""))]
            dimensions = [_number(row.get(dimension.capitalize())) for dimension in DIMENSIONS]
            labels = _labels(categories, dimensions, gender=row.get("Gender"), age=row.get("Age"))
            stated = [row[corner] for corner in ("X_min", "Y_min", "X_max", "Y_max")]
            size = [_number(row["Width"]), _number(row["Height"])]
            picture = pictures.setdefault(name, _Picture())
            try:
                picture.add(size, _check_box(list(map(_number, stated)), ", ".join(stated)), labels)
            except _BadRow as problem:
                picture.problems.append(f"{where}: {problem}")
    for split in (split for split in SPLITS if split in by_split):
        for name, picture in sorted(by_split[split].items()):
            record = picture.record(folders[0], name, split, allow_outside=False)
            image, refused = (
                (b"", record.refused) if record.refused else emotic_arrays.read_picture(folders[0] / name)
            )
            # The boxes are fractions of a picture of another size, which has no EXIF data.
            yield replace(record, image=image, refused=refused, boxes_size=None)


def _labels(categories: Sequence[Any], dimensions: Sequence[float], **texts: Any) -> dict[str, Any]:
    """A person's labels as JSON values, without unknown ones.

    Raises:
        _BadRow: for a category that is not one of the 26.
    """
    found: set[str] = set()
    for name in filter(None, (str(name).strip() for name in categories)):
        if name.casefold() not in _SPELLINGS:
            raise _BadRow(f"{name!r} is not a category of EMOTIC; valid are {', '.join(CATEGORIES)}")
        found.add(_SPELLINGS[name.casefold()])
    labels: dict[str, Any] = {"categories": sorted(found)}
    labels |= {name: value for name, value in zip(DIMENSIONS, dimensions) if math.isfinite(value)}
    return labels | {
        name: text.strip() for name, text in texts.items() if isinstance(text, str) and text.strip()
    }


# ---- CSV


def _from_csv(path: Place) -> dict[str, _Picture]:
    pictures: dict[str, _Picture] = {}
    for _, line, row in read_csv(path, lambda header: _check_columns(header, path)):
        where = f"{path.name}, line {line}"
        name = _name(row["Folder"], row["Filename"])
        picture = pictures.setdefault(name or where, _Picture())
        if not name:
            picture.problems.append(f"{where}: has no picture name; give a Folder and a Filename")
            continue
        try:
            picture.add(*_person(row))
        except _BadRow as problem:
            picture.problems.append(f"{where}: {problem}")
    if not pictures:
        raise UserError(f"{path}: has no rows; remove it or convert Annotations.mat again")
    return pictures


def _person(row: dict[str, Any]) -> tuple[list[float], list[float], dict[str, Any]]:
    """The size of the picture, the box, and the labels of a row.

    Raises:
        _BadRow: for a cell that cannot be read.
    """
    box, values = _check_box(_numbers(row, "BBox"), row["BBox"]), _numbers(row, "Continuous_Labels")
    if values and len(values) != len(DIMENSIONS):
        raise _BadRow(f"Continuous_Labels is {row['Continuous_Labels']!r:.80}, not [{', '.join(DIMENSIONS)}]")
    categories = _cell(row, "Categorical_Labels")
    labels = _labels(categories, values, gender=row.get("Gender"), age=row.get("Age"))
    return _numbers(row, "Image Size"), box, labels


def _check_box(box: list[float], stated: object) -> list[float]:
    """The box itself. Raises _BadRow if it is not four numbers in order."""
    if len(box) != 4 or not all(map(math.isfinite, box)) or box[2] < box[0] or box[3] < box[1]:
        raise _BadRow(f"BBox is {str(stated)!r:.80}, not [x1, y1, x2, y2] in pixels")
    return box


def _check_columns(present: list[str], path: Place) -> None:
    if missing := [name for name in COLUMNS if name not in present]:
        raise UserError(
            f"{path}: lacks the columns {', '.join(missing)}; its columns are {', '.join(present)}"
        )


def _cell(row: dict[str, Any], column: str) -> list[Any]:
    """The list in a cell; empty for an empty cell or a missing column.

    Raises:
        _BadRow: for another value.
    """
    # Python prints NaN in a list as a bare nan, which is not a literal.
    text = re.sub(r"\bnan\b", "None", (row.get(column) or "").strip())
    try:
        value = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not isinstance(value, (list, tuple)):
        raise _BadRow(f"{column} is {row[column]!r:.80}, not a list such as [1, 2]")
    return list(value)


def _numbers(row: dict[str, Any], column: str) -> list[float]:
    """The numbers in a cell's list; NaN for an item that is not a number."""
    return [_number(value) for value in _cell(row, column)]


def _name(folder: Any, filename: Any) -> str | None:
    """The path of a picture; None if it has no name."""
    if not isinstance(filename, str) or not filename.strip():
        return None
    inner = folder.strip().replace("\\", "/").strip("/") if isinstance(folder, str) else ""
    return f"{inner}/{filename.strip()}" if inner else filename.strip()


# ---- Annotations.mat


def _from_mat(path: Place) -> Iterator[tuple[str, dict[str, _Picture]]]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise missing_extra("scipy", "emotic") from None
    try:
        content = loadmat(io.BytesIO(path.read_bytes()), struct_as_record=False, squeeze_me=True)
    except Exception as error:  # scipy raises many types on damaged files
        raise UserError(f"{path}: not a MATLAB 5 file ({error}); download it again") from None
    present = [split for split in SPLITS if split in content]
    if not present:
        names = ", ".join(name for name in content if not name.startswith("__")) or "none"
        raise UserError(f"{path}: has {names} instead of train, val or test; give EMOTIC's own file")
    for split in present:
        pictures: dict[str, _Picture] = {}
        for number, entry in enumerate(_each(content[split]), start=1):
            where = f"{path.name}, {split}({number})"
            name = _name(_get(entry, "folder"), _get(entry, "filename"))
            picture = pictures.setdefault(name or where, _Picture())
            if not name:
                picture.problems.append(f"{where}: has no picture name")
                continue
            stated = _get(entry, "image_size")
            size = [_number(_get(stated, side)) for side in ("n_col", "n_row")]
            for person in _each(_get(entry, "person")):
                box = [_number(value) for value in _each(_get(person, "body_bbox"))]
                try:
                    picture.add(size, _check_box(box, box), _mat_labels(person))
                except _BadRow as problem:
                    picture.problems.append(f"{where}: {problem}")
        yield split, pictures


def _mat_labels(person: Any) -> dict[str, Any]:
    annotators = _each(_get(person, "annotations_categories"))
    categories = [name for annotator in annotators for name in _each(_get(annotator, "categories"))]
    if hasattr(person, "combined_categories"):
        categories = _each(person.combined_categories)
    combined = "combined_continuous" if hasattr(person, "combined_continuous") else "annotations_continuous"
    means = []
    for dimension in DIMENSIONS:
        given = [_number(_get(annotator, dimension)) for annotator in _each(_get(person, combined))]
        known = [value for value in given if math.isfinite(value)]
        means.append(sum(known) / len(known) if known else math.nan)
    return _labels(categories, means, gender=_get(person, "gender"), age=_get(person, "age"))


def _get(struct: Any, name: str) -> Any:
    """A field of a MATLAB struct; an empty array (MATLAB's null) if it is missing."""
    return getattr(struct, name, np.empty(0))


def _each(value: Any) -> list[Any]:
    """The elements of a MATLAB array. Reading squeezes an array of one element to that element."""
    return list(np.atleast_1d(value).ravel())


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
