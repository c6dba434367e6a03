"""The first section of the page about a run: its model and state, its objective, and its environment at the start."""

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from uniemox_dist.checkpoints.folders import Checkpoint, find_newest_complete
from uniemox_dist.config.losses import LOSS_TERMS
from uniemox_dist.core.files import read_json
from uniemox_dist.core.formatting import cut, is_number, millions, moment, short
from uniemox_dist.runs.events.training import Start
from uniemox_dist.runs.folder import Lock, RunFolder
from uniemox_dist.runs.history import History
from uniemox_dist.runs.jobs import choose_job, read_jobs
from uniemox_dist.runs.status import Saved, find_state, read_saved_time
from uniemox_dist.scheduler.commands import JobState

FUSIONS = {
    "prior": "psychological prior: λ ⊙ scene + person",
    "multi_head": "multi-head weighted sum of scene and person",
    "attention": "attention-weighted sum of scene and person",
    "gated_mlp": "gated MLP of scene and person",
    "none": "none: the scene alone",
}
MASKS = {"random": "random patches", "block": "rectangles", "person": "person-aware"}
LOSSES = {term.name: term.title for term in LOSS_TERMS}
SOURCES = {"live": "its picture tower runs in every step", "cache": "cached views with its embeddings"}
FACTS = ("host", "cores", "platform", "python")
SUBMITTED = ("job_ids", "cluster", "nodes", "ranks_per_node", "code")


def summarize(
    folder: RunFolder,
    config: Mapping[str, Any],
    history: History,
    lock: Lock,
    now: float,
    answers: Mapping[int, JobState] | None = None,
) -> dict[str, Any]:
    """The facts of the first sentence and the figures below it; unknown ones are None.

    Args:
        answers: states of the run's jobs by number, if Slurm was asked and answered.
    """
    model, data, losses = (config.get(section) or {} for section in ("model", "data", "loss"))
    batch = (config.get("batch") or {}).get("global_batch")
    starts = [event for event in history.select(Start) if is_number(event.get("time"))]
    last = starts[-1] if starts else {}
    step = history.step
    epochs = history.lines[-1].get("epoch") if history.lines else None
    length = history.length(config)
    newest = find_newest_complete(folder.checkpoints)
    saved = Saved(newest.step, read_saved_time(newest.info, newest.completed)) if newest is not None else None
    job = choose_job(read_jobs(folder.path), answers)
    state = find_state(history, config, lock, saved=saved, now=now, job=job)
    learns = any(term.teacher and losses.get(term.name) for term in LOSS_TERMS)
    return {
        "parameters": _parameters(newest),
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
        "max_steps": f"{'' if length.exact else 'about '}{length.steps:,}" if length.steps else None,
        "share": min(1.0, step / length.steps) if length.steps else None,
        "samples": f"{step * batch:,}" if batch else None,
        "epochs": f"{step * epochs / history.lines[-1]['step']:.3g}" if epochs else None,
        "held_out": bool(data.get("eval_path")),
        "started": moment(starts[0]["time"]) if starts else None,
        "state": state,
    }


def _parameters(newest: Checkpoint | None) -> str | None:
    """The number of parameters of the student, from the shapes in the newest checkpoint."""
    shapes = newest.info.get("parameters") if newest is not None else None
    if not isinstance(shapes, dict):
        return None
    return millions(sum(math.prod(shape) for shape in shapes.values()))


def describe_objective(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(name, value, remark) of losses, masks, fusion and teacher; empty without a configuration."""
    model, loss, teacher = (config.get(section) or {} for section in ("model", "loss", "teacher"))
    if not model or not loss:
        return []
    learns = any(term.teacher and loss.get(term.name) for term in LOSS_TERMS)
    found = [("Losses", ", ".join(_weighted(loss)), _losses_remark(loss))]
    found.append(("Masks", _mask(model), _mask_remark(model)))
    if learns:
        fusion = str(model.get("fusion"))
        found.append(("Fusion", fusion, FUSIONS.get(fusion, "")))
        source = str(teacher.get("source", "live"))
        found.append(("Teacher", source, SOURCES.get(source, "")))
    return found


def _weighted(loss: Mapping[str, Any]) -> list[str]:
    names = {name: title for name, title in LOSSES.items() if loss.get(name)}
    weights = {loss[name] for name in names}
    plain = weights == {1.0}
    return [title if plain else f"{loss[name]:g} × {title}" for name, title in names.items()]


def _losses_remark(loss: Mapping[str, Any]) -> str:
    parts = [f"without {title}" for name, title in LOSSES.items() if not loss.get(name)]
    if loss.get("relation"):
        over = "the global batch" if loss.get("relation_over") == "global" else "the own micro-batch"
        parts.append(f"L1 as {loss.get('relation_form')} over {over}")
    if loss.get("reconstruction") and loss.get("norm_pix"):
        parts.append("L3 on standardised patches")
    if loss.get("person_reconstruction"):
        parts.append("L3 of both views")
    for name, points in (loss.get("schedule") or {}).items():
        line = " → ".join(f"{factor:g} at {100 * share:g} %" for share, factor in points)
        parts.append(f"{LOSSES.get(name, name)} scheduled: × {line}")
    return "; ".join(parts)


def _mask(model: Mapping[str, Any]) -> str:
    kind = str(model.get("mask"))
    return f"{MASKS.get(kind, kind)}, {100 * float(model.get('mask_ratio', 0)):g} %"


def _mask_remark(model: Mapping[str, Any]) -> str:
    if model.get("mask") == "person":
        return f"{100 * float(model.get('mask_person_share', 0)):g} % of them on the person"
    return "of each view"


def read_environment(path: Path) -> dict[str, Any] | None:
    """Rows (name, value) and the command of environment.json; `broken` is its error. None if there is no such file."""
    if not path.is_file():
        return None
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        return {"rows": [], "command": "", "broken": cut(str(error), 120)}
    versions = found.get("versions")
    rows = [(key, short(found[key])) for key in FACTS if found.get(key) is not None]
    rows += [
        (cut(str(package)), short(version) if version else "not installed")
        for package, version in (versions.items() if isinstance(versions, dict) else ())
    ]
    return {"rows": rows, "command": _command(found.get("command")), "broken": ""}


def read_submission(jobs: Path) -> dict[str, Any] | None:
    """Rows and command of the newest readable submission."""
    for path in sorted(jobs.glob("*/submission.json"), reverse=True):
        try:
            found = read_json(path)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            rows = [
                (key.replace("_", " "), short(found[key])) for key in SUBMITTED if found.get(key) is not None
            ]
            return {
                "name": path.parent.name,
                "time": moment(found.get("time")),
                "rows": rows,
                "command": _command(found.get("command")),
            }
    return None


def _command(words: Any) -> str:
    return shlex.join(map(str, words)) if isinstance(words, list) else ""
