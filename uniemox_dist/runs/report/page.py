"""One self-contained HTML page about a run: this module collects the facts, and run.html.j2 lays them out.

The template escapes every text; only the charts of this package are inserted unescaped.
"""

import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from uniemox_dist.config.losses import LOSS_TERMS
from uniemox_dist.config.yaml_text import parse_yaml
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import write_text
from uniemox_dist.core.formatting import duration, moment, zone
from uniemox_dist.runs.events.training import Resume
from uniemox_dist.runs.folder import RunFolder, open_run, read_lines
from uniemox_dist.runs.history import History, select_sections
from uniemox_dist.runs.metric_table import read_metrics
from uniemox_dist.runs.report.attempts import (
    collect_lanes,
    draw_timeline,
    list_figures,
    make_attempt_rows,
    make_event_row,
)
from uniemox_dist.runs.report.curves import RESUMES, draw
from uniemox_dist.runs.report.evaluation import read_evaluation, table
from uniemox_dist.runs.report.finetuning import read_finetuning
from uniemox_dist.runs.report.pictures import gallery, read_nearest_texts, select_pictures
from uniemox_dist.runs.report.summary import describe_objective, read_environment, read_submission, summarize
from uniemox_dist.runs.status import is_starting
from uniemox_dist.scheduler.commands import JobState

EVENTS_SHOWN = 150
"""Largest number of events in the table; if there are more, the middle ones are left out."""
FIRST_EVENTS = 10
"""Number of these that come before the ones left out."""


def write_report(
    run: Path,
    evaluation: Path | None = None,
    out: Path | None = None,
    answers: Mapping[int, JobState] | None = None,
) -> Path:
    """Writes the page and returns its path. `answers` are states of the run's jobs by number, if Slurm was asked.

    Raises:
        UserError: if RUN is not a run folder, or the evaluation file is not an evaluation.
    """
    folder = open_run(run)
    path = out or folder.report
    if path.is_dir():
        raise UserError(f"--out={path}: is a folder; give a file, such as {path / 'report.html'}")
    found = folder.path / "evaluation.json"
    origin = evaluation or (found if found.is_file() else None)
    write_text(path, render(folder, read_evaluation(origin) if origin else None, answers))
    return path


def render(
    folder: RunFolder, evaluation: dict[str, Any] | None, answers: Mapping[int, JobState] | None
) -> str:
    """The page as HTML."""
    text = folder.config.read_text(encoding="utf-8") if folder.config.is_file() else ""
    config = select_sections(parse_yaml(text, str(folder.config)) if text else None)
    lock = folder.check_lock()  # first: it may change while the files are read
    history, now = History(read_metrics(folder.metrics), read_lines(folder.events)), time.time()
    facts = summarize(folder, config, history, lock, now, answers)
    over = facts["state"].word == "killed" or is_starting(history.events, lock)
    hidden = max(0, len(history.events) - EVENTS_SHOWN)
    facts["duration"] = duration(history.work_s)
    name = folder.path.resolve().name
    tuned = read_finetuning(folder, config, history)
    charts = draw(history, config.get("loss") or {})
    charts[1:1] = tuned.charts if tuned is not None else []
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string(Path(__file__).with_name("run.html.j2").read_text(encoding="utf-8"))
    return template.render(
        name=name,
        quoted=shlex.quote(name),
        released=shlex.quote(f"{name}-release"),
        facts=facts,
        charts=charts,
        finetuned=tuned,
        svg=Markup,
        history=history,
        marks=[(kind, legend, history.find_resumes(kind)) for kind, (legend, _) in RESUMES.items()],
        resumed=len(history.select(Resume)),
        timeline=draw_timeline(history, over=over),
        lanes=[(lane.title, len(times)) for lane, times in collect_lanes(history, over=over)],
        figures=list_figures(history, over=over),
        attempts=make_attempt_rows(history, over=over),
        lost=history.lost_steps,
        stragglers=history.stragglers,
        objective=describe_objective(config),
        reconstructs=any(
            term.decoder and (config.get("loss") or {}).get(term.name, True) for term in LOSS_TERMS
        ),
        losses=LOSS_TERMS,
        questions={term.name: term.question for term in LOSS_TERMS},
        persons_too=bool((config.get("loss") or {}).get("person_reconstruction")),
        pictures=select_pictures(folder.samples),
        run=config.get("run") or {},
        nearest=read_nearest_texts(folder.samples),
        table=table(evaluation) if evaluation else None,
        evaluation=evaluation,
        gallery=gallery(folder.path),
        first_events=[make_event_row(event) for event in history.events[:FIRST_EVENTS]],
        hidden_events=hidden,
        last_events=[make_event_row(event) for event in history.events[FIRST_EVENTS + hidden :]],
        config=text,
        environment=read_environment(folder.environment),
        submission=read_submission(folder.path / "jobs"),
        checkpoints=sorted(p.parent.name for p in folder.checkpoints.glob("step_*/complete.json")),
        written=moment(now),
        zone=zone(now),
    )
