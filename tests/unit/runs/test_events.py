"""The text of each kind of event, and the lines that runs write."""
# ruff: noqa: E501 (an event and its sentence are read side by side)

import json
from pathlib import Path
from typing import Any

import pytest

from uniemox_dist.runs.events.base import Event
from uniemox_dist.runs.events.jobs import JobStart, Restart
from uniemox_dist.runs.events.reading import CLASSES, describe, format_event
from uniemox_dist.runs.events.training import (
    BadSample,
    CheckpointSetAside,
    End,
    FaultEvent,
    FirstStep,
    Signal,
)


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"event": "start", "step": 0, "ranks": 16, "zero_stage": 2, "precision": "bf16", "teacher": "live", "host": "a", "hosts": ["a", "b"], "versions": {"torch": "2.11"}},
         "started at step 0 on 16 ranks, ZeRO-2; 2 hosts (a, b); bf16; teacher live; torch 2.11"),
        ({"event": "start", "step": 9, "ranks": 1, "precision": "fp32", "teacher": None, "host": "a", "hosts": ["a"]},
         "started at step 9 on 1 rank; host a; fp32"),
        ({"event": "resume", "step": 1000, "checkpoint": "step_00001000", "ranks": 2, "zero_stage": 1},
         "resumed from step_00001000, a checkpoint of 2 ranks, ZeRO-1"),
        ({"event": "convert", "step": 1000, "from_ranks": 2, "from_zero_stage": 1, "ranks": 3, "zero_stage": 3},
         "converted the checkpoint of step 1,000 from 2 ranks, ZeRO-1 to 3 ranks, ZeRO-3"),
        ({"event": "init", "init_from": "mae.pth", "layout": "MAE's names", "loaded": 150, "missing": ["x"], "unexpected": [], "resampled": {}},
         "initial weights from mae.pth (MAE's names): 150 parameters loaded, 1 missing, 0 unexpected, 0 resampled"),
        ({"event": "save", "step": 100, "bytes": 37_900_000, "seconds": 0.154, "blocked_s": 0.02, "removed": ["step_00000080"]},
         "saved step 100: 37.9 MB in 0.15 s, training waited 0.02 s; removed step_00000080"),
        ({"event": "fault", "step": 7, "rank": 0, "error": "RuntimeError: a\nb", "ends": True},
         "fault at step 7 on rank 0: RuntimeError: a b; it ended this attempt"),
        ({"event": "fault", "error": "part_00000 was altered", "set_aside": "step_00000003.damaged"},
         "fault: part_00000 was altered; it was set aside as step_00000003.damaged"),
        ({"event": "fault", "rank": 5, "host": "n2", "error": "it took too long", "ends": True},
         "fault on rank 5 of n2: it took too long; it ended this attempt"),
        ({"event": "fault", "error": "20 steps in a row were skipped", "ends": True, "restart": False},
         "fault: 20 steps in a row were skipped; it ended this attempt; another attempt would fail in the same way"),
        ({"event": "fault", "step": 7, "damaged": "slot 3: a.tar b"}, "replaced a damaged picture at step 7: slot 3: a.tar b"),
        ({"event": "skip", "step": 7, "in_a_row": 2, "loss": "nan", "where": "loss"}, "skipped step 7: the loss was not finite (loss nan); 2 steps in a row"),
        ({"event": "skip", "step": 7, "in_a_row": 1, "loss": 2.5, "where": "gradients"}, "skipped step 7: the gradients were not finite (loss 2.5)"),
        ({"event": "spike", "step": 7, "loss": 9.0, "median": 2.0}, "loss spike at step 7: 9, 4.5 times the running median 2"),
        ({"event": "straggler", "step": 7, "rank": 0, "host": "n2", "seconds": 1.5, "median_s": 0.5}, "rank 0 on n2 at step 7 is slow: 1.5 s per step, 3.0 times the median 0.5 s"),
        ({"event": "signal", "step": 7, "signal": "SIGUSR2", "saved": True}, "stopped by SIGUSR2 after step 7, with a complete save"),
        ({"event": "signal", "step": 7, "signal": None, "saved": False}, "stopped after step 7, without a save"),
        ({"event": "restart", "attempt": 1, "left": 2, "code": -9, "step": 90}, "the launcher restarts the ranks after exit code -9, from step 90 (attempt 1, 2 left without progress)"),
        ({"event": "job", "job_id": 17, "restarts": 0, "nodes": ["n1", "n2"], "ranks": 16, "idle": 0}, "Slurm job 17: 16 ranks on 2 nodes (n1, n2)"),
        ({"event": "job", "job_id": 17, "restarts": 2, "nodes": ["n1"], "ranks": 6, "idle": 2, "after": 16},
         "Slurm job 17, requeued 2 times, in place of job 16: 6 ranks on 1 node (n1); 2 tasks idle"),
        ({"event": "requeue", "step": 40, "job_id": 17, "by": "slurm"}, "job 17 was requeued by Slurm, continues from step 40"),
        ({"event": "requeue", "job_id": 17, "by": "job", "reason": "saved"}, "job 17 was requeued: saved"),
        ({"event": "resubmit", "job_id": 17, "nodes": ["n2"], "reason": "n2: fail"}, "job 17 was submitted again without n2: n2: fail"),
        ({"event": "started", "step": 40, "seconds": {"imports": 5.12, "first batch": 0.5, "total": 5.62}},
         "first step after step 40, 5.6 s after the start: imports 5.1, first batch 0.5"),
        ({"event": "started", "parts": {"first_batch": 0.5}}, "first step, 0.5 s after the start: first batch 0.5"),
        ({"event": "end", "step": 313}, "complete at step 313"),
        ({"event": "end", "step": 313, "reason": "no better for 5 validations"}, "complete at step 313: no better for 5 validations"),
        ({"event": "novel", "time": 3.0, "what": [1, 2]}, "novel: what 1, 2"),
        ({}, "None"),
    ],
)  # fmt: skip
def test_an_event_is_a_text_of(event: dict[str, Any], text: str) -> None:
    assert format_event(event) == text


