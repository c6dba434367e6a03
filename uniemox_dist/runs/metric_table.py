"""The numbers of metrics.jsonl as one array, for readers of a whole run: a million lines take 128 MB."""

import json
import math
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

from pydantic_core import from_json

from uniemox_dist.config.losses import LOSS_NAMES
from uniemox_dist.runs.events.base import Line

KEYS = (
    "step",
    "time",
    "epoch",
    "slots",
    "loss",
    *LOSS_NAMES,
    *("labels", "categories", "dimensions"),  # losses of fine-tuning
    "lr",
    "grad_norm",
    "samples_per_s",
    "data_wait_share",
)
"""The numbers that the report and releases read."""
_WIDTH, _STEP = len(KEYS), KEYS.index("step")
_MISSING = (math.nan,) * _WIDTH


def number(value: Any) -> float:
    """The value as a float; NaN if it is not a number."""
    return float(value) if isinstance(value, int | float) else math.nan


class MetricTable(Sequence[Line]):
    """Lines of metrics, reduced to their finite numbers of `KEYS`."""

    def __init__(self, numbers: "array[float]", rows: Sequence[int]) -> None:
        """`numbers` holds the values of `KEYS` line by line, NaN where a line has none; `rows` are the lines that
        belong to the table."""
        self._numbers, self._rows = numbers, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> list[Line]: ...
    def __getitem__(self, index: int | slice) -> Line | list[Line]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first = self._rows[index] * _WIDTH
        values = self._numbers[first : first + _WIDTH]
        line: Line = {key: value for key, value in zip(KEYS, values) if math.isfinite(value)}
        return {**line, "step": int(line["step"])} if "step" in line else line

    def column(self, key: str) -> "array[float]":
        """The values of a key."""
        values = self._numbers[KEYS.index(key) :: _WIDTH]
        return values if isinstance(self._rows, range) else array("d", map(values.__getitem__, self._rows))

    def select(self, indices: Sequence[int]) -> "MetricTable":
        """The table of some of its lines, by their increasing numbers in this table."""
        if len(indices) == len(self):
            return self
        return MetricTable(self._numbers, array("q", map(self._rows.__getitem__, indices)))


def read_metrics(path: Path) -> MetricTable:
    """Reads the lines of a metrics.jsonl; lines that are cut or unfinished are skipped."""
    numbers = array("d")
    try:
        with open(path, "rb") as file:
            for text in file:
                line = _parse(text)
                if isinstance(line, dict):
                    _append(numbers, line)
    except FileNotFoundError:
        pass
    return MetricTable(numbers, range(len(numbers) // _WIDTH))


def _parse(text: bytes) -> Any:
    try:
        return from_json(text)  # three times as fast as json.loads
    except ValueError:
        try:
            return json.loads(text.decode("utf-8", errors="replace"))
        except ValueError:
            return None


def _append(numbers: "array[float]", line: Line) -> None:
    values = list(map(line.get, KEYS, _MISSING))
    if not isinstance(values[_STEP], int):
        values[_STEP] = math.nan
    try:
        numbers.fromlist(values)
    except TypeError:  # a value is not a number
        numbers.fromlist(list(map(number, values)))


def column(lines: Sequence[Line], key: str) -> "array[float]":
    """The values of a key of all lines; NaN where it is not a number, and for steps also where it is not an integer."""
    if isinstance(lines, MetricTable):
        return lines.column(key)
    values: Iterable[Any] = (line.get(key) for line in lines)
    if key == "step":
        values = (value if isinstance(value, int) else None for value in values)
    return array("d", map(number, values))
