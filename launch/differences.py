"""What a run's folder was made with, and how another configuration differs from it."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from uniemox_dist.config.load import parse_yaml
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError

OF_THE_SITE = frozenset({"run.start_timeout_s", "run.step_timeout_s", "run.compile_timeout_s"})
"""Settings that come with a cluster and are none of the run's own."""


def known_settings(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The file with the settings of the run in that folder, and what it says by dotted keys: what its last start left,
    or else what was submitted last. None where nothing was ever submitted or started.

    Raises:
        UserError: if the file cannot be read.
    """
    submitted = sorted(run.glob("jobs/[0-9]*/config.yaml"))
    for path in (run / "config.yaml", *reversed(submitted)):
        if path.is_file():
            values = parse_yaml(path.read_text(encoding="utf-8", errors="replace"), str(path))
            if not isinstance(values, dict):
                raise UserError(
                    f"{path}: is no configuration; restore it, or give --force-new or another run.name"
                )
            with suppress(ValidationError):  # what an older version did not write down has its default
                values = Config.model_validate(values).model_dump(mode="json")
            return path, flat(values)
    return None


def differences(before: dict[str, Any], config: Config) -> list[str]:
    """Lines `key: old -> new`; settings of the site do not count."""
    after = flat(config.model_dump(mode="json"))
    keys = [key for key in {**before, **after} if key not in OF_THE_SITE]
    return [
        f"{key}: {_said(before, key)} -> {_said(after, key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys; lists stay values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, f"{name}.")
        else:
            found[name] = value
    return found


def _said(values: dict[str, Any], key: str) -> str:
    return json.dumps(values[key], ensure_ascii=False) if key in values else "not set"
