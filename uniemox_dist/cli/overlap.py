"""`uniemox shards overlap`. Torch-free."""

from pathlib import Path

import click

from uniemox_dist.cli.inputs import Checked, OutputFile
from uniemox_dist.cli.pack import WORKERS


def _check(context: click.Context) -> None:
    from shards.overlap.find import open_sets
    from shards.storage import parse_place

    open_sets([parse_place(folder, "DIR") for folder in context.params["folders"]])


@click.command("overlap", cls=Checked, check=_check)
@click.argument("folders", nargs=-1, required=True, metavar="DIR...")
@click.option(
    "--out",
    type=OutputFile(".parquet"),
    default="overlap.parquet",
    show_default=True,
    help="File of pairs.",
)
@click.option(
    "--page", type=OutputFile(".html"), help="Also write an HTML page that shows pairs side by side."
)
@WORKERS
def overlap_command(folders: tuple[str, ...], out: Path, page: Path | None, workers: int) -> None:
    """Find near-copies within and across data sets: resized, re-encoded, cropped, mirrored, with a border or a caption.

    Each DIR is a data set, or a folder of splits. `shards select --without-overlap FILE` drops the copies that the
    file of pairs lists.
    """
    from tqdm import tqdm

    from shards.overlap.find import find_pairs, open_sets
    from shards.overlap.page import write_page
    from shards.overlap.pairs import Overlap, write_pairs
    from shards.storage import parse_place
    from uniemox_dist.core.files import convert_write_errors

    sets = open_sets([parse_place(folder, "DIR") for folder in folders])
    with (
        convert_write_errors(f"--out={out}"),
        tqdm(unit=" shards", desc="reading", disable=None) as reading,
        tqdm(unit=" blocks", desc="comparing", disable=None) as comparing,
    ):
        found = find_pairs(
            sets, workers=workers, scratch=out.absolute().parent, reading=reading, comparing=comparing
        )
    overlap = Overlap(tuple(found.sets), tuple(found.pairs))
    if page is not None:
        with convert_write_errors(f"--page={page}"):
            write_page(page, overlap, [one.folder for one in sets])
        click.echo(f"wrote {page}")
    with convert_write_errors(f"--out={out}"):
        write_pairs(out, found.sets, found.pairs)
    for line in overlap.describe():
        click.echo(line)
    for text in found.unreadable[:5]:
        click.echo(f"  not compared: {text}")
    click.echo(f"{out}: {len(found.pairs)} pairs")
