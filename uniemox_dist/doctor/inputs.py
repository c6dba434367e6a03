"""The files that a run starts from: whether each rank's node can read them, and whether they are complete.

Headers and configurations are read, weights are not.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from uniemox_dist.checkpoints.folders import COMPLETE, Checkpoint, list_complete_checkpoints
from uniemox_dist.config.schema import Config, TeacherConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import counted
from uniemox_dist.core.formatting import size as format_size
from uniemox_dist.data.sources import Sources
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding, RankFacts, make_findings
from uniemox_dist.teacher.identity import CONFIG, find_local_folder, find_weights_file, read_statistics

TEACHER, INITIAL = "teacher", "init_from"
COPY = "copy it again"


@dataclass(frozen=True)
class FileFacts:
    """Facts about files that are known without loading them."""

    text: str
    """The description that the finding prints."""


def measure_teacher(config: TeacherConfig) -> FileFacts:
    """Reads a live teacher's configuration and the header of its weights.

    Raises:
        UserError: naming what is missing or damaged.
    """
    folder = find_local_folder(config)
    path = find_weights_file(config, folder)
    if folder is not None:
        try:
            model = read_json(folder / CONFIG)["model_cfg"]
            width, side = int(model["embed_dim"]), model["vision_cfg"]["image_size"]
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"teacher.name={config.name}: {CONFIG} states no model_cfg with embed_dim and vision_cfg; {COPY}"
            ) from None
        shape = f", pictures of {side} pixels, embeddings of {width}"
    else:
        shape = ""
    read_statistics(config, folder)
    return FileFacts(f"{config.name}: {_weights(path, f'teacher.name={config.name}')}{shape}")


def measure_cache(config: Config, world: World) -> FileFacts:
    """Opens the cached views that replace a live teacher; each rank opens its part of the shards.

    Raises:
        UserError: if there are none, or they were made with other settings.
    """
    from uniemox_dist.teacher.view_selection import check_rank_shards, select_views

    sources = Sources(config, rank=world.rank, world_size=world.size)
    check_rank_shards(config, sources, select_views(config, sources.readers), world)
    return FileFacts(f"cached views of {config.teacher.name} for {counted(len(sources.readers), 'data set')}")


def measure_initial(path: Path) -> FileFacts:
    """Reads the header of the weights that `model.init_from` names: a file, a release, a run or its checkpoint, or a
    folder in timm's local-dir layout.

    Raises:
        UserError: naming what is missing or damaged.
    """
    where = f"model.init_from={path}"
    if path.is_file():
        return FileFacts(f"{path}: {_weights(path, where)}")
    if (path / "uniemox.json").is_file():
        _object(path / "uniemox.json", where)
        parts = [_weights(path / name, where) for name in ("model.safetensors", "uniemox.safetensors")]
        return FileFacts(f"{path}: a release, {' and '.join(parts)}")
    if (path / COMPLETE).is_file() or (path / "checkpoints").is_dir():
        return FileFacts(f"{path}: {_checkpoint(path, where)}")
    if (path / "config.json").is_file():
        _object(path / "config.json", where)
        return FileFacts(f"{path}: timm's local-dir, {_weights(path / 'model.safetensors', where)}")
    what = "holds no weights" if path.is_dir() else "no such file or folder"
    fix = "give a file, a folder in timm's local-dir layout, a release, or a run's folder"
    raise UserError(f"{where}: {what}; {fix}")


def _weights(path: Path, where: str) -> str:
    """Describes a file of weights by its header."""
    if not path.is_file():
        raise UserError(f"{where}: lacks {path.name}; {COPY}")
    size = format_size(path.stat().st_size)
    if path.suffix != ".safetensors":
        with open(path, "rb") as file:
            if not file.read(1):
                raise UserError(f"{where}: {path.name} is empty; {COPY}")
        # A zip archive ends with its table of contents, which a truncated one lacks. torch's older format, a plain
        # pickle, cannot be checked without loading it.
        kind = "a complete archive" if zipfile.is_zipfile(path) else "readable, content not checked"
        return f"{size}, {kind}"
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        return f"{size}, content not checked (safetensors is not installed)"
    try:
        with safe_open(path, framework="np") as file:  # checks the header and the length of the file
            return f"{len(list(file.keys()))} tensors, {size}"
    except SafetensorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {path.name} is damaged ({reason}); {COPY}") from None


def _checkpoint(path: Path, where: str) -> str:
    """The newest checkpoint whose files have the right size."""
    folder, name = (path.parent, path.name) if (path / COMPLETE).is_file() else (path / "checkpoints", None)
    found: list[Checkpoint] = [c for c in list_complete_checkpoints(folder) if name in (None, c.folder.name)]
    problems = []
    for checkpoint in reversed(found):
        problem = checkpoint.problem(hashes=False)
        if problem is None:
            return f"a checkpoint of step {checkpoint.step}, {len(checkpoint.info['files'])} files"
        problems.append(problem)
    raise UserError(f"{where}: {problems[0] if problems else 'has no complete checkpoint'}; give another one")


def _object(path: Path, where: str) -> None:
    try:
        dict(read_json(path))
    except (ValueError, TypeError):
        raise UserError(f"{where}: {path.name} is not a JSON object; {COPY}") from None


def judge(what: str, gathered: Sequence[RankFacts[FileFacts]]) -> list[Finding]:
    """Fails if a rank's node cannot read them, or they are damaged."""
    return make_findings(what, gathered, lambda *_: None, lambda all_facts: all_facts[0].text)
