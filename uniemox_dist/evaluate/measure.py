"""Opens a release and the splits of a data set, runs one of the four tasks, and prints its table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
from tqdm import tqdm

from shards.format.manifest import MANIFEST
from shards.storage import place
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate import tasks
from uniemox_dist.evaluate.charts import draw_confusion
from uniemox_dist.evaluate.timm_subject import PREFIX, TimmSubject
from uniemox_dist.evaluate.vectors import BASELINES, RELEASE, Embed, Subject, Vectors, embed_split
from uniemox_dist.teacher.model import Teacher

LEARNING = ("knn", "probe")
"""Tasks that learn from a training split."""


def splits_of(data: str, names: dict[str, str | None], wanted: Sequence[str]) -> dict[str, ShardReader]:
    """The splits of a data set by role (train, val, test): DATA/NAME; or DATA itself as test, if it is one data set.

    Raises:
        UserError: naming what is not there; a val split may be missing where none was named.
    """
    base = place(data, "DATA")
    if (base / MANIFEST).is_file():
        if "train" in wanted:
            raise UserError(
                f"DATA={data}: is one data set; give the folder that holds train/ and test/ (`uniemox shards split` "
                "makes them)"
            )
        return {"test": ShardReader.from_folder(data, "DATA")}
    found: dict[str, ShardReader] = {}
    for role in wanted:
        folder = base / (names[role] or role)
        if role == "val" and names[role] is None and not (folder / MANIFEST).is_file():
            continue
        found[role] = ShardReader.from_folder(str(folder), "DATA")
    for role, reader in found.items():
        if role != "test" and reader.manifest.identity == found["test"].manifest.identity:
            raise UserError(
                f"DATA={data}: {role} and test are the same data set ({reader.manifest.identity[:12]}); "
                "what is learned or chosen on it cannot be tested on it"
            )
    return found


def baselines_of(text: str) -> tuple[str, ...]:
    """The rows that `--baselines` names.

    Raises:
        UserError: for one that does not exist.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in BASELINES:
            raise UserError(f"--baselines={name}: is none; give some of {', '.join(BASELINES)}")
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
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, Any]:
    """One task on a release, or (k-NN and probe) on an encoder `timm:NAME=FILE`; the result is what `--json` writes.

    Raises:
        UserError: for what the user can mend: releases, splits and labels that do not fit.
    """
    readers = splits_of(data, splits, ("train", "val", "test") if task in LEARNING else ("test",))
    teacher: Teacher | None = None
    if str(release).startswith(PREFIX):
        if task not in LEARNING:
            raise UserError(f"{release}: has no space that texts are in; use knn or probe")
        settings, facts, rows = _timm(str(release), baselines, device)
    else:
        with_teacher = task not in LEARNING
        subject = Subject(
            Path(release), baselines, teacher_name=teacher_name, with_teacher=with_teacher, device=device
        )
        settings, facts, teacher = subject.settings, subject.facts, subject.teacher
        rows = subject.features() if task in LEARNING else subject.in_space()
    total = sum(reader.manifest.samples for reader in readers.values())
    with tqdm(total=total, desc="embedding", unit=" pictures", disable=None) as bar:
        found = {
            role: embed_split(reader, settings, rows, group_by=group_by, progress=bar.update, workers=workers)
            for role, reader in readers.items()
        }
    test = found["test"]
    if task == "knn":
        result = tasks.knn(found["train"], found.get("val"), test)
    elif task == "probe":
        result = tasks.probe(found["train"], found.get("val"), test)
    elif task == "zeroshot":
        assert teacher is not None
        names = list(labels) or sorted({str(label) for label in test.labels if label is not None})
        if test.labels.count(None):
            raise UserError(
                f"DATA={test.path}: {test.labels.count(None)} of {len(test)} samples have no label"
            )
        result = tasks.zeroshot(test, teacher, names, templates or tasks.TEMPLATES)
    else:
        assert teacher is not None
        result = tasks.retrieval(test, teacher)
    return {
        "format": f"uniemox-{task}",
        "format_version": 1,
        "release": str(release),
        "step": facts["step"],
        "data": {role: _about(split) for role, split in found.items()},
        "bootstrap": {"resamples": 1000, "unit": group_by or "picture", "confidence": 0.95},
        **result,
    }


def _timm(
    text: str, baselines: tuple[str, ...], device: str
) -> tuple[ViewSettings, dict[str, Any], dict[str, Embed]]:
    subject = TimmSubject(text, baselines, device)
    return subject.settings, subject.facts, subject.features()


def remarks(result: dict[str, Any]) -> list[str]:
    """What a reader of the figures should know."""
    told = []
    if "labels" in result:
        classes = result["rows"][RELEASE]["classes"]
        missing = [row["label"] for row in classes if not row["support"]]
        if missing:
            told.append(
                f"the test split has no sample of {', '.join(missing)}: left out of averages over classes"
            )
    return told


def print_result(result: dict[str, Any]) -> None:
    """The table of a task, for a terminal."""
    rows = result["rows"]
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


def write_confusion(result: dict[str, Any], path: Path) -> None:
    """The release's confusion matrix as a PNG."""
    row = result["rows"][RELEASE]
    title = f"{result['format'].removeprefix('uniemox-')}, accuracy {row['accuracy']:.3f}"
    draw_confusion(np.array(row["confusion"]), result["labels"], title, path)


def _about(split: Vectors) -> dict[str, Any]:
    return {"path": split.path, "identity": split.identity, "samples": len(split)}
