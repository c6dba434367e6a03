"""`uniemox shards merge`, `select` and `split`: data sets made of others. Torch-free."""

from pathlib import Path

import click

from uniemox_dist.cli.inputs import REMOTE_FOLDER, Checked, FolderType, InputFile
from uniemox_dist.cli.pack import OUT_PLACE, NamesOption, explain_interruption

AGAIN = "start the same command again"
LINK = click.option(
    "--link",
    is_flag=True,
    help="Link the tars of DIR instead of writing new ones; readers without an index see all samples of DIR.",
)
COPY = click.option("--copy", is_flag=True, help="Write new tars (the default).")


def _check_manifest(context: click.Context) -> None:
    from shards.format.manifest import read_manifest

    read_manifest(context.params["folder"], "DIR")


def _check_parts(context: click.Context) -> None:
    from shards.edit.merge_inputs import open_inputs

    open_inputs(context.params["parts"])


@click.command("merge", cls=Checked, check=_check_parts)
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


@click.command("select", cls=Checked, check=_check_manifest)
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


@click.command("split", cls=Checked, check=_check_manifest)
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
