"""`uniemox evaluate knn|probe|distribution|regress|zeroshot|retrieval`: opens a release and the splits of a data set,
runs one task, and prints its table.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from matplotlib.figure import Figure

from uniemox_dist.config.finetune import DISTRIBUTION_TITLES
from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate import tasks
from uniemox_dist.evaluate.embedding_pass import embed_splits
from uniemox_dist.evaluate.inputs import TIMM_PREFIX, check_group_attribute, open_splits
from uniemox_dist.evaluate.intervals import RESAMPLES
from uniemox_dist.evaluate.subject import BASELINES, RELEASE, ReleaseSubject, TimmSubject
from uniemox_dist.teacher.model import Teacher

LEARNING = ("knn", "probe", "distribution", "regress")
"""Tasks that learn from a training split."""
MOST_NUMBERS = 20
"""Largest number of classes for which the cells of a confusion matrix show their counts."""


def parse_baselines(text: str) -> tuple[str, ...]:
    """The rows that `--baselines` names.

    Raises:
        UserError: for one that does not exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in BASELINES:
            raise UserError(f"--baselines={name}: is not a baseline; give some of {', '.join(BASELINES)}")
    return names


def measure(
    task: str,
    release: Path | str,
    data: str,
    *,
    splits: dict[str, str | None],
    baselines: tuple[str, ...] = (),
    teacher_name: str | None = None,
    group_by: str | None = None,
    templates: Sequence[str] = (),
    labels: Sequence[str] = (),
    attributes: Sequence[str] = (),
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """Runs one task on a release, or (one of LEARNING) on an encoder `timm:NAME=FILE`. Returns the result that
    `--json` writes.

    Args:
        splits: folder of each role (train, val, test). None means the folder of that name; for val it means no
        validation split.
        labels: classes of zero-shot; by default those of the test split.
        attributes: numbers that regression predicts; by default valence, arousal and dominance, if samples have them.

    Raises:
        UserError: if the release, splits, baselines or labels do not suit the task.
    """
    learns = task in LEARNING
    readers = open_splits(data, splits, ("train", "val", "test") if learns else ("test",))
    check_group_attribute(readers, group_by)
    teacher: Teacher | None = None
    if str(release).startswith(TIMM_PREFIX):
        if not learns:
            raise UserError(f"{release}: cannot be compared with texts; use {', '.join(LEARNING)}")
        timm_subject = TimmSubject(str(release), baselines, device=device)
        settings, facts = timm_subject.settings, timm_subject.facts
        found = embed_splits(
            readers, settings, lambda _, b: timm_subject.embed(b), group_by=group_by, workers=workers
        )
    else:
        subject = ReleaseSubject(
            Path(release), baselines, teacher_name=teacher_name, with_teacher=not learns, device=device
        )
        if not learns:
            subject.check_space()
        facts, teacher = subject.facts, subject.teacher
        found = embed_splits(
            readers,
            subject.settings,
            lambda _, batch: subject.embed(batch, features=learns, in_space=not learns),
            group_by=group_by,
            workers=workers,
        )
    test = found["test"]
    if task == "knn":
        result = tasks.knn(found["train"], found.get("val"), test)
    elif task == "probe":
        result = tasks.probe(found["train"], found.get("val"), test)
    elif task == "distribution":
        result = tasks.distribution(found["train"], found.get("val"), test)
    elif task == "regress":
        result = tasks.regress(found["train"], test, attributes)
    elif task == "zeroshot":
        assert teacher is not None
        names = list(labels) or sorted({str(label) for label in test.labels if label is not None})
        result = tasks.zeroshot(test, teacher, names, templates or tasks.TEMPLATES)
    else:
        assert teacher is not None
        result = tasks.retrieval(test, teacher)
    return {
        "format": f"uniemox-{task}",
        "format_version": 1,
        "release": str(release),
        "step": facts["step"],
        "data": {role: split.facts for role, split in found.items()},
        "bootstrap": {"resamples": RESAMPLES, "unit": group_by or "picture", "confidence": 0.95},
        **result,
    }


def list_remarks(result: dict[str, Any]) -> list[str]:
    """Warnings about a result: classes that the test split lacks."""
    warnings = []
    if "classes" in result["rows"][RELEASE]:
        classes = result["rows"][RELEASE]["classes"]
        missing = [row["label"] for row in classes if not row["support"]]
        if missing:
            warnings.append(
                f"the test split has no sample of {', '.join(missing)}: left out of averages over classes"
            )
    return warnings


def print_result(result: dict[str, Any]) -> None:
    """Prints the table of a task."""
    rows = result["rows"]
    if "attributes" in result:
        _print_regression(rows)
        return
    if "chebyshev" in rows[RELEASE]:
        _print_distributions(rows)
        return
    if "labels" not in result:
        click.echo(f"{result['pictures']:,} pictures, {result['texts']:,} different captions")
        click.echo(f"  {'':18s} {'picture to caption':>24s}   {'caption to picture':>24s}")
        for row, both in rows.items():
            for k in (1, 5, 10):
                cells = (both[way][f"R@{k}"] for way in ("image_to_text", "text_to_image"))
                text = "   ".join(f"{c['value']:7.4f} [{c['low']:.4f}, {c['high']:.4f}]" for c in cells)
                click.echo(f"  {row + f' R@{k}':18s} {text}")
        return
    click.echo(f"{'':20s} {'accuracy':>8s}   95 % interval     macro F1   mean recall")
    for row, found in rows.items():
        chosen = "".join(f"   {what}={found[what]:g}" for what in ("k", "penalty") if what in found)
        click.echo(
            f"{row:20s} {found['accuracy']:8.4f}   [{found['low']:.4f}, {found['high']:.4f}]   "
            f"{found['macro_f1']:8.4f}   {found['mean_recall']:11.4f}{chosen}"
        )
    click.echo(f"\n{'class':24s} precision   recall       F1   support")
    for c in rows[RELEASE]["classes"]:
        recall, f1 = (f"{c[k]:8.4f}" if c[k] is not None else f"{'–':>8s}" for k in ("recall", "f1"))
        click.echo(f"{c['label'][:24]:24s} {c['precision']:9.4f} {recall} {f1} {c['support']:9,}")


def _print_distributions(rows: dict[str, Any]) -> None:
    """Each measure of all rows, so that rows can be compared; then the labels of the release."""
    for name, (title, better) in DISTRIBUTION_TITLES.items():
        click.echo(f"{title} ({better} is better)")
        for row, found in rows.items():
            low, high = found[f"{name}_interval"]
            is_chosen_by = name == "kl_divergence" and "penalty" in found
            chosen = f"   penalty={found['penalty']:g}" if is_chosen_by else ""
            click.echo(f"  {row:20s} {found[name]:8.4f}   [{low:.4f}, {high:.4f}]{chosen}")
    click.echo(f"\n{'label':24s} mean share   mean estimate   largest in")
    for found in rows[RELEASE]["per_class"]:
        shares = f"{found['mean_share']:10.4f} {found['mean_estimate']:15.4f}"
        click.echo(f"{found['label'][:24]:24s} {shares} {found['samples']:12,}")


def _print_regression(rows: dict[str, Any]) -> None:
    click.echo(
        f"{'':20s} {'':12s} {'samples':>8s}   {'mean error':>24s}   {'correlation':>24s}   {'CCC':>24s}"
    )
    for row, found in rows.items():
        for measured in found["dimensions"]:
            cells = []
            for name in ("mean_absolute_error", "correlation", "ccc"):
                value, interval = measured[name], measured[f"{name}_interval"]
                shown = "–" if value is None else f"{value:7.4f} [{interval[0]:.4f}, {interval[1]:.4f}]"
                cells.append(f"{shown:>24s}")
            name = measured["dimension"][:12]
            click.echo(f"{row:20s} {name:12s} {measured['samples']:8,}   {'   '.join(cells)}")


def write_confusion(result: dict[str, Any], path: Path) -> None:
    """Writes the release's confusion matrix as a PNG."""
    row = result["rows"][RELEASE]
    title = f"{result['format'].removeprefix('uniemox-')}, accuracy {row['accuracy']:.3f}"
    draw_confusion(np.array(row["confusion"]), result["labels"], title, path)


def draw_confusion(counts_CC: np.ndarray, names: Sequence[str], title: str, path: Path) -> None:
    """Draws counts C×C as a PNG: rows are true classes, columns are answers, colours are shares of a row."""
    counts = np.asarray(counts_CC)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = 2.2 + 0.5 * len(names)
    figure = Figure(figsize=(side + 0.9, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    axes.set_title(title, fontsize=10)
    if len(names) <= MOST_NUMBERS:
        for (i, j), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[i, j] > 0.55 else "black"
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.7)
    figure.savefig(path, metadata={"Software": None})
