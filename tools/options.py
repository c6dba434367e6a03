"""Types of options of the scripts in this folder, for argparse: they refuse a wrong value while options are parsed."""

import argparse
import difflib
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from uniemox_dist.config.load import parse_override
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import describe_missing_folder, require_local


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1, "a positive integer")


def non_negative_int(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0, "0 or a positive integer")


def _integer(text: str, least: int, expected: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return number


def positive_ints(text: str) -> list[int]:
    """Positive integers, separated by commas."""
    return [positive_int(word) for word in text.split(",")]


def positive_number(text: str) -> float:
    """A finite number above 0."""
    return _number(text, math.inf, "a positive number")


def ratio(text: str) -> float:
    """A number between 0 and 1, both excluded."""
    return _number(text, 1, "a number between 0 and 1, such as 0.75")


def _number(text: str, bound: float, expected: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < bound:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return number


def local_path(text: str) -> Path:
    """A file or folder to write, on a local or network file system."""
    try:
        return Path(require_local(text, "path"))
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("path=")) from None


def photo_folder(text: str) -> Path:
    """A folder that contains JPEGs, at any depth."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: {describe_missing_folder(path)}; give a folder of JPEGs")
    if next(path.rglob("*.jpg"), None) is None:
        raise argparse.ArgumentTypeError(f"{text}: contains no *.jpg; give a folder of JPEGs")
    return path


def teacher_shape(text: str) -> str:
    """The name of an open_clip model, or local-dir:PATH."""
    if text.startswith("local-dir:"):
        path = Path(text.removeprefix("local-dir:"))
        if not (path / "open_clip_config.json").is_file():
            raise argparse.ArgumentTypeError(
                f"{text}: contains no open_clip_config.json; give another folder"
            )
        return text
    import open_clip  # slow; used only here

    known = open_clip.list_models()
    if text not in known:
        near = difflib.get_close_matches(text, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"such as {known[0]}"
        raise argparse.ArgumentTypeError(f"{text}: open_clip has no such model; {hint}")
    return text


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds `--set KEY=VALUE`, which can be repeated."""
    parser.add_argument(
        "--set",
        type=setting_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="as of uniemox pretrain",
    )


def setting_pair(text: str) -> str:
    """A pair KEY=VALUE whose key is one of the configuration."""
    try:
        values: Any = parse_override(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    model: Any = Config
    path = ""
    while isinstance(model, type) and issubclass(model, BaseModel) and isinstance(values, dict) and values:
        [(key, values)] = values.items()
        fields = model.model_fields
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {path}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise argparse.ArgumentTypeError(f"{text}: {path}{key} is no key of the configuration; {hint}")
        model, path = fields[key].annotation, f"{path}{key}."
    if isinstance(model, type) and issubclass(model, BaseModel):
        raise argparse.ArgumentTypeError(f"{text}: {path[:-1]} is a section; set one of its keys")
    return text
