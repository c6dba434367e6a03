"""The report of a run in a real browser: it shows everything, asks for nothing, and fits a phone."""

import json
from collections.abc import Iterator
from pathlib import Path

import browser as chromium
import numpy as np
import pytest
import torch
from browser import Browser, browser
from PIL import Image
from told_run import BEGAN, told_run

from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.core.errors import EXIT_DONE
from uniemox_dist.core.files import write_json
from uniemox_dist.evaluate.gallery import thumbnail
from uniemox_dist.runs.report.pictures import gallery

CHARTS = 8
DECODED = """
for (const picture of document.images) picture.loading = 'eager';
return Promise.all([...document.images].map(picture => picture.decode())).then(() => document.images.length);
"""
SIZES = """
const box = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
return {
  charts: [...document.querySelectorAll('.charts svg')].map(box),
  curves: [...document.querySelectorAll('.charts .curve path')].map(box),
  timeline: [...document.querySelectorAll('.timeline svg')].map(box),
  marks: Object.fromEntries(['mark-restart-3000', 'mark-requeue-5706', 'mark-resume-7000', 'marks-skip', 'marks-spike']
    .map(name => [name, [...document.querySelectorAll('.charts .' + name + ' *')].map(box)])),
  pictures: [...document.images].map(i => [i.complete, i.naturalWidth, ...box(i)]),
  scripts: document.scripts.length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  page: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.querySelector('.charts .curve path')).stroke,
};
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a run that its launcher restarted, whose job was queued again, and that was killed once."""
    folder = told_run(tmp_path_factory.mktemp("runs") / "told")
    events = [json.loads(line) for line in folder.events.read_text().splitlines()]
    starts = [event for event in events if event["event"] == "start"]
    stop = next(event for event in events if event["event"] == "signal")
    job = {"event": "job", "job_id": 4711, "nodes": ["node01", "node02"], "ranks": 16, "idle": 0}
    events += [
        {**job, "time": BEGAN - 20, "restarts": 0},
        {"event": "requeue", "time": stop["time"] + 2, "job_id": 4711, "step": 5706, "by": "job"},
        {**job, "time": starts[2]["time"] - 15, "restarts": 1, "ranks": 8, "nodes": ["node01"]},
        {
            "event": "started",
            "time": starts[0]["time"] + 3,
            "step": 0,
            "seconds": {"imports": 8.1, "total": 12.3},
        },
    ]
    events.sort(key=lambda event: event["time"])
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in events))
    write_json(
        folder.environment,
        {
            "host": "node01",
            "cores": 64,
            "command": ["uniemox", "pretrain", "vit"],
            "versions": {"torch": "2.11"},
        },
    )
    write_json(
        folder.path / "jobs/0001/submission.json", {"job_ids": [4711], "nodes": "1-2", "command": ["uniemox"]}
    )
    draws = np.random.default_rng(0)
    for step in (2000, 4000, 8000):
        pixels = draws.integers(0, 256, (3, 6, 3), np.uint8).repeat(64, 0).repeat(64, 1)
        Image.fromarray(pixels).save(folder.samples / f"step_{step:08d}.png")
    assert uniemox(["report", str(folder.path)]) == EXIT_DONE
    return folder.report


@pytest.fixture(scope="module")
def window() -> Iterator[Browser]:
    if why := chromium.missing():
        pytest.skip(why)
    with browser() as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_everything_is_seen_nothing_is_asked_for_and_nothing_is_complained_of(
    page: Path, window: Browser, width: int, scheme: str
) -> None:
    window.size(width, 900)
    window.prefer(scheme)
    window.open(page)
    assert window.run(DECODED) == 3
    found = window.run(SIZES)
    assert window.said() == []
    asked = [url for url in window.asked_for() if not url.startswith("data:")]
    assert asked == [page.resolve().as_uri()]
    assert found["scripts"] == 0
    assert len(found["charts"]) == len(found["curves"]) == CHARTS
    for name in ("charts", "curves", "timeline"):
        assert all(w > 100 and h >= 0 for w, h in found[name]), (name, found[name])
    assert all(h > 100 for _, h in (*found["charts"], *found["timeline"]))
    assert sum(h > 10 for _, h in found["curves"]) >= 5  # the learning rate, throughput and wait are level
    for name, boxes in found["marks"].items():
        assert sum(w + h > 2 for w, h in boxes) >= CHARTS, (name, boxes)
    assert len(found["pictures"]) == 3
    assert all(complete and own > 0 and w > 50 and h > 20 for complete, own, w, h in found["pictures"])
    assert found["wide"] <= 0, "the page is wider than the window"
    assert (found["page"], found["ink"]) == {
        "light": ("rgb(247, 246, 243)", "rgb(51, 70, 184)"),
        "dark": ("rgb(18, 20, 26)", "rgb(146, 164, 255)"),
    }[scheme]


def test_dots_of_the_map_show_their_picture_when_they_are_pointed_at(
    page: Path, window: Browser, tmp_path: Path
) -> None:
    pictures = [
        {
            "key": str(i),
            "label": "<b>joy</b>" if i else None,
            "caption": f"picture {i}",
            "x": i / 2,
            "y": 1 - i / 2,
            "picture": thumbnail(torch.full((3, 16, 16), 80 * i, dtype=torch.uint8), 64),
        }
        for i in range(3)
    ]
    found = {
        "format": "uniemox-gallery",
        "format_version": 1,
        "step": 8000,
        "data": {"samples": 3},
        "pictures": pictures,
        "neighbours": [{"picture": 0, "nearest": [{"picture": 2, "cosine": 0.5}]}],
        "zeroshot": {
            "labels": ["joy", "awe"],
            "accuracy": 0.5,
            "right": [{"picture": 1, "answer": "joy", "probability": 0.9}],
            "wrong": [],
        },
        "attention": [{"picture": 1, "scene_view": pictures[1]["picture"], "scene": pictures[2]["picture"]}],
    }
    write_json(page.parent / "gallery.json", found)
    out = tmp_path / "with_gallery.html"
    try:
        assert uniemox(["report", str(page.parent), "--out", str(out)]) == EXIT_DONE
    finally:
        (page.parent / "gallery.json").unlink()
    window.size(390, 900)
    window.open(out)
    window.run(DECODED)
    shown = "return [...document.querySelectorAll('.map i > span')].map(e => e.getBoundingClientRect().width)"
    assert window.run(shown) == [0, 0, 0]
    window.run("document.querySelectorAll('.map i')[1].focus()")
    first, second, third = window.run(shown)
    assert (first, third) == (0, 0)
    assert second > 100
    assert "<b>joy</b>" in window.run("return document.querySelectorAll('.map i')[1].innerText")
    assert window.said() == []
    assert (
        window.run("return document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    )
    assert len(window.run("return [...document.querySelectorAll('#gallery ~ .strip')].map(e => 1)")) == 4
    (tmp_path / "run").mkdir()
    write_json(
        tmp_path / "run" / "gallery.json", {**found, "pictures": [{**pictures[0], "picture": '"><script>'}]}
    )
    assert gallery(tmp_path / "run") is None
