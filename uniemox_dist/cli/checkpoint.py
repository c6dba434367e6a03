"""`uniemox checkpoint …`: what a run saved, whether it is sound, and making room. Torch-free."""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from uniemox_dist.cli.one_run import alone, checkpoints_of

if TYPE_CHECKING:
    from uniemox_dist.checkpoints.folders import Checkpoint

RUN = click.argument("run", type=click.Path(path_type=Path))
KEEP_LAST = click.option(
    "--keep-last",
    type=click.IntRange(1),
    help="Complete checkpoints kept; default from the run's config.yaml.",
)
KEEP_EVERY = click.option(
    "--keep-every",
    type=click.IntRange(0),
    help="Steps that this divides are kept for ever; 0: none. Default from the run's config.yaml.",
)


@click.group()
def checkpoint() -> None:
    """List a run's checkpoints, read every byte of them again, delete old ones."""


@checkpoint.command("list")
@RUN
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def list_command(run: Path, as_json: bool) -> None:
    """Lists the complete checkpoints of RUN (a run's folder), and what was set aside or is unfinished.

    The last column says whether retention keeps a checkpoint: the run deletes what it does not keep at its next save.
    """
    from datetime import datetime

    from uniemox_dist.checkpoints import folders
    from uniemox_dist.checkpoints.retention import policy, superfluous
    from uniemox_dist.cli.tables import columns
    from uniemox_dist.runtime.words import counted, size

    place = checkpoints_of(run)
    complete = folders.complete_checkpoints(place)
    keep_last, keep_every = policy(run / "config.yaml")
    doomed = set(superfluous([c.step for c in complete], keep_last, keep_every))
    facts = [_facts(c, kept=c.step not in doomed) for c in complete]
    others: dict[str, list[Path]] = {
        "set_aside": folders.damaged_folders(place),
        "incomplete": folders.incomplete(place),
        "unfinished": folders.unfinished(place),
    }
    left: dict[str, list[dict[str, Any]]] = {
        kind: [{"name": p.name, "bytes": folders.bytes_below(p)} for p in some]
        for kind, some in others.items()
    }
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
    words = {
        "set_aside": "set aside as damaged",
        "incomplete": "incomplete: no complete.json that this version reads",
        "unfinished": "unfinished, or being written just now",
    }
    for kind, said in words.items():
        for found in left[kind]:
            click.echo(f"{found['name']} ({size(found['bytes'])}): {said}")
    every = f", every step that {keep_every:,} divides" if keep_every else ""
    total = sum(f["bytes"] for f in facts)
    click.echo(
        f"{counted(len(facts), 'complete checkpoint')}, {size(total)}; kept are the last {keep_last}{every}"
    )


@checkpoint.command("verify")
@RUN
@click.option("--step", type=click.IntRange(0), help="Only the checkpoint of this step.")
@click.option("--workers", type=click.IntRange(1), help="Threads; default: one per core, at most 8.")
def verify_command(run: Path, step: int | None, workers: int | None) -> int:
    """Compares size and SHA-256 of every file of RUN's checkpoints (or of one checkpoint's folder) with what was saved.

    Exit code 1 if any is damaged.
    """
    from tqdm import tqdm

    from uniemox_dist.checkpoints.folders import COMPLETE, complete_checkpoints, incomplete, read_checkpoint
    from uniemox_dist.checkpoints.verify import verify
    from uniemox_dist.runtime.errors import EXIT_DONE, EXIT_FAULT, UserError
    from uniemox_dist.runtime.words import counted, size

    if (run / COMPLETE).is_file():
        one = read_checkpoint(run)
        chosen, broken = ([one], []) if one is not None else ([], [run])
        if step is not None and one is not None and one.step != step:
            raise UserError(
                f"--step={step}: RUN={run} is the checkpoint of step {one.step}; leave --step out"
            )
    else:
        place = checkpoints_of(run)
        chosen, broken = list(complete_checkpoints(place)), incomplete(place)
        if step is not None:
            steps = ", ".join(str(c.step) for c in chosen) or "none"
            chosen = [c for c in chosen if c.step == step]
            broken = [p for p in broken if int(p.name.removeprefix("step_")) == step]
            if not chosen and not broken:
                raise UserError(
                    f"--step={step}: {run} has no complete checkpoint of that step; it has {steps}"
                )
    if not chosen and not broken:
        raise UserError(f"RUN={run}: has no complete checkpoint; let the run save one first")
    damaged = len(broken)
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
    for path in broken:
        click.echo(f"{path.name}: DAMAGED: {path / COMPLETE} is missing, damaged, or of a newer version")
    if damaged:
        count = len(chosen) + len(broken)
        click.echo(f"{damaged} of {counted(count, 'checkpoint')} damaged: a resumed run passes over them")
    return EXIT_FAULT if damaged else EXIT_DONE


@checkpoint.command("prune")
@RUN
@KEEP_LAST
@KEEP_EVERY
@click.option("--damaged", is_flag=True, help="Delete what was set aside as damaged, too.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
def prune_command(
    run: Path, keep_last: int | None, keep_every: int | None, damaged: bool, dry_run: bool
) -> None:
    """Deletes the checkpoints of RUN (a run's folder) that retention does not keep, and what killed saves left.

    The newest complete checkpoint always stays, and nothing is deleted unless every byte of it is sound. A run that
    trains does this by itself: then the command refuses.
    """
    from uniemox_dist.checkpoints import folders
    from uniemox_dist.checkpoints.retention import policy, superfluous
    from uniemox_dist.runtime.errors import Fault
    from uniemox_dist.runtime.files import remove_dir
    from uniemox_dist.runtime.words import counted, size

    place = checkpoints_of(run)
    with alone(run, only_look=dry_run):
        complete = folders.complete_checkpoints(place)
        steps = set(
            superfluous([c.step for c in complete], *policy(run / "config.yaml", keep_last, keep_every))
        )
        old = [c.folder for c in complete if c.step in steps]
        aside = folders.damaged_folders(place) if damaged else []
        if old or aside:  # what these could still be good for, the newest must be able to replace
            if not complete:
                raise Fault(
                    f"{place}: no complete checkpoint could replace {aside[0].name}; nothing was deleted"
                )
            problem = complete[-1].problem(hashes=True)
            if problem is not None:
                raise Fault(
                    f"the newest checkpoint is damaged ({problem}); nothing was deleted: start the run again, which "
                    f"passes over it, or delete {complete[-1].folder} by hand"
                )
        left = folders.unfinished(place)
        freed = 0
        for path in (*old, *aside, *left):
            count = folders.bytes_below(path)
            if not dry_run:
                # Readers must not see a checkpoint in part; nobody reads what is unfinished.
                (shutil.rmtree if path in left else remove_dir)(path)
            freed += count
            click.echo(f"{'would delete' if dry_run else 'deleted'} {path.name} ({size(count)})")
    kept = counted(len(complete) - len(old), "complete checkpoint")
    would = "would be freed" if dry_run else "freed"
    click.echo(
        f"{size(freed)} {would} ({len(old)} old, {len(aside)} set aside, {len(left)} unfinished); {kept} kept"
    )


def _facts(found: "Checkpoint", *, kept: bool) -> dict[str, Any]:
    info = found.info
    time = found.completed
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
