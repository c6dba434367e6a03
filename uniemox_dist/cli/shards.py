"""`uniemox shards …`: everything about data at rest. Torch-free."""

from pathlib import Path
from typing import Any

import click

WORKERS = click.option(
    "--workers", type=click.IntRange(0), default=1, show_default=True, help="Processes; 0: none."
)

LICENCE = click.option(
    "--licence",
    "--license",
    metavar="TEXT",
    help="What may be done with the pictures; stands in the manifest, and in the cards of models trained on them.",
)


@click.group()
def shards() -> None:
    """Pack pictures into tar shards, check them, describe them, and choose among them."""


@shards.command("pack")
@click.argument("source")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--layout", help="table, folder, wds, coco, emoset or emotic  [table; folder with --preset]")
@click.option(
    "--preset", help="A published set: its labels and splits (emo8, fi, ube, emotion6, caer-s, heco)."
)
@WORKERS
@click.option(
    "--persons", default="nanodet", show_default=True, help="nanodet, onnx:FILE (YOLO type), source or none."
)
@click.option("--captions", help="Compose captions: shipped, or a YAML file of templates.")
@click.option(
    "--check",
    type=click.Choice(["decode", "header"]),
    default="decode",
    show_default=True,
    help="Go through all data of every picture, or trust its header.",
)
@click.option("--max-side", type=click.IntRange(1), help="Shrink pictures whose longer side has more pixels.")
@click.option(
    "--min-side", type=click.IntRange(1), help="Shrink pictures whose shorter side has more pixels."
)
@click.option(
    "--quality", type=int, default=90, show_default=True, help="JPEG and WebP quality of shrunk ones."
)
@click.option("--keep-side", metavar="MIN[:MAX]", help="Refuse pictures by the pixels of their shorter side.")
@click.option("--keep-aspect", type=float, metavar="MAX", help="Refuse pictures longer than MAX : 1.")
@click.option("--keep-caption", metavar="MIN[:MAX]", help="Refuse pictures by the length of their caption.")
@click.option("--keep-label", "keep_labels", multiple=True, help="Refuse pictures with other labels.")
@click.option(
    "--shard-size", "shard_mb", type=float, default=256, show_default=True, help="MB of a shard, at most."
)
@click.option(
    "--shard-samples", type=click.IntRange(1), default=10_000, show_default=True, help="Samples, at most."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Order of samples, and splits that we make."
)
@click.option("--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Renames a table's column.")
@click.option(
    "--part",
    "part_text",
    metavar="I/N",
    help="Pack only part I of N, from 1 (0/N is N/N, so that arrays may count from 0); `shards merge` joins them.",
)
@LICENCE
@click.option("--resume", is_flag=True, help="Go on with an interrupted pack; keep a complete one.")
def pack_command(
    source: str,
    out: Path,
    workers: int,
    resume: bool,
    part_text: str | None,
    licence: str | None,
    **options: Any,
) -> None:
    """Packs SOURCE into tar shards with captions and person boxes under OUT (OUT/<split> where there are splits).

    SOURCE is a table (.parquet, .csv, or shipped:fluent_emoji), a folder of pictures or of tars, or the folder of
    a published set; on disk, or at s3://, gs:// or http(s)://.
    """
    from tqdm import tqdm

    from shards.pack.pipeline import pack
    from shards.pack.settings import parse_part

    settings = _settings(source, options)
    part = None if part_text is None else parse_part(part_text)
    with tqdm(unit=" pictures", desc="packing", disable=None, smoothing=0.05) as bar:
        result = pack(settings, out, workers=workers, resume=resume, part=part, licence=licence, progress=bar)
    packed = sum(result.packed.values())
    if result.reused:
        click.echo(f"{out} is complete: {result.records} samples, nothing to do")
        return
    if result.resumed:
        click.echo(f"went on behind {result.resumed} records that were done before")
    for split, count in sorted(result.packed.items()):
        click.echo(f"{out / split}: {count} samples")
    click.echo(
        f"{result.records} records = {packed} packed + {len(result.rejected)} refused; "
        f"{result.with_person} with a person, {packed - result.with_person} without"
    )
    for refused in result.rejected[:5]:
        click.echo(f"  refused {refused.source}: {refused.reason}: {refused.detail}")
    if result.rejected:
        click.echo(f"  all {len(result.rejected)} stand in {out / 'rejected.parquet'}")


def _settings(source: str, options: dict[str, Any]) -> Any:
    from shards.pack.prepare import Filters
    from shards.pack.reencode import Shrink
    from shards.pack.settings import PackSettings
    from uniemox_dist.core.errors import UserError

    pairs = [column.split("=", 1) for column in options["columns"]]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--column {options['columns']}: expected OURS=THEIRS, such as image=jpg")
    return PackSettings(
        source=source,
        layout=options["layout"] or ("folder" if options["preset"] else "table"),
        persons=options["persons"],
        shard_mb=options["shard_mb"],
        shard_samples=options["shard_samples"],
        seed=options["seed"],
        columns=dict(pairs),
        preset=options["preset"],
        captions=options["captions"],
        check=options["check"],
        shrink=Shrink(options["max_side"], options["min_side"], options["quality"]),
        filters=Filters(
            _limits("--keep-side", options["keep_side"]),
            options["keep_aspect"],
            _limits("--keep-caption", options["keep_caption"]),
        ),
        keep_labels=tuple(options["keep_labels"]),
    )


def _limits(option: str, text: str | None) -> tuple[int, int | None]:
    from uniemox_dist.core.errors import UserError

    if text is None:
        return 0, None
    low, _, high = text.partition(":")
    if not all(part.isdecimal() for part in (low, high) if part) or not (low or high):
        raise UserError(f"{option}={text}: expected MIN or MIN:MAX in whole numbers, such as 128:4096")
    limits = int(low or 0), int(high) if high else None
    if limits[1] is not None and limits[1] < limits[0]:
        raise UserError(f"{option}={text}: the least is larger than the most; exchange them")
    return limits
