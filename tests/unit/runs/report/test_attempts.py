"""The page's section "How the run went": the drawing and its figures, from a made-up run with events of every kind."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
from event_lines import write_event
from told_run import told_run

from uniemox_dist.runs.events.reading import CLASSES
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.report.attempts import (
    KILLED_LANE,
    MOST_MARKS,
    collect_lanes,
    draw_timeline,
    list_figures,
    make_attempt_rows,
    make_event_row,
)
from uniemox_dist.runs.report.page import write_report


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return told_run(tmp_path_factory.mktemp("runs") / "told")


def section(folder: RunFolder) -> str:
    """The text of the section on the page, without its drawing."""
    page = write_report(folder.path).read_text(encoding="utf-8")
    html = page.split('<h2 id="went">')[1].split("<section>")[0]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)))


def test_the_figures_count_attempts_losses_and_saves(told: RunFolder) -> None:
    found = {name: (value, remark) for name, value, remark, _ in list_figures(History(read_lines(told.metrics), read_lines(told.events)))}  # fmt: skip  # noqa: E501
    assert found == {
        "Attempts": ("4", "56 min 02 s between them"),
        "Restarts": ("1", "by the launcher"),
        "Stops": ("1", "by signals"),
        "Killed": ("1", "no exit message"),
        "Faults": ("2", "1 picture replaced"),
        "Steps lost": ("467", "repeated after a resume"),
        "Skipped": ("2", "steps, not finite"),
        "Loss spikes": ("1", "events"),
        "Saves": ("17", "1.3 GB each"),
        "A save takes": ("3.1 s", "median"),
        "Training waits for it": ("420 ms", "median"),
    }


def test_the_page_describes_the_timeline_and_names_slow_hosts(told: RunFolder) -> None:
    text = section(told)
    assert (
        "Events below: saves (17), skipped (2), spikes (1), slow ranks (3), pictures replaced (1), "
        "faults (2), killed (1), restarts (1), stops (1)."
    ) in text
    assert "steps drawn in red were lost" in text
    assert (
        "Slow ranks by host: node02 2 times, at most 2.1 × the median; node01 1 time, at most 1.6 × the median."
        in text
    )


def test_the_timeline_shades_each_attempt_and_draws_lost_steps_in_red(told: RunFolder) -> None:
    metrics, events = read_lines(told.metrics), read_lines(told.events)
    svg = draw_timeline(History(metrics, events))
    assert svg is not None
    assert svg.count("fill: var(--total); opacity: 0.07") == 4
    assert len(re.findall(r"stroke: var\(--bad\); stroke-width: 2.6", svg)) == 2
    assert ">hours since the first start<" in svg
    for word in ("saves", "killed", "restarts", "8,000"):
        assert f">{word}<" in svg
    assert "#00fe" not in svg
    assert len(svg) < 60_000


@pytest.mark.parametrize(
    ("seconds", "unit"), [(5, "seconds"), (300, "minutes"), (20_000, "hours"), (900_000, "days")]
)
def test_the_drawings_unit_fits_its_length(seconds: float, unit: str) -> None:
    events = [
        {"time": 100.0, "event": "start", "step": 0},
        {"time": 100.0 + seconds, "event": "end", "step": 9},
    ]
    svg = draw_timeline(History([], events))
    assert f">{unit} since the first start<" in str(svg)


def test_a_run_of_one_moment_is_drawn_and_one_without_a_start_is_not() -> None:
    events: list[dict[str, Any]] = [{"time": 100.0, "event": "start", "step": 0}]
    assert "seconds since" in str(draw_timeline(History([], events)))
    assert draw_timeline(History([], [])) is None
    assert list_figures(History([], [])) == []


def test_a_lane_of_a_long_run_has_a_limited_number_of_marks() -> None:
    events: list[dict[str, Any]] = [{"time": 0.0, "event": "start", "step": 0}]
    events += [{"time": float(i), "event": "save", "step": i} for i in range(1, 5000)]
    history = History([], events)
    assert [(lane.title, len(times)) for lane, times in collect_lanes(history)] == [("saves", 4999)]
    assert str(draw_timeline(history)).count("<use") <= MOST_MARKS + 50


def test_the_rows_of_the_timeline_keep_their_order() -> None:
    kinds = ("signal", "job", "requeue", "restart", "fault", "straggler", "spike", "skip", "save")
    events: list[dict[str, Any]] = [{"time": 0.0, "event": "start", "step": 0}]
    events += [{"time": 1.0 + i, "event": kind} for i, kind in enumerate((*kinds, "start"))]
    events += [{"time": 20.0, "event": "fault", "damaged": "a"}, {"time": 21.0, "event": "start", "step": 0}]
    assert [lane.title for lane, _ in collect_lanes(History([], events))] == [
        "saves", "skipped", "spikes", "slow ranks", "pictures replaced", "faults", "killed", "restarts", "requeues",
        "jobs start", "stops",
    ]  # fmt: skip


def test_each_row_of_the_timeline_has_its_own_position() -> None:
    lanes = {KILLED_LANE, *(found.lane for found in CLASSES if found.lane is not None)}
    assert len({lane.row for lane in lanes}) == len({lane.title for lane in lanes}) == len(lanes)


def test_a_run_without_faults_has_no_red_words(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    write_event(folder, "start", step=0, ranks=1)
    write_event(folder, "end", step=5)
    assert "red" not in section(folder).split(".")[0]


def test_a_row_of_events_has_its_text_and_the_values_that_the_text_leaves_out() -> None:
    row = make_event_row({"time": 0, "event": "end", "step": 5, "novel": [1, 2]})
    assert (row["time"], row["text"], row["facts"]) == (
        "1970-01-01 00:00:00",
        "complete at step 5",
        [("novel", "1, 2")],
    )


def test_the_page_distinguishes_a_running_run_from_a_killed_one(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.lock()
    os.utime(tmp_path / "lock", (0, 0))
    write_event(folder, "start", step=0, ranks=1)

    def state() -> str:
        page = write_report(tmp_path).read_text(encoding="utf-8")
        return re.sub(r"<[^>]+>", " ", page.split("<dt>State</dt>")[1].split("</dd>")[0]).split()[0]

    def killed() -> list[str]:
        return re.findall(r"killed \((\d)\)", section(folder))

    assert state() == "running"
    assert killed() == []
    folder.unlock()
    assert state() == "killed"
    assert killed() == ["1"]
    folder.lock()  # the next attempt, which has not begun to train
    os.utime(tmp_path / "lock", (4e9, 4e9))
    assert state() == "running"
    assert killed() == ["1"]
    folder.unlock()


def test_each_attempt_is_a_row_with_its_job_and_how_it_ended(told: RunFolder) -> None:
    events = read_lines(told.events)
    starts = [event for event in events if event["event"] == "start"]
    jobs = [
        {"event": "job", "job_id": job, "time": start["time"] - 9}
        for job, start in ((17, starts[0]), (18, starts[2]))
    ]
    restart = next(event for event in events if event["event"] == "restart")
    restart["reason"] = "rank 5 died of SIGKILL"
    rows = make_attempt_rows(History(read_lines(told.metrics), [*jobs, *events]))
    assert [
        (row["steps"], row["lost"], row["ranks"], row["stage"], row["job"], row["end"]) for row in rows
    ] == [
        (
            "0 – 3,247",
            "247 lost",
            "16",
            "ZeRO-2",
            "17",
            "a fault: RuntimeError: CUDA error: an illegal memory access",
        ),
        ("3,000 – 5,706", "", "16", "ZeRO-2", "17", "stopped by a signal"),
        ("5,706 – 7,220", "220 lost", "8", "ZeRO-1", "18", "killed (no exit message)"),
        ("7,000 – 8,200", "", "8", "ZeRO-1", "18", "continues, or ended without an event"),
    ]
    assert {row["hosts"] for row in rows} == {"node01, node02"}


def test_attempts_with_odd_events_are_still_rows() -> None:
    start = {"event": "start", "time": 5.0, "hosts": "n1", "ranks": [2], "zero_stage": "x"}
    (row,) = make_attempt_rows(History([], [{"event": "job", "time": 1.0, "job_id": None}, start]))
    assert (row["hosts"], row["ranks"], row["stage"], row["job"]) == ("n1", "2", "", "null")


def test_requeues_are_shown_if_there_are_any() -> None:
    events = [{"event": "start", "time": 1.0}, {"event": "requeue", "time": 2.0}]
    assert ("Requeues", "1", "of its job", "") in list_figures(History([], events))
