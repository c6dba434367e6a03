"""`uniemox shards …`: index, check, describe and rearrange data sets. Torch-free."""

from pathlib import Path
from typing import Any

import click

from uniemox_dist.cli.inputs import Checked, InputFile, OutputFile, OutputPlace, Tars
from uniemox_dist.cli.overlap import overlap_command
from uniemox_dist.cli.pack import (
    CHECK,
    LICENCE,
    OUT_PLACE,
    WORKERS,
    NamesOption,
    explain_interruption,
    pack_command,
)

AGAIN = "start the same command again"
WRITABLE = "give a file in a folder that can be written"


class FolderType(click.ParamType):
    """The folder of a data set, local or remote."""

    name = "folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        from shards.storage import parse_place

        return parse_place(value, "DIR")


LINK = click.option(
    "--link",
    is_flag=True,
    help="Link the tars of DIR instead of writing new ones; readers without an index see all samples of DIR.",
)
COPY = click.option("--copy", is_flag=True, help="Write new tars (the default).")
JSON = click.option("--json", "json_file", type=OutputFile(), help="Also write the results to this file.")
REMOTE_FOLDER = click.argument("folder", type=FolderType(), metavar="DIR")


def _check_manifest(context: click.Context) -> None:
    from shards.format.manifest import read_manifest

    read_manifest(context.params["folder"], "DIR")


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


def _check_parts(context: click.Context) -> None:
    from shards.edit.merge_inputs import open_inputs

    open_inputs(context.params["parts"])


@click.group()
def shards() -> None:
    """Pack pictures into tar shards; check, describe and select them."""


shards.add_command(pack_command)
shards.add_command(overlap_command)


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


@shards.command("merge", cls=Checked, check=_check_parts)
@OUT_PLACE
@click.argument("parts", nargs=-1, required=True, type=FolderType())
@click.option(
    "--same-key",
    type=click.Choice(["refuse", "rename", "drop"]),
    default="refuse",
    show_default=True,
    help="What to do if samples of unrelated data sets have the same key and different pictures.",
)
def merge_command(out: Path, parts: tuple[Path, ...], same_key: str) -> None:
    """Join PARTS into one data set OUT without copying tars: all parts of a `shards pack --part I/N`, or unrelated data
    sets.

    Pictures that several parts packed are marked in the index and do not count; a copy in a test split stays. The tars
    are hard links, so the parts may be deleted afterwards; on another file system they are symbolic links, and the
    parts must stay. OUT and PARTS may be at s3:// or gs://, where tars are copied.
    """
    from shards.edit.merge import merge
    from uniemox_dist.core.files import hide_secrets

    with explain_interruption(out, AGAIN):
        result = merge(out, parts, same_key=same_key, note=click.echo)
    for split, count in sorted(result.packed.items()):
        click.echo(f"{hide_secrets(out / split)}: {count} samples")
    packed = sum(result.packed.values())
    click.echo(
        f"{result.records} records = {packed} packed + {sum(result.refused.values())} refused, "
        f"{result.marked} of them because another one has the same picture or key"
    )
    if result.refused:
        counted = ", ".join(f"{reason} {count}" for reason, count in sorted(result.refused.items()))
        click.echo(f"  refused: {counted}; {hide_secrets(out / 'rejected.parquet')} lists them")
    if result.renamed:
        click.echo(f"{result.renamed} samples have another key, because an earlier data set has theirs")
    _report_links(out)


def _filter_names() -> list[str]:
    from shards.edit.expressions import NUMBERS, TEXTS

    return [*TEXTS, *NUMBERS]


