"""Checks for conflicts before a submission: other settings in the run's folder, jobs of the run in the queue, a
machine without Slurm."""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.submission import job_ids
from uniemox_dist.config.load import validate_config
from uniemox_dist.config.schema import Config
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.scheduler import commands

SITE_SETTINGS = frozenset({"run.start_timeout_s", "run.step_timeout_s", "run.compile_timeout_s"})
"""Settings that the cluster determines; they may differ between submissions of a run."""


def check_same_settings(run: Path, config: Config, *, resume: bool, force_new: bool) -> None:
    """
    Raises:
        UserError: if the run's folder holds a run with other settings; the message lists the differences.
    """
    if resume or force_new:
        return
    known = read_settings(run)
    changed = setting_differences(known[1], config) if known else []
    if known and changed:
        raise UserError(
            "\n".join(
                [
                    f"run.dir/run.name={run}: there is a run with other settings ({known[0].relative_to(run)}):",
                    *(f"  {line}" for line in changed),
                    "give --resume to continue it with the new settings, --force-new to set that folder aside, or "
                    "another run.name",
                ]
            )
        )


def check_no_job(runs: Sequence[Path], *, after: int | None = None, singleton: bool = False) -> list[str]:
    """Checks that no job of these runs is queued or running.

    Args:
        runs: folders of the runs that are submitted.
        after: the job that the new one waits for.
        singleton: whether the new job waits for all jobs of its name.

    Returns:
        A remark if the job to wait for does not exist.

    Raises:
        UserError: if a job of one of the runs is queued or running, unless the new one waits for it.
    """
    if singleton:
        return []
    known = {run: job_ids(run) for run in runs}
    asked = [number for numbers in known.values() for number in numbers]
    states = commands.query_job_states([*asked, *([] if after is None else [after])])
    for run, numbers in known.items():
        live = {n: states[n].state.lower() for n in numbers if n in states and states[n].live}
        if live and after not in live:
            jobs = ", ".join(f"{number} ({state})" for number, state in live.items())
            who, them = (f"job {jobs} has", "it") if len(live) == 1 else (f"jobs {jobs} have", "them")
            raise UserError(
                f"run.dir/run.name={run}: {who} this run; wait for {them} with --after {max(live)}, end {them} with "
                f"`scancel {' '.join(map(str, live))}`, or give another run.name"
            )
    if after is not None and after not in states:
        return [f"--after {after}: Slurm does not know this job any more; the new job does not wait"]
    return []


def require_commands(*names: str, user: str = "") -> None:
    """Checks that this machine has some of Slurm's commands; `user` names what needs them.

    Raises:
        NoSlurm: naming the first one that is missing.
    """
    for name in names:
        if not commands.has(name):
            needs = f", and {user} needs it" if user else ""
            raise commands.NoSlurm(
                f"{name}: there is no such command on this machine{needs}; call this on a login node of the cluster, "
                "use --dry-run to see the script, or `uniemox launch local`"
            )


def read_settings(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file with the settings of the run in that folder, and its values by dotted keys: those of the run's last
    start, or else those of the last submission. None if the run was never submitted or started.

    Raises:
        UserError: if the file is not a configuration.
    """
    submitted = sorted(run.glob("jobs/[0-9]*/config.yaml"))
    for path in (run / "config.yaml", *reversed(submitted)):
        if path.is_file():
            values = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
            if not isinstance(values, dict):
                raise UserError(
                    f"{path}: not a configuration; restore it, or give --force-new or another run.name"
                )
            with suppress(UserError):  # settings that an older version lacked get their defaults
                values = validate_config(values, str(path)).model_dump(mode="json")
            return path, flatten(values)
    return None


def setting_differences(before: dict[str, Any], config: Config) -> list[str]:
    """Lines `key: old -> new`, without the site's settings."""
    after = flatten(config.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if key not in SITE_SETTINGS]
    return [
        f"{key}: {_format_value(before, key)} -> {_format_value(after, key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            found |= flatten(value, f"{name}.")
        else:
            found[name] = value
    return found


def _format_value(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"
