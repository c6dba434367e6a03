"""The report: values on the page, from run folders written here line by line (no torch, no browser)."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_lines import write_event
from PIL import Image

from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.config.load import dump_yaml
from uniemox_dist.config.schema import (
    BatchConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    TeacherConfig,
)
from uniemox_dist.core.errors import EXIT_DONE, EXIT_USER, UserError
from uniemox_dist.core.files import write_json, write_text
from uniemox_dist.core.formatting import duration, moment
from uniemox_dist.runs.folder import RunFolder
from uniemox_dist.runs.history import History
from uniemox_dist.runs.report.curves import RESUMES, draw, show, thin_out
from uniemox_dist.runs.report.evaluation import read_evaluation, table
from uniemox_dist.runs.report.page import write_report
from uniemox_dist.runs.report.pictures import select_pictures

HOSTILE = "<script>alert('x')</script>&\"-->"


def metric(step: int, time: float, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    values = {"relation": 0.5, "similarity": 0.3, "reconstruction": 0.2, "lr": 1e-4, "grad_norm": 2.0}
    rates = {"samples_per_s": 40.0, "data_wait_share": 0.025, "epoch": step * 24 / 1200, "slots": step * 24}
    return {"step": step, "time": time, "loss": loss, **values, **rates, **more}


def config(**sections: Any) -> Config:
    base = {
        "run": RunConfig(max_steps=20),
        "data": DataConfig(path="shards/train", eval_path="shards/test"),
        "batch": BatchConfig(global_batch=24, micro_batch=12, streams=12),
        "teacher": TeacherConfig(name="shipped:demo"),
    }
    return Config(**{**base, **sections})


def sheet(path: Path, side: int = 12, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, 3 * side, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run that was killed at step 8, resumed from 6 with other losses, and ended at 20."""
    found = RunFolder(tmp_path / "emo")
    found.create()
    write_text(found.config, dump_yaml(config()))
    write_json(
        found.environment,
        {"host": "node7", "command": ["uniemox", "pretrain", "a b"], "versions": {"torch": "2.11"}},
    )
    for line in [metric(s, 100 + s, loss=9.0) for s in range(2, 9, 2)] + [
        metric(s, 200 + s) for s in range(8, 21, 2)
    ]:
        found.write_metric(line)
    events: list[dict[str, Any]] = [
        {"time": 100, "event": "start", "step": 0, "ranks": 2, "precision": "fp32", "host": "node7"},
        {"time": 106, "event": "save", "step": 6, "bytes": 4_200_000, "seconds": 0.131, "removed": []},
        {"time": 107.5, "event": "skip", "step": 7, "loss": "nan", "in_a_row": 1},
        {"time": 200, "event": "start", "step": 6, "ranks": 3, "precision": "bf16", "host": "node7"},
        {"time": 200, "event": "resume", "step": 6, "checkpoint": "step_00000006", "ranks": 2},
        {"time": 212.5, "event": "skip", "step": 13, "loss": "nan", "in_a_row": 1},
        {"time": 220, "event": "save", "step": 20, "removed": [f"step_{n}" for n in range(10)]},
        {"time": 220, "event": "end", "step": 20},
    ]
    found.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    for step in (5, 10, 20):
        sheet(found.samples / f"step_{step:08d}.png", seed=step)
    return found


def evaluation() -> dict[str, Any]:
    def rows(**values: float) -> list[dict[str, Any]]:
        return [{"row": r, "value": v, "low": v - 0.01, "high": v + 0.01} for r, v in values.items()]

    return {
        "format": "uniemox-evaluation",
        "format_version": 1,
        "release": "emo-release",
        "data": {"test": {"path": "shards/test", "identity": "ab", "samples": 348}},
        "bootstrap": {"resamples": 1000, "unit": "family", "confidence": 0.95},
        "metrics": [
            {"name": "probe", "title": "Linear probe", "better": "higher", "primary": False, "n": 28,
             "rows": rows(teacher=0.83, student=0.61)},
            {"name": "masked_mse", "title": "Masked MSE", "better": "lower", "primary": True,
             "note": "mask 0.75",
             "rows": [*rows(**{"linear interpolation": 0.044, "student": 0.03}),
                      {"row": "untrained", "value": None}]},
        ],
        "verdict": ["The student does not beat the teacher in Linear probe."],
    }  # fmt: skip


