"""A stop signal that Slurm sent before a rank had started."""

import time

import pytest

from uniemox_dist.core.signals import StopFlag


@pytest.mark.parametrize(
    ("ends", "lead", "received"),
    [
        ("-1", "180", "SIGUSR2"),
        ("170", "180", "SIGUSR2"),
        ("200", "180", None),  # it may have been sent already, but the time has not come
        ("3600", "180", None),
        ("", "180", None),
        ("170", "", None),
    ],
)
def test_who_starts_after_the_signal_goes_by_the_clock(ends: str, lead: str, received: str | None) -> None:
    stop = StopFlag()
    stop.watch_time_limit(
        {"UNIEMOX_ENDS": str(time.time() + float(ends)) if ends else "", "UNIEMOX_LEAD_S": lead}
    )
    assert stop.received == received


def test_the_clock_is_checked_again_after_an_early_signal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stop = StopFlag()
    stop.watch_time_limit({"UNIEMOX_ENDS": str(time.time() + 200), "UNIEMOX_LEAD_S": "180"})
    assert not stop
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 30)
    assert stop.received == "SIGUSR2"
