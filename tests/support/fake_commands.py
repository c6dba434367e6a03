"""Programs of a machine that is not there, such as Slurm's commands."""

from collections.abc import Mapping
from pathlib import Path


def write_commands(folder: Path, texts: Mapping[str, str]) -> Path:
    """Writes executable bash scripts into a folder and returns it; `texts` holds their content by name."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder
