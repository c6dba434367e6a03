"""Miniatures of published sets: real JPEGs in the folders, with the names, columns and oddities of the published form.

`shards/sources/README.md` names for each set the reader from which its form was taken. `write(SOURCE)` writes the
miniature for which that document has the command.
"""

import csv
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from doc_lines import command_lines
from PIL import Image

README = Path(__file__).parents[2] / "shards/sources/README.md"
SETS: dict[str, Callable[[Path], None]] = {}
"""SOURCE of a command in the document -> a function that writes this set into an empty folder."""


def published(source: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    """Registers the writer of a set under the SOURCE of its command."""

    def register(write: Callable[[Path], None]) -> Callable[[Path], None]:
        SETS[source] = write
        return write

    return register


def command_of(source: str) -> list[str]:
    """The words of the document's command for a set, without `uniemox`."""
    [words] = [words for words in pack_commands() if words[2] == source]
    return words


def pack_commands() -> list[list[str]]:
    """All commands of the document that pack a set."""
    lines = command_lines(README.read_text(encoding="utf-8"))
    return [words for words in lines if words[:2] == ["shards", "pack"]]


def jpeg(path: Path, size: tuple[int, int] = (48, 32), format: str = "JPEG") -> Path:
    """A picture of noise that differs from those of all other names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = sum(n * byte for n, byte in enumerate(str(path)[-60:].encode(), 1))
    pixels = np.random.RandomState(seed).randint(0, 255, (size[1] // 4, size[0] // 4, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size).save(path, format)
    return path


def jpegs(root: Path, *names: str) -> None:
    for name in names:
        jpeg(root / name)


def text(path: Path, *lines: str, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())
    return path


def table(path: Path, header: Sequence[str], *rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return path


def samples(out: Path) -> dict[str, dict[str, Any]]:
    """What the tars of a pack hold: the name in the source -> the sample's JSON, with its split."""
    found: dict[str, dict[str, Any]] = {}
    for tar in sorted(out.rglob("*.tar")):
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".json"):
                    content = json.load(members.extractfile(member))  # type: ignore[arg-type]
                    for name in ("attributes", "persons", "label_distribution"):
                        content[name] = json.loads(content[name])
                    content["captions"] = [caption for caption in content["captions"] if caption]
                    split = "" if tar.parent == out else tar.parent.name
                    assert content["source"] not in found
                    found[content["source"]] = {**content, "split": split}
    return found


# ---- the seven


@published("UnBiasedEmo")
def unbiased_emo(root: Path) -> None:
    for label in ("anger", "fear", "joy", "love", "sadness", "surprise"):
        for source in ("bing", "google"):
            jpegs(root, *(f"images/{label}/{source}/{i}.jpg" for i in range(10)))
    text(root / "README.txt", "UnBiasedEmo")


@published("HECO")
def heco(root: Path) -> None:
    columns = "Image,xmin,ymin,xmax,ymax,Category,Label_SA,Label_CA,Valence,Arousal,Dominance"
    for i in range(1, 5):
        jpeg(root / f"Data/HECO_{i:04d}.png", format="PNG")
    table(
        root / "Labels/HECO_Labels.csv",
        columns.split(","),
        ["HECO_0001.png", 0, 0, 12.0000001, 16, "Peace", "Extremely-Sa", "Mildly-Ca", 6, 3, 5],
        ["HECO_0001.png", 12, 8, 48, 32, "Happinesst", "Neutral", "Highly-Ca", 8, 6, 5],
        ["HECO_0002.png", 6, 8, 60, 40, "Anger", "SlightlyN-Sa", "Neutral", 2, 8, 10],
        ["HECO_0003.png", 0, 0, 24, 32, "Fear", "Neutral", "Neutral", 3, 7, 2],
        ["HECO_0003.png", 24, 0, 48, 32, "Fear", "Neutral", "Neutral", 2, 8, 1],
        ["HECO_0004.png", 0, 0, 24, 32, "Sadness", "Neutral", "Neutral", 11, 4, 3],
    )


@published("CAER-S")
def caer_s(root: Path) -> None:
    for label in ("Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"):
        jpegs(root, *(f"train/{label}/{i:04d}.png" for i in range(1, 3)))
        jpegs(root, *(f"test/{label}/{i:04d}.png" for i in range(1, 4)))


@published("Emotion6")
def emotion6(root: Path) -> None:
    labels = ("anger", "disgust", "fear", "joy", "sadness", "surprise")
    probabilities = "\t".join(f"[prob. {label}]" for label in (*labels, "neutral"))
    rows = []
    for number, label in enumerate(labels):
        for i in range(1, 11):
            jpegs(root, f"images/{label}/{i}.jpg")
            shares = [0.0] * 7
            shares[number], shares[6] = 0.733333, 0.266667
            if (label, i) == ("joy", 3):
                shares[number], shares[0] = 0.4, 0.333333
            rows.append(
                "\t".join([f"{label}/{i}.jpg", f"{number + 1.5}", "4.2", *(f"{s:g}" for s in shares)])
            )
    text(
        root / "ground_truth.txt",
        f"[image_filename]\t[valence]\t[arousal]\t{probabilities}",
        *rows,
        end="\r\n",
    )
