"""Small sets of real JPEGs in the layouts of the seven benchmarks. A label is a colour, so that it can be learned."""

import colorsys
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from shards.pack.pipeline import PackSettings, pack
from shards.sources.layouts.emotic import CATEGORIES
from shards.sources.presets import load_presets

SIZE = 40
LAYOUTS = {
    "emo8": "{split}/{label}/{name}.jpg",
    "fi": "emotion_dataset/{label}/{name}.jpg",
    "ube": "UnBiasedEmo/images/{label}/{engine}/{name}.jpg",
    "emotion6": "images/{label}/{name}.jpg",
    "caer-s": "{split}/{label}/{name}.jpg",
    "heco": "{label}/{name}.jpg",
}
"""Where the pictures of each set lie."""
GIVEN = {"emo8": {"train": 7, "val": 1, "test": 2}, "caer-s": {"train": 6, "test": 3}}
"""Pictures of a label in splits that a set comes with."""


def picture(path: Path, label: int, of: int, seed: int, size: tuple[int, int] = (SIZE, SIZE)) -> Path:
    """A JPEG with a bright patch of the label's colour on noise."""
    random = np.random.RandomState(seed)
    pixels = random.randint(60, 120, (size[1], size[0], 3)).astype(np.uint8)
    colour = [round(255 * value) for value in colorsys.hsv_to_rgb(label / of, 1.0, 1.0)]
    left, top = random.randint(0, size[0] // 4), random.randint(0, size[1] // 4)
    pixels[top : top + 3 * size[1] // 4, left : left + 3 * size[0] // 4] = colour
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def folder_set(root: Path, name: str, per_label: int = 10) -> Path:
    """One of the sets of label folders, in its own layout."""
    labels = load_presets()[name].labels
    for number, label in enumerate(labels):
        splits = GIVEN.get(name, {"": per_label})
        for split, count in splits.items():
            for i in range(count):
                at = LAYOUTS[name].format(
                    split=split, label=label, engine=("bing", "google")[i % 2], name=f"{split}{i:03d}"
                )
                picture(root / at, number, len(labels), seed=1000 * number + i + 100 * len(split))
    return root


def labels_set(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """split -> label -> number of pictures; the colour is the label's place in all labels."""
    names = sorted({label for labels in splits.values() for label in labels})
    for split, labels in splits.items():
        for label, count in labels.items():
            for i in range(count):
                at = root / split / label / f"{split}{i:03d}.jpg"
                picture(
                    at, names.index(label), len(names), seed=1000 * names.index(label) + i + 100 * len(split)
                )
    return root


SHARES = {"joy": [0.7, 0.2, 0.1], "awe": [0.2, 0.6, 0.2], "fear": [0.0, 0.25, 0.75]}
"""Distributions of the pictures of `distribution_set` over these three labels, by the most likely one."""


def distribution_set(root: Path, counts: dict[str, int]) -> Path:
    """A table for each split with distributions, valence (1 to 9, unknown for every fourth picture), and arousal; no
    labels. Distribution and valence follow the colour, and arousal is 3 for every picture."""
    labels = list(SHARES)
    for split, count in counts.items():
        rows = []
        for i in range(count):
            number = i % len(labels)
            at = picture(root / f"{split}_{i:03d}.jpg", number, len(labels), seed=i + 100 * len(split))
            row: dict[str, Any] = {"path": at.name, "distribution": dict(zip(labels, SHARES[labels[number]]))}
            row |= {"valence": 9 - 3 * number} if i % 4 else {}
            rows.append(json.dumps({**row, "arousal": 3}))
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    return root


def heco_set(root: Path, count: int = 24) -> Path:
    """HECO's published form: a CSV with one row per person. Every third picture has two persons: half of these pairs
    have different labels. Valence follows the label, and the second person has none."""
    labels = load_presets()["heco"].labels[:4]
    rows = []
    for i in range(count):
        name, number = f"HECO_{i:04d}.jpg", i % 4
        picture(root / "Data" / name, number, 4, seed=i, size=(80, 60))
        rows.append([name, 5, 5, 40, 55, labels[number], 2 + 2 * number, 5, 5])
        if i % 3 == 0:
            rows.append([name, 30, 10, 80, 58, labels[(number + i % 2) % 4], "", 6, 4])
    (root / "Labels").mkdir()
    with open(root / "Labels/HECO_Labels.csv", "w", newline="", encoding="utf-8") as file:
        header = ["Image", "xmin", "ymin", "xmax", "ymax", "Category", "Valence", "Arousal", "Dominance"]
        csv.writer(file).writerows([header, *rows])
    return root


def emotic_set(root: Path, train: int = 16, others: int = 6) -> Path:
    """EMOTIC's CSV layout: two persons in every second picture; valence follows the category, where it is known."""
    for split, count in {"train": train, "val": others, "test": others}.items():
        rows: list[dict[str, Any]] = []
        for i in range(count):
            name = f"{split}_{i:03d}.jpg"
            number = i % 4
            picture(root / "emotic/mscoco/images" / name, number, 4, seed=i + 100 * len(split), size=(80, 60))
            boxes: Sequence[list[int]] = [[5, 5, 40, 55], [30, 10, 85, 58]][: 1 + i % 2]
            for person, box in enumerate(boxes):
                known = (i + person) % 5
                vad = [2.0 + number, 5, 4] if known else ["nan", 6, "nan"]
                rows.append(
                    {
                        "Folder": "mscoco/images",
                        "Filename": name,
                        "Image Size": "[80, 60]",
                        "BBox": str(box),
                        "Categorical_Labels": str([CATEGORIES[number], CATEGORIES[20 + person]]),
                        "Continuous_Labels": "[" + ", ".join(map(str, vad)) + "]",
                        "Gender": "Male",
                        "Age": "Adult",
                    }
                )
        with open(root / f"{split}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    return root


def packed(
    source: Path, out: Path, *, preset: str | None = None, layout: str = "folder", **more: Any
) -> Path:
    """A set as `uniemox shards pack` makes it; persons as the source has them."""
    persons = "source" if layout == "emotic" else "none"
    settings = PackSettings(str(source), layout, persons=persons, preset=preset, shard_samples=30, **more)
    pack(settings, out, workers=0)
    return out
