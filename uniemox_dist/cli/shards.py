"""`uniemox shards …`: index, check, describe and rearrange data sets. Torch-free."""

from pathlib import Path
from typing import Any

import click

from uniemox_dist.cli.edit import merge_command, select_command, split_command
from uniemox_dist.cli.inputs import REMOTE_FOLDER, Checked, OutputFile, OutputPlace, Tars
from uniemox_dist.cli.overlap import overlap_command
from uniemox_dist.cli.pack import (
    CHECK,
    LICENCE,
    WORKERS,
    pack_command,
)

AGAIN = "start the same command again"
WRITABLE = "give a file in a folder that can be written"


JSON = click.option("--json", "json_file", type=OutputFile(), help="Also write the results to this file.")


def _check_data_sets(context: click.Context) -> None:
    from shards.inspect.verify import find_data_sets

    find_data_sets(context.params["folder"])


def _check_tars(context: click.Context) -> None:
    from shards.edit.index_members import find_members
    from shards.edit.index_tars import find_tars
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.core.files import require_local

    given = context.params
    if given["members"]:
        if context.get_parameter_source("check") is click.core.ParameterSource.COMMANDLINE:
            raise UserError(
                "--check: is for pictures, and --members reads no pictures; leave one of them out"
            )
        find_members(given["folder"], given["index"])
    elif given["index"] is not None:
        raise UserError("--index: needs --members; an index of pictures is always beside the tars")
    else:
        find_tars(Path(require_local(given["folder"], "DIR")))


@click.group()
def shards() -> None:
    """Pack pictures into tar shards; check, describe and select them."""


shards.add_command(pack_command)
shards.add_command(overlap_command)
for _command in (merge_command, select_command, split_command):
    shards.add_command(_command)


@shards.command("index", cls=Checked, check=_check_tars)
@click.argument("folder", type=Tars(), metavar="DIR")
@WORKERS
@CHECK
@LICENCE
@click.option(
    "--members",
    is_flag=True,
    help="Index all members (audio, .cls, .npy, several pictures), grouped as webdataset does. DIR may be a URL or a "
    "pattern such as 'DIR/{000..012}.tar'.",
)
@click.option(
    "--index",
    type=OutputPlace(),
    metavar="FOLDER",
    help="With --members: folder of the index, also on a store  [default: DIR/members]",
)
@click.pass_context
def index_command(
    context: click.Context,
    folder: str,
    workers: int,
    check: str,
    licence: str | None,
    members: bool,
    index: Path | None,
) -> None:
    """Make the tars in DIR readable for training without changing them: write an index for each, and a manifest.

    For tars of other tools, such as img2dataset. DIR/rejected.parquet lists what cannot be used.
    """
    from shards.edit.index_tars import find_folders_below, index_folder
    from uniemox_dist.core.files import require_local

    _check_tars(context)
    if members:
        _index_members(folder, index, workers, licence)
        return
    where = Path(require_local(folder, "DIR"))
    with _bar("indexing", "tars") as bar:
        manifest, rejected = index_folder(where, workers=workers, check=check, licence=licence, progress=bar)
    records = manifest.samples + len(rejected)
    click.echo(f"{folder}: {len(manifest.shards)} shards, identity {manifest.identity[:12]}")
    click.echo(f"{records} records = {manifest.samples} indexed + {len(rejected)} refused")
    for refused in rejected[:5]:
        click.echo(f"  refused {refused.source}: {refused.reason}: {refused.detail}")
    if below := find_folders_below(where):
        click.echo(
            f"tars in folders of {folder} are not indexed; index them one by one: {', '.join(below[:5])}"
        )


def _index_members(text: str, index: Path | None, workers: int, licence: str | None) -> None:
    from shards.edit.index_members import index_members
    from shards.format.manifest import MEMBERS
    from shards.format.rejected import REJECTED
    from shards.format.tar_names import split_tars
    from shards.storage import parse_place
    from uniemox_dist.core.files import hide_secrets

    out = index or parse_place(split_tars(text, "DIR")[0], "DIR") / MEMBERS
    with _bar("indexing", "tars") as bar:
        manifest, rejected = index_members(text, index=index, workers=workers, licence=licence, progress=bar)
    click.echo(
        f"{hide_secrets(text)}: {len(manifest.shards)} shards, {manifest.samples} samples, identity "
        f"{manifest.identity[:12]}"
    )
    click.echo(f"wrote the index to {hide_secrets(out)}")
    if rejected:
        counted = ", ".join(f"{reason} {n}" for reason, n in manifest.provenance["left_out"].items())
        click.echo(f"left out {len(rejected)} members: {counted}; {hide_secrets(out / REJECTED)} lists them")
    for refused in rejected[:5]:
        click.echo(f"  left out {refused.source}: {refused.reason}: {refused.detail}")


