"""Values of a CSV's cells: numbers, lists of captions, and the words that other programs write for missing values.

- `MISSING` words are missing values in the columns of captions, label, split, persons, distribution, votes, valence,
  arousal and dominance. In attributes only `NEVER_TEXT` are, because `None` may be a value there. Columns of single
  shares keep them, so that a row whose shares are not all numbers is refused.
- A caption cell with a list of texts, in JSON or as Python or NumPy prints it, holds several captions. Each cell is
  decided for itself. Every other cell is one caption, such as `[applause] a man`.
- A column without a name is left out; it is the index that pandas writes.

Notes in the summary count such cells by column.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from shards.sources import Findings
from shards.sources.columns import DESCRIBING, share_columns
from shards.sources.tables import parse_number
from shards.sources.values import load_json
from uniemox_dist.core.formatting import counted

NEVER_TEXT = frozenset(("NaN", "nan", "<NA>", "\\N", "#N/A"))
"""Words for missing values that are no text of a person."""
MISSING = NEVER_TEXT | {"NA", "N/A", "n/a", "null", "NULL", "None"}
"""Words for missing values, as pandas and databases write them."""
_CAPTIONS = ("caption", "captions")
_ESCAPE = r"""\\[\\'"nrtabfvxuU]"""
_ITEM = rf"""(?:'(?:[^'\\\n]|{_ESCAPE})*'|"(?:[^"\\\n]|{_ESCAPE})*"|None|nan)"""
_ITEMS = re.compile(_ITEM)
_LIST = re.compile(rf"\[\s*{_ITEM}(?:(?:\s*,\s*|\s+){_ITEM})*(?:\s*,)?\s*\]")
"""A list of texts as Python prints it, or without commas as NumPy does."""
_LIKE_LIST = re.compile(r"""\[\s*['"].*\]""", re.DOTALL)


class CsvCells:
    """Converts the rows of one CSV, and counts cells for the notes."""

    def __init__(self, names: Mapping[str, str], columns: Sequence[str], findings: Findings) -> None:
        """
        Args:
            names: our names -> columns of the CSV.
            columns: all columns of the CSV.
        """
        self._counts = findings.cells
        self._texts = set(names.values())
        self._captions = {names[ours] for ours in _CAPTIONS if ours in names}
        self._missing = dict.fromkeys(columns, NEVER_TEXT)
        for ours, theirs in names.items():
            shares = share_columns(ours, theirs, columns)
            words = MISSING if ours in (*DESCRIBING, *_CAPTIONS) and not shares else frozenset()
            self._missing |= dict.fromkeys(shares.values() or [theirs], words)
        note = "a column without a name was left out; name it in the header to keep it"
        if "" in columns and note not in findings.notes:
            findings.notes.append(note)

    def convert(self, cells: Mapping[str, str]) -> dict[str, Any]:
        """The values of a row by column; missing ones are empty texts."""
        return {column: self._value(column, cell) for column, cell in cells.items() if column}

    def _value(self, column: str, cell: str) -> Any:
        word = cell.strip()
        if word in self._missing[column]:
            advice = "" if word in NEVER_TEXT else " (a text if the table is JSON Lines, Parquet or Arrow)"
            self._counts[column, f"with {word!r}: missing values{advice}"] += 1
            return ""
        if column not in self._texts:
            return parse_number(cell)
        if column in self._captions and word.startswith("[") and word.endswith("]"):
            if (found := parse_list(word)) is not None:
                self._counts[column, "with a list: each of its texts is a caption"] += 1
                return found
            if _LIKE_LIST.fullmatch(word):
                self._counts[column, "with brackets that hold no list of texts: one caption each"] += 1
        return cell


def parse_list(text: str) -> list[str | None] | None:
    """The texts of a list in JSON, or as Python or NumPy prints it; None if it is none, or has other items."""
    try:
        found = load_json(text)
    except ValueError:
        pass
    else:
        is_list = isinstance(found, list) and all(item is None or isinstance(item, str) for item in found)
        return found if is_list else None
    if not _LIST.fullmatch(text):
        return None
    try:
        return [
            None if item in ("None", "nan") else ast.literal_eval(item) for item in _ITEMS.findall(text[1:-1])
        ]
    except (ValueError, SyntaxError):
        return None


def write_cell_notes(findings: Findings) -> None:
    """Notes the counts of all CSVs, by column."""
    for (column, what), count in sorted(findings.cells.items()):
        findings.notes.append(f"{counted(count, 'cell')} of the column {column!r} {what}")
