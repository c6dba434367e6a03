"""Slurm's notation of durations."""

import pytest

from uniemox_dist.scheduler.durations import parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("90", 5400),
        ("30:00", 1800),
        ("1:30", 90),
        ("2:30:00", 9000),
        ("2:00:01", 7201),
        ("1-0", 86400),
        ("1-12", 129600),
        ("1-12:30", 131400),
        ("1-12:30:00", 131400),
        ("1-02:03:04", 93784),
        (" 0:00 ", 0),
    ],
)
def test_each_form_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "UNLIMITED",
        "INFINITE",
        "NOT_SET",
        "INVALID",
        "N/A",
        "",
        "-1",
        "1:2:3:4",
        "1-",
        "1-2:3:4:5",
        "1.5",
        "2h",
        "٣",
    ],
)
def test_no_limit_and_other_texts_have_no_duration(text: str) -> None:
    assert parse_duration(text) is None
