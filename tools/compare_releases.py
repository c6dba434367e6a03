"""Compares releases and encoders of timm on several data sets by several methods; writes one table.

    python tools/compare_releases.py OUT_A OUT_B timm:vit_small_patch16_224=small.safetensors \\
        --data emoset=data/emoset --data fi=data/fi --methods knn,probe,zeroshot,retrieval --out comparison

Writes comparison.md, comparison.png and comparison.json. A cell is empty if a method does not apply: an encoder of
timm has no text embeddings.
"""

from pathlib import Path
from typing import Any

from benchmark import Parser, run_main
from matplotlib.figure import Figure
from options import local_path

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import atomic_path, write_json, write_text
from uniemox_dist.evaluate.measure import measure
from uniemox_dist.evaluate.subject import RELEASE

METHODS = ("knn", "probe", "zeroshot", "retrieval")
SPLITS: dict[str, str | None] = {"train": None, "val": None, "test": None}


def cell(result: dict[str, Any]) -> dict[str, float]:
    """The value of a task with its interval: accuracy, or R@10 from pictures to captions."""
    row = result["rows"][RELEASE]
    if "accuracy" in row:
        return {"value": row["accuracy"], "low": row["low"], "high": row["high"]}
    found: dict[str, float] = row["image_to_text"]["R@10"]
    return found


def name_of(release: str) -> str:
    """A short title for a column."""
    return (
        release.removeprefix("timm:").partition("=")[0] if release.startswith("timm:") else Path(release).name
    )


def markdown(names: list[str], rows: list[tuple[str, list[dict[str, float] | None]]]) -> str:
    """The table as Markdown; the best value of a row is bold."""
    lines = ["| data, method | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for title, cells in rows:
        best = max((c["value"] for c in cells if c), default=None)
        texts = []
        for c in cells:
            text = f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c else "–"
            texts.append(f"**{text}**" if c and c["value"] == best and len(cells) > 1 else text)
        lines.append(f"| {title} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def draw(names: list[str], rows: list[tuple[str, list[dict[str, float] | None]]], path: Path) -> None:
    """Draws values with their intervals, one group per data set and method."""
    figure = Figure(figsize=(8, 1.2 + 0.32 * len(rows) * (len(names) + 1)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        for line, (_, cells) in enumerate(rows):
            if (c := cells[number]) is not None:
                y = line * (len(names) + 1) + number
                bars = [[c["value"] - c["low"]], [c["high"] - c["value"]]]
                label = name if line == next(i for i, (_, some) in enumerate(rows) if some[number]) else None
                axes.errorbar(
                    [c["value"]], [y], xerr=bars, fmt="o", capsize=3, color=f"C{number}", label=label
                )
    centres = [line * (len(names) + 1) + (len(names) - 1) / 2 for line in range(len(rows))]
    axes.set_yticks(centres, [title for title, _ in rows])
    axes.set_ylim(len(rows) * (len(names) + 1) - 1.2, -0.8)
    axes.set_xlim(0, 1)
    axes.set_xlabel("accuracy, or R@10 of retrieval; 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(3, len(names)), frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> int:
    """Measures all releases, and writes the table."""
    parser = Parser(__doc__)
    parser.add_argument("releases", nargs="+")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=DIR")
    parser.add_argument("--methods", default="knn,probe")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=local_path, default=Path("comparison"))
    given = parser.parse_args()
    methods = [m.strip() for m in given.methods.split(",") if m.strip()]
    if unknown := [m for m in methods if m not in METHODS]:
        raise UserError(f"--methods={unknown[0]}: is not a method; give some of {', '.join(METHODS)}")
    results: dict[str, Any] = {}
    rows: list[tuple[str, list[dict[str, float] | None]]] = []
    for text in given.data:
        title, _, folder = text.rpartition("=")
        for method in methods:
            cells: list[dict[str, float] | None] = []
            for release in given.releases:
                if release.startswith("timm:") and method not in ("knn", "probe"):
                    cells.append(None)
                    continue
                found = measure(
                    method, release, folder, splits=SPLITS, group_by="family", device=given.device
                )
                results[f"{title or folder}/{method}/{release}"] = found
                cells.append(cell(found))
            rows.append((f"{title or Path(folder).name}, {method}", cells))
    names = [name_of(release) for release in given.releases]
    table = markdown(names, rows)
    print(table)
    write_text(given.out.with_suffix(".md"), table)
    write_json(given.out.with_suffix(".json"), results)
    draw(names, rows, given.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run_main(main)
