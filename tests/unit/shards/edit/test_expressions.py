"""Conditions on an index: the rows they select, the columns they read, and invalid ones."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.edit.expressions import NUMBERS, TEXTS, apply_filter, filter_columns, parse_filter
from shards.format.index import OPTIONAL, SCHEMA, read_index, write_index
from uniemox_dist.core.errors import UserError

PERSON = {"box": [0.1, 0.2, 0.5, 0.9], "score": 0.9, "labels": "{}"}


def row(key: str, width: int, height: int, label: str | None, captions: Any, persons: int) -> dict[str, Any]:
    return {
        "key": key,
        "sample_offset": 0,
        "sample_length": 4096,
        "image_offset": 512,
        "image_length": 1000 * width,
        "width": width,
        "height": height,
        "label": label,
        "captions": captions,
        "persons": [PERSON] * persons,
        "image_sha256": key * 64,
    }


ROWS = [
    row("a", 640, 480, "joy", ["A dog at a beach.", "Joy"], 1),
    row("b", 100, 300, "fear", [], 0),
    row("c", 256, 256, None, ["A cat."], 3),
    row("d", 300, 900, "awe", ["Dogs, seen from above."], 0),
]
TABLE = pa.Table.from_pylist(ROWS, SCHEMA)


def holds(text: str, table: pa.Table = TABLE) -> str:
    mask = apply_filter(table, text)
    assert mask.type == pa.bool_()
    assert mask.null_count == 0
    return "".join(table.filter(mask)["key"].to_pylist())


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("key == 'a'", "a"),
        ("'b' <= key < 'd'", "bc"),
        ("image_sha256 == '" + "c" * 64 + "'", "c"),
        ("width == 256", "c"),
        ("256.0 == width", "c"),
        ("width > height", "a"),
        ("width != 100", "acd"),
        ("100 < height <= 480", "abc"),
        ("width > -1 and width < +1e9", "abcd"),
        ("side >= 256", "acd"),
        ("side == 100", "b"),
        ("aspect == 3", "bd"),
        ("1 < aspect < 1.5", "a"),
        ("bytes >= 300_000", "ad"),
        ("image_length == bytes", "abcd"),
        ("persons == 0", "bd"),
        ("persons >= 1", "ac"),
        ("captions > 1", "a"),
        ("not captions", None),
        ("caption == ''", "b"),
        ("caption == 'A cat.'", "c"),
        ("'dog' in caption", "a"),
        ("'Dog' in caption or 'cat' in caption", "cd"),
        ("'dog' not in caption", "bcd"),
        ("'o' in label", "a"),
        ("width in [100, 256.0, 7]", "bc"),
        ("width not in (100, 256)", "ad"),
        ("width in []", ""),
        ("True", "abcd"),
        ("False", ""),
        ("persons > 0 and True", "ac"),
        ("not (side >= 256 and persons > 0)", "bd"),
        ("persons > 0 or side < 256 and captions == 0", "abc"),
        ("  side >= 256\n", "acd"),
    ],
)
def test_a_condition_selects_the_expected_rows(text: str, keys: str | None) -> None:
    if keys is None:
        with pytest.raises(UserError, match="'captions' is not a condition"):
            apply_filter(TABLE, text)
    else:
        assert holds(text) == keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("label == 'joy'", "a"),
        ("label != 'joy'", "bd"),
        ("not label == 'joy'", "bd"),
        ("not label != 'joy'", "a"),
        ("label in ['joy', 'awe']", "ad"),
        ("label not in ['joy', 'awe']", "b"),
        ("label not in []", "abd"),
        ("label < 'k'", "abd"),
        ("'j' not in label", "bd"),
        ("label is None", "c"),
        ("label is not None", "abd"),
        ("label is None or label != 'joy'", "bcd"),
        ("label == 'joy' or persons == 3", "ac"),
        ("label == 'joy' and persons == 3", ""),
        ("caption is None or persons is None", ""),
    ],
)
def test_a_row_without_label_answers_no_comparison(text: str, keys: str) -> None:
    assert holds(text) == keys


@pytest.mark.parametrize("table", [TABLE.slice(1), TABLE.slice(2, 1), TABLE.slice(0, 0)])
def test_a_part_of_an_index_is_judged_by_its_own_rows(table: pa.Table) -> None:
    expected = "".join(key for key in table["key"].to_pylist() if key in "acd")
    assert holds("caption != ''", table) == expected
    several = pa.concat_tables([table, TABLE, table])
    assert holds("caption != ''", several) == expected + "acd" + expected


def test_columns_that_are_null_count_as_nothing() -> None:
    empty = {**ROWS[0], "captions": None, "persons": None, "label": None}
    assert apply_filter(
        pa.Table.from_pylist([empty], SCHEMA), "captions == 0 and persons == 0 and caption == ''"
    ).to_pylist() == [True]


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("side >= 256 and persons > 0", {"width", "height", "persons"}),
        ("aspect < 2 or label is None", {"width", "height", "label"}),
        ("'x' in caption and captions < 3 and bytes > 1", {"captions", "image_length"}),
        ("key in ['a'] and image_sha256 != ''", {"key", "image_sha256"}),
        ("True", set()),
    ],
)
def test_only_the_needed_columns_are_named_and_are_enough(text: str, columns: set[str]) -> None:
    assert filter_columns(text) == columns
    if columns:
        assert apply_filter(TABLE.select(sorted(columns)), text) == apply_filter(TABLE, text)


def test_every_name_has_a_column_of_the_index() -> None:
    for name in (*TEXTS, *NUMBERS):
        assert filter_columns(f"{name} is not None") <= {*SCHEMA.names, *OPTIONAL.names}


def test_parquet_reads_by_the_expression(tmp_path: Path) -> None:
    write_index(tmp_path / "i.parquet", ROWS)
    read = pq.read_table(tmp_path / "i.parquet", filters=parse_filter("side >= 256 and label != 'joy'"))
    assert read["key"].to_pylist() == ["d"]


VALID = (
    "key, label, image_sha256, caption, width, height, side, aspect, bytes, image_length, persons, captions"
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("widht > 3", f"widht: unknown name; did you mean width? valid are {VALID}"),
        ("zzz == 1", f"zzz: unknown name; valid are {VALID}"),
        ("width == 'x'", "width and 'x': cannot compare a text with a number"),
        ("label < 3", "label and 3: cannot compare a text with a number"),
        ("label == width", "label and width: cannot compare a text with a number"),
        ("1 < 2 < width", "1 and 2: one side must be a column"),
        ("3 in [3]", "3 is a constant; use a column"),
        ("None is None", "'None' is neither a column nor a number nor a text"),
        ("label == None", "use None with `is` and `is not` only"),
        ("label in ['joy', None]", "a list must not contain None; add `or … is None`"),
        ("label is 'joy'", "use `is` with None only, and == otherwise"),
        ("width in [1, 'x']", "the list for width must contain numbers only"),
        ("label in ['joy', key]", "the list for label must contain texts only"),
        ("label in 'joy'", "`in` takes a list such as ['joy', 'awe'], not 'joy'"),
        ("3 in caption", "3 is not a text; write it in quotes"),
        ("'x' in persons", "persons is a number, not a text"),
        ("width == True", "'True' is neither a column nor a number nor a text"),
        ("-width < 3", "'-width' is neither a column nor a number nor a text"),
        ("label == -'x'", "\"-'x'\" is neither a column nor a number nor a text"),
        ("width * height > 3", "'width * height' is neither a column nor a number nor a text"),
        ("len(caption) > 3", "'len(caption)' is neither a column nor a number nor a text"),
        ("caption.x == ''", "'caption.x' is neither a column nor a number nor a text"),
        ("width > 1j", "'1j' is neither a column nor a number nor a text"),
        (f"width > 1{'0' * 310}", "a number is too large"),
        ("(x := width) > 3", "'(x := width)' is neither a column nor a number nor a text"),
        ("width", "'width' is not a condition"),
        ("lambda: True", "'lambda: True' is not a condition"),
        ("side > 3 & 1", "'3 & 1' is neither a column nor a number nor a text"),
        ("side >", "cannot be read (invalid syntax)"),
        ("side = 3", "cannot be read (invalid syntax"),
    ],
)
def test_a_mistake_is_named_with_an_example(text: str, problem: str) -> None:
    for function in (parse_filter, filter_columns, lambda text: apply_filter(TABLE, text)):
        with pytest.raises(UserError) as caught:
            function(text)
        shown = text if len(text) <= 200 else f"{text[:200]} …"
        assert str(caught.value).startswith(f"--filter {shown!r}: {problem}")
        assert str(caught.value).endswith("; such as: side >= 256 and label in ['joy', 'awe']")


def test_many_values_are_written_as_a_list() -> None:
    assert holds(f"key in {['b'] * 20_000}") == "b"
    assert holds(" or ".join(["key == 'b'"] * 499)) == "b"
    assert holds("0 < width" + " <= width" * 499) == "abcd"


@pytest.mark.parametrize(
    "text", [" or ".join(["key == 'b'"] * 20_000), "0 < width" + " <= width" * 5_000, "not " * 600 + "True"]
)
def test_too_many_parts_are_a_short_mistake(text: str) -> None:
    with pytest.raises(
        UserError, match="more than 500 parts; write many values as one list after `in`"
    ) as caught:
        parse_filter(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("text", ["not " * 100_000 + "True", "(" * 5_000 + "True" + ")" * 5_000])
def test_too_many_parts_in_each_other_are_a_short_mistake(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_filter(text)
    assert len(str(caught.value)) < 400


def test_shares_of_labels_and_values_of_pictures_are_compared(tmp_path: Path) -> None:
    more: list[dict[str, Any]] = [
        {"label_distribution": '{"a\\"b":0.5,"joy":0.5}', "valence": 2.5},
        {"label_distribution": '{"joy (mild)":1.0}', "valence": -1.0, "dominance": 3.0},
        {},
        {"label_distribution": '{"joy":1e-05,"été":0.99999}'},
    ]
    write_index(tmp_path / "i.parquet", [{**one, **two} for one, two in zip(ROWS, more)])
    table = read_index(tmp_path / "i.parquet")
    assert "arousal" not in table.column_names
    for text, keys in (
        ("distribution['joy'] >= 0.5", "a"),
        ("distribution['joy'] < 0.5", "d"),
        ("distribution['joy (mild)'] == 1", "b"),
        ("distribution['a\"b'] == 0.5", "a"),
        ("distribution['b'] > 0", ""),
        ("distribution['été'] > 0.9", "d"),
        ("distribution['joy'] is None", "bc"),
        ("distribution is None", "c"),
        ("distribution is not None and valence > 0", "a"),
        ("valence < 2", "b"),
        ("valence is None", "cd"),
        ("not valence < 2", "a"),
        ("arousal > 0 or dominance > 0", "b"),
    ):
        assert holds(text, table) == keys, text
    assert filter_columns("distribution['joy'] > 0 and valence > 0") == {"label_distribution", "valence"}
    with pytest.raises(UserError, match=r"distribution\[1\]: give a label in quotes"):
        parse_filter("distribution[1] > 0")
