"""CSV files as the layouts read them: strictly, because a quote that is out of place swallows rows."""

import csv
from collections import Counter
from collections.abc import Callable, Iterator

from shards.storage import Place
from uniemox_dist.core.errors import UserError

_FIELD_BYTES = 1 << 24


def csv_rows(
    path: Place, check_header: Callable[[list[str]], None]
) -> Iterator[tuple[int, int, dict[str, str]]]:
    """(row, counted from 0; the line it ends on; its cells by column) of a CSV, or TSV, in UTF-8 with a header.

    Raises:
        UserError: an empty file, a column that is there twice, a row that is longer or shorter than the header,
            quotes that do not match, or other bytes than UTF-8; and what `check_header` raises.
    """
    csv.field_size_limit(_FIELD_BYTES)
    try:
        with path.open("r", encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
            header = next(lines, [])
            if not header:
                raise UserError(f"SOURCE={path}: not a readable table: it is empty")
            check_header(header)
            check_names(header, path)
            for row, cells in enumerate(lines):
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise UserError(
                        f"SOURCE={path}: line {lines.line_num} has {len(cells)} values where the header has "
                        f"{len(header)}; mend its commas or quotes"
                    )
                yield row, lines.line_num, dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(
            f"SOURCE={path}: not a readable table: line {lines.line_num}: {error}; mend its quotes"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"SOURCE={path}: not a CSV in UTF-8 ({error.reason}); convert it") from None


def check_names(columns: list[str], path: Place) -> None:
    """Raises UserError for a table that has two columns of one name: one of them would be lost."""
    doubled = [name for name, count in Counter(columns).items() if count > 1]
    if doubled:
        raise UserError(
            f"SOURCE={path}: has {Counter(columns)[doubled[0]]} columns called {doubled[0]!r}; rename or remove all "
            "but one"
        )
