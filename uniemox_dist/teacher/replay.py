"""Which cached views a run replays: those that fit its settings and teacher, or a line that says what is missing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.teacher import text_cache, view_cache
from uniemox_dist.teacher.facts import TeacherFacts
from uniemox_dist.teacher.files import stated_facts
from uniemox_dist.teacher.view_cache import DESCRIPTION, ViewCache, ViewsMade

VIEWS = 8
"""Views of a picture that an error line suggests where there are none yet."""


@dataclass(frozen=True)
class Replay:
    """The cached views of all sources of a run, which one teacher made."""

    made: tuple[ViewsMade, ...]

    @property
    def facts(self) -> TeacherFacts:
        """Of the teacher, which stays away."""
        return self.made[0].facts

    @property
    def ids(self) -> list[str]:
        """What checkpoints record of the views of each source."""
        return [made.id for made in self.made]

    def caches(self, readers: Sequence[ShardReader]) -> list[ViewCache]:
        """The views of all sources, to read from."""
        return [ViewCache(reader, made) for reader, made in zip(readers, self.made)]

    def __str__(self) -> str:
        counts = sorted({made.count for made in self.made})
        many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{many} cached views of each picture ({', '.join(self.ids)})"


def find(config: Config, readers: Sequence[ShardReader], earlier: Sequence[str] = ()) -> Replay:
    """The caches that fit a run, one for each source. Of several that fit, the one that an earlier part of the run
    replayed (`earlier`, by source), or else the one with most views.

    Raises:
        UserError: if a source has none, saying what there is, what differs, and the command that makes it.
    """
    teacher = stated_facts(config.teacher)
    used = [*earlier, *[""] * len(readers)]
    made = [_of_source(config, reader, teacher, used[i]) for i, reader in enumerate(readers)]
    for other in made[1:]:
        if other.facts.id != made[0].facts.id:
            raise UserError(
                f"teacher.source=cache: the sources' views were embedded by different teachers, all of them called "
                f"{config.teacher.name}; teach them with the same weights"
            )
    return Replay(tuple(made))


def check_shards(config: Config, reader: ShardReader, made: ViewsMade, shards: Sequence[int]) -> None:
    """Looks whether some shards have all that a run replays.

    Raises:
        UserError: naming the first that has not, and the command that goes on with it.
    """
    folder, finish = made.folder(reader), f"finish it with `{_command(config, reader, made)}`"
    texts = text_cache.beside_shards(reader, made.facts.id)
    for shard in shards:
        name = reader.manifest.shards[shard].name
        if not view_cache.is_for(reader, made, shard):
            raise UserError(
                f"teacher.source=cache: {folder} lacks the views of {name}, or has those of other pictures; {finish}"
            )
        if config.loss.needs_texts and not text_cache.is_current(reader, made.facts.id, texts, shard):
            raise UserError(f"teacher.source=cache: {texts} lacks the captions of {name}; {finish}")


def _of_source(config: Config, reader: ShardReader, teacher: dict[str, Any], used: str) -> ViewsMade:
    field = f"teacher.source=cache: {reader.url}"
    if not reader.is_local:
        raise UserError(
            f"{field}: is remote, and views are read from a local folder; copy it with its cache/"
        )
    found = sorted(Path(reader.folder).glob(f"cache/*/views-*/{DESCRIPTION}"))
    if not found:
        raise UserError(f"{field}: has no cached views; make them with `{_command(config, reader)}`")
    fitting: list[ViewsMade] = []
    nearest: tuple[list[str], ViewsMade] | None = None
    for path in found:
        made, identity = view_cache.read_description(path)
        differs = _differences(config, teacher, made)
        if identity != reader.manifest.identity:
            differs.append("they are of other pictures, captions or labels than the shards hold now")
        if not differs:
            fitting.append(made)
        elif nearest is None or len(differs) < len(nearest[0]):
            nearest = differs, made
    if fitting:
        return max(fitting, key=lambda made: (made.id == used, made.count, made.precision == "fp32", made.id))
    assert nearest is not None
    raise UserError(
        f"{field}: none of its {len(found)} caches of views fits; of {nearest[1].id} {'; '.join(nearest[0])}; make "
        f"those of this run with `{_command(config, reader, nearest[1])}`"
    )


def _differences(config: Config, teacher: dict[str, Any], made: ViewsMade) -> list[str]:
    wanted, lines = wanted_views(config), []
    for key, there in made.drawn.items():
        if there != wanted[key]:
            section = "model" if key == "image_size" else "data"
            lines.append(f"{section}.{key} is {there} there and {wanted[key]} here")
    for key, here in teacher.items():
        if made.facts.identity[key] != here:
            what = (
                "weights are others"
                if key == "weights_sha256"
                else f"{key} is {made.facts.identity[key]} there"
            )
            lines.append(f"the teacher's {what}" + ("" if key == "weights_sha256" else f" and {here} here"))
    if config.teacher.precision not in ("auto", made.precision):
        lines.append(f"teacher.precision is {made.precision} there and {config.teacher.precision} here")
    return lines


def wanted_views(config: Config) -> dict[str, Any]:
    """What a run asks of cached views, in the keys of `ViewsMade.drawn`."""
    data = config.data
    return {
        "image_size": config.model.image_size,
        "scene_scale": [float(share) for share in data.scene_scale],
        "flip": data.flip,
        "background": data.background,
        "colour_jitter": float(data.colour_jitter),
    }


def _command(config: Config, reader: ShardReader, made: ViewsMade | None = None) -> str:
    """The command that makes the views of a run."""
    teacher, data = config.teacher, config.data
    words = ["uniemox", "teach", reader.url, "--teacher", teacher.name]
    if teacher.weights is not None and ":" not in teacher.name:
        words += ["--weights", teacher.weights]
        words += ["--mean", _joined(teacher.mean or ()), "--std", _joined(teacher.std or ())]
    words += ["--views", str(made.count if made else VIEWS), "--image-size", str(config.model.image_size)]
    words += ["--scene-scale", _joined(data.scene_scale)]
    if not data.flip:
        words.append("--no-flip")
    if data.background != "white":
        words += ["--background", data.background]
    if data.colour_jitter:
        words += ["--colour-jitter", f"{data.colour_jitter:g}"]
    if made is not None and made.seed:
        words += ["--seed", str(made.seed)]
    precision = teacher.precision if made is None or teacher.precision != "auto" else made.precision
    if precision != "auto":
        words += ["--precision", precision]
    return shlex.join(words)


def _joined(numbers: Sequence[float]) -> str:
    return ",".join(f"{x:.9g}" for x in numbers)
