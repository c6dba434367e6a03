"""YAML from elsewhere is read, or refused with one line, in bounded time and memory."""

from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from uniemox_dist.config.load import load_config
from uniemox_dist.config.yaml_text import MAX_CHARACTERS, Dumper, parse_yaml
from uniemox_dist.core.errors import UserError

ALIASES = "\n".join(
    ["a: &a [x,x,x,x,x,x,x,x,x]"]
    + [f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]" for before, name in zip("abcdefgh", "bcdefghi")]
)
"""1 kB that stands for 9^9 values."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALIASES, "f.yaml: line 6: has more than 100000 values"),
        ("a: &a [*a]", "f.yaml: line 1: contains itself"),
        ("&a {*a : b}", "f.yaml: line 1: contains itself"),
        ("[" * 100_000, "f.yaml: is nested more deeply than 50 levels"),
        ("- " * 60 + "x", "f.yaml: line 1: is nested more deeply than 50 levels"),
        ("x: " + "1" * 5000, "f.yaml: is not valid YAML: Exceeds the limit"),
        ("x" * (MAX_CHARACTERS + 1), "f.yaml: has 1048577 characters of YAML, more than 1048576"),
        ("a: !!python/object/apply:os.system [ls]", "f.yaml: line 1 is not valid YAML: could not determine"),
        ("a: \x1b[2J", "f.yaml: is not valid YAML: unacceptable character"),
        ("a: !!int x", "f.yaml: is not valid YAML: invalid literal"),
        ("--- a\n--- b", "f.yaml: line 2 is not valid YAML: but found another document"),
        ("a: 1\na: 2", "f.yaml: line 2: the key 'a' is given twice"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "f.yaml")
    assert str(caught.value).startswith(says)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-10-10", "2024-10-10"),
        ("2024-10-10 12:00:00", "2024-10-10 12:00:00"),
        ("12:30", "12:30"),
        ("1e-4", 1e-4),
        ("on", "on"),
        ("09", "09"),
        ("1_000", 1000),
        ("{a: &x [1, 2], b: *x}", {"a": [1, 2], "b": [1, 2]}),
        ("", None),
    ],
)
def test_values_are_read_as_people_mean_them_and_written_so_that_all_read_them_alike(
    text: str, value: Any
) -> None:
    assert parse_yaml(text, "f.yaml") == value
    written = yaml.dump(value, Dumper=Dumper)
    assert parse_yaml(written, "f.yaml") == yaml.safe_load(written) == value


def test_a_run_may_be_named_after_a_date() -> None:
    assert load_config("demo", ["run.name=2024-10-10"]).run.name == "2024-10-10"


trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(trees)
def test_what_is_written_is_read(value: Any) -> None:
    assert parse_yaml(yaml.dump(value, Dumper=Dumper), "f.yaml") == value


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab01-.:,[]{}&*!|>?#%@'\"<= \n\t\x00\x85é"), max_size=60))
def test_any_text_is_read_or_refused_with_one_line(text: str) -> None:
    try:
        parse_yaml(text, "f.yaml")
    except UserError as error:
        assert str(error).isprintable(), text  # noqa: PT017
