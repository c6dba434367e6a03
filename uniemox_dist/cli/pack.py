"""`uniemox shards pack`, and the options that it shares with other commands. Torch-free."""

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

import click

from uniemox_dist.cli.inputs import Checked, LocalFolder, OutputPlace

MOST_NAMED = 5
"""Refused records that are printed one by one."""


@contextmanager
def explain_interruption(out: Path, then: str) -> Iterator[None]:
    """Ends a command that Ctrl-C or SIGTERM interrupts with a line that states how to continue.

    Raises:
        Fault: with that line.
    """
    from uniemox_dist.core.errors import Fault
    from uniemox_dist.core.files import hide_secrets

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()  # no other one can set handlers
    before = signal.signal(signal.SIGTERM, interrupt) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Fault(f"OUT={hide_secrets(out)}: interrupted; {then}") from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


class NamesOption(click.Option):
    """An option whose help ends with its valid names. They are looked up only when the help is printed."""

    def __init__(self, *arguments: Any, names: Callable[[], list[str]], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._text, self._names = self.help, names

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        self.help = f"{self._text} {', '.join(self._names())}."
        return super().get_help_record(ctx)


WORKERS = click.option(
    "--workers",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Number of processes; 0: only this one.",
)
LICENCE = click.option(
    "--licence",
    "--license",
    metavar="TEXT",
    help="Licence of the pictures; goes into the manifest and the cards of models trained on them.",
)
CHECK = click.option(
    "--check",
    type=click.Choice(["decode", "header"]),
    default="decode",
    show_default=True,
    help="Read all data of every picture, or trust its header.",
)
OUT = click.argument("out", type=LocalFolder())
OUT_PLACE = click.argument("out", type=OutputPlace())


def layouts() -> list[str]:
    """The source layouts."""
    from shards.sources import layout_names

    return layout_names()


def _presets() -> list[str]:
    from shards.sources.presets import load_presets

    return list(load_presets())


def _check(context: click.Context) -> None:
    from shards.pack.settings import parse_part
    from uniemox_dist.core.errors import UserError
    from uniemox_dist.core.files import is_remote

    given = context.params
    source = given["source"]
    _settings(source, given)
    if given["part_text"] is not None:
        parse_part(given["part_text"])
    is_path = not (is_remote(source) or source.startswith("shipped:") or has_magic(source))
    if given["layout"] == "wds":
        from shards.sources.tars import stands_for_several

        is_path = is_path and not stands_for_several(source)
    if is_path and not Path(source.removeprefix("file://")).exists():
        raise UserError(f"SOURCE={source}: no such file or folder; give a table, a folder or tars")


@click.command("pack", cls=Checked, check=_check)
@click.argument("source")
@OUT_PLACE
@click.option(
    "--layout",
    cls=NamesOption,
    names=layouts,
    help="Layout of SOURCE [default: table, or that of --preset]. One of:",
)
@click.option(
    "--preset",
    cls=NamesOption,
    names=_presets,
    help="A published set, which states layout, labels and splits: a file FILE.yaml, or one of:",
)
@WORKERS
@click.option(
    "--persons", default="nanodet", show_default=True, help="nanodet, onnx:FILE (YOLO type), source or none."
)
@click.option("--captions", help="Compose captions: `shipped`, or a YAML file of templates.")
@CHECK
@click.option("--max-side", type=click.IntRange(1), help="Shrink pictures whose longer side has more pixels.")
@click.option(
    "--min-side", type=click.IntRange(1), help="Shrink pictures whose shorter side has more pixels."
)
@click.option(
    "--quality", type=int, default=90, show_default=True, help="JPEG and WebP quality of shrunk pictures."
)
@click.option(
    "--keep-side", metavar="MIN[:MAX]", help="Keep only pictures with so many pixels on the shorter side."
)
@click.option("--keep-aspect", type=float, metavar="MAX", help="Keep only pictures not longer than MAX : 1.")
@click.option(
    "--keep-caption",
    metavar="MIN[:MAX]",
    help="Keep only pictures with so many characters in the first caption.",
)
@click.option(
    "--keep-label", "keep_labels", multiple=True, help="Keep only pictures with this label (repeatable)."
)
@click.option(
    "--shard-size", "shard_mb", type=float, default=256, show_default=True, help="Largest shard, in MB."
)
@click.option(
    "--shard-samples",
    type=click.IntRange(1),
    default=10_000,
    show_default=True,
    help="Most samples in a shard.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed for the order of samples and for drawn splits.",
)
@click.option(
    "--column", "columns", multiple=True, metavar="OURS=THEIRS", help="Rename a column of the table."
)
@click.option(
    "--dimension-range",
    "dimension_ranges",
    multiple=True,
    metavar="NAME=LOW:HIGH",
    help="Range of valence, arousal or dominance, such as valence=1:9; pictures and persons with others are refused.",
)
@click.option(
    "--columns",
    "header",
    metavar="A,B,…",
    help="The columns of tables without a header line, such as caption,url.",
)
@click.option(
    "--delimiter", help="The delimiter of tables: one character, tab, or `space` for any white space."
)
@click.option("--pictures", metavar="DIR", help="The folder of a table's pictures, relative to SOURCE.")
@click.option(
    "--allow-outside", is_flag=True, help="Let paths in a table lead out of its folder, by /, .. or links."
)
@click.option(
    "--picture",
    metavar="NAME",
    help="Which picture of a sample with several: `left` for k.left.jpg  [default: the first]",
)
@click.option(
    "--part",
    "part_text",
    metavar="I/N",
    help="Pack only part I of N, counted from 1 (0/N means N/N, for arrays from 0); join with `shards merge`.",
)
@click.option(
    "--near-duplicates",
    type=click.Choice(["keep", "mark", "drop"]),
    default="keep",
    show_default=True,
    help="Near-copies of pictures that are packed earlier: keep, name the earlier one in their attributes, or list "
    "them as refused. Reads every picture once more.",
)
@LICENCE
@click.option(
    "--append",
    is_flag=True,
    help="Add new shards to the finished data set OUT; its own shards stay unchanged.",
)
@click.option(
    "--retry-refused",
    is_flag=True,
    help="Read the pictures again that the finished data set OUT refused as unreadable or damaged, such as failed "
    "downloads, and append those that can be packed.",
)
@click.option("--resume", is_flag=True, help="Continue an interrupted pack; keep a complete one.")
def pack_command(
    source: str,
    out: Path,
    workers: int,
    resume: bool,
    part_text: str | None,
    licence: str | None,
    append: bool,
    retry_refused: bool,
    **options: Any,
) -> None:
    """Pack SOURCE into tar shards with captions and person boxes in OUT (OUT/<split> if there are splits).

    SOURCE is a table (.parquet, .csv, .jsonl, .arrow, or shipped:fluent_emoji), a folder of pictures or of tars, or
    the folder of a published set; on disk, or at s3://, gs:// or http(s)://. OUT may be at s3:// or gs://, too.
    """
    from tqdm import tqdm

    from shards.pack.pipeline import pack
    from shards.pack.settings import parse_part
    from uniemox_dist.core.files import hide_secrets

    settings = _settings(source, options)
    part = None if part_text is None else parse_part(part_text)
    again = explain_interruption(out, "continue after the complete shards with the same command and --resume")
    with again, tqdm(unit=" pictures", desc="packing", disable=None, smoothing=0.05) as bar:
        result = pack(
            settings,
            out,
            workers=workers,
            resume=resume,
            part=part,
            licence=licence,
            append=append,
            retry_refused=retry_refused,
            progress=bar,
        )
    packed = sum(result.packed.values())
    if result.reused and retry_refused:
        tried = len(result.rejected)
        none = (
            f"none of {tried} refused records can be packed now"
            if tried
            else "no refused record to try again"
        )
        click.echo(f"{hide_secrets(out)} is unchanged: {none}")
        return
    if result.reused and append:
        click.echo(f"{hide_secrets(out)} has all pictures of SOURCE already: nothing to append")
        return
    if result.reused:
        click.echo(f"{hide_secrets(out)} is complete: {result.records} samples, nothing to do")
        return
    if result.resumed:
        click.echo(f"resumed after {result.resumed} records that were already done")
    for split, count in sorted(result.packed.items()):
        click.echo(f"{hide_secrets(out / split)}: {count} samples")
    click.echo(
        f"{result.records} records = {packed} packed + {len(result.rejected)} refused; "
        f"{result.with_person} with a person, {packed - result.with_person} without"
    )
    for line in _describe_contents(result):
        click.echo(line)
    if result.converted:
        formats = ", ".join(f"{count} {form}" for form, count in sorted(result.converted.items()))
        click.echo(f"  stored as lossless WebP or PNG, of several frames or pages the first: {formats}")
    for refused in result.rejected[:MOST_NAMED]:
        click.echo(f"  refused {refused.source}: {refused.reason}: {refused.detail}")
    if (more := len(result.rejected) - MOST_NAMED) > 0:
        reasons = Counter(refused.reason for refused in result.rejected)
        counts = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
        click.echo(f"  and {more} more; all by reason: {counts}")
    if result.rejected:
        click.echo(f"  {hide_secrets(out / 'rejected.parquet')} lists every refused record and its reason")
    same_key = sum(refused.reason == "duplicate_key" for refused in result.rejected)
    if append and same_key:
        click.echo(
            f"  {same_key} new pictures have keys of others; to keep them, pack SOURCE into a data set of its own, and "
            "join both with `uniemox shards merge --same-key rename`"
        )


def _describe_contents(result: Any) -> list[str]:
    """What the samples have and lack, and which files and rows of the source are no records."""
    from shards.format.sample import DIMENSIONS
    from shards.pack.duplicates import count_lost_captions

    count = result.contents
    lines = [
        f"the samples have {count['captions']} captions, {count['labels']} labels and {count['boxes']} boxes; "
        f"{count['without_caption']} have no caption, {count['without_label']} no label, {count['without_box']} no box"
    ]
    emotions = {"label_distribution": "a distribution", **{name: name for name in DIMENSIONS}}
    if some := [f"{count[name]} have {what}" for name, what in emotions.items() if count[name]]:
        lines.append(f"of the samples {', '.join(some)}")
    if lost := count_lost_captions(refused.detail for refused in result.rejected):
        lines.append(f"{lost} captions are in refused copies of packed pictures only, and left out")
    rows, pictures = result.rows
    if rows > pictures:
        lines.append(f"{rows} rows of the source describe {pictures} pictures")
    if others := result.findings.not_pictures:
        by_count = sorted(others.items(), key=lambda item: (-item[1], item[0]))
        lines.append(f"not pictures: {', '.join(f'{number} {kind}' for kind, number in by_count)}")
    return lines + result.findings.notes


def _names(text: str | None) -> tuple[str, ...]:
    """The names in `a,b,c`."""
    from uniemox_dist.core.errors import UserError

    names = () if text is None else tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) != len(names):
        raise UserError(
            f"--columns={text}: give different names with commas between them, such as caption,url"
        )
    return names


