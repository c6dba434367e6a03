"""The evaluation as a table for a page: a row per name, a column per metric, and the position of each interval."""

from pathlib import Path
from typing import Any

from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import is_number

WRITE = "write it with `uniemox evaluate protocol … --json`"
FIRST_ROWS = ("student", "untrained", "teacher", "colour histogram", "24x24 pixels")


def read_evaluation(path: Path) -> dict[str, Any]:
    """An evaluation as `uniemox evaluate protocol --json` writes it.

    Raises:
        UserError: if the file is missing or not an evaluation.
    """
    try:
        found = read_json(path)
        if found["format"] != "uniemox-evaluation" or found["format_version"] != 1:
            raise UserError(
                f"--evaluation={path}: is {found['format']} {found['format_version']}, not uniemox-evaluation 1; "
                f"{WRITE}"
            )
        table(found)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"--evaluation={path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        wrong = f"{type(error).__name__}: {error}"
        raise UserError(f"--evaluation={path}: is not an evaluation ({wrong}); {WRITE}") from None
    return dict(found)


def table(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Columns (primary metrics first) and rows of cells; a cell is None if a row has no value."""
    blank = {"better": "lower", "primary": False, "note": "", "n": None}
    metrics = [{**blank, "title": metric["name"], **metric} for metric in evaluation["metrics"]]
    metrics.sort(key=lambda metric: not metric["primary"])
    cells = [_column(metric) for metric in metrics]
    given = [row for column in cells for row in column]
    names = [row for row in FIRST_ROWS if row in given] + [
        row for row in dict.fromkeys(given) if row not in FIRST_ROWS
    ]
    return {"metrics": metrics, "rows": [(name, [column.get(name) for column in cells]) for name in names]}


def _column(metric: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Row name -> cell: texts, whether it is the best, and the positions of low, value and high on a scale of
    0…100."""
    rows = {row["row"]: row for row in metric["rows"] if is_number(row.get("value"))}
    spans = {
        name: [float(row[k]) if is_number(row.get(k)) else None for k in ("low", "high")]
        for name, row in rows.items()
    }
    ends = [x for span in spans.values() for x in span if x is not None] + [
        row["value"] for row in rows.values()
    ]
    if not rows:
        return {}
    first, width = min(ends), (max(ends) - min(ends)) or 1.0
    best = (max if metric["better"] == "higher" else min)(row["value"] for row in rows.values())
    digits = 2 if max(map(abs, ends)) >= 10 else 3 if max(map(abs, ends)) >= 0.2 else 4

    def text(value: float) -> str:
        return f"{value:.{digits}f}".replace("-", "−")

    def cell(value: float, low: float | None, high: float | None) -> dict[str, Any]:
        low_, high_ = (value if end is None else end for end in (low, high))
        return {
            "value": text(value),
            "interval": None if low is None or high is None else f"{text(low)} – {text(high)}",
            "best": value == best,
            "at": [round(3 + 94 * (x - first) / width, 2) for x in (low_, value, high_)],
        }

    return {name: cell(float(row["value"]), *spans[name]) for name, row in rows.items()}
