"""The seconds from the start of a job to its first step, by parts."""

import time

import pytest

from uniemox_dist.train import startup
from uniemox_dist.train.startup import PARTS, StartupTimer, describe, read_process_start


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: 1000.0 + now[0])
    monkeypatch.setattr(startup, "read_process_start", lambda: 1094.0)
    return now


@pytest.mark.parametrize(
    ("began", "batch"),
    [("1091.5", {"batch script": 2.5}), ("1091,5", {"batch script": 2.5}), ("", {}), ("x", {})],
)
def test_every_second_belongs_to_one_part(clock: list[float], began: str, batch: dict[str, float]) -> None:
    seconds = StartupTimer({"UNIEMOX_BATCH_BEGAN": began})
    for doing in ("the preflight", "opening the data", "something else", "opening the teacher"):
        clock[0] += 1
        seconds.start_phase(doing)
    clock[0] += 0.5
    seconds.start("first step")
    clock[0] += 0.25
    parts = {
        "imports": 6.0,
        "meeting": 1.0,
        "preflight": 1.0,
        "data": 2.0,
        "teacher": 0.5,
        "first step": 0.25,
    }
    total = sum(batch.values()) + 10.75
    assert seconds.facts() == {**batch, **parts, "total": total}
    said = describe(seconds.facts())
    assert said.startswith(f"first step after {total:.1f} s: ")
    assert said.endswith("imports 6.0, meeting 1.0, preflight 1.0, data 2.0, teacher 0.5, first step 0.2")


def test_a_process_began_before_now_and_after_its_machine() -> None:
    with open("/proc/uptime", encoding="ascii") as file:
        up_s = float(file.read().split()[0])
    assert time.time() - up_s - 1 < read_process_start() <= time.time() + 0.1


def test_known_variables_include_those_that_set_up_announces() -> None:
    import inspect

    from uniemox_dist.train import loop, pretrain

    source = inspect.getsource(pretrain) + inspect.getsource(loop)
    assert all(f'expect("{doing}")' in source for doing in PARTS)
