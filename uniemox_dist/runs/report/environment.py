"""What a run was started with, as its folder tells: versions, host and command, and its newest submission to Slurm."""

import shlex
from pathlib import Path
from typing import Any

from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import cut, moment, short

FACTS = ("host", "cores", "platform", "python")
SUBMITTED = ("job_ids", "cluster", "nodes", "ranks_per_node", "code")


def environment(path: Path) -> dict[str, Any] | None:
    """Rows (name, value) and the command of environment.json; `broken` says what is wrong with it. None without one."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("it holds no names with values")
    except (OSError, ValueError) as error:
        return {"rows": [], "command": "", "broken": cut(str(error), 120)}
    versions = found.get("versions")
    rows = [(key, short(found[key])) for key in FACTS if found.get(key) is not None]
    rows += [
        (cut(str(package)), short(version) if version else "not installed")
        for package, version in (versions.items() if isinstance(versions, dict) else ())
    ]
    return {"rows": rows, "command": _command(found.get("command")), "broken": ""}


def submission(jobs: Path) -> dict[str, Any] | None:
    """The newest submission that can be read: its rows and command."""
    for path in sorted(jobs.glob("*/submission.json"), reverse=True):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            rows = [
                (key.replace("_", " "), short(found[key])) for key in SUBMITTED if found.get(key) is not None
            ]
            return {
                "name": path.parent.name,
                "time": moment(found.get("time")),
                "rows": rows,
                "command": _command(found.get("command")),
            }
    return None


def _command(words: Any) -> str:
    return shlex.join(map(str, words)) if isinstance(words, list) else ""
