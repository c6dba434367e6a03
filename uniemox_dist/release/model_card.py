"""The description of a release: the facts in uniemox.json, the model card, and the curves beside it."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from matplotlib.figure import Figure

from shards.format.manifest import Manifest, combined_identity, read_manifest
from uniemox_dist import __version__
from uniemox_dist.checkpoints.folders import Checkpoint
from uniemox_dist.config.losses import LOSS_NAMES, LOSS_TERMS
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import is_remote, read_json
from uniemox_dist.release.contamination import find_contamination
from uniemox_dist.release.format import ENCODER, FORMAT, FORMAT_VERSION, REST
from uniemox_dist.release.preprocessing import preprocessing_facts
from uniemox_dist.release.weights import Source, read_config
from uniemox_dist.runs.events.base import Line
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.runs.history import History
from uniemox_dist.runs.metric_table import column, read_metrics
from uniemox_dist.runs.report.curves import thin_out

SPLITS = ("train", "val", "test")
MOST_POINTS = 2000
"""Points of a curve."""
MOST_INDEXES = 2000
"""Largest number of index files that are searched for labels; larger data sets are not searched."""


def collect_facts(
    checkpoint: Checkpoint,
    source: Source,
    run: RunFolder,
    *,
    weights: str,
    dtype: str,
    licence: str | None,
    overlap: Path | None = None,
) -> dict[str, Any]:
    """The contents of uniemox.json: the identity, origin and use of a release."""
    info, config = checkpoint.info, read_config(checkpoint)
    last = find_last_line(read_valid_metrics(run), checkpoint.step)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "uniemox_dist": __version__,
        "run": config.run.name,
        "step": checkpoint.step,
        "slots": info["slots"],
        "parameters": source.parameters[ENCODER],
        "other_parameters": source.parameters[REST],
        "weights": weights,
        "dtype": dtype,
        "feature": "class token",
        "feature_width": config.model.width,
        "embedding_width": info["embedding_width"],
        "preprocessing": preprocessing_facts(config.model),
        "teacher": info["teacher"],
        "data_identity": info["data_identity"],
        "data": collect_data_facts(config, info["data_identity"]),
        "overlap": find_contamination(overlap, config, info["data_identity"]),
        "licence": licence,
        "losses": {key: last.get(key) for key in ("loss", *LOSS_NAMES)} if last else None,
        "config": info["config"],
    }


def read_valid_metrics(run: RunFolder) -> Sequence[Line]:
    """The valid lines of a run's metrics: those of steps that were not repeated later."""
    return History(read_metrics(run.metrics), read_lines(run.events)).lines


def find_last_line(lines: Sequence[Line], step: int) -> Line | None:
    """The last of the valid lines up to a step."""
    count = bisect_right(column(lines, "step"), step)
    return lines[count - 1] if count else None


def collect_data_facts(config: Config, identity: str) -> dict[str, Any] | None:
    """Counts, sources and labels of the training data; None if the data is no longer at the run's paths."""
    urls = [origin.path for origin in config.data.origins()]
    try:
        manifests = [read_manifest(url, "data.path") for url in urls]
    except (UserError, OSError):
        return None
    if combined_identity([manifest.identity for manifest in manifests]) != identity:
        return None
    settings = [manifest.provenance.get("settings") or {} for manifest in manifests]
    declared = [label for manifest in manifests for label in manifest.provenance.get("labels") or []]
    return {
        "samples": sum(manifest.samples for manifest in manifests),
        "shards": sum(len(manifest.shards) for manifest in manifests),
        "bytes": sum(manifest.bytes for manifest in manifests),
        "sources": [
            {
                **{key: s[key] for key in ("layout", "preset", "captions", "persons") if s.get(key)},
                "name": _name(url),
                "samples": manifest.samples,
                "licence": _licence(manifest),
            }
            for url, manifest, s in zip(urls, manifests, settings)
        ],
        "labels": sorted(set(declared or _labels(urls, manifests))),
    }


def _name(url: str) -> str:
    """The name of a data set in a list: its folder's name, with its parent's if the folder is a split."""
    parts = [part for part in url.rstrip("/").split("/") if part]
    return "/".join(parts[-2:] if parts[-1] in SPLITS else parts[-1:])


def _licence(manifest: Manifest) -> str | None:
    stated = manifest.provenance.get("licence")
    return stated if isinstance(stated, str) else None


def _labels(urls: Sequence[str], manifests: Sequence[Manifest]) -> set[str]:
    """The labels in the indexes of local data."""
    if sum(len(manifest.shards) for manifest in manifests) > MOST_INDEXES or any(map(is_remote, urls)):
        return set()
    found: set[str] = set()
    for url, manifest in zip(urls, manifests):
        for shard in manifest.shards:
            path = Path(url) / "index" / f"{Path(shard.name).stem}.parquet"
            if path.is_file():
                column = pq.read_table(path, columns=["label"])["label"]
                found |= {label for label in column.unique().to_pylist() if label}
    return found


def find_evaluation(run: RunFolder, given: Path | None, step: int) -> dict[str, Any] | None:
    """The evaluation of the released step: the given file, or evaluation.json of the run.

    Raises:
        UserError: if the given file is not an evaluation, or is one of another step.
    """
    path = given or run.path / "evaluation.json"
    try:
        found = read_json(path)
        metrics = [
            {**{key: metric[key] for key in ("title", "better", "note")}, "rows": metric["rows"]}
            for metric in found["metrics"]
        ]
        same = found["step"] == step
    except (OSError, ValueError, KeyError, TypeError) as error:
        if given is None:
            return None
        raise UserError(
            f"--evaluation={path}: cannot be read as an evaluation ({type(error).__name__}: {error}); write it with "
            "`uniemox evaluate protocol … --json`"
        ) from None
    if not same:
        if given is None:
            return None
        raise UserError(
            f"--evaluation={path}: is of step {found['step']}, not of the released step {step}; evaluate that step"
        )
    return {"metrics": metrics, "verdict": found.get("verdict", []), "data": found.get("data", {})}


def render_card(
    facts: Mapping[str, Any], evaluation: Mapping[str, Any] | None, *, onnx: bool, curves: bool
) -> str:
    """The model card, with the front matter that the Hugging Face Hub reads."""
    text = resources.files("uniemox_dist").joinpath("release/model_card.md.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    config = Config.model_validate(facts["config"])
    return environment.from_string(text).render(
        facts=facts, model=config.model, config=config, evaluation=evaluation, onnx=onnx, curves=curves
    )


def draw_curves(lines: Sequence[Line], step: int, path: Path) -> bool:
    """Losses and learning rate up to the released step as one PNG; False if the run has no metrics. More than
    `MOST_POINTS` lines are drawn as the mean and range of neighbours."""
    titles = {
        "loss": "total loss",
        **{term.name: term.title for term in LOSS_TERMS},
        "lr": "learning rate",
    }
    steps = np.asarray(column(lines, "step"))
    steps = steps[: np.searchsorted(steps, step, side="right")]
    curves = {key: np.asarray(column(lines, key))[: len(steps)] for key in titles}
    shown = {key: values for key, values in curves.items() if (np.isfinite(values) & (values != 0)).any()}
    if not shown:
        return False
    figure = Figure(figsize=(3.1 * len(shown), 2.7), dpi=150, layout="constrained")
    for axes, (key, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        x, mean, low, high = thin_out(steps, values, MOST_POINTS)
        if len(x) < len(steps):
            axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
        axes.plot(x, mean, linewidth=1.3, marker="o" if len(steps) < 3 else None)
        axes.set_title(titles[key], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
    return True
