"""Conditions on the rows of an index, as `shards select --filter` takes them: `side >= 256 and persons > 0`.

The syntax is a small part of Python's; it is parsed, never evaluated: comparisons (also chained), `in`, `and`, `or`,
`not`, `is None`, numbers, texts, True and False. Names are columns of the index, and values derived from them:

| name | meaning |
|---|---|
| key, label, image_sha256 | texts |
| width, height | pixels, upright |
| side, aspect | shorter side in pixels; longer over shorter side |
| bytes, image_length | of the encoded picture |
| persons, captions | their number |
| valence, arousal, dominance | of the picture, if the source states them |
| distribution['joy'] | the share of a label in the sample's distribution |
| distribution | only as `distribution is None` and `distribution is not None` |
| caption | the first one, "" if there is none; `"dog" in caption` searches it, case-sensitively |

As in SQL, a row without label, value or share matches no comparison: `label != 'joy'`, `label not in ['joy']` and
`not label == 'joy'` leave a row without label out, just as `label == 'joy'` does. `label is None` finds such rows, so
`label is None or label != 'joy'` selects everything except joy.
"""

import ast
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from re import escape
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from shards.format.index import OPTIONAL
from shards.format.sample import DIMENSIONS
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import canonical_json

TEXTS = ("key", "label", "image_sha256", "caption")
NUMBERS = ("width", "height", "side", "aspect", "bytes", "image_length", "persons", "captions", *DIMENSIONS)
_SOURCES = {
    "side": ("width", "height"),
    "aspect": ("width", "height"),
    "bytes": ("image_length",),
    "caption": ("captions",),
}
"""The index columns from which a name is derived, unless it is the column of that name."""
_MOST_PARTS = 500
"""Arrow evaluates expressions recursively, and crashes if they are some thousands deep."""
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


def parse_filter(text: str) -> pc.Expression:
    """Parses a condition over the columns of an index. It is null for a row whose missing label is compared.

    Raises:
        UserError: if the condition is illegal.
    """
    return _parse(text)[0]


def filter_columns(text: str) -> set[str]:
    """The columns of the index that the condition needs.

    Raises:
        UserError: as `parse_filter`.
    """
    return _parse(text)[1]


def apply_filter(table: pa.Table, text: str) -> pa.ChunkedArray:
    """For each row of an index, or of its `filter_columns`, whether the condition holds; null counts as False.

    Raises:
        UserError: as `parse_filter`.
    """
    for field in OPTIONAL:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(table.num_rows, field.type))
    holds = pc.coalesce(parse_filter(text), pc.scalar(False))
    return ds.dataset(table).to_table(columns={"holds": holds}, use_threads=False)["holds"]


@dataclass(frozen=True)
class _Operand:
    """A side of a comparison."""

    value: Any
    """An expression of a column, or a constant."""
    is_text: bool
    is_column: bool

    @property
    def expression(self) -> pc.Expression:
        return self.value if self.is_column else pc.scalar(self.value)


