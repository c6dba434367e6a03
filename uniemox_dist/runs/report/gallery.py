"""What `uniemox evaluate gallery` found, for the page: checked, since whatever stands in the file goes into it."""

import re
from pathlib import Path
from typing import Any

from uniemox_dist.core.files import read_json

NAME = "gallery.json"
BASE64 = re.compile(r"[A-Za-z0-9+/]+={0,2}")
PALETTE = (
    *("#3346b8", "#0c8069", "#b85c08", "#b02475", "#55657f", "#7c4ddb", "#0b7891", "#c0271c"),
    *("#8a7a00", "#4f7d1c", "#a0522d", "#5b5b5b"),
)
"""Colours of labels; more labels share them again."""


def gallery(path: Path) -> dict[str, Any] | None:
    """The gallery of a run's folder; None where there is none, or something else stands there."""
    try:
        found = read_json(path / NAME)
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