@shards.command("verify", cls=Checked, check=_check_data_sets)
@REMOTE_FOLDER
@WORKERS
@CHECK
@click.option(
    "--quarantine", is_flag=True, help="Move bad shards to DIR/quarantine and rewrite the manifest."
)
@JSON
def verify_command(folder: Path, workers: int, check: str, quarantine: bool, json_file: Path | None) -> int:
    """Read everything in DIR again and check counts, hashes and every picture. Exit code 2 if anything is wrong.
    Pictures that two splits have in common are counted."""
    from shards.inspect import verify
    from shards.storage import is_local
    from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
    from uniemox_dist.core.formatting import counted

    if quarantine and not is_local(folder):
        raise UserError("--quarantine: DIR is remote, and only local files can be moved; verify a local copy")
    folders = verify.find_data_sets(folder)
    with _bar("verifying", "shards") as bar:
        verdicts = verify.verify(folders, workers=workers, check=check, progress=bar)
    bad = [verdict for verdict in verdicts if verdict.problems]
    for verdict in bad:
        for problem in verdict.problems:
            click.echo(f"{verdict.folder / verdict.shard}: {problem}")
    samples = sum(verdict.samples for verdict in verdicts)
    tars, bad_tars = ([v for v in some if v.shard.endswith(".tar")] for some in (verdicts, bad))
    click.echo(f"{folder}: {len(tars)} shards, {samples} samples: {len(bad_tars) or 'no'} bad shards")
    leaks = {} if bad or len(folders) == 1 else verify.count_leaks(folders)
    for (first, second), count in leaks.items():
        click.echo(f"{folder}: {counted(count, 'picture')} of {first} occur in {second}, too")
    findings = [
        {"shard": str(v.folder / v.shard), "samples": v.samples, "problems": list(v.problems)}
        for v in verdicts
    ]
    common = [{"splits": list(pair), "pictures": count} for pair, count in leaks.items()]
    found_bad = {"bad": len(bad_tars), "findings": findings, "common_pictures": common}
    _write_json(json_file, {"shards": len(tars), "samples": samples, **found_bad})
    moved = verify.quarantine(verdicts) if quarantine else {}
    for found, manifest in moved.items():
        has_bad_tars = any(verdict.folder == found for verdict in bad_tars)
        did = f"moved bad shards to {found / verify.QUARANTINE}" if has_bad_tars else "rewrote sizes.json"
        left = "nothing is left" if manifest is None else f"{manifest.samples} samples are left"
        click.echo(f"{found}: {did}; {left}")
    return EXIT_USER if bad else EXIT_DONE


@shards.command("stats", cls=Checked, check=_check_data_sets)
@REMOTE_FOLDER
@JSON
def stats_command(folder: Path, json_file: Path | None) -> None:
    """Print statistics of DIR (a data set, or several splits): samples, labels, captions, persons."""
    from shards.inspect.stats import describe, describe_json
    from shards.inspect.verify import find_data_sets

    find_data_sets(folder)
    for text in describe(folder):
        click.echo(text)
    if json_file is not None:
        _write_json(json_file, describe_json(folder))


@shards.command("report", cls=Checked, check=_check_data_sets)
@REMOTE_FOLDER
@click.option("--out", type=OutputPlace(), help="The HTML file, also on a store  [default: DIR/report.html]")
def report_command(folder: Path, out: Path | None) -> None:
    """Write one HTML page about DIR: pictures of every label with person boxes, histograms, refused records."""
    from shards.inspect.page import write_page
    from shards.inspect.verify import find_data_sets
    from shards.remote_folder import check_writable
    from uniemox_dist.core.files import hide_secrets

    find_data_sets(folder)
    page = out or folder / "report.html"
    check_writable(page, "--out")
    write_page(folder, page)
    click.echo(f"wrote {hide_secrets(page)}")


def _write_json(file: Path | None, value: Any) -> None:
    from uniemox_dist.core.files import convert_write_errors, write_json

    if file is not None:
        with convert_write_errors(f"--json={file}", WRITABLE):
            write_json(file, value)


def _bar(what: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(unit=f" {unit}", desc=what, disable=None)
