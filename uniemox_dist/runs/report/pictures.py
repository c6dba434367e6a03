"""The pictures of a page: sheets of reconstructions, nearest texts of pictures, and the gallery."""

import base64
import io
import re
from pathlib import Path
from typing import Any

from PIL import Image

from uniemox_dist.core.files import read_json

EARLIER_SHOWN = 8
"""Number of earlier pictures that are visible without unfolding, spread evenly over the run."""
SMALL_PIXELS, SMALL_BYTES = 800, 200_000
"""Earlier pictures of more bytes than this are embedded at this width, so that the page still opens on a phone."""
TEXTS_SHOWN = 3
STUDENT, TEACHER = "student", "teacher"
GALLERY_NAME = "gallery.json"
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
PALETTE = (
    *("#3346b8", "#0c8069", "#b85c08", "#b02475", "#55657f", "#7c4ddb", "#0b7891", "#c0271c"),
    *("#8a7a00", "#4f7d1c", "#a0522d", "#5b5b5b"),
)
"""Colours of labels; if there are more labels, colours repeat."""


def select_pictures(samples: Path) -> dict[str, Any]:
    """Returns the newest reconstruction unchanged and the earlier ones small: some visible, the others to unfold."""
    newest: dict[str, Any] | None = None
    earlier, broken = [], []
    for path in sorted(samples.glob("*.png"), reverse=True):
        try:
            with Image.open(path, formats=["PNG"]) as picture:
                picture.load()
                uri = _embed(path, picture, whole=newest is None)
                found = {"uri": uri, "title": _title(path), "width": picture.width, "height": picture.height}
        except (OSError, SyntaxError):  # Pillow raises these for a file that is being written
            broken.append(path.name)
            continue
        if newest is None:
            newest = found
        else:
            earlier.append(found)
    stride = max(1.0, (len(earlier) - 1) / (EARLIER_SHOWN - 1))
    spread = {round(i * stride) for i in range(EARLIER_SHOWN)}
    seen = [found for i, found in enumerate(earlier) if i in spread]
    others = [found for i, found in enumerate(earlier) if i not in spread]
    return {"newest": newest, "seen": seen, "others": others, "broken": broken}


def _embed(path: Path, picture: Image.Image, *, whole: bool) -> str:
    raw, kind = path.read_bytes(), "png"
    if not whole and len(raw) > SMALL_BYTES:
        small = picture.convert("RGB")
        small.thumbnail((SMALL_PIXELS, 10 * SMALL_PIXELS))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        raw, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def _title(path: Path) -> str:
    digits = path.stem.removeprefix("step_")
    return f"step {int(digits):,}" if digits.isdigit() else path.stem


def read_nearest_texts(samples: Path) -> dict[str, Any] | None:
    """Returns the first and the newest file of nearest texts, picture by picture; None if there is none.

    Skips incomplete and other files, because the page may be written while the run continues.
    """
    looks = [look for path in sorted(samples.glob("step_*.json")) if (look := _read_samples(path))]
    if not looks:
        return None
    newest = looks[-1]
    # If the run continued with other held-out data, only files about the same pictures can be compared.
    first = next(
        look for look in looks if look["keys"] == newest["keys"] and look["texts"] == newest["texts"]
    )
    columns = [("Teacher", None, newest["sides"][TEACHER])] if newest["sides"][TEACHER] else []
    if first is not newest:
        columns.append((f"Student at step {first['step']:,}", first["step"], first["sides"][STUDENT]))
    columns.append((f"Student at step {newest['step']:,}", newest["step"], newest["sides"][STUDENT]))
    names = [{line["text"] for line in cell["nearest"]} for cell in newest["sides"][TEACHER]]
    rows = []
    for i, caption in enumerate(newest["captions"]):
        known = names[i] if names else set()
        row = [_cell(cells[i], caption, set() if step is None else known) for _, step, cells in columns]
        rows.append((caption, row))
    return {
        "texts": newest["texts"],
        "titles": [title for title, _, _ in columns],
        "rows": rows,
        "places": [(title, _mean_place(cells)) for title, _, cells in columns],
        "shared": [(step, _shared(cells, names)) for _, step, cells in columns if names and step is not None],
    }