def test_every_class_of_events_is_known_to_the_readers() -> None:
    assert set(CLASSES) == set(Event.__subclasses__())


@pytest.mark.parametrize("kind", sorted({found.kind for found in CLASSES}))
def test_an_event_with_missing_or_odd_values_still_has_a_text(kind: str) -> None:
    keys = ("step", "ranks", "hosts", "versions", "bytes", "seconds", "removed", "loss", "median", "rank", "host", "in_a_row", "code", "error", "missing", "job_id", "nodes", "idle", "restarts", "parts", "by", "after")  # fmt: skip
    for value in (None, "x", 3, 2.5, float("nan"), [], [None], {}, {"a": 1}, True):
        text = format_event({"event": kind, **dict.fromkeys(keys, value)})
        assert text
        assert "\n" not in text
    assert format_event({"event": kind})


def test_describe_returns_the_values_that_the_text_leaves_out() -> None:
    text, rest = describe({"time": 1, "event": "end", "step": 3, "more": "x"})
    assert (text, rest) == ("complete at step 3", {"more": "x"})


def test_the_page_about_run_folders_has_an_example_of_each_kind() -> None:
    page = (Path(__file__).parents[3] / "docs/run_folder.md").read_text(encoding="utf-8")
    blocks = page.split("```json\n")[1:]
    lines = [
        json.loads(line)
        for block in blocks
        for line in block.split("```")[0].splitlines()
        if '"event"' in line
    ]
    assert {line["event"] for line in lines} == {found.kind for found in CLASSES}
    for line in lines:
        text, rest = describe(line)
        assert text != line["event"]
        assert not rest.keys() - {"missing", "unexpected", "resampled", "versions", "write_s"}, (text, rest)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            FaultEvent(rank=1, error="boom", ends=True),
            {"event": "fault", "rank": 1, "error": "boom", "ends": True},
        ),
        (
            FaultEvent(step=7, error="save failed: x"),
            {"event": "fault", "step": 7, "error": "save failed: x"},
        ),
        (
            FaultEvent(error="x", ends=True, restart=False, code=2),
            {"event": "fault", "error": "x", "ends": True, "restart": False, "code": 2},
        ),
        (BadSample(step=7, damaged="a.tar b"), {"event": "fault", "step": 7, "damaged": "a.tar b"}),
        (
            CheckpointSetAside(error="altered", set_aside=None),
            {"event": "fault", "error": "altered", "set_aside": None},
        ),
        (
            Restart(attempt=2, left=1, code=1, step=None, reason="x", pause_s=1.0),
            {
                "event": "restart",
                "attempt": 2,
                "left": 1,
                "code": 1,
                "step": None,
                "reason": "x",
                "pause_s": 1.0,
            },
        ),
        (
            JobStart(job_id=17, restarts=0, nodes=["n1"], ranks=2, idle=0),
            {"event": "job", "job_id": 17, "restarts": 0, "nodes": ["n1"], "ranks": 2, "idle": 0},
        ),
        (
            Signal(step=5, signal=None, saved=False),
            {"event": "signal", "step": 5, "signal": None, "saved": False},
        ),
        (End(step=5), {"event": "end", "step": 5}),
        (
            FirstStep(step=0, seconds={"total": 1.0}),
            {"event": "started", "step": 0, "seconds": {"total": 1.0}},
        ),
    ],
)
def test_the_keys_of_a_written_event(event: Event, line: dict[str, Any]) -> None:
    """Other programs read these keys: a required field is written even if it is null, an optional one only if set."""
    assert event.to_line() == line
