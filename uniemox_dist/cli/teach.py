"""`uniemox teach`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from uniemox_dist.cli.inputs import Checked

if TYPE_CHECKING:
    from uniemox_dist.data.reader import ShardReader
    from uniemox_dist.teacher.model import Teacher

RETRY_S = 60.0
"""Seconds for which a failing read is retried."""
PLAIN_VIEW_OPTIONS = ("image_size", "flip", "background", "colour_jitter", "resize", "seed")
"""Options of views that are fields of `ViewSpec` as they are; --scene-scale is parsed first."""
MAX_NAMED = 10
"""Largest number of unreadable pictures to print; the cache marks all of them."""


@click.command(cls=Checked, check=lambda context: TeachJob.parse(context, context.params))
@click.argument("location", metavar="DIR")
@click.option("--teacher", required=True, help="local-dir:PATH, shipped:demo, or an open_clip model name.")
@click.option("--weights", help="File of weights, with an open_clip model name.")
@click.option("--mean", metavar="R,G,B", help="Pixel mean of the teacher's input, with --weights.")
@click.option(
    "--std", metavar="R,G,B", help="Pixel standard deviation of the teacher's input, with --weights."
)
@click.option(
    "--views", type=click.IntRange(1), metavar="K", help="Also embed K scene views of every picture."
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 4096),
    default=224,
    show_default=True,
    help="Side of a view in pixels: model.image_size of the runs.",
)
@click.option(
    "--scene-scale",
    metavar="LOW,HIGH",
    default="0.2,1.0",
    show_default=True,
    help="Area of a view's crop as a share of the picture: data.scene_scale of the runs.",
)
@click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror half of the views.")
@click.option(
    "--background",
    type=click.Choice(["white", "random"]),
    default="white",
    show_default=True,
    help="Colour behind transparent pixels.",
)
@click.option(
    "--colour-jitter",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Largest relative change of brightness, contrast and saturation.",
)
@click.option(
    "--resize",
    type=click.Choice(["bicubic", "bilinear"]),
    default="bicubic",
    show_default=True,
    help="Filter that resizes the views: data.resize of the runs.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of crops and colours.",
)
@click.option("--part", metavar="I/N", help="Process only shards I, I+N, I+2N, …, for job arrays.")
@click.option(
    "--workers",
    type=click.IntRange(0),
    default=2,
    show_default=True,
    help="Loader processes that draw views.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=256,
    show_default=True,
    help="Captions or views per forward pass.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Precision of the image tower; auto is bf16 on a GPU and fp32 elsewhere.",
)
@click.pass_context
def teach(context: click.Context, **options: Any) -> None:
    """Cache a teacher's embeddings of all data below DIR beside its shards, for pretraining.

    Caption embeddings are always computed. With --views K, the command also draws and embeds K random scene views of
    every picture. Runs with teacher.source=cache and the same view settings use them and need no teacher.

    Run the same command again to continue an interrupted one. Under srun or torchrun each rank takes its part of the
    shards.
    """
    job = TeachJob.parse(context, options)
    from uniemox_dist.teacher.model import Teacher

    teacher = Teacher(job.teacher, job.choose_device())
    for reader in job.readers:
        job.embed_captions(reader, teacher)
    if job.views:
        teacher.drop_text_tower()
        for reader in job.readers:
            job.embed_views(reader, teacher)


@dataclass(frozen=True)
class TeachJob:
    """A checked command line."""

    readers: list["ShardReader"]
    teacher: Any
    views: dict[str, Any]
    """Arguments of `ViewSpec`; empty if only captions are embedded."""
    part: tuple[int, int]
    rank: int
    ranks: int
    local_rank: int
    workers: int
    batch: int

    @classmethod
    def parse(cls, context: click.Context, options: dict[str, Any]) -> "TeachJob":
        """Checks the options and opens the data sets.

        Raises:
            UserError: naming the wrong option.
        """
        from shards.inspect.verify import find_data_sets
        from shards.pack.settings import parse_part
        from shards.storage import is_local, parse_place
        from uniemox_dist.config.schema import TeacherConfig
        from uniemox_dist.core.errors import UserError
        from uniemox_dist.data.reader import ShardReader
        from uniemox_dist.distributed.world import World
        from uniemox_dist.teacher.identity import find_local_folder, find_weights_file

        location, name, count = options["location"], options["teacher"], options["views"]
        if count is None:
            for option in (*PLAIN_VIEW_OPTIONS, "scene_scale"):
                given = context.get_parameter_source(option)
                if given is not None and given.name != "DEFAULT":
                    raise UserError(f"--{option.replace('_', '-')}: applies to views only; add --views K")
        numbers = {
            key: _parse_numbers(f"--{key}", options[key], 3) for key in ("mean", "std") if options[key]
        }
        if ":" not in name:
            missing = [k for k in ("weights", "mean", "std") if options[k] is None]
            # Pixel statistics do not affect captions, so any values do without --views.
            if "weights" in missing or (count and missing):
                value = {"weights": "FILE", "mean": "R,G,B", "std": "R,G,B"}
                needs = ", ".join(f"--{key} {value[key]}" for key in (missing if count else ["weights"]))
                raise UserError(f"--teacher={name}: an open_clip model name needs {needs}")
            numbers = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **numbers}
        elif options["weights"] or numbers:
            raise UserError(
                f"--teacher={name}: its folder states weights, mean and std; leave these options out"
            )
        low, high = _parse_numbers("--scene-scale", options["scene_scale"], 2)
        if not 0 < low <= high <= 1:
            raise UserError(f"--scene-scale={options['scene_scale']}: needs 0 < LOW <= HIGH <= 1")
        part = parse_part(options["part"]) if options["part"] else (1, 1)
        folder = parse_place(location, "DIR")
        if not is_local(folder):
            raise UserError(
                f"DIR={location}: is remote; run this command on a local copy (pretraining caches captions of remote "
                f"data in the run's folder)"
            )
        folders = find_data_sets(folder)
        world = World.from_env(meets=False)
        readers = [ShardReader.from_folder(path, "DIR") for path in folders]
        for reader in readers:
            reader.origin.retry_s = RETRY_S
        settings = {key: options[key] for key in PLAIN_VIEW_OPTIONS}
        teacher = TeacherConfig(
            name=name, weights=options["weights"], precision=options["precision"], **numbers
        )
        if (local := find_local_folder(teacher)) is not None:
            find_weights_file(teacher, local)
        return cls(
            readers,
            teacher,
            {**settings, "scene_scale": (low, high), "count": count} if count else {},
            part,
            world.rank,
            world.size,
            world.local_rank,
            options["workers"],
            options["batch"],
        )

    def choose_device(self) -> str:
        """Returns this rank's GPU, or the CPU."""
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def embed_captions(self, reader: "ShardReader", teacher: "Teacher") -> None:
        """Embeds the captions of this rank's shards and prints a summary."""
        from uniemox_dist.core.files import convert_write_errors
        from uniemox_dist.teacher import text_cache

        cache = text_cache.folder_beside_shards(reader, teacher.id)
        shards = self._list_shards(reader)
        with self._bar(reader, shards, "captions") as bar, convert_write_errors(*_describe_cache(reader)):
            embedded = text_cache.build(
                reader, teacher, cache, batch=self.batch, shards=shards, progress=bar.update
            )
        click.echo(f"{reader.url}: {embedded} captions embedded into {cache}")

    def embed_views(self, reader: "ShardReader", teacher: "Teacher") -> None:
        """Draws and embeds the views of this rank's shards and prints a summary."""
        import time

        from uniemox_dist.core.files import convert_write_errors
        from uniemox_dist.core.formatting import size
        from uniemox_dist.teacher.view_builder import build
        from uniemox_dist.teacher.view_cache import ViewSpec

        spec = ViewSpec(teacher.facts, precision=teacher.precision, **self.views)
        shards, started = self._list_shards(reader), time.perf_counter()
        with self._bar(reader, shards, "views") as bar, convert_write_errors(*_describe_cache(reader)):
            result = build(
                reader,
                teacher,
                spec,
                batch=self.batch,
                workers=self.workers,
                shards=shards,
                progress=bar.update,
            )
        seconds = time.perf_counter() - started
        kept = (result.pictures * spec.count) - result.embedded
        click.echo(
            f"{reader.url}: {result.embedded} views of {result.pictures} pictures embedded in {seconds:.1f} s "
            f"({result.embedded / seconds:.1f} per second), {kept} kept; {size(result.bytes)} in "
            f"{len(shards)} of {len(reader.manifest.shards)} shards of {spec.folder(reader)}"
        )
        if result.unreadable:
            click.echo(f"{len(result.unreadable)} pictures are unreadable and marked in the cache:", err=True)
        for line in result.unreadable[:MAX_NAMED]:
            click.echo(f"  {line}", err=True)

    def _list_shards(self, reader: "ShardReader") -> range:
        first, parts = self.part
        return range(first - 1, len(reader.manifest.shards), parts)[self.rank :: self.ranks]

    def _bar(self, reader: "ShardReader", shards: range, what: str) -> Any:
        from tqdm import tqdm

        samples = sum(reader.manifest.shards[shard].samples for shard in shards)
        quiet = None if self.rank == 0 else True
        return tqdm(total=samples, desc=f"{reader.url}: {what}", unit=" samples", disable=quiet)


def _describe_cache(reader: "ShardReader") -> tuple[str, str]:
    """Returns name and fix for errors about a cache that cannot be written."""
    fix = "run it on a writable copy, or let pretraining keep captions in the run's folder"
    return f"DIR={reader.url}: its cache", fix


def _parse_numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    from uniemox_dist.core.errors import UserError

    try:
        numbers = tuple(float(part) for part in text.split(","))
        if len(numbers) == count and all(abs(x) < 1e6 for x in numbers):
            return numbers
    except ValueError:
        pass
    raise UserError(f"{option}={text}: give {count} numbers separated by commas, such as {EXAMPLES[count]}")


EXAMPLES = {2: "0.2,1.0", 3: "0.481,0.458,0.408"}
