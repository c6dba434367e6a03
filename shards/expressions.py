"""Conditions on the rows of an index, as `shards select --filter` takes them: `side >= 256 and persons > 0`.

Python's syntax, a small part of it, parsed and never evaluated: comparisons (also chained), `in`, `and`, `or`, `not`,
`is None`, numbers and texts. Names are columns of the index, and what follows from them:

| name | what |
|---|---|
| key, label, image_sha256 | texts |
| width, height | pixels, upright |
| side, aspect | shorter side in pixels; longer over shorter side |
| bytes | of the encoded picture |
| persons, captions | how many |
| caption | the first one, "" without any; `"dog" in caption` looks for a part of it |
"""

import ast
import difflib
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from uniemox_dist.runtime.errors import UserError

TEXTS = ("key", "label", "image_sha256", "caption")
NUMBERS = ("width", "height", "side", "aspect", "bytes", "persons", "captions")
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}


def apply_filter(table: pa.Table, text: str) -> pa.ChunkedArray:
    """For each row whether the condition holds. Where a row has no label, every comparison with it is false, `!=`
    too, as in SQL; `label is None` finds such rows.

    Raises:
        UserError: naming what is wrong with the condition.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _mistake(text, f"cannot be read ({getattr(error, 'msg', error)})") from None
    found = _Evaluation(table, text).condition(tree)
    return pc.fill_null(found, False)


def _mistake(text: str, problem: str) -> UserError:
    return UserError(f"--filter {text!r}: {problem}; such as: side >= 256 and label in ['joy', 'awe']")


class _Evaluation:
    def __init__(self, table: pa.Table, text: str) -> None:
        self.table, self.text = table, text

    def condition(self, node: ast.expr) -> Any:
        """A column of truth values."""
        if isinstance(node, ast.BoolOp):
            join = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            values = [self.condition(value) for value in node.values]
            result = values[0]
            for value in values[1:]:
                result = join(result, value)
            return result
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self.condition(node.operand))
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            pairs = [self._compare(a, op, b) for a, op, b in zip(sides, node.ops, sides[1:])]
            result = pairs[0]
            for pair in pairs[1:]:
                result = pc.and_kleene(result, pair)
            return result
        raise _mistake(self.text, f"{ast.unparse(node)!r} is no condition")

    def _compare(self, left: ast.expr, op: ast.cmpop, right: ast.expr) -> Any:
        if isinstance(op, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise _mistake(self.text, "`is` goes with None only; compare with ==")
            missing = pc.is_null(self._value(left)[0])
            return missing if isinstance(op, ast.Is) else pc.invert(missing)
        if isinstance(op, ast.In | ast.NotIn):
            found = self._contains(left, right)
            return found if isinstance(op, ast.In) else pc.invert(found)
        (a, a_text), (b, b_text) = self._value(left), self._value(right)
        if a_text != b_text:
            raise _mistake(self.text, f"{ast.unparse(left)} and {ast.unparse(right)}: a text and a number")
        if isinstance(a, pa.Scalar) and isinstance(b, pa.Scalar):
            raise _mistake(self.text, f"{ast.unparse(left)} and {ast.unparse(right)}: name a column")
        return _COMPARE[type(op)](a, b)

    def _contains(self, left: ast.expr, right: ast.expr) -> Any:
        if isinstance(right, ast.Name) and isinstance(left, ast.Constant) and isinstance(left.value, str):
            column, is_text = self._value(right)
            if not is_text:
                raise _mistake(self.text, f"{right.id} is a number, and holds no text")
            return pc.match_substring(column, left.value)
        if not isinstance(right, ast.List | ast.Tuple | ast.Set):
            raise _mistake(self.text, f"`in` takes a list such as ['joy', 'awe'], not {ast.unparse(right)}")
        column, is_text = self._value(left)
        constants = [self._value(item) for item in right.elts]
        if any(not isinstance(value, pa.Scalar) or text != is_text for value, text in constants):
            kind = "texts" if is_text else "numbers"
            raise _mistake(self.text, f"{ast.unparse(left)} is looked for among {kind} only")
        values = [value.as_py() for value, _ in constants]
        found = pc.is_in(column, value_set=pa.array(values, pa.string() if is_text else pa.float64()))
        return pc.if_else(pc.is_null(column), pa.scalar(None, pa.bool_()), found)

    def _value(self, node: ast.expr) -> tuple[Any, bool]:
        """A column or constant, and whether it is a text."""
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value, is_text = self._value(node.operand)
            if not is_text and isinstance(value, pa.Scalar):
                return pa.scalar(-value.as_py()), False
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return pa.scalar(node.value), True
            if isinstance(node.value, int | float) and not isinstance(node.value, bool):
                return pa.scalar(float(node.value)), False
        if isinstance(node, ast.Name):
            return self._column(node.id), node.id in TEXTS
        raise _mistake(self.text, f"{ast.unparse(node)!r} is neither a column nor a number nor a text")

    def _column(self, name: str) -> Any:
        table = self.table
        if name in ("key", "label", "image_sha256"):
            return table[name]
        if name in ("width", "height"):
            return pc.cast(table[name], pa.float64())
        if name in ("side", "aspect"):
            sides = [pc.cast(table["width"], pa.float64()), pc.cast(table["height"], pa.float64())]
            short, long = pc.min_element_wise(*sides), pc.max_element_wise(*sides)
            return short if name == "side" else pc.divide(long, short)
        if name == "bytes":
            return pc.cast(table["image_length"], pa.float64())
        if name in ("persons", "captions"):
            return pc.cast(pc.fill_null(pc.list_value_length(table[name]), 0), pa.float64())
        if name == "caption":
            first = [captions[0] if captions else "" for captions in table["captions"].to_pylist()]
            return pa.chunked_array([pa.array(first, pa.string())])
        near = difflib.get_close_matches(name, TEXTS + NUMBERS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise _mistake(self.text, f"{name}: not known; {meant}valid are {', '.join(TEXTS + NUMBERS)}")