@shards.command("select", cls=Checked, check=_check_manifest)
@REMOTE_FOLDER
@OUT_PLACE
@click.option("--label", "labels", multiple=True, help="Select samples with this label (repeatable).")
@click.option(
    "--filter",
    "filter_text",
    cls=NamesOption,
    names=_filter_names,
    metavar="EXPR",
    help="Select samples by a condition such as 'side >= 256 and persons > 0'. Its names are",
)
@click.option(
    "--without-overlap",
    "overlap_file",
    type=InputFile("write it with `uniemox shards overlap`"),
    metavar="FILE",
    help="Drop near-copies that this file of `shards overlap` lists; OUT/rejected.parquet names them and their twins.",
)
@LINK
@COPY
def select_command(
    folder: Path,
    out: Path,
    labels: tuple[str, ...],
    filter_text: str | None,
    overlap_file: Path | None,
    link: bool,
    copy: bool,
) -> None:
    """Make a data set OUT of selected samples of DIR.

    With --link the tars are hard links, so DIR may be deleted afterwards; on another file system they are symbolic
    links, and DIR must stay.
    """
    from shards.edit.select import select
    from uniemox_dist.core.files import hide_secrets

    _check_link(link, copy)
    without = None if overlap_file is None else _read_dropped(folder, overlap_file)
    with explain_interruption(out, AGAIN):
        subset = select(
            folder, out, labels=labels, filter_text=filter_text, without=without, link=link, note=click.echo
        )
    click.echo(
        f"{hide_secrets(out)}: {subset.samples} samples in {len(subset.shards)} shards, identity {subset.identity[:12]}"
    )
    if without is not None:
        click.echo(f"dropped {len(without)} near-copies; {out / 'rejected.parquet'} lists each with its twin")
    _report_links(out)


def _read_dropped(folder: Path, overlap_file: Path) -> dict[str, str]:
    from shards.format.manifest import read_manifest
    from shards.overlap.pairs import choose_dropped, read_pairs

    overlap = read_pairs(overlap_file, "--without-overlap")
    return choose_dropped(overlap, read_manifest(folder, "DIR").identity, f"--without-overlap={overlap_file}")


@shards.command("split", cls=Checked, check=_check_manifest)
@REMOTE_FOLDER
@OUT_PLACE
@click.option(
    "--shares",
    default="train=80,val=10,test=10",
    show_default=True,
    help="Names of the splits, and their shares.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed that assigns samples to splits.")
@LINK
@COPY
def split_command(folder: Path, out: Path, shares: str, seed: int, link: bool, copy: bool) -> None:
    """Divide DIR into splits OUT/<name>, label by label."""
    from shards.edit.select import parse_shares, split
    from uniemox_dist.core.files import hide_secrets

    _check_link(link, copy)
    with explain_interruption(out, AGAIN):
        made = split(folder, out, parse_shares(shares), seed=seed, link=link, note=click.echo)
    for name, subset in made.items():
        click.echo(f"{hide_secrets(out / name)}: {subset.samples} samples, identity {subset.identity[:12]}")
    _report_links(out)


def _check_link(link: bool, copy: bool) -> None:
    """Warns of links; raises UserError if both options are given."""
    from uniemox_dist.core.errors import UserError

    if link and copy:
        raise UserError("--link and --copy: exclude each other; --copy is the default")
    if link:
        click.echo(
            "warning: linked tars hold all samples of DIR, those of other splits too; only uniemox reads the index "
            "that leaves them out (webdataset, open_clip and datasets do not)",
            err=True,
        )


def _report_links(out: Path) -> None:
    """Prints the folders that must stay, if tars are symbolic links."""
    from shards.storage import is_local

    if not is_local(out):
        return
    links = [path for path in out.rglob("*.tar") if path.is_symlink()]
    if links:
        folders = sorted({str(path.resolve().parent) for path in links})
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        click.echo(
            f"{len(links)} tars are symbolic links, because they are on another file system: "
            f"{', '.join(folders[:3])}{more} must stay where they are"
        )


def _write_json(file: Path | None, value: Any) -> None:
    from uniemox_dist.core.files import convert_write_errors, write_json

    if file is not None:
        with convert_write_errors(f"--json={file}", WRITABLE):
            write_json(file, value)


def _bar(what: str, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(unit=f" {unit}", desc=what, disable=None)
