"""Sweeps: one run for each point of a grid of settings."""

import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

from launch.checks import run_path
from launch.conflicts import flatten
from uniemox_dist.config.load import parse_override
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError

MAX_POINTS = 1001
"""Slurm's usual largest array (MaxArraySize)."""


def parse_axis(text: str) -> tuple[str, list[str]]:
    """Parses `optim.blr=1e-3,3e-4` into the key and its values; commas inside brackets do not divide.

    Raises:
        UserError: if it has another form.
    """
    key, equals, values = text.partition("=")
    parts = _split_values(values)
    if not equals or not parts:
        raise UserError(f"--array {text}: expected KEY=VALUE,VALUE,…, such as optim.blr=1e-3,3e-4")
    if key in ("run.name", "run.dir"):
        raise UserError(f"--array {text}: every point gets its own run.name; sweep over another key")
    parsed = [parse_override(f"{key}={part}") for part in parts]
    if any(value in parsed[:n] for n, value in enumerate(parsed)):
        raise UserError(f"--array {text}: a value is given twice; both would train the same run")
    return key, parts


def expand_grid(axes: Sequence[str]) -> list[list[str]]:
    """The cross product of `KEY=V1,V2,…` lists: pairs KEY=VALUE for each point; the last key changes fastest.

    Raises:
        UserError: for a list of another form, a key that is given twice, or too many points.
    """
    parsed = [parse_axis(axis) for axis in axes]
    keys = [key for key, _ in parsed]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--array {twice[0]}=…: given twice; put all its values into one list")
    points = [
        [f"{key}={value}" for key, value in zip(keys, values)]
        for values in itertools.product(*(values for _, values in parsed))
    ]
    if len(points) > MAX_POINTS:
        raise UserError(f"--array: {len(points)} points; at most {MAX_POINTS} fit into a job array")
    return points


def point_names(points: Sequence[Sequence[str]]) -> list[str]:
    """The suffix of each point's run.name: short keys and values, or numbers if those would be equal or long."""
    names = ["-".join(_shorten_pair(pair) for pair in point) for point in points]
    if len(set(names)) < len(names) or max(map(len, names)) > 80:
        return [f"{n:04d}" for n in range(len(points))]
    return names


def format_points(configs: Sequence[Config], points: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the number, values and run of each point."""
    keys = [pair.partition("=")[0] for pair in points[0]]
    rows = [["task", *keys, "run"]]
    for number, (config, point) in enumerate(zip(configs, points)):
        values = flatten(config.model_dump(mode="json"))
        rows.append([str(number), *(_value(values, p) for p in point), str(run_path(config))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def _split_values(values: str) -> list[str]:
    """Splits at the commas outside of brackets; an empty list if a part is empty or a bracket stays open."""
    parts, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    parts = [part.strip() for part in parts]
    return parts if depth == 0 and all(parts) else []


def _shorten_pair(pair: str) -> str:
    key, _, value = pair.partition("=")
    return f"{key.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9.-]+', '_', value).strip('_')}"


def _value(values: dict[str, Any], pair: str) -> str:
    key, _, text = pair.partition("=")
    return json.dumps(values[key]) if key in values else text
