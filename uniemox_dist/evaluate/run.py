"""Opens a release, its teacher and two splits, runs the protocol, and prints its table."""

from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import write_json
from uniemox_dist.data.loader import view_settings
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.evaluate import features, protocol
from uniemox_dist.models.student import Student
from uniemox_dist.release.format import read_release
from uniemox_dist.release.load import load_pretrained
from uniemox_dist.teacher.model import Teacher


def run(
    release: Path,
    train: Path,
    test: Path,
    *,
    teacher_name: str | None,
    group_by: str | None,
    valence: str,
    scores_file: Path | None = None,
) -> dict[str, Any]:
    """The protocol on a release; the result is what evaluation.json holds.

    Args:
        scores_file: gets the scores of every held-out picture, for intervals over several releases.

    Raises:
        UserError: for a release without a teacher, another teacher than it was trained with, or missing data.
    """
    facts = read_release(release, verify=True)
    config = Config.model_validate(facts["config"])
    if facts["teacher"] is None:
        raise UserError(f"RELEASE={release}: was trained without a teacher, which the protocol compares with")
    readers = {
        name: ShardReader.from_folder(path, "DATA") for name, path in (("train", train), ("test", test))
    }
    wanted = (
        config.teacher if teacher_name is None else config.teacher.model_copy(update={"name": teacher_name})
    )
    teacher = Teacher(wanted.model_copy(update={"compile": False}))  # compiling takes longer than this
    if teacher.identity["weights_sha256"] != facts["teacher"]["weights_sha256"]:
        raise UserError(f"--teacher={wanted.name}: is not the teacher of {release}: its weights differ")
    student = load_pretrained(release)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)  # the very weights that the run began with
        untrained = Student(config.model, config.loss, facts["embedding_width"]).eval()
    students = {protocol.STUDENT: student, protocol.UNTRAINED: untrained}
    settings = view_settings(config)
    found = {}
    with tqdm(
        total=sum(r.manifest.samples for r in readers.values()),
        desc="embedding",
        unit=" pictures",
        disable=None,
    ) as bar:
        for name, reader in readers.items():
            found[name] = features.compute(
                reader, students, teacher, settings, group_by=group_by, valence=valence, progress=bar.update
            )
    metrics = protocol.measure(found["train"], found["test"], student, untrained, config.run.seed)
    if scores_file is not None:
        about = {"format": "uniemox-scores", "format_version": 1, "release": str(release)}
        write_json(scores_file, {**about, "metrics": protocol.scores(metrics)})
    return {
        "format": "uniemox-evaluation",
        "format_version": 1,
        "release": str(release),
        "step": facts["step"],
        "data": {
            name: {"path": str(r.folder), "identity": r.manifest.identity, "samples": r.manifest.samples}
            for name, r in readers.items()
        },
        "bootstrap": {"resamples": 1000, "unit": group_by or "picture", "confidence": 0.95},
        **protocol.evaluate(metrics),
    }


def print_table(result: dict[str, Any]) -> None:
    """The table and the verdict, for a terminal."""
    order = [protocol.STUDENT, protocol.UNTRAINED, protocol.TEACHER, *protocol.TRIVIAL]
    for metric in result["metrics"]:
        kind = "" if metric["primary"] else ", secondary"
        click.echo(f"\n{metric['title']} ({metric['better']} is better{kind}): {metric['note']}")
        place = {name: i for i, name in enumerate(order)}
        for row in sorted(metric["rows"], key=lambda r: place.get(r["row"], len(place))):
            click.echo(f"  {row['row']:24s} {row['value']:7.4f}   [{row['low']:.4f}, {row['high']:.4f}]")
    click.echo("")
    for sentence in result["verdict"]:
        click.echo(sentence)