def _settings(source: str, options: dict[str, Any]) -> Any:
    from shards.pack.prepare import Filters
    from shards.pack.settings import PackSettings, parse_limits, parse_ranges
    from shards.pack.shrink import Shrink
    from uniemox_dist.core.errors import UserError

    pairs = [column.split("=", 1) for column in options["columns"]]
    if any(len(pair) != 2 for pair in pairs):
        wrong = next(column for column in options["columns"] if "=" not in column)
        raise UserError(f"--column={wrong}: expected OURS=THEIRS, such as image=jpg")
    return PackSettings(
        source=source,
        layout="table" if options["layout"] is None and not options["preset"] else options["layout"],
        shrink=Shrink(options["max_side"], options["min_side"], options["quality"]),
        filters=Filters(
            parse_limits("--keep-side", options["keep_side"]),
            options["keep_aspect"],
            parse_limits("--keep-caption", options["keep_caption"]),
        ),
        columns=dict(pairs),
        picture=None if options["picture"] is None else options["picture"].lower().removeprefix("."),
        delimiter={"tab": "\t"}.get(options["delimiter"], options["delimiter"]),
        header=_names(options["header"]),
        keep_labels=tuple(options["keep_labels"]),
        allow_outside=options["allow_outside"],
        near_duplicates=options["near_duplicates"],
        dimension_ranges=parse_ranges(options["dimension_ranges"]),
        **{
            name: options[name]
            for name in (
                *("persons", "shard_mb", "shard_samples", "seed", "preset", "captions", "check"),
                "pictures",
            )
        },
    )
