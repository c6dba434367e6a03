"""One self-contained HTML page about a run: the facts are collected here, run.html.j2 gives them their form.

What a user or a data set named is text to the template, which escapes it; only our charts go in as they are.
"""

import base64
import io
import json
import math
import shlex
from datetime import datetime, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from uniemox_dist.config.load import parse_yaml
from uniemox_dist.report.curves import History, draw, history
from uniemox_dist.report.evaluation import is_number, read_evaluation, table
from uniemox_dist.report.nearest import nearest
from uniemox_dist.report.objective import objective
from uniemox_dist.runtime.errors import UserError
from uniemox_dist.runtime.files import read_json, write_text
from uniemox_dist.runtime.run_folder import RunFolder, read_lines

EARLIER_SHOWN = 8
"""Earlier pictures that are seen without unfolding, spread evenly over the run."""
EVENTS_SHOWN = 150
"""Events in the table; of more, the middle ones are left out."""
SMALL_PIXELS, SMALL_BYTES = 800, 200_000
"""Earlier pictures of more bytes are embedded in this width: the page must still open on a phone."""


def write_report(run: Path, evaluation: Path | None = None, out: Path | None = None) -> Path:
    """Writes the page and returns its path.

    Raises:
        UserError: if RUN is no run folder, or the evaluation is not one.
    """
    folder = RunFolder(run)
    if not (folder.config.is_file() or folder.events.is_file()):
        inside = sorted(p.parent.name for p in run.glob("*/config.yaml"))
        hint = (
            f"did you mean {run / inside[0]}?" if inside else "give run.dir/run.name, such as demo/runs/demo"
        )
        raise UserError(
            f"RUN={run}: holds no config.yaml and no events.jsonl, so it is no run folder; {hint}"
        )
    path = out or folder.report
    if path.is_dir():
        raise UserError(f"--out={path}: is a folder; give a file, such as {path / 'report.html'}")
    found = folder.path / "evaluation.json"
    origin = evaluation or (found if found.is_file() else None)
    write_text(path, render(folder, read_evaluation(origin) if origin else None))
    return path


def render(folder: RunFolder, evaluation: dict[str, Any] | None) -> str:
    """The page as HTML."""
    text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    config = (parse_yaml(text, str(folder.config)) if text else None) or {}
    metrics = [line for line in read_lines(folder.metrics) if isinstance(line, dict)]
    events = [line for line in read_lines(folder.events) if isinstance(line, dict)]
    past = history(metrics, events)
    charts = draw(past, config.get("loss") or {})
    name = folder.path.resolve().name
    environment = read_json(folder.environment) if folder.environment.is_file() else {}
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("run.html.j2").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        quoted=shlex.quote(name),
        released=shlex.quote(f"{name}-release"),
        facts=summary(folder, config, metrics, events, past),
        charts=charts,
        svg=Markup,
        past=past,
        resumed=sum(event.get("event") == "resume" for event in events),
        objective=objective(config),
        reconstructs=bool((config.get("loss") or {}).get("reconstruction", True)),
        persons_too=bool((config.get("loss") or {}).get("person_reconstruction")),
        pictures=pictures(folder.samples),
        nearest=nearest(folder.samples),
        table=table(evaluation) if evaluation else None,
        evaluation=evaluation,
        events=[event_row(event) for event in events],
        most_events=EVENTS_SHOWN,
        config=text,
        environment=environment,
        command=shlex.join(environment.get("command", [])),
        checkpoints=sorted(p.parent.name for p in folder.checkpoints.glob("step_*/complete.json")),
        written=_moment(datetime.now().timestamp()),
    )


def summary(
    folder: RunFolder, config: dict[str, Any], metrics: list[Any], events: list[Any], past: History
) -> dict[str, Any]:
    """What the first sentence and the figures below it say; None is what is not known."""
    run, model, data, losses = (config.get(section) or {} for section in ("run", "model", "data", "loss"))
    batch = (config.get("batch") or {}).get("global_batch")
    starts = [event for event in events if event.get("event") == "start" and is_number(event.get("time"))]
    last = starts[-1] if starts else {}
    stamped = [
        x for x in (*past.lines[-1:], *events) if isinstance(x.get("step"), int) and is_number(x.get("time"))
    ]
    step = max(stamped, key=lambda x: x["time"])["step"] if stamped else 0
    epochs = past.lines[-1].get("epoch") if past.lines else None
    max_steps, exact = run.get("max_steps"), True
    if max_steps is None and any(
        event.get("event") == "end" and event.get("step") == step for event in events
    ):
        max_steps = step
    elif max_steps is None and batch and run.get("epochs") and (data.get("epoch_samples") or epochs):
        # The size of the data is not in the run's folder, but follows from slots per (rounded) epoch.
        exact = bool(data.get("epoch_samples"))
        epoch_samples = data.get("epoch_samples") or past.lines[-1].get("slots", 0) / epochs
        max_steps = math.ceil(round(run["epochs"] * epoch_samples / batch, 2))
    learns = losses.get("relation") or losses.get("similarity")
    return {
        "parameters": _parameters(folder),
        "model": model,
        "teacher": (config.get("teacher") or {}).get("name") if learns else None,
        "teacher_source": last.get("teacher"),
        "ranks": last.get("ranks"),
        "earlier_ranks": list(
            dict.fromkeys(s.get("ranks") for s in starts if s.get("ranks") != last.get("ranks"))
        ),
        "precision": last.get("precision"),
        "zero": (config.get("zero") or {}).get("stage"),
        "step": step,
        "max_steps": f"{'' if exact else 'about '}{max_steps:,}" if max_steps else None,
        "share": min(1.0, step / max_steps) if max_steps else None,
        "samples": f"{step * batch:,}" if batch else None,
        "epochs": f"{step * epochs / past.lines[-1]['step']:.3g}" if epochs else None,
        "held_out": bool(data.get("eval_path")),
        "duration": duration(_worked_s(starts, [*metrics, *events])),
        "started": _moment(starts[0]["time"]) if starts else None,
        "state": _state(events, complete=bool(exact and max_steps and step >= max_steps)),
    }


