"""The nearest texts of a run's shown pictures as a table: at the first look, at the newest, and for the teacher."""

from pathlib import Path
from typing import Any

from uniemox_dist.core.files import read_json

MOST = 3
STUDENT, TEACHER = "student", "teacher"


def nearest(samples: Path) -> dict[str, Any] | None:
    """First and newest look, picture by picture; None where none was written.

    A file that is cut or something else is passed over: the page is written while runs go on.
    """
    looks = [look for path in sorted(samples.glob("step_*.json")) if (look := _read(path))]
    if not looks:
        return None
    newest = looks[-1]
    # Of a run that went on with other held-out data, only what was seen of the same pictures compares.
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


def _read(path: Path) -> dict[str, Any] | None:
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
    texts = [{"text": str(line["text"]), "cosine": float(line["cosine"])} for line in found["nearest"][:MOST]]
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
    """How many of the teacher's nearest texts the student names too, on average."""
    counts = [sum(line["text"] in known for line in cell["nearest"]) for cell, known in zip(cells, names)]
    return sum(counts) / len(counts)
