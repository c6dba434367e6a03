"""Decides which checkpoints are kept, and deletes the others. Torch-free."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from uniemox_dist.checkpoints.folders import list_complete_checkpoints, list_unfinished
from uniemox_dist.config.data_sections import RunConfig
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import remove_dir


def list_superfluous(steps: Iterable[int], keep_last: int, keep_every: int | None = None) -> list[int]:
    """The steps whose checkpoints are not kept, oldest first. The newest `keep_last` are kept, and all whose step is a
    multiple of `keep_every`; the newest one is always kept."""
    older = sorted(steps)[: -max(1, keep_last)]
    return [step for step in older if keep_every is None or step % keep_every]


def choose_policy(
    config: Path, keep_last: int | None = None, keep_every: int | None = None
) -> tuple[int, int | None]:
    """Returns how many of the last checkpoints to keep, and the multiple of steps that are always kept: the arguments,
    or by default the values in the run's config.yaml, whose other settings may be of any version.

    Raises:
        UserError: if the file has no such numbers.
    """
    stated: dict[str, Any] = {}
    if config.is_file():
        values = parse_yaml(config.read_text(encoding="utf-8"), str(config))
        run = values.get("run") if isinstance(values, dict) else None
        stated = run if isinstance(run, dict) else {}
    fields = RunConfig.model_fields
    last = stated.get("keep_last", fields["keep_last"].default) if keep_last is None else keep_last
    every = stated.get("keep_every", fields["keep_every"].default) if keep_every is None else keep_every
    for key, value in (("keep_last", last), ("keep_every", every or 1)):
        if not isinstance(value, int) or value < 1:
            option = "--" + key.replace("_", "-")
            raise UserError(
                f"{config}: run.{key}={value!r} is not a whole number of at least 1; correct it, or give {option}"
            )
    return last, every or None


def prune(folder: Path, keep_last: int, keep_every: int | None = None) -> list[str]:
    """Deletes the complete checkpoints below a run's checkpoints/ that are not kept; returns their names. Each is
    renamed before it is deleted, so that no reader sees a part of it."""
    by_step = {checkpoint.step: checkpoint for checkpoint in list_complete_checkpoints(folder)}
    doomed = [by_step[step].folder for step in list_superfluous(by_step, keep_last, keep_every)]
    for path in doomed:
        remove_dir(path)
    return [path.name for path in doomed]


def clear_unfinished(folder: Path) -> list[str]:
    """Deletes temporary folders of killed saves and deletions below checkpoints/. Call it only while no save is
    running."""
    left = list_unfinished(folder)
    for path in left:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
    return [path.name for path in left]


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written to the file system of a folder."""
    return shutil.disk_usage(folder).free