def _parse(text: str) -> tuple[pc.Expression, set[str]]:
    parser = _Parser(text)
    try:
        return parser.condition(ast.parse(text.strip(), mode="eval").body), parser.columns
    except (RecursionError, MemoryError):
        raise parser.mistake("nested too deeply") from None
    except (SyntaxError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise parser.mistake(f"cannot be read ({getattr(error, 'msg', error)})") from None


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.columns: set[str] = set()
        self.parts = 0

    def mistake(self, problem: str) -> UserError:
        shown = self.text if len(self.text) <= 200 else f"{self.text[:200]} …"
        return UserError(f"--filter {shown!r}: {problem}; such as: side >= 256 and label in ['joy', 'awe']")

    def condition(self, node: ast.expr) -> pc.Expression:
        """The expression of a condition: a column of booleans."""
        self.parts += len(node.ops) if isinstance(node, ast.Compare) else 1
        if self.parts > _MOST_PARTS:
            raise self.mistake(f"more than {_MOST_PARTS} parts; write many values as one list after `in`")
        if isinstance(node, ast.BoolOp):
            values = [self.condition(value) for value in node.values]
            return reduce(and_ if isinstance(node.op, ast.And) else or_, values)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return ~self.condition(node.operand)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [self._compare(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:])]
            return reduce(and_, pairs)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            return pc.scalar(node.value)
        raise self.mistake(f"{ast.unparse(node)!r} is not a condition")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> pc.Expression:
        if isinstance(op, ast.Is | ast.IsNot):
            if not _is_none(right):
                raise self.mistake("use `is` with None only, and == otherwise")
            if isinstance(left, ast.Name) and left.id == "distribution":
                self.columns.add("label_distribution")
                missing = pc.field("label_distribution").is_null()
            else:
                missing = self._column_operand(left).value.is_null()
            return missing if isinstance(op, ast.Is) else ~missing
        if isinstance(op, ast.In | ast.NotIn):
            found = self._contains(left, right)
            return found if isinstance(op, ast.In) else ~found
        if _is_none(left) or _is_none(right):
            raise self.mistake("use None with `is` and `is not` only")
        a, b = self._operand(left), self._operand(right)
        if a.is_text != b.is_text:
            raise self.mistake(
                f"{ast.unparse(left)} and {ast.unparse(right)}: cannot compare a text with a number"
            )
        if not (a.is_column or b.is_column):
            raise self.mistake(f"{ast.unparse(left)} and {ast.unparse(right)}: one side must be a column")
        return _COMPARE[type(op)](a.expression, b.expression)

    def _contains(self, left: ast.expr, right: ast.expr) -> pc.Expression:
        if isinstance(right, ast.Name) and isinstance(left, ast.Constant):
            column = self._operand(right)
            if not column.is_text:
                raise self.mistake(f"{right.id} is a number, not a text")
            if not isinstance(left.value, str):
                raise self.mistake(f"{left.value!r} is not a text; write it in quotes")
            return pc.match_substring(column.value, left.value)
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            raise self.mistake(f"`in` takes a list such as ['joy', 'awe'], not {ast.unparse(right)}")
        column = self._column_operand(left)
        if any(_is_none(item) for item in right.elts):
            raise self.mistake("a list must not contain None; add `or … is None`")
        items = [self._operand(item) for item in right.elts]
        if any(item.is_column or item.is_text != column.is_text for item in items):
            kind = "texts" if column.is_text else "numbers"
            raise self.mistake(f"the list for {ast.unparse(left)} must contain {kind} only")
        wanted = pa.array([item.value for item in items], pa.string() if column.is_text else pa.float64())
        found = column.value.isin(wanted)
        # isin returns False for null, which `not in` would turn into True.
        return pc.if_else(column.value.is_null(), pc.scalar(pa.scalar(None, pa.bool_())), found)

    def _column_operand(self, node: ast.expr) -> _Operand:
        operand = self._operand(node)
        if not operand.is_column:
            raise self.mistake(f"{ast.unparse(node)} is a constant; use a column")
        return operand

    def _operand(self, node: ast.expr) -> _Operand:
        sign = 1
        constant = node
        while isinstance(constant, ast.UnaryOp) and isinstance(constant.op, ast.USub | ast.UAdd):
            sign = -sign if isinstance(constant.op, ast.USub) else sign
            constant = constant.operand
        if isinstance(constant, ast.Constant):
            value = constant.value
            if isinstance(value, str) and constant is node:
                return _Operand(value, is_text=True, is_column=False)
            if isinstance(value, int | float) and not isinstance(value, bool):
                try:
                    return _Operand(sign * float(value), is_text=False, is_column=False)
                except OverflowError:
                    raise self.mistake("a number is too large") from None
        if isinstance(node, ast.Name):
            return _Operand(self._column(node.id), is_text=node.id in TEXTS, is_column=True)
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "distribution":
            return _Operand(self._share(node.slice), is_text=False, is_column=True)
        raise self.mistake(f"{ast.unparse(node)!r} is neither a column nor a number nor a text")

    def _share(self, node: ast.expr) -> pc.Expression:
        """The share of a label, from the JSON in the index; null for a row whose distribution lacks it."""
        if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            raise self.mistake(f"distribution[{ast.unparse(node)}]: give a label in quotes")
        self.columns.add("label_distribution")
        label = escape(canonical_json(node.value).decode())
        found = pc.extract_regex(pc.field("label_distribution"), f"[{{,]{label}:(?P<share>[^,}}]+)")
        return pc.struct_field(found, "share").cast(pa.float64())

    def _column(self, name: str) -> pc.Expression:
        if name not in TEXTS + NUMBERS:
            near = difflib.get_close_matches(name, TEXTS + NUMBERS, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise self.mistake(f"{name}: unknown name; {meant}valid are {', '.join(TEXTS + NUMBERS)}")
        sources = _SOURCES.get(name, (name,))
        self.columns.update(sources)
        field = pc.field(sources[0])
        if name == "caption":
            # A slice of fixed size is null for shorter lists; list_element alone would fail there.
            first = pc.list_element(pc.list_slice(field, 0, 1, return_fixed_size_list=True), 0)
            return pc.coalesce(first, pc.scalar(""))
        if name in TEXTS:
            return field
        if name in ("persons", "captions"):
            field = pc.coalesce(pc.list_value_length(field), pc.scalar(pa.scalar(0, pa.int32())))
        number = field.cast(pa.float64())  # so that all numbers can be compared
        if name in ("side", "aspect"):
            other = pc.field("height").cast(pa.float64())
            short, long = pc.min_element_wise(number, other), pc.max_element_wise(number, other)
            return short if name == "side" else pc.divide(long, short)
        return number


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
