"""EmoSet-118K: a list of rows per split, and a JSON of attributes per picture.

    SOURCE/info.json                                    {"emotion": {"label2idx": {"amusement": 0, …}}, …}
    SOURCE/train.json, val.json, test.json              at least one of them; other usual names
                                                        of splits will do, such as validation.json
    SOURCE/image/amusement/amusement_00000.jpg
    SOURCE/annotation/amusement/amusement_00000.json    {"brightness": 0.4, "scene": "bakery/shop", …}

A row is `[label, image_id, image, annotation]`, or in the older release `[label, image, annotation]`;
`annotation` may be missing or null. `label2idx` may also be at the top level of info.json. Labels are stored by name,
because two releases may list them in different orders.
"""

import json
from collections.abc import Iterator
from typing import Any

from shards.sources import Record, SourceOptions
from shards.sources.files import find_file, find_split_files, read_side_file, try_path
from shards.sources.values import load_json, to_json_value
from shards.storage import Place, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--allow-outside",)
ATTRIBUTES = ("scene", "object", "facial_expression", "human_action", "brightness", "colorfulness")
POLARITY = {
    **dict.fromkeys(("amusement", "awe", "contentment", "excitement"), "positive"),
    **dict.fromkeys(("anger", "disgust", "fear", "sadness"), "negative"),
}

Row = tuple[str, str, str | None]
"""(label, image, annotation)"""


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures by split (train, val, test), then by path.

    Raises:
        UserError: if info.json or the lists of splits are missing, or differ from the form above.
    """
    root = parse_place(source, "SOURCE")
    labels = _labels(root / "info.json")
    lists = find_split_files(root, ".json")
    if not lists:
        raise UserError(
            f"SOURCE={source}: has none of train.json, val.json, test.json; give EmoSet-118K's folder"
        )
    for split, path in lists:
        for row in sorted(_rows(path), key=lambda row: row[1]):
            yield _record(root, split, row, labels, options)


def _record(root: Place, split: str, row: Row, labels: list[str], options: SourceOptions) -> Record:
    label, image, annotation = row
    attributes: dict[str, Any] = {}
    place, refused = try_path(root, image, allow_outside=options.allow_outside)
    if refused is None and annotation is not None:
        _, refused = try_path(root, annotation, allow_outside=options.allow_outside)
    if refused is None and label not in labels:
        refused = ("label", f"label {label!r} is not one of {', '.join(labels)}")
    elif refused is None and annotation is not None:
        attributes, problem = _attributes(find_file(root, annotation))
        refused = ("annotation", f"{annotation[:120]}: {problem}") if problem else None
    if label in POLARITY:
        attributes["polarity"] = POLARITY[label]
    return Record(
        name=image,
        image=place,
        label=label,
        attributes=attributes,
        split=split,
        refused=refused,
    )


def _attributes(annotation: Place) -> tuple[dict[str, Any], str]:
    """(attributes in the file, without empty ones; a problem of the file, or '')."""
    try:
        data = read_side_file(annotation)
    except ValueError as error:
        return {}, str(error)
    try:
        found = load_json(data)
        if not isinstance(found, dict):
            return {}, f"holds a {type(found).__name__}, not an object"
        values = {name: to_json_value(found.get(name)) for name in ATTRIBUTES}
    except ValueError as error:
        return {}, f"cannot be read as JSON ({error})"
    return {name: value for name, value in values.items() if value not in (None, "", [], {})}, ""


def _labels(path: Place) -> list[str]:
    found = _load(path, "is missing; give EmoSet-118K's folder, which contains it")
    if isinstance(found, dict):
        for holder in (found.get("emotion"), found):
            names = holder.get("label2idx") if isinstance(holder, dict) else None
            if names and isinstance(names, dict):
                return sorted(names)
    raise UserError(
        f"{path}: has no labels under emotion.label2idx or label2idx; give the file as EmoSet publishes it"
    )


def _rows(path: Place) -> list[Row]:
    rows = _load(path, "is missing; download it again")
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{path}: not a list of rows, or an empty one; give the file as EmoSet publishes it")
    return [_row(path, number, row) for number, row in enumerate(rows, start=1)]


def _row(path: Place, number: int, row: Any) -> Row:
    if isinstance(row, list) and 2 <= len(row) <= 4:
        label, image, annotation = [row[0], *row[2 if len(row) == 4 else 1 :], None][:3]
        texts = (
            isinstance(label, str) and isinstance(image, str) and isinstance(annotation, (str, type(None)))
        )
        if texts and label and image:
            return label, image, annotation or None
    shown = json.dumps(row, ensure_ascii=False)
    raise UserError(
        f"{path}: row {number} is {shown[:120]}; give [label, image_id, image, annotation] "
        "or [label, image, annotation] with names and paths"
    )


def _load(path: Place, missing: str) -> Any:
    try:
        return load_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"SOURCE: {path} {missing}") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from None
