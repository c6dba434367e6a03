"""Selects the cached views that a run uses instead of a live teacher, or explains which ones are missing."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.teacher import text_cache, view_cache
from uniemox_dist.teacher.identity import TeacherFacts, read_stated_facts
from uniemox_dist.teacher.view_cache import DESCRIPTION, ViewCache, ViewSpec

SUGGESTED_VIEWS = 8
"""Views per picture in the command that an error message suggests if a data set has none yet."""


@dataclass(frozen=True)
class SelectedViews:
    """The cached views of all sources of a run, all from one teacher."""

    specs: tuple[ViewSpec, ...]
    """One for each source."""

    @property
    def facts(self) -> TeacherFacts:
        """Facts of the teacher that embedded the views."""
        return self.specs[0].facts

    @property
    def ids(self) -> list[str]:
        """Names of the views of each source, as recorded in checkpoints."""
        return [spec.id for spec in self.specs]

    def open(self, readers: Sequence[ShardReader]) -> list[ViewCache]:
        """Opens the views of all sources."""
        return [ViewCache(reader, spec) for reader, spec in zip(readers, self.specs)]

    def __str__(self) -> str:
        counts = sorted({spec.count for spec in self.specs})
        number = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        return f"{number} cached views of each picture ({', '.join(self.ids)})"


def select_for_ranks(
    config: Config, world: World, sources: Sources, resumed: Checkpoint | None
) -> SelectedViews:
    """Selects the views of a run and checks them. Collective: each rank checks its part of the shards.

    Args:
        resumed: the checkpoint that the run resumes from. A resumed run keeps the views that it started with.
    """
    earlier = (resumed.info["teacher"] or {}).get("views", []) if resumed else []
    views: SelectedViews = collectives.on_main(world, lambda: select_views(config, sources.readers, earlier))
    collectives.on_all(world, lambda: check_rank_shards(config, sources, views, world))
    return views


def select_views(
    config: Config, readers: Sequence[ShardReader], earlier: Sequence[str] = ()
) -> SelectedViews:
    """Selects a matching cache for each source.

    If several match, takes the one that the run used before (`earlier`, ids by source), otherwise the one with the
    most views.

    Raises:
        UserError: if no cache of a source matches; states the differences and the command that builds one.
    """
    teacher = read_stated_facts(config.teacher)
    used = [*earlier, *[""] * len(readers)]
    specs = [_select_for_source(config, reader, teacher, used[i]) for i, reader in enumerate(readers)]
    for other in specs[1:]:
        if other.facts.id != specs[0].facts.id:
            raise UserError(
                f"teacher.source=cache: the sources' views were embedded by different teachers, all of them called "
                f"{config.teacher.name}; run `uniemox teach` on each source with the same weights"
            )
    return SelectedViews(tuple(specs))


def check_rank_shards(config: Config, sources: Sources, views: SelectedViews, world: World) -> None:
    """Checks this rank's part of the shards: views exist, and captions too if a loss needs texts.

    Raises:
        UserError: naming the first incomplete shard and the command that completes it.
    """
    for reader, spec in zip(sources.readers, views.specs):
        check_shards(config, reader, spec, range(world.rank, len(reader.manifest.shards), world.size))


def check_shards(config: Config, reader: ShardReader, spec: ViewSpec, shards: Sequence[int]) -> None:
    """Checks that some shards of a source have views, and captions if a loss needs texts.

    Raises:
        UserError: naming the first incomplete shard and the command that completes it.
    """
    folder, fix = spec.folder(reader), f"complete it with `{_teach_command(config, reader, spec)}`"
    texts = text_cache.folder_beside_shards(reader, spec.facts.id)
    for shard in shards:
        name = reader.manifest.shards[shard].name
        if not view_cache.is_current(reader, spec, shard):
            raise UserError(
                f"teacher.source=cache: {folder} lacks the views of {name}, or has those of other pictures; {fix}"
            )
        if config.loss.needs_texts and not text_cache.is_current(reader, spec.facts.id, texts, shard):
            raise UserError(f"teacher.source=cache: {texts} lacks the captions of {name}; {fix}")


def _select_for_source(config: Config, reader: ShardReader, teacher: dict[str, Any], used: str) -> ViewSpec:
    field = f"teacher.source=cache: {reader.url}"
    if not reader.is_local:
        raise UserError(
            f"{field}: is remote, but cached views must be in a local folder; copy it with its cache/"
        )
    paths = sorted(Path(reader.folder).glob(f"cache/*/views-*/{DESCRIPTION}"))
    if not paths:
        raise UserError(f"{field}: has no cached views; build them with `{_teach_command(config, reader)}`")
    matching: list[ViewSpec] = []
    nearest: tuple[list[str], ViewSpec] | None = None
    for path in paths:
        spec, identity = view_cache.read_description(path)
        differences = _list_differences(config, teacher, spec)
        if identity != reader.manifest.identity:
            differences.append("they are of other pictures, captions or labels than the shards hold now")
        if not differences:
            matching.append(spec)
        elif nearest is None or len(differences) < len(nearest[0]):
            nearest = differences, spec
    if matching:
        return max(
            matching, key=lambda spec: (spec.id == used, spec.count, spec.precision == "fp32", spec.id)
        )
    assert nearest is not None
    raise UserError(
        f"{field}: none of its {len(paths)} caches of views matches; {nearest[1].id}: {'; '.join(nearest[0])}; build "
        f"the views of this run with `{_teach_command(config, reader, nearest[1])}`"
    )


def _list_differences(config: Config, teacher: dict[str, Any], spec: ViewSpec) -> list[str]:
    """Lists in words how cached views differ from those that a run needs."""
    wanted, differences = view_cache.shared_settings(config.model.image_size, config.data), []
    for key, cached in spec.shared_settings.items():
        if cached != wanted[key]:
            section = "model" if key == "image_size" else "data"
            differences.append(f"{section}.{key} is {cached} there and {wanted[key]} here")
    for key, here in teacher.items():
        if spec.facts.identity[key] == here:
            continue
        if key == "weights_sha256":
            differences.append("the teacher's weights differ")
        else:
            differences.append(f"the teacher's {key} is {spec.facts.identity[key]} there and {here} here")
    if config.teacher.precision not in ("auto", spec.precision):
        differences.append(f"teacher.precision is {spec.precision} there and {config.teacher.precision} here")
    return differences


def _teach_command(config: Config, reader: ShardReader, spec: ViewSpec | None = None) -> str:
    """Returns the `uniemox teach` command that builds the views of a run; `spec` gives count, seed and precision."""
    teacher, data = config.teacher, config.data
    words = ["uniemox", "teach", reader.url, "--teacher", teacher.name]
    if teacher.weights is not None and ":" not in teacher.name:
        words += ["--weights", teacher.weights]
        words += ["--mean", _join(teacher.mean or ()), "--std", _join(teacher.std or ())]
    words += ["--views", str(spec.count if spec else SUGGESTED_VIEWS)]
    words += ["--image-size", str(config.model.image_size), "--scene-scale", _join(data.scene_scale)]
    if not data.flip:
        words.append("--no-flip")
    if data.background != "white":
        words += ["--background", data.background]
    if data.colour_jitter:
        words += ["--colour-jitter", f"{data.colour_jitter:g}"]
    if data.resize != "bicubic":
        words += ["--resize", data.resize]
    if spec is not None and spec.seed:
        words += ["--seed", str(spec.seed)]
    precision = teacher.precision if spec is None or teacher.precision != "auto" else spec.precision
    if precision != "auto":
        words += ["--precision", precision]
    return shlex.join(words)


def _join(numbers: Sequence[float]) -> str:
    return ",".join(f"{x:.9g}" for x in numbers)
