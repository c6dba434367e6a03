"""COCO captions: a JSON of captions per split, pictures in a folder of the same name.

    SOURCE/annotations/captions_train2017.json     also instances_train2017.json for person boxes
    SOURCE/annotations/captions_val2017.json
    SOURCE/train2017/000000000009.jpg              or SOURCE/images/train2017/…
    SOURCE/val2017/000000000139.jpg

SOURCE may also be one captions_*.json; its pictures are then in a folder as above, beside it, or in `images/` beside
it. There is one record per picture, with all of its captions. Person boxes are read only on request (`--persons
source`), because the instances file of one split has 450 MB. They are in pixels of the stored picture.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.detect.types import Person
from shards.sources import Record, SourceOptions
from shards.sources.files import SPLITS, find_file, split_name, try_path
from shards.sources.values import BAD_VALUE, load_json, parse_text
from shards.storage import Place, parse_place
from uniemox_dist.core.errors import UserError

USES = ("--persons source", "--allow-outside")
CAPTIONS = re.compile(rf"captions_(?P<part>(?P<split>{'|'.join(SPLITS)})(?P<year>\d*))\.json", re.IGNORECASE)
_PROBES = 16
"""Number of pictures that are tried to find the picture folder."""


def read(source: str, options: SourceOptions) -> Iterator[Record]:
    """Yields the pictures in the order of their captions files, then by name.

    Raises:
        UserError: if there are no captions, captions of several years, a file that is not COCO's JSON, or no
            instances file although the source's persons are requested.
    """
    for path in _caption_files(source):
        yield from _read_part(path, options)


def _caption_files(source: str) -> list[Place]:
    root = parse_place(source, "SOURCE")
    if root.name.endswith(".json"):
        # Absolute, because a bare file name has no parent folder.
        return [root.absolute() if isinstance(root, Path) else root]
    found = {path.name: path for path in (root / "annotations").glob("captions_*.json")}
    known = {name: match for name in sorted(found) if (match := CAPTIONS.fullmatch(name))}
    if not known:
        raise UserError(
            f"SOURCE={source}: has no annotations/captions_<split><year>.json (split: train, val, test); "
            "give the folder that holds annotations/, or one captions JSON"
        )
    years = sorted({match["year"] for match in known.values()})
    if len(years) > 1:
        # Most pictures of val2014 are in train2017, so a common pack would have them in two splits.
        raise UserError(
            f"SOURCE={source}: annotations/ has captions of several years ({', '.join(known)}), which share "
            "pictures across splits; keep those of one year, or give one captions JSON"
        )
    return [found[name] for name in known]


def _read_part(path: Place, options: SourceOptions) -> Iterator[Record]:
    match = CAPTIONS.fullmatch(path.name)
    part, split = (match["part"], split_name(match["split"])) if match else ("", None)
    content = _load(path, ("images", "annotations"))
    images: list[dict[str, Any]] = []
    captions: dict[Any, list[tuple[int, str]]] = defaultdict(list)
    try:
        images = sorted(content["images"], key=lambda image: image["file_name"])
        names = [str(image["file_name"]) for image in images]
        ids = {image["id"] for image in images}
        for entry in content["annotations"]:
            captions[entry["image_id"]].append(
                (int(entry["id"]), (parse_text(entry["caption"]) or "").strip())
            )
    except BAD_VALUE as error:
        raise _malformed(path, error) from None
    if not images:
        raise UserError(f"{path}: lists no images; give the captions_*.json as COCO publishes it")
    if len(ids) != len(images):
        raise UserError(f"{path}: lists one image id twice; give the captions_*.json as COCO publishes it")
    sizes = _sizes(path, images) if options.source_persons else {}
    persons = _persons(path, sizes) if options.source_persons else None
    folder = _picture_folder(path, part, names[:_PROBES])
    for name, image in zip(names, images):
        texts = dict.fromkeys(caption for _, caption in sorted(captions[image["id"]]) if caption)
        place, refused = try_path(folder, name, allow_outside=options.allow_outside)
        yield Record(
            name=f"{part}/{name}" if part else name,
            image=place,
            captions=tuple(texts),
            attributes={"coco_id": image["id"]},
            split=split,
            persons=None if persons is None else persons[image["id"]],
            boxes_size=sizes.get(image["id"]),
            refused=refused,
        )


def _picture_folder(path: Place, part: str, names: list[str]) -> Place:
    """The first folder that contains one of these pictures; the published one if none does."""
    here = path.parent
    folders: list[Place] = [here, here / "images", here.parent / "images"]
    if part:
        named: list[Place] = [
            base / inner for base in (here.parent, here) for inner in (part, f"images/{part}")
        ]
        folders = named + folders
    return next(
        (folder for folder in folders if any(find_file(folder, n).is_file() for n in names)), folders[0]
    )


def _sizes(path: Place, images: list[dict[str, Any]]) -> dict[Any, tuple[float, float]]:
    """Image id -> its width and height in pixels."""
    sizes: dict[Any, Any] = {image["id"]: (image.get("width"), image.get("height")) for image in images}
    for number, size in sizes.items():
        if not all(isinstance(side, (int, float)) and 0 < side < math.inf for side in size):
            raise UserError(
                f"{path}: image {number} has width and height {size[0]} and {size[1]}, which cannot scale "
                "boxes; give positive numbers, or use another --persons"
            )
    return sizes


def _persons(path: Place, sizes: dict[Any, tuple[float, float]]) -> dict[Any, tuple[Person, ...]]:
    """Image id -> persons, the largest first."""
    where = path.parent / path.name.replace("captions_", "instances_", 1)
    if where == path or not where.is_file():
        raise UserError(
            f"--persons source: {where if where != path else f'instances_* beside {path}'} is missing; "
            "copy it from COCO's annotations zip, or use another --persons"
        )
    content = _load(where, ("annotations", "categories"))
    found: dict[Any, list[tuple[float, int, Person]]] = defaultdict(list)
    try:
        kinds = {entry["id"] for entry in content["categories"] if entry["name"] == "person"}
        for entry in content["annotations"]:
            if entry["category_id"] in kinds and not entry["iscrowd"] and entry["image_id"] in sizes:
                person = _person(entry["bbox"], sizes[entry["image_id"]])
                if person is not None:
                    found[entry["image_id"]].append((-_area(entry["bbox"]), int(entry["id"]), person))
    except BAD_VALUE as error:
        raise _malformed(where, error) from None
    if not kinds:
        raise UserError(f"{where}: has no category 'person'; give COCO's own instances file")
    return {
        number: tuple(person for *_, person in sorted(found[number], key=lambda item: item[:2]))
        for number in sizes
    }


def _area(box: list[float]) -> float:
    return float(box[2]) * float(box[3])


def _person(box: list[float], size: tuple[float, float]) -> Person | None:
    """None for a box that has no area inside the picture."""
    x, y, width, height = map(float, box)
    if not all(map(math.isfinite, (x, y, width, height))) or width <= 0 or height <= 0:
        return None
    person = Person((x / size[0], y / size[1], (x + width) / size[0], (y + height) / size[1]), score=1.0)
    x1, y1, x2, y2 = person.box
    return person if x2 > x1 and y2 > y1 else None


def _load(path: Place, keys: tuple[str, ...]) -> dict[str, Any]:
    """The JSON object in a file that has a list under each of `keys`."""
    try:
        content = load_json(path.read_bytes(), _without_outline)
    except FileNotFoundError:
        raise UserError(f"SOURCE: {path} is missing; give COCO's folder or one captions JSON") from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); download it again") from None
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: has no list {key!r}; give the file as COCO publishes it")
    return dict(content)


def _without_outline(entry: dict[str, Any]) -> dict[str, Any]:
    # Outlines are most of an instances file; they would need several GB of memory.
    entry.pop("segmentation", None)
    return entry


def _malformed(path: Place, error: Exception) -> UserError:
    what = f"an entry lacks {error}" if isinstance(error, KeyError) else f"an entry is malformed ({error})"
    return UserError(f"{path}: {what}; give the file as COCO publishes it")