def _read_samples(path: Path) -> dict[str, Any] | None:
    try:
        found = read_json(path)
        if (found["format"], found["format_version"]) != ("uniemox-samples", 1):
            return None
        pictures = found["pictures"]
        return {
            "step": int(found["step"]),
            "texts": int(found["texts"]),
            "keys": [str(picture["key"]) for picture in pictures],
            "captions": [str(picture["caption"]) for picture in pictures],
            "sides": {
                STUDENT: [_side(picture[STUDENT]) for picture in pictures],
                TEACHER: [_side(picture[TEACHER]) for picture in pictures if TEACHER in picture],
            },
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _side(found: dict[str, Any]) -> dict[str, Any]:
    texts = [
        {"text": str(line["text"]), "cosine": float(line["cosine"])}
        for line in found["nearest"][:TEXTS_SHOWN]
    ]
    own = found["own"]
    return {"nearest": texts, "own": None if own is None else (float(own["cosine"]), int(own["rank"]))}


def _cell(found: dict[str, Any], caption: str, known: set[str]) -> dict[str, Any]:
    lines = [
        {
            "text": line["text"],
            "cosine": f"{line['cosine']:.2f}".replace("-", "−"),
            "own": line["text"] == caption,
            "known": line["text"] in known,
        }
        for line in found["nearest"]
    ]
    return {"lines": lines, "place": found["own"][1] if found["own"] else None}


def _mean_place(cells: list[dict[str, Any]]) -> float | None:
    places = [cell["own"][1] for cell in cells if cell["own"]]
    return sum(places) / len(places) if places else None


def _shared(cells: list[dict[str, Any]], names: list[set[str]]) -> float:
    """The mean number of the teacher's nearest texts that are also the student's."""
    counts = [sum(line["text"] in known for line in cell["nearest"]) for cell, known in zip(cells, names)]
    return sum(counts) / len(counts)


def gallery(path: Path) -> dict[str, Any] | None:
    """Reads the gallery of a run's folder; None if the file is missing or not a gallery."""
    try:
        found = read_json(path / GALLERY_NAME)
        if (found["format"], found["format_version"]) != ("uniemox-gallery", 1):
            return None
        pictures: list[dict[str, Any]] = [
            {
                "key": str(p["key"]),
                "label": str(p["label"] or "no label"),
                "caption": str(p["caption"]),
                "x": round(100 * min(1.0, max(0.0, float(p["x"]))), 2),
                "y": round(100 * min(1.0, max(0.0, float(p["y"]))), 2),
                "src": _source(p["picture"]),
            }
            for p in found["pictures"]
        ]
        labels = sorted({p["label"] for p in pictures})
        colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}
        for p in pictures:
            p["colour"] = colours[p["label"]]
        zeroshot = found["zeroshot"]
        return {
            "step": int(found["step"]),
            "samples": int(found["data"]["samples"]),
            "pictures": pictures,
            "labels": [(label, colours[label]) for label in labels],
            "neighbours": [
                (pictures[n["picture"]], [(pictures[x["picture"]], float(x["cosine"])) for x in n["nearest"]])
                for n in found["neighbours"]
            ],
            "answers": [
                (
                    word,
                    [
                        (pictures[a["picture"]], str(a["answer"]), float(a["probability"]))
                        for a in zeroshot[word]
                    ],
                )
                for word in ("right", "wrong")
                if zeroshot
            ],
            "accuracy": float(zeroshot["accuracy"]) if zeroshot else None,
            "classes": len(zeroshot["labels"]) if zeroshot else 0,
            "attention": [
                (
                    pictures[look["picture"]],
                    [
                        _source(look[k])
                        for k in ("scene_view", "scene", "person_view", "person")
                        if look.get(k)
                    ],
                )
                for look in found["attention"]
            ],
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _source(text: str) -> str:
    if not BASE64.fullmatch(text):
        raise ValueError("no base64")
    return f"data:image/jpeg;base64,{text}"
