"""Checks that an output file can be written, before the work that produces its content."""

import tempfile
from pathlib import Path

from uniemox_dist.core.errors import UserError


def check_output(path: Path | None, option: str, suffix: str = "") -> None:
    """Checks that a file can be written, without creating it.

    Args:
        path: the file; None if the user requested none.
        option: the option that names it, such as `--json`.
        suffix: the required ending of its name.

    Raises:
        UserError: if it cannot be written, is a folder, or has another ending.
    """
    if path is None:
        return
    if suffix and path.suffix.lower() != suffix:
        raise UserError(
            f"{option}={path}: is written as {suffix[1:].upper()}; give a name that ends with {suffix}"
        )
    if path.is_dir():
        raise UserError(f"{option}={path}: is a folder; give a file")
    there = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(
            f"{option}={path}: cannot be written ({error.strerror}); give a file in a folder that can be written"
        ) from None
