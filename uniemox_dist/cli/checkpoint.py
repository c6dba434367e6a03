"""`uniemox checkpoint`: list, verify and prune the checkpoints of a run. Torch-free."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uniemox_dist.cli.inputs import Checked
from uniemox_dist.cli.one_run import RunPath, count_bytes, find_checkpoints, hold_lock, list_requested, remove

if TYPE_CHECKING:
    from uniemox_dist.checkpoints.folders import Checkpoint

RUN = click.argument("run", type=RunPath())
KEEP_LAST = click.option(
    "--keep-last",
    type=click.IntRange(1),
    help="Complete checkpoints to keep; default from the run's config.yaml.",
)
KEEP_EVERY = click.option(
    "--keep-every",
    type=click.IntRange(0),
    help="Also keep steps that are multiples of this; 0: none. Default from the run's config.yaml.",
)


@click.group()
def checkpoint() -> None:
    """List, verify and prune a run's checkpoints."""


@checkpoint.command("list")
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(run: Path, as_json: bool) -> None:
    """List the checkpoints of RUN (a run's folder): complete, damaged, set aside and unfinished.

    A checkpoint that lacks a file or an entry, or has a file of another size, is damaged; `verify` also reads files.

    The last column shows whether retention keeps a checkpoint; the run deletes the others at its next save.
    """
    from datetime import datetime

    from uniemox_dist.checkpoints import folders
    from uniemox_dist.checkpoints.retention import choose_policy, list_superfluous
    from uniemox_dist.checkpoints.verify import Unread, examine
    from uniemox_dist.cli.tables import columns
    from uniemox_dist.core.formatting import counted, size

    place = find_checkpoints(run)
    complete = folders.list_complete_checkpoints(place)
    keep_last, keep_every = choose_policy(run / "config.yaml")
    doomed = set(list_superfluous([c.step for c in complete], keep_last, keep_every))
    facts = [_facts(c, kept=c.step not in doomed) for c in complete]
    damaged = {c.folder.name: problem for c in complete if (problem := c.problem(hashes=False)) is not None}
    for fact in facts:
        if fact["name"] in damaged:
            fact["problem"] = damaged[fact["name"]]
    others: dict[str, list[Path]] = {
        "set_aside": folders.list_damaged(place),
        "incomplete": folders.list_incomplete(place),
        "unfinished": folders.list_unfinished(place),
    }
    left: dict[str, list[dict[str, Any]]] = {
        kind: [{"name": p.name, "bytes": _bytes_of_files(p)} for p in some] for kind, some in others.items()
    }
    for about, path in zip(left["incomplete"], others["incomplete"], strict=True):
        seen = examine(path)
        if isinstance(seen, Unread):
            about |= {"kind": seen.kind, "problem": seen.problem}
    if as_json:
        kept = {"keep_last": keep_last, "keep_every": keep_every}
        click.echo(
            json.dumps({"run": str(run), **kept, "checkpoints": facts, **left}, indent=2, ensure_ascii=False)
        )
        return
    rows = [
        [
            f"{f['step']:,}",
            f"{f['slots']:,}" if f["slots"] is not None else "–",
            datetime.fromtimestamp(f["time"]).strftime("%Y-%m-%d %H:%M") if f["time"] is not None else "–",
            str(f["ranks"]),
            str(f["zero_stage"]),
            str(f["precision"]),
            str(f["files"]),
            size(f["bytes"]),
            "keeps" if f["kept"] else "would delete",
        ]
        for f in facts
    ]
    head = ("step", "slots", "saved", "ranks", "ZeRO", "precision", "files", "size", "retention")
    for line in columns(head, rows, left=("saved", "precision", "retention")):
        click.echo(line)
    for name, problem in damaged.items():
        click.echo(f"{name}: DAMAGED: {problem}")
    words = {
        "set_aside": "set aside as damaged",
        "incomplete": "incomplete",
        "unfinished": "unfinished, or being written just now",
    }
    for kind, said in words.items():
        for found in left[kind]:
            why = f"{found['kind']}: {found['problem']}" if "kind" in found else said
            click.echo(f"{found['name']} ({size(found['bytes'])}): {why}")
    every = f" and every multiple of {keep_every:,}" if keep_every else ""
    intact = [f for f in facts if f["name"] not in damaged]
    total = size(sum(f["bytes"] for f in intact))
    click.echo(
        f"{counted(len(intact), 'complete checkpoint')}, {total}; retention keeps the last {keep_last}{every}"
    )


@checkpoint.command(
    "verify",
    cls=Checked,
    check=lambda context: list_requested(context.params["run"], context.params["step"]) and None,
)
@RUN
@click.option("--step", type=click.IntRange(0), help="Only the checkpoint of this step.")
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one per core, at most 8.")
def verify_command(run: Path, step: int | None, workers: int | None) -> int:
    """Compare size and SHA-256 of every file of RUN's checkpoints, or of one checkpoint's folder, with those saved.

    RUN may also be a checkpoint that was set aside. Exit code 1 if any is damaged, or all are incomplete.
    """
    from tqdm import tqdm

    from uniemox_dist.checkpoints.verify import Unread, verify
    from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT
    from uniemox_dist.core.formatting import counted, size

    seen = list_requested(run, step)
    chosen = [one for one in seen if not isinstance(one, Unread)]
    unread = [one for one in seen if isinstance(one, Unread)]
    incomplete = [one for one in unread if one.kind == "incomplete"]
    damaged = len(unread) - len(incomplete)
    with tqdm(
        total=sum(c.bytes for c in chosen),
        unit="B",
        unit_scale=True,
        desc="verifying",
        disable=None,
        leave=False,
    ) as bar:
        for verdict in verify(chosen, workers=workers or min(8, os.cpu_count() or 1), read=bar.update):
            name, files = verdict.checkpoint.folder.name, verdict.checkpoint.info["files"]
            if verdict.gone:
                tqdm.write(f"{name}: deleted meanwhile by the run's retention")
                continue
            damaged += bool(verdict.problems)
            state = f"DAMAGED: {'; '.join(verdict.problems)}" if verdict.problems else "sound"
            tqdm.write(f"{name}: {counted(len(files), 'file')}, {size(verdict.checkpoint.bytes)}, {state}")
    for one in unread:
        word = {"incomplete": "incomplete", "damaged": "DAMAGED"}.get(one.kind, "not read")
        click.echo(f"{one.folder.name}: {word}: {one.problem}")
    if damaged:
        count = len(seen) - len(incomplete)
        click.echo(f"{damaged} of {counted(count, 'checkpoint')} damaged: a resumed run skips them")
    # An unfinished save is not an error if at least one complete checkpoint was checked.
    return EXIT_FAULT if damaged or not chosen else EXIT_DONE


@checkpoint.command("prune")
@RUN
@KEEP_LAST
@KEEP_EVERY
@click.option("--damaged", is_flag=True, help="Delete what was set aside as damaged, or is incomplete, too.")
@click.option("--dry-run", is_flag=True, help="Only print what would be deleted.")
def prune_command(
    run: Path, keep_last: int | None, keep_every: int | None, damaged: bool, dry_run: bool
) -> None:
    """Delete the checkpoints of RUN (a run's folder) that retention does not keep, and the remains of killed saves.

    The newest complete checkpoint always stays, and nothing is deleted unless all its files are intact. The last
    checkpoints are verified first, and damaged ones do not count among those to keep. The command refuses a run that
    is training, because that run prunes its own checkpoints.
    """
    from uniemox_dist.checkpoints import folders
    from uniemox_dist.checkpoints.retention import choose_policy
    from uniemox_dist.checkpoints.verify import Unread, examine, list_superseded
    from uniemox_dist.core.formatting import counted, size

    place = find_checkpoints(run)
    with hold_lock(run, only_look=dry_run):
        complete = folders.list_complete_checkpoints(place)
        aside: list[Path] = []
        if damaged:
            unread = [one for one in map(examine, folders.list_incomplete(place)) if isinstance(one, Unread)]
            # Folders of a newer version, or on a disk that does not answer, may be intact.
            lost = [one.folder for one in unread if one.kind in ("incomplete", "damaged")]
            aside = folders.list_damaged(place) + lost
        kept = choose_policy(run / "config.yaml", keep_last, keep_every)
        old, broken = list_superseded(place, complete, *kept, aside)
        for one, problem in broken:
            click.echo(f"{one.folder.name} is damaged and does not count as kept: {problem}")
        left = folders.list_unfinished(place)
        freed = 0
        for path in (*old, *aside, *left):
            count, link = count_bytes(path), path.is_symlink()
            if not dry_run:
                remove(path, seen=path not in left)
            freed += count
            said = "a link; its target stays" if link else size(count)
            click.echo(f"{'would delete' if dry_run else 'deleted'} {path.name} ({said})")
    stay = counted(len(complete) - len(old), "complete checkpoint")
    would = "would be freed" if dry_run else "freed"
    click.echo(
        f"{size(freed)} {would} ({len(old)} old, {len(aside)} set aside or incomplete, {len(left)} unfinished); "
        f"{stay} kept"
    )


def _bytes_of_files(folder: Path) -> int:
    """Size of a checkpoint's files, without complete.json, as for complete checkpoints."""
    from uniemox_dist.checkpoints.folders import COMPLETE

    own = folder / COMPLETE
    return count_bytes(folder) - (own.stat().st_size if own.is_file() and not folder.is_symlink() else 0)


def _facts(found: "Checkpoint", *, kept: bool) -> dict[str, Any]:
    from uniemox_dist.runs.status import read_saved_time

    info = found.info
    time = read_saved_time(info, found.completed)
    return {
        "name": found.folder.name,
        "step": found.step,
        "slots": info.get("slots"),
        "time": None if time is None else round(time, 3),
        "ranks": info.get("world_size"),
        "zero_stage": info.get("zero_stage"),
        "precision": info.get("precision"),
        "files": len(info["files"]),
        "bytes": found.bytes,
        "kept": kept,
    }
