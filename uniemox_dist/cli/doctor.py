"""`uniemox doctor`."""

import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, UserError, install_command
from uniemox_dist.core.files import require_local

if TYPE_CHECKING:
    from uniemox_dist.distributed.world import World
    from uniemox_dist.doctor.findings import Finding
    from uniemox_dist.doctor.subject import Subject

MEETING_S = 120
"""Seconds that a rank waits for the others to connect, and for each collective operation."""
DEFAULT_FOLDER = "runs"


@click.command()
@click.argument("recipe", nargs=-1, metavar="[RECIPE [KEY=VALUE]...]")
@click.option("--run-dir", metavar="DIR", help="Run folder; otherwise the recipe's, or runs.")
@click.option("--data", multiple=True, metavar="DIR", help="Shards; otherwise the recipe's. Repeatable.")
@click.option("--nproc", type=click.IntRange(1), help="Start this many ranks on this machine.")
@click.option("--short", is_flag=True, help="Only what pretraining checks before it starts.")
@click.option("--json", "json_file", metavar="FILE", help="Write the findings there too.")
def doctor(
    recipe: tuple[str, ...],
    run_dir: str | None,
    data: tuple[str, ...],
    nproc: int | None,
    short: bool,
    json_file: str | None,
) -> int:
    """Check this node, or all ranks of an allocation, for problems that would stop or slow a run.

    With RECIPE and KEY=VALUE pairs as for pretrain it also checks that run's folder, shards, teacher and initial
    weights. Inside srun or torchrun this is one rank of many; with --nproc it starts the ranks of this machine. Each
    line has ok, warn or fail, the measurement, and the fix. Exit code 1 if any check fails.
    """
    from uniemox_dist.distributed.world import World

    if short and data:
        raise UserError(f"--data={data[0]}: --short does not check shards; leave one of them out")
    run_dir = None if run_dir is None else require_local(run_dir, "--run-dir")
    json_file = None if json_file is None else require_local(json_file, "--json")
    subject = _subject(recipe, run_dir, data)
    if json_file is not None and not Path(json_file).absolute().parent.is_dir():
        raise UserError(f"--json={json_file}: no such folder; make {Path(json_file).parent} first")
    if json_file is not None and (not json_file or Path(json_file).is_dir()):
        raise UserError(
            f"--json={json_file}: is a folder; give a file, such as {Path(json_file) / 'doctor.json'}"
        )
    with_torch = find_spec("torch") is not None
    world = World.from_env()
    if nproc is not None and nproc > 1 and world.size == 1 and with_torch:
        import torch

        from uniemox_dist.distributed.local_launcher import run_ranks

        command = [sys.executable, "-m", "uniemox_dist.cli", "doctor", *recipe]
        command += ["--run-dir", run_dir] if run_dir is not None else []
        command += [word for path in data for word in ("--data", path)]
        command += ["--short"] if short else []
        command += ["--json", json_file] if json_file is not None else []
        return run_ranks(command, nproc, gpus=torch.cuda.is_available())
    try:
        found = _examine(subject, world, short=short, with_torch=with_torch)
    finally:
        if with_torch:
            from uniemox_dist.distributed import collectives

            collectives.close()
    return _end(found, world, json_file)


def _subject(recipe: Sequence[str], run_dir: str | None, data: Sequence[str]) -> "Subject":
    """Returns what the doctor checks.

    Raises:
        UserError: for every mistake of a recipe, or pairs without one.
    """
    from uniemox_dist.config.finetune import FinetuneRun
    from uniemox_dist.config.load import load_config
    from uniemox_dist.doctor.subject import Subject

    folder = Path(run_dir) if run_dir is not None else None
    if not recipe:
        return Subject(folder or Path(DEFAULT_FOLDER), tuple(("--data", path) for path in data))
    if "=" in recipe[0]:
        raise UserError(f"{recipe[0]}: KEY=VALUE pairs come on top of a RECIPE; name one before them")
    config = load_config(recipe[0], recipe[1:])
    if isinstance(config, FinetuneRun):
        config = config.select_training()
    return Subject.from_config(config, folder, data)


def _examine(subject: "Subject", world: "World", *, short: bool, with_torch: bool) -> list["Finding"]:
    """Runs the checks and prints each finding at once. Rank 0 prints the findings of all ranks; any rank prints those
    of its own."""
    from uniemox_dist.doctor.all_checks import check_alone, describe_failed_meeting, examine
    from uniemox_dist.doctor.findings import Finding
    from uniemox_dist.doctor.preflight import preflight

    def say(findings: list[Finding], *, together: bool = True) -> list[Finding]:
        for finding in findings:
            if world.is_main or not (together or finding.status == "ok"):
                click.echo(finding.line())
        return findings

    found: list[Finding] = []
    device = None
    if with_torch:
        from uniemox_dist.distributed import collectives

        # Before the ranks connect: one without a device cannot, and the others would wait for it.
        if problems := check_alone(world):
            return say(problems, together=False)
        try:
            device = collectives.init(world, MEETING_S)
        except (RuntimeError, ValueError) as error:
            return say([describe_failed_meeting(error, world)], together=False)
    else:
        status: Literal["warn", "fail"] = "warn" if subject.config is None else "fail"
        fix = f"run {install_command('train')}; until then each process checks its own node only"
        found += say([Finding(status, "torch", "not installed", fix)])
    try:
        if short:
            return found + say(preflight(subject.config, world, device, subject.run_folder))
        for findings in examine(subject, world, device):
            found += say(findings, together=with_torch)
    except RuntimeError as error:
        # A collective operation failed. Measurements on one rank do not raise.
        found += say([describe_failed_meeting(error, world)], together=False)
    return found


def _end(found: Sequence["Finding"], world: "World", json_file: str | None) -> int:
    """Prints the number of findings of each kind, writes the file, and returns the exit code."""
    from uniemox_dist.core.files import write_json
    from uniemox_dist.doctor.findings import find_worst

    if world.is_main:
        kinds = ("ok", "warn", "fail")
        click.echo(", ".join(f"{sum(f.status == kind for f in found)} {kind}" for kind in kinds))
        if json_file is not None:
            facts = {
                "format": "uniemox-doctor",
                "format_version": 1,
                "time": round(time.time(), 3),
                "ranks": world.size,
                "status": find_worst(found),
                "findings": [finding.facts() for finding in found],
            }
            write_json(json_file, facts)
    return EXIT_FAULT if find_worst(found) == "fail" else EXIT_DONE
