"""`uniemox teach`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from uniemox_dist.data.reader import ShardReader
    from uniemox_dist.teacher.model import Teacher

RETRY_S = 60.0
"""For which a read that fails is tried again."""
SHOWN = 10
"""Pictures without views that are named; all are marked in the cache."""


@click.command()
@click.argument("location", metavar="DIR")
@click.option("--teacher", required=True, help="local-dir:PATH, shipped:demo, or an open_clip model name.")
@click.option("--weights", help="File of weights, with an open_clip model name.")
@click.option("--mean", metavar="R,G,B", help="Pixel mean of the teacher's input, with --weights.")
@click.option("--std", metavar="R,G,B", help="Pixel standard deviation of it, with --weights.")
@click.option(
    "--views", type=click.IntRange(1), metavar="K", help="Also embed K scene views of every picture."
)
@click.option(
    "--image-size",
    type=click.IntRange(8, 4096),
    default=224,
    show_default=True,
    help="Side of a view, pixels: the runs' model.image_size.",
)
@click.option(
    "--scene-scale",
    metavar="LOW,HIGH",
    default="0.2,1.0",
    show_default=True,
    help="Area of a view's crop as a share of the picture: the runs' data.scene_scale.",
)
@click.option("--flip/--no-flip", default=True, show_default=True, help="Mirror half of the views.")
@click.option(
    "--background",
    type=click.Choice(["white", "random"]),
    default="white",
    show_default=True,
    help="What stands behind transparent pixels.",
)
@click.option(
    "--colour-jitter",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Brightness, contrast and saturation are multiplied by 1 - this to 1 + this.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of crops and colours."
)
@click.option("--part", metavar="I/N", help="Take only shards I, I+N, I+2N, …, for arrays of jobs.")
@click.option(
    "--workers", type=click.IntRange(0), default=2, show_default=True, help="Processes that draw views."
)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="Embedded at once.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the picture tower; auto is bf16 on a GPU and fp32 elsewhere.",
)
@click.pass_context
def teach(context: click.Context, **options: Any) -> None:
    """Caches what a teacher says of all data below DIR beside its shards, for pretraining to use.

    Embeddings of captions are always made. With --views K, K random scene views of every picture are drawn and
    embedded too: runs with teacher.source=cache and the same view settings replay them, and need no teacher.

    The same command again goes on where it was stopped. Under srun or torchrun each rank takes its share of the shards.
    """
    work = Work.of(context, options)
    from uniemox_dist.teacher.model import Teacher

    teacher = Teacher(work.teacher, work.device())
    for folder in work.folders:
        work.texts(folder, teacher)
    if work.views:
        teacher.drop_text_tower()
        for folder in work.folders:
            work.pictures(folder, teacher)


@dataclass(frozen=True)
class Work:
    """A checked command line."""

    folders: list["ShardReader"]
    teacher: Any
    views: dict[str, Any]
    """Settings of `ViewSpec`; empty where only captions are embedded."""
    part: tuple[int, int]
    rank: int
    ranks: int
    local_rank: int
    workers: int
    batch: int

    @classmethod
    def of(cls, context: click.Context, options: dict[str, Any]) -> "Work":
        """Opens the data sets.

        Raises:
            UserError: naming the option that is wrong.
        """
        from shards.format.manifest import manifest_folders
        from shards.pack.settings import parse_part
        from shards.storage import is_local, place
        from uniemox_dist.config.schema import TeacherConfig
        from uniemox_dist.core.errors import UserError
        from uniemox_dist.data.reader import ShardReader
        from uniemox_dist.distributed.world import World

        location, name, count = options["location"], options["teacher"], options["views"]
        if count is None:
            for option in ("image_size", "scene_scale", "flip", "background", "colour_jitter", "seed"):
                given = context.get_parameter_source(option)
                if given is not None and given.name != "DEFAULT":
                    raise UserError(f"--{option.replace('_', '-')}: says how views are drawn; add --views K")
        numbers = {key: _numbers(f"--{key}", options[key], 3) for key in ("mean", "std") if options[key]}
        if ":" not in name:
            missing = [k for k in ("weights", "mean", "std") if options[k] is None]
            # Texts are not touched by pixel statistics: any will do for them.
            if "weights" in missing or (count and missing):
                value = {"weights": "FILE", "mean": "R,G,B", "std": "R,G,B"}
                needs = ", ".join(f"--{key} {value[key]}" for key in (missing if count else ["weights"]))
                raise UserError(f"--teacher={name}: an open_clip model name needs {needs}")
            numbers = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), **numbers}
        elif options["weights"] or numbers:
            raise UserError(
                f"--teacher={name}: states its weights, mean and std itself; leave those options out"
            )
        low, high = _numbers("--scene-scale", options["scene_scale"], 2)
        if not 0 < low <= high <= 1:
            raise UserError(f"--scene-scale={options['scene_scale']}: needs 0 < LOW <= HIGH <= 1")
        part = parse_part(options["part"]) if options["part"] else (1, 1)
        folder = place(location, "DIR")
        if not is_local(folder):
            raise UserError(
                f"DIR={location}: is remote; pretraining caches captions of such data in the run's folder itself, and "
                f"views are taught on a local copy"
            )
        folders = manifest_folders(folder)
        if not folders:
            raise UserError(f"DIR={folder}: holds no manifest.json; build it with `uniemox shards pack`")
        world = World.from_env(meets=False)
        readers = [ShardReader.from_folder(found, "DIR") for found in folders]
        for reader in readers:
            reader.origin.retry_s = RETRY_S
        drawn = {key: options[key] for key in ("image_size", "flip", "background", "colour_jitter", "seed")}
        return cls(
            readers,
            TeacherConfig(name=name, weights=options["weights"], precision=options["precision"], **numbers),
            {**drawn, "scene_scale": (low, high), "count": count} if count else {},
            part,
            world.rank,
            world.size,
            world.local_rank,
            options["workers"],
            options["batch"],
        )

    def device(self) -> str:
        """Where the teacher runs: this rank's GPU, or the CPU."""
        import torch

        return f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"

    def texts(self, reader: "ShardReader", teacher: "Teacher") -> None:
        """Embeds the captions of this rank's shards, and says what was done."""
        from uniemox_dist.core.os_errors import writing
        from uniemox_dist.teacher import text_cache

        cache = text_cache.folder_beside_shards(reader, teacher.id)
        shards = self._shards(reader)
        with self._bar(reader, shards, "captions") as bar, writing(*_place(reader)):
            embedded = text_cache.build(
                reader, teacher, cache, batch=self.batch, shards=shards, progress=bar.update
            )
        click.echo(f"{reader.url}: {embedded} captions embedded into {cache}")

    def pictures(self, reader: "ShardReader", teacher: "Teacher") -> None:
        """Draws and embeds the views of this rank's shards, and says what was done."""
        import time

        from uniemox_dist.core.os_errors import writing
        from uniemox_dist.teacher.view_builder import build
        from uniemox_dist.teacher.view_cache import ViewSpec

        made = ViewSpec(teacher.facts, precision=teacher.precision, **self.views)
        shards, began = self._shards(reader), time.perf_counter()
        with self._bar(reader, shards, "views") as bar, writing(*_place(reader)):
            built = build(
                reader,
                teacher,
                made,
                batch=self.batch,
                workers=self.workers,
                shards=shards,
                progress=bar.update,
            )
        seconds = time.perf_counter() - began
        kept = (built.pictures * made.count) - built.embedded
        click.echo(
            f"{reader.url}: {built.embedded} views of {built.pictures} pictures embedded in {seconds:.1f} s "
            f"({built.embedded / seconds:.1f} a second), {kept} kept; {built.bytes / 1e6:.1f} MB in "
            f"{len(shards)} of {len(reader.manifest.shards)} shards of {made.folder(reader)}"
        )
        if built.unreadable:
            click.echo(f"{len(built.unreadable)} pictures could not be read and are marked:", err=True)
        for line in built.unreadable[:SHOWN]:
            click.echo(f"  {line}", err=True)

    def _shards(self, reader: "ShardReader") -> range:
        first, parts = self.part
        return range(first - 1, len(reader.manifest.shards), parts)[self.rank :: self.ranks]

    def _bar(self, reader: "ShardReader", shards: range, what: str) -> Any:
        from tqdm import tqdm

        samples = sum(reader.manifest.shards[shard].samples for shard in shards)
        quiet = None if self.rank == 0 else True
        return tqdm(total=samples, desc=f"{reader.url}: {what}", unit=" samples", disable=quiet)


def _place(reader: "ShardReader") -> tuple[str, str]:
    """What error lines call the place of a cache, and what helps where it cannot be written."""
    fix = "teach a copy that can be written, or let pretraining keep captions in the run's folder"
    return f"DIR={reader.url}: its cache", fix


def _numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    from uniemox_dist.core.errors import UserError

    try:
        found = tuple(float(part) for part in text.split(","))
        if len(found) == count and all(abs(x) < 1e6 for x in found):
            return found
    except ValueError:
        pass
    raise UserError(
        f"{option}={text}: give {count} numbers with commas between them, such as {EXAMPLES[count]}"
    )


EXAMPLES = {2: "0.2,1.0", 3: "0.481,0.458,0.408"}
