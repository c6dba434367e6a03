"""Finding runs by what a user typed."""

from pathlib import Path

from uniemox_dist.core.errors import UserError
from uniemox_dist.runs.folder import RunFolder


def open_run(path: Path) -> RunFolder:
    """A run's folder that is there.

    Raises:
        UserError: if it is none.
    """
    if is_run(path):
        return RunFolder(path)
    inside = [run.path for run in runs_below(path)]
    hint = f"did you mean {inside[0]}?" if inside else "give run.dir/run.name, such as demo/runs/demo"
    raise UserError(f"RUN={path}: holds no config.yaml and no events.jsonl, so it is no run folder; {hint}")


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has a configuration, or events, or was submitted and waits in a queue."""
    told = (path / "config.yaml").is_file() or (path / "events.jsonl").is_file()
    return told or next(path.glob("jobs/[0-9]*/submission.json"), None) is not None


def runs_below(path: Path, depth: int = 3) -> list[RunFolder]:
    """The runs in a folder and in the folders inside it, down to a depth, by name; a run inside a run is not seen."""
    found: list[RunFolder] = []
    try:
        folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError:
        return []
    for folder in folders:
        if is_run(folder):
            found.append(RunFolder(folder))
        elif depth > 1:
            found += runs_below(folder, depth - 1)
    return found