def _parameters(folder: RunFolder) -> str | None:
    """Size of the student, from the newest checkpoint (which lists all shapes)."""
    for complete in sorted(folder.checkpoints.glob("step_*/complete.json"), reverse=True):
        millions = sum(math.prod(shape) for shape in read_json(complete).get("parameters", {}).values()) / 1e6
        return f"{millions:.2f} M" if millions < 10 else f"{millions:.0f} M"
    return None


def _state(events: list[Any], *, complete: bool) -> tuple[str, str, str]:
    """(word, tone, remark) for where the run stands; a run that was killed leaves no word of its own."""
    last = events[-1] if events else {}
    if complete:
        return "complete", "good", ""
    if last.get("event") == "signal":
        return "stopped", "wait", "by a signal; the same command goes on"
    if last.get("event") == "fault" and "step" not in last:
        return "failed", "bad", "see the last event"
    return "running", "wait", "or killed without a word"


def _worked_s(starts: list[Any], lines: list[Any]) -> float:
    """Seconds from each start to the last sign of life before the next one."""
    times = sorted(line["time"] for line in lines if is_number(line.get("time")))
    bounds = [start["time"] for start in starts] + [math.inf]
    return sum(max(t for t in times if a <= t < b) - a for a, b in pairwise(bounds) if b > a)


def pictures(samples: Path) -> dict[str, Any]:
    """The newest reconstruction as it is, the earlier ones small: some to see, the others to unfold."""
    newest: dict[str, Any] | None = None
    earlier, broken = [], []
    for path in sorted(samples.glob("*.png"), reverse=True):
        try:
            with Image.open(path) as picture:
                picture.load()
                uri = _embed(path, picture, whole=newest is None)
                found = {"uri": uri, "title": _title(path), "width": picture.width, "height": picture.height}
        except (OSError, SyntaxError):  # Pillow's words for a file that is being written just now
            broken.append(path.name)
            continue
        if newest is None:
            newest = found
        else:
            earlier.append(found)
    stride = max(1.0, (len(earlier) - 1) / (EARLIER_SHOWN - 1))
    spread = {round(i * stride) for i in range(EARLIER_SHOWN)}
    seen = [found for i, found in enumerate(earlier) if i in spread]
    others = [found for i, found in enumerate(earlier) if i not in spread]
    return {"newest": newest, "seen": seen, "others": others, "broken": broken}


def _embed(path: Path, picture: Image.Image, *, whole: bool) -> str:
    raw, kind = path.read_bytes(), "png"
    if not whole and len(raw) > SMALL_BYTES:
        small = picture.convert("RGB")
        small.thumbnail((SMALL_PIXELS, 10 * SMALL_PIXELS))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        raw, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(raw).decode('ascii')}"


def _title(path: Path) -> str:
    digits = path.stem.removeprefix("step_")
    return f"step {int(digits):,}" if digits.isdigit() else path.stem


def event_row(event: dict[str, Any]) -> dict[str, Any]:
    """An event as the table shows it: when, what, and its facts in short."""
    facts = [(key, _short(key, value)) for key, value in event.items() if key not in ("time", "event")]
    return {"time": _moment(event.get("time")), "event": str(event.get("event", "?")), "facts": facts}


def _short(key: str, value: Any) -> str:
    if isinstance(value, list):
        rest = f" … {len(value) - 2} more" if len(value) > 3 else ""
        return (", ".join(map(str, value[:2] if rest else value)) or "none") + rest
    if key == "bytes" and isinstance(value, int):
        return f"{value / 1e6:.1f} MB"
    if key == "seconds" and isinstance(value, int | float):
        return f"{value:.2f} s"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 240 else f"{text[:240]} …"


def _moment(seconds: Any) -> str:
    if not is_number(seconds):
        return "–"
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h} h"
    return f"{h} h {m:02d} min" if h else f"{m} min {s:02d} s" if m else f"{s} s"
