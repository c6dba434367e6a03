"""`uniemox shards …`: everything about data at rest. Torch-free."""

from pathlib import Path

import click


@click.group()
def shards() -> None:
    """Pack pictures into tar shards, and look into them."""


@shards.command("pack")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", default="table", show_default=True, help="table or folder.")
@click.option("--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes; 0: none.")
@click.option("--persons", default="nanodet", show_default=True, help="Person detector: nanodet or none.")
@click.option(
    "--shard-size", "shard_mb", type=float, default=256, show_default=True, help="MB of a shard, at most."
)
@click.option(
    "--shard-samples", type=click.IntRange(1), default=10_000, show_default=True, help="Samples, at most."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Order in which samples are written.")
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Renames a table's column.")
@click.option("--resume", is_flag=True, help="Keep a complete pack of the same settings.")
def pack_command(
    source: str,
    out: Path,
    layout: str,
    workers: int,
    persons: str,
    shard_mb: float,
    shard_samples: int,
    seed: int,
    columns: tuple[str, ...],
    resume: bool,
) -> None:
    """Packs SOURCE into tar shards with captions and person boxes under OUT (OUT/<split> where there are splits).

    SOURCE is a table (.parquet, .csv, or shipped:fluent_emoji) or a folder of pictures.
    """
    from tqdm import tqdm

    from shards.pack import PackSettings, pack
    from uniemox_dist.runtime.errors import UserError

    if shard_mb <= 0:
        raise UserError(f"--shard-size={shard_mb}: give a positive number of MB")
    pairs = [column.split("=", 1) for column in columns]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--column {columns}: expected OURS=THEIRS, such as image=jpg")
    settings = PackSettings(source, layout, persons, shard_mb, shard_samples, seed, dict(pairs))
    with tqdm(unit=" pictures", desc="packing", disable=None) as bar:
        result = pack(settings, out, workers=workers, resume=resume, progress=bar.update)
    if result.reused:
        click.echo(f"{out} is complete: {result.records} samples, nothing to do")
        return
    for split, count in sorted(result.packed.items()):
        click.echo(f"{out / split}: {count} samples")
    click.echo(
        f"{result.records} records = {sum(result.packed.values())} packed + {len(result.rejected)} refused; "
        f"{result.with_person} with a person, {sum(result.packed.values()) - result.with_person} without"
    )
    for refused in result.rejected[:5]:
        click.echo(f"  refused {refused.source}: {refused.reason}: {refused.detail}")
    if result.rejected:
        click.echo(f"  all {len(result.rejected)} stand in {out / 'rejected.parquet'}")


@shards.command("stats")
@click.argument("folder", type=click.Path(path_type=Path))
def stats_command(folder: Path) -> None:
    """Prints what is in FOLDER (a data set, or several splits): samples, labels, captions, persons."""
    from shards.report import describe
    from uniemox_dist.runtime.errors import UserError

    texts = describe(folder)
    if not texts:
        raise UserError(f"DIR={folder}: holds no manifest.json; build it with `uniemox shards pack`")
    for text in texts:
        click.echo(text)
