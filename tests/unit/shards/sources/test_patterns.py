"""Regular expressions of presets: what they match, and the limit on the time of a match."""

import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from published_sets import jpegs, text

from shards.sources import patterns
from shards.sources.patterns import MOST_CHARS, Pattern
from uniemox_dist.core.errors import UserError

SLOW = {
    r"(?P<x>(a+)+)b": "a" * 60,
    r"(?P<x>(a|a)*b)": "a" * 60,
    r"(?P<x>(\w+)\2+$)": "ab" * 20_000 + "c",
    r"(?P<x>.*.*.*.*b)": "a" * 20_000,
    r"(?P<x>(?:(?:a{1,1000}){1,1000}){1,1000}b)": "a" * 3000,
}


@pytest.fixture(autouse=True)
def _short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "LIMIT_S", 0.2)


def test_a_pattern_is_searched_or_matched_with_the_whole_text() -> None:
    pattern = Pattern("name", r"(?P<year>\d{4})_(?P<what>[a-z]+)")
    assert pattern.groups == ("year", "what")
    match = pattern.search("x/2005_dog.jpg")
    assert match is not None
    assert match.groupdict() == {"year": "2005", "what": "dog"}
    assert pattern.fullmatch("2005_dog.jpg") is None
    assert pattern.fullmatch("2005_dog") is not None
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_a_very_long_text_does_not_match() -> None:
    assert Pattern("line", "(?P<x>a+)").search("a" * MOST_CHARS) is not None
    assert Pattern("line", "(?P<x>a+)").search("a" * (MOST_CHARS + 1)) is None


@pytest.mark.parametrize("pattern", SLOW)
def test_a_match_that_takes_too_long_is_one_line_that_names_the_pattern(pattern: str) -> None:
    with pytest.raises(UserError) as caught:
        Pattern("patterns.name", pattern).search(SLOW[pattern])
    assert str(caught.value) == (
        f"--preset: patterns.name={pattern!r}: takes more than 0.2 s for the text {SLOW[pattern][:60]!r}; simplify it, "
        "such as (a+)+ to a+"
    )
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_other_threads_match_without_a_timer() -> None:
    found: list[bool] = []
    thread = threading.Thread(
        target=lambda: found.append(Pattern("name", "(?P<x>a)").search("a") is not None)
    )
    thread.start()
    thread.join()
    assert found == [True]


TABLE = "layout: table\ntables:\n  - {files: t.csv, columns: {path: name}, "


@pytest.mark.parametrize(
    ("preset", "field"),
    [
        (TABLE + "patterns: {name: '(?P<x>(\\w+)+)!$'}}", "patterns.name="),
        (TABLE.replace("columns: {path: name}, ", "") + "line: '(?P<path>(\\w+,?)+)!'}", "line="),
        ("labels: [calm]\nname: '(?P<label>(\\w+)+)!$'", "name="),
        ("labels: [calm]\n" + TABLE[14:] + "patterns: {name: '(?P<x>(\\w+)+)!$'}}", "patterns.name="),
    ],
)  # fmt: skip
def test_a_slow_pattern_ends_the_pack(preset: str, field: str, tmp_path: Path, command: Any) -> None:
    jpegs(tmp_path / "set", f"calm/{'a' * 60}.jpg")
    text(tmp_path / "set/t.csv", "name,x", "a" * 60 + ",1")
    text(tmp_path / "mine.yaml", preset)
    code, _, err = command("set out --preset mine.yaml")
    assert (code, err.count("\n")) == (2, 1), err
    assert err.startswith(f"uniemox: error: --preset: {field}")
    assert "takes more than 0.2 s for the text" in err
    assert not (tmp_path / "out").exists()