class Page(HTMLParser):
    """Start tags with their attributes, and the text outside of styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._style = "", False
        self.html = path.read_text(encoding="utf-8")
        self.feed(self.html)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._style else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_a_resumed_run_keeps_the_later_line_of_each_step(folder: RunFolder) -> None:
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    past = History(lines, events)
    assert [(line["step"], line["loss"]) for line in past.lines] == [
        *((s, 9.0) for s in (2, 4, 6)), *((s, 1.0) for s in range(8, 21, 2))
    ]  # fmt: skip
    assert (past.resumes, past.skips) == ([6], [13])


def test_lines_beyond_a_resumed_checkpoint_are_discarded_at_once() -> None:
    lines = [metric(s, 100 + s) for s in range(1, 9)]
    starts = [{"time": 100, "event": "start", "step": 0}, {"time": 200, "event": "start", "step": 6}]
    assert [line["step"] for line in History(lines, starts).lines] == [1, 2, 3, 4, 5, 6]
    # log_every changed from 1 to 10: steps 7 and 8 of the first attempt have no later lines.
    assert [line["step"] for line in History([*lines, metric(10, 210)], starts).lines] == [
        1,
        2,
        3,
        4,
        5,
        6,
        10,
    ]


def test_a_lost_start_event_gives_no_repeated_steps() -> None:
    steps = [1, 2, 3, 4, 3, 4, 5]
    past = History([metric(s, 100 + i, loss=i) for i, s in enumerate(steps)], [])
    assert [(line["step"], line["loss"]) for line in past.lines] == [(1, 0), (2, 1), (3, 4), (4, 5), (5, 6)]


def test_thin_keeps_means_and_extremes_and_leaves_gaps() -> None:
    values = np.array([1.0, 3.0, math.nan, math.nan, 5.0, math.nan])
    steps, mean, low, high = thin_out(np.arange(6), values, most=3)
    np.testing.assert_array_equal(steps, [0.5, 2.5, 4.5])
    np.testing.assert_array_equal(mean, [2.0, math.nan, 5.0])
    np.testing.assert_array_equal((low[0], high[0], low[2], high[2]), (1.0, 3.0, 5.0, 5.0))


EVENTS = [{"event": "resume", "step": 200}, {"event": "skip", "step": 50}]


def test_charts_take_the_pages_colours_and_leave_out_losses_of_weight_0() -> None:
    past = History([metric(s, s, grad_norm=math.nan if s == 3 else s) for s in range(1, 400)], EVENTS)
    charts = {c.panel.key: c for c in draw(past, LossConfig(relation=0.0, norm_pix=True).model_dump())}
    assert "relation" not in charts
    assert len(charts) == 7
    assert charts["reconstruction"].panel.unit == "mean squared error of standardised patches"
    assert (charts["data_wait_share"].latest, charts["samples_per_s"].latest) == ("2.5 %", "40 /s")
    assert (charts["grad_norm"].lowest, charts["grad_norm"].highest) == ("1", "399")
    for chart in charts.values():
        assert len(chart.svg) < 40_000
        assert "var(--resume)" in chart.svg
        assert "var(--skip)" in chart.svg
        assert "http" not in chart.svg
        assert "#00fe" not in chart.svg
    ids = [i for chart in charts.values() for i in re.findall(r' id="([^"]*)"', chart.svg)]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (3.14159, "3.142"), (2.5e-5, "2.50·10⁻⁵"), (12345.6, "12346"), (math.nan, "–")],
)
def test_numbers_are_shown_short(value: float, text: str) -> None:
    assert show(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(16.4, "16 s"), (61, "1 min 01 s"), (3720, "1 h 02 min"), (90000, "1 d 1 h")]
)
def test_durations_are_formatted_with_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_first_sentence_describes_the_run(folder: RunFolder) -> None:
    about: dict[str, Any] = {
        "format": "uniemox-checkpoint",
        "format_version": 1,
        "step": 20,
        "slots": 480,
        "world_size": 3,
    }
    files = {"part_00000.safetensors": {"bytes": 1, "sha256": "0" * 64}}
    about |= {"config": {}, "adam_step": 20.0}
    shapes = {"parameters": {"a": [1000, 300], "b": [50_000]}}
    write_json(
        folder.checkpoints / "step_00000020/complete.json",
        {**about, "zero_stage": 1, "precision": "bf16", "files": files, **shapes},
    )
    text = Page(write_report(folder.path)).text
    # Time at work: 100..108 of the first attempt, 200..220 of the second; the pause between is not work.
    assert (
        "A student of 0.35 M parameters (ViT 768 wide, 12 blocks, patches of 16 px in pictures of 224 px) "
        "learns from the teacher shipped:demo on 3 ranks (earlier 2) with ZeRO stage 1 in bf16: "
        "20 of 20 steps, 480 samples (0.4 epochs) in 28 s."
    ) in text
    assert "Statecomplete" in text
    assert "resumed at step 6" in text
    assert "skipped 1 step with" in text
    assert "1 complete checkpoint (step_00000020)" in text


@pytest.mark.parametrize(("source", "words"), [("live", "(live)"), ("cache", "(cached views)")])
def test_the_first_sentence_names_the_source_of_the_teachers_embeddings(
    folder: RunFolder, source: str, words: str
) -> None:
    write_event(folder, "start", step=20, ranks=3, precision="bf16", teacher=source, host="node7")
    text = Page(write_report(folder.path)).text
    assert f"learns from the teacher shipped:demo {words} on 3 ranks" in text


def test_a_complete_run_that_is_started_again_stays_complete_on_the_page(folder: RunFolder) -> None:
    write_event(folder, "start", step=20, ranks=3, precision="bf16", host="node7")
    folder.metrics.unlink()
    assert "Statecomplete" in Page(write_report(folder.path)).text


@pytest.mark.parametrize(
    ("event", "word"),
    [
        ({"event": "signal", "signal": "SIGTERM", "saved": True, "step": 18}, "Statestopped"),
        ({"event": "fault", "error": "RuntimeError: NCCL"}, "Statefailed"),
        ({"event": "fault", "error": "RuntimeError: NCCL", "step": 18, "ends": True}, "Statefailed"),
        ({"event": "fault", "damaged": "train.tar row 7", "step": 18}, "Statestalled"),
        ({"event": "restart", "attempt": 1, "left": 2, "code": 1, "step": 6}, "Statekilled"),
    ],
)
def test_the_state_is_read_from_the_last_event(folder: RunFolder, event: dict[str, Any], word: str) -> None:
    lines = folder.events.read_text().splitlines()[:-2]
    folder.events.write_text("\n".join([*lines, json.dumps({"time": 221, **event})]) + "\n")
    folder.metrics.unlink()
    assert word in Page(write_report(folder.path)).text


def test_steps_of_a_run_in_epochs_follow_from_its_metrics(folder: RunFolder) -> None:
    write_text(folder.config, dump_yaml(config(run=RunConfig(epochs=10))))
    folder.events.write_text('{"time": 100, "event": "start", "step": 0, "ranks": 1, "precision": "fp32"}\n')
    text = Page(write_report(folder.path)).text
    assert "20 of about 500 steps" in text  # 10 epochs x 1200 samples / 24
    assert "on 1 rank with" in text


def test_every_picture_is_embedded_newest_first_and_whole(folder: RunFolder) -> None:
    folder.metrics.unlink()
    page = Page(write_report(folder.path))
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        f"Picture, masked, reconstructed at step {s}" for s in (20, 10, 5)
    ]
    for image, step in zip(images, (20, 10, 5)):
        kind, data = str(image["src"]).split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(data) == (folder.samples / f"step_{step:08d}.png").read_bytes()
    assert "Each triple: picture, masked, reconstructed." in page.text


def test_many_large_pictures_are_spread_out_and_made_smaller(tmp_path: Path) -> None:
    for step in range(1, 21):
        sheet(tmp_path / f"step_{step:08d}.png", side=300 if step < 3 or step == 20 else 8)
    (tmp_path / "step_00000021.png").write_bytes(b"\x89PNG\r\n")
    found = select_pictures(tmp_path)
    assert (found["newest"]["title"], found["broken"]) == ("step 20", ["step_00000021.png"])
    assert found["newest"]["uri"].startswith("data:image/png")
    assert [p["title"] for p in found["seen"]] == [f"step {s}" for s in (19, 16, 14, 11, 9, 6, 4, 1)]
    assert len(found["seen"]) + len(found["others"]) == 19
    first = found["seen"][-1]["uri"].split(",")
    assert first[0] == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(first[1]))).size == (800, 267)


def test_the_table_has_primary_columns_first_and_marks_the_best(folder: RunFolder) -> None:
    folder.metrics.unlink()
    found = table(evaluation())
    assert [m["title"] for m in found["metrics"]] == ["Masked MSE", "Linear probe"]
    rows = dict(found["rows"])
    assert list(rows) == ["student", "teacher", "linear interpolation"]
    mse, probe = rows["student"]
    assert (mse["value"], mse["interval"], mse["best"]) == ("0.0300", "0.0200 – 0.0400", True)
    assert (probe["value"], probe["best"], rows["teacher"][1]["best"]) == ("0.610", False, True)
    assert rows["teacher"][0] is None
    assert mse["at"][0] == 3.0
    assert rows["linear interpolation"][0]["at"][2] == 97.0
    write_json(folder.path / "evaluation.json", evaluation())
    page = Page(write_report(folder.path))
    assert "The student does not beat the teacher in Linear probe." in page.text
    assert "Masked MSE\xa0↓" in page.html or "Masked MSE&nbsp;↓" in page.html
    assert "Intervals hold 95 % of 1000 bootstrap resamples, drawn by family." in page.text
    assert "Masked MSE: mask 0.75" in page.text
    assert "secondary, n = 28" in page.text
    assert [tr.get("class") for tr in page.all("tr")].count("student") == 1


def test_a_run_without_evaluation_has_no_such_section(folder: RunFolder, tmp_path: Path) -> None:
    folder.metrics.unlink()
    assert "evaluation" not in {h.get("id") for h in Page(write_report(folder.path)).all("h2")}
    write_json(tmp_path / "other.json", evaluation())
    page = Page(write_report(folder.path, evaluation=tmp_path / "other.json"))
    assert "evaluation" in {h.get("id") for h in page.all("h2")}


@pytest.mark.parametrize("content", ["[]", "{}", "{", '{"format": "x", "format_version": 1}', '{"format": "uniemox-evaluation", "format_version": 1, "metrics": [{"name": "a", "rows": [3]}]}'])  # fmt: skip  # noqa: E501
def test_another_file_is_refused_as_evaluation(tmp_path: Path, content: str) -> None:
    (tmp_path / "e.json").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "e.json"))):
        read_evaluation(tmp_path / "e.json")


def test_names_and_texts_are_never_markup(folder: RunFolder, tmp_path: Path) -> None:
    hostile = folder.path.rename(tmp_path / HOSTILE.replace("/", "∕"))
    found = RunFolder(hostile)
    write_event(found, "fault", error=HOSTILE, step=20, **{HOSTILE: [HOSTILE]})
    write_text(found.config, dump_yaml(config(teacher=TeacherConfig(name=f"local-dir:{HOSTILE}"))))
    write_json(found.environment, {"host": HOSTILE, "command": [HOSTILE], "versions": {HOSTILE: HOSTILE}})
    bad = evaluation()
    bad["metrics"][0].update(title=HOSTILE, note=HOSTILE, rows=[{"row": HOSTILE, "value": 1.0}])
    bad.update(release=HOSTILE, verdict=[HOSTILE])
    write_json(hostile / "evaluation.json", bad)
    sheet(hostile / "samples" / f"{HOSTILE.replace('/', '')}.png")
    page = Page(write_report(hostile))
    assert page.all("script") == []
    assert page.text.count("<script>alert('x')</script>") >= 8
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on")}


def test_the_page_loads_nothing(folder: RunFolder) -> None:
    write_json(folder.path / "evaluation.json", evaluation())
    page = Page(write_report(folder.path))
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:")), (tag, attributes)
    assert not re.search(r"url\((?!#)|@import|https?://", page.html)
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_events_are_shortened(folder: RunFolder) -> None:
    for step in range(300):
        write_event(folder, "save", step=step)
    write_event(folder, "fault", error="x" * 1000)
    folder.metrics.unlink()
    page = Page(write_report(folder.path))
    assert "removed step_0, step_1 … 8 more" in page.text
    assert "saved step 6: 4.2 MB in 0.13 s" in page.text
    assert "159 more in events.jsonl" in page.text  # 8 + 301, of which 10 and 140 are shown
    assert "fault: " + "x" * 240 + " …" in page.text
    assert "x" * 241 not in page.text


def test_a_run_without_metrics_says_so(tmp_path: Path) -> None:
    found = RunFolder(tmp_path / "young")
    found.create()
    write_text(found.config, dump_yaml(config()))
    text = Page(write_report(found.path)).text
    assert "No metrics yet" in text
    assert "No pictures yet" in text
    assert "No events yet" in text
    assert "none of 20 steps yet." in text
    found.config.unlink()
    found.events.write_text('{"time": 1, "event": "fault", "error": "no sound checkpoint"}\n')
    assert "no sound checkpoint" in Page(write_report(found.path)).text


def test_a_run_without_pictures_gets_them_later_only_if_it_writes_some(tmp_path: Path) -> None:
    found = RunFolder(tmp_path / "blind")
    found.create()
    write_text(found.config, dump_yaml(config(run=RunConfig(max_steps=20, pictures_every=None))))
    found.events.write_text('{"time": 1, "event": "skip", "step": 3, "in_a_row": 1, "loss": "nan"}\n')
    found.metrics.write_text(json.dumps(metric(1, 1)) + "\n")
    text = Page(write_report(found.path)).text
    assert "No pictures: run.pictures_every is null." in text
    assert "No pictures yet" not in text
    assert "skipped 1 step with losses or gradients that were not finite" in text


@pytest.mark.parametrize("text", ["", "[1, 2]", "words\n", "model: 3\nloss: no\n", "model: {width: 3}\n"])
def test_an_invalid_configuration_leaves_out_only_its_own_facts(folder: RunFolder, text: str) -> None:
    folder.config.write_text(text)
    page = Page(write_report(folder.path)).text
    assert "Total loss" in page
    assert uniemox(["status", str(folder.path)]) == EXIT_DONE


@pytest.mark.parametrize("lines", [150, 151, 299, 301, 1000])
def test_a_curve_is_smoothed_by_the_same_number_of_lines_everywhere(lines: int) -> None:
    steps = np.arange(lines)
    x, mean, low, high = thin_out(steps, steps * 1.0)
    size = math.ceil(lines / 150)
    assert len(x) <= 150
    assert set((high - low)[:-1]) == {size - 1.0}
    assert mean[0] == (size - 1) / 2


def test_the_command_writes_the_page_and_refuses_other_folders(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.metrics.unlink()
    assert uniemox(["report", str(folder.path)]) == EXIT_DONE
    assert folder.report.is_file()
    assert str(folder.report) in capsys.readouterr().out
    assert uniemox(["report", str(folder.path), "--out", str(tmp_path / "new/page.html")]) == EXIT_DONE
    assert (tmp_path / "new/page.html").is_file()
    capsys.readouterr()
    assert uniemox(["report", str(tmp_path)]) == EXIT_USER
    assert capsys.readouterr().err == (
        f"uniemox: error: RUN={tmp_path}: holds no config.yaml and no events.jsonl, so it is not a run folder; "
        f"did you mean {folder.path}?\n"
    )
    assert not (tmp_path / "report.html").exists()
    assert uniemox(["report", str(folder.path), "--out", str(tmp_path)]) == EXIT_USER
    assert uniemox(["report", str(folder.path), "--evaluation", str(tmp_path / "none.json")]) == EXIT_USER
    assert "no such file; write it with" in capsys.readouterr().err


def test_reporting_needs_no_torch() -> None:
    code = "import sys, uniemox_dist.runs.report.page, uniemox_dist.cli.report; print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def look(folder: RunFolder, step: int, student: list[str], *, teacher: bool = True, rank: int = 4) -> None:
    def side(texts: list[str], place: int) -> dict[str, Any]:
        lines = [{"text": text, "cosine": 0.5 - i / 10} for i, text in enumerate(texts)]
        return {"nearest": lines, "own": {"cosine": 0.1, "rank": place}}

    first: dict[str, Any] = {"key": "k1", "caption": "a cat", "student": side(student, rank)}
    second: dict[str, Any] = {"key": "k2", "caption": "", "student": {"nearest": [], "own": None}}
    if teacher:
        first["teacher"] = side(["a cat", "a dog", "a tree"], 1)
        second["teacher"] = {"nearest": [{"text": "<b>", "cosine": -0.25}], "own": None}
    about = {"format": "uniemox-samples", "format_version": 1, "step": step, "texts": 300, "mask": "random"}
    write_json(folder.samples / f"step_{step:08d}.json", {**about, "pictures": [first, second]})


def test_nearest_texts_of_the_first_and_newest_step_are_shown_beside_the_teachers(folder: RunFolder) -> None:
    look(folder, 5, ["a bus", "a car", "a road"], rank=200)
    look(folder, 10, ["never shown"] * 3)
    look(folder, 20, ["a cat", "a tree", "a car"], rank=2)
    (folder.samples / "step_00000021.json").write_text('{"format": "uniemox-samples", "format_ver')
    page = Page(write_report(folder.path))
    heads = (
        "Own caption Teacher mean rank of the own caption: 1 Student at step 5 mean rank of the own caption: 200 "
        "Student at step 20 mean rank of the own caption: 2"
    )
    assert heads in page.text
    assert (
        "also among the student's, on average over these pictures: 0.0 at step 5, 1.0 at step 20."
        in page.text
    )
    assert "never shown" not in page.text
    assert "−0.25 <b> not finite" in page.text
    kinds = [(span.get("class")) for span in page.all("span") if span.get("class") in ("own", "known")]
    assert kinds == ["own", "own", "known"]  # the teacher's own caption; the student's two of the newest look
    assert "#texts" in {a.get("href") for a in page.all("a")}


def test_nearest_texts_are_shown_without_a_teacher_and_not_for_other_pictures(folder: RunFolder) -> None:
    look(folder, 20, ["a cat", "a tree", "a car"], teacher=False)
    before = json.loads((folder.samples / "step_00000020.json").read_text())
    write_json(folder.samples / "step_00000005.json", {**before, "step": 5, "texts": 299})
    page = Page(write_report(folder.path))
    assert "the teacher's own nearest texts are not available" in page.text
    assert "Student at step 5" not in page.text
    assert "also among the student's" not in page.text


def test_a_run_without_texts_has_no_such_section(folder: RunFolder) -> None:
    assert "texts" not in {h.get("id") for h in Page(write_report(folder.path)).all("h2")}


def test_the_page_names_masks_fusion_losses_and_teacher(folder: RunFolder) -> None:
    text = Page(write_report(folder.path)).text
    assert "Losses L1 relation, L2 similarity, L3 reconstruction (L1 as cosine over the global batch)" in text
    assert "Masks random patches, 75 % (of each view)" in text
    assert "Fusion prior (psychological prior: λ ⊙ scene + person)" in text
    assert "Teacher live (its picture tower runs in every step)" in text
    losses = LossConfig(
        relation=0,
        similarity=0.5,
        person_reconstruction=True,
        schedule={"similarity": ((0.0, 0.0), (0.1, 1.0))},
    )
    model = ModelConfig(mask="person", mask_person_share=0.3, mask_ratio=0.9, fusion="gated_mlp")
    teacher = TeacherConfig(name="shipped:demo", source="cache")
    write_text(folder.config, dump_yaml(config(loss=losses, model=model, teacher=teacher)))
    text = Page(write_report(folder.path)).text
    assert (
        "Losses 0.5 × L2 similarity, 1 × L3 reconstruction (without L1 relation; L3 of both views; " in text
    )
    assert "L2 similarity scheduled: × 0 at 0 % → 1 at 10 %)" in text
    assert "Masks person-aware, 90 % (30 % of them on the person)" in text
    assert "Fusion gated_mlp" in text
    assert "Teacher cache (cached views with its embeddings)" in text
    write_text(folder.config, dump_yaml(config(loss=LossConfig(reconstruction=0))))
    page = Page(write_report(folder.path))
    assert "This run reconstructs nothing." in page.text
    assert "triple" not in page.text


@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "7", '{"command": 3, "versions": ["torch"], "cores": {"a": 1}}', "\xff"]
)
def test_a_damaged_environment_leaves_out_only_its_own_facts(folder: RunFolder, text: str) -> None:
    folder.environment.write_bytes(text.encode("latin-1"))
    page = Page(write_report(folder.path)).text
    assert "Total loss" in page
    assert ("Not readable: environment.json" in page) == (not text.startswith("{") or text == "{")


def test_the_newest_submission_that_can_be_read_is_shown(folder: RunFolder) -> None:
    assert "Submission to Slurm" not in Page(write_report(folder.path)).text
    for number, facts in (
        (1, {"job_ids": [16]}),
        (2, {"job_ids": [17], "command": ["uniemox", "launch", "a b"]}),
    ):
        write_json(folder.path / f"jobs/{number:04d}/submission.json", {**facts, "nodes": "2-4", "time": 100})
    write_text(folder.path / "jobs/0003/submission.json", "{")
    page = Page(write_report(folder.path)).text
    assert f"Submission to Slurm (jobs/0002, {moment(100)})" in page
    assert "uniemox launch 'a b'" in page
    assert "job ids17 nodes2-4" in page


def test_curves_mark_resumes_and_loss_spikes() -> None:
    def at(step: int) -> dict[str, Any]:
        return {"event": "resume", "step": step}

    events: list[dict[str, Any]] = [
        {"event": "spike", "step": 3},
        {"event": "spike", "step": 11},
        {"event": "restart"}, {"event": "start", "step": 10, "time": 50}, at(10),
        {"event": "signal"}, {"event": "requeue"}, {"event": "job", "restarts": 1}, at(20),
        at(30),  # by hand
        {"event": "job", "restarts": 2}, at(40),  # by Slurm, after the loss of a node
        {"event": "job", "restarts": 0}, at(50),  # of a new job
        {"event": "restart"}, at(30),  # repeated: the last line counts
    ]  # fmt: skip
    past = History([metric(s, 100 + s) for s in range(1, 60)], events)
    assert {kind: past.find_resumes(kind) for kind in RESUMES} == {
        "restart": [10, 30], "requeue": [20, 40], "resume": [50],
    }  # fmt: skip
    assert past.spikes == [3]  # the other is in steps that were repeated
    svg = draw(past, {})[0].svg
    for name in ("mark-restart-10", "mark-requeue-40", "mark-resume-50", "marks-spike", "curve"):
        assert svg.count(f'class="{name}"') == 1, name


def test_a_step_skipped_after_the_last_line_of_metrics_has_its_mark() -> None:
    events = [{"event": "skip", "step": step} for step in (5, 29)]
    past = History([metric(s, 100 + s) for s in (10, 20)], events)
    assert past.skips == [5, 29]
    mark = re.search(r'<g class="marks-skip".*?</g>\s*</g>', draw(past, {})[0].svg, re.DOTALL)
    assert mark is not None
    assert mark[0].count("<use ") == 1  # the first step lies before the axis, the last within it


def test_the_state_is_the_one_that_status_shows(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(folder.events, "a") as file:
        file.write('{"time": 230, "event": "start", "step": 20, "ranks": 3}\n')
    write_text(folder.config, dump_yaml(config(run=RunConfig(max_steps=40))))
    write_json(folder.path / "job.json", {"job_id": 17, "nodes": ["n1"], "time": 5})
    tool = tmp_path / "bin/squeue"
    write_text(tool, "#!/bin/sh\necho '17|17|PENDING|Priority||N/A|1:00:00'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    assert uniemox(["report", str(folder.path)]) == EXIT_DONE
    text = Page(folder.report).text
    assert "job 17 waits behind jobs of higher priority; has no checkpoint to continue from" in text
