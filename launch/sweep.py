"""Sweeps: one run for each point of a grid of settings, in one Slurm job array, each with its own frozen configuration.

A sweep's folder, run.dir/sweeps/NAME-0001, holds the one script, the code, and the table of points.
"""

import itertools
import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.checks import check, resolve, run_path
from launch.conflicts import refuse_live, refuse_other_settings, require_sbatch
from launch.differences import flat
from launch.dispatch import (
    Order,
    Submitted,
    frozen_job,
    mounts_of,
    needs_shipped_teacher,
    send,
    submission_facts,
    without_nodes,
)
from launch.freeze import code_name, freeze_code
from launch.render import Frozen, render
from launch.submission import (
    interrupts_wait,
    new_folder,
    next_folder,
    one_at_a_time,
    record,
    run_folder,
    write_config,
)
from uniemox_dist.config.load import parse_override
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.files import write_text

MOST_POINTS = 1001
"""Slurm's usual largest array (MaxArraySize)."""
LOG = "slurm-%A_%a.out"


def parse_axis(text: str) -> tuple[str, list[str]]:
    """`optim.blr=1e-3,3e-4` as the key and its values; commas inside brackets do not divide.

    Raises:
        UserError: if it is none.
    """
    key, equals, values = text.partition("=")
    parts = _divide(values)
    if not equals or not parts:
        raise UserError(f"--array {text}: expected KEY=VALUE,VALUE,…, such as optim.blr=1e-3,3e-4")
    if key in ("run.name", "run.dir"):
        raise UserError(f"--array {text}: every point gets a run.name of its own; sweep over another key")
    read = [parse_override(f"{key}={part}") for part in parts]
    if any(value in read[:n] for n, value in enumerate(read)):
        raise UserError(f"--array {text}: a value stands twice; each would train the same run")
    return key, parts


def grid(axes: Sequence[str]) -> list[list[str]]:
    """The cross product of `KEY=V1,V2,…` lists, as pairs KEY=VALUE for each point; the last key changes fastest.

    Raises:
        UserError: for a list that is none, a key that stands twice, or too many points.
    """
    parsed = [parse_axis(axis) for axis in axes]
    keys = [key for key, _ in parsed]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise UserError(f"--array {twice[0]}=…: given twice; put all its values into one list")
    points = [
        [f"{key}={value}" for key, value in zip(keys, values)]
        for values in itertools.product(*(values for _, values in parsed))
    ]
    if len(points) > MOST_POINTS:
        raise UserError(f"--array: {len(points)} points; at most {MOST_POINTS} fit into a job array")
    return points


def suffixes(points: Sequence[Sequence[str]]) -> list[str]:
    """What each point's run.name ends with: short keys and values, or numbers where these would be the same or long."""
    names = ["-".join(_short(pair) for pair in point) for point in points]
    if len(set(names)) < len(names) or max(map(len, names)) > 80:
        return [f"{n:04d}" for n in range(len(points))]
    return names


def prepare_points(order: Order, axes: Sequence[str]) -> tuple[list[Config], list[list[str]], list[str]]:
    """The checked configuration of every point, the points, and remarks.

    Raises:
        UserError: naming the point that cannot run.
    """
    points = grid(axes)
    base = prepare_name(order)
    configs: list[Config] = []
    remarks: list[str] = []
    seen: list[object] = []
    for point, suffix in zip(points, suffixes(points)):
        try:
            pairs = [*order.overrides, *point, f"run.name={base}-{suffix}"]
            config = resolve(order.recipe, pairs, order.cluster)
            inputs = (config.data, config.batch, config.teacher)  # the same shards are looked at once
            remarks += check(config, order.cluster, data=order.data and inputs not in seen)
            refuse_other_settings(config, resume=order.resume, force_new=order.force_new)
        except UserError as error:
            raise UserError(
                "\n".join(f"{', '.join(point)}: {line}" for line in str(error).splitlines())
            ) from None
        configs.append(config)
        seen.append(inputs)
    return configs, points, list(dict.fromkeys(remarks))


def prepare_name(order: Order) -> str:
    """The run.name that the recipe and the pairs give."""
    return resolve(order.recipe, order.overrides, order.cluster).run.name


def table(configs: Sequence[Config], points: Sequence[Sequence[str]]) -> list[str]:
    """Lines with each point's number, values and run."""
    keys = [pair.partition("=")[0] for pair in points[0]]
    rows = [["task", *keys, "run"]]
    for number, (config, point) in enumerate(zip(configs, points)):
        values = flat(config.model_dump(mode="json"))
        rows.append([str(number), *(_value(values, p) for p in point), str(run_path(config))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]


def script_only(order: Order, axes: Sequence[str]) -> tuple[str, list[str], list[str]]:
    """The script that would be submitted, the table of points, and remarks; nothing is written."""
    configs, points, remarks = prepare_points(order, axes)
    above, prefix = _place(order, configs[0])
    folder = next_folder(above, prefix)
    shipped = any(map(needs_shipped_teacher, configs))
    frozen = _frozen(order, configs, folder, folder / "code" / code_name(shipped_teacher=shipped))
    return (
        render("pretrain", order.cluster, frozen, mounts_of(configs[0])),
        table(configs, points),
        remarks,
    )


def submit(order: Order, axes: Sequence[str]) -> tuple[Submitted, list[str], list[str]]:
    """Checks, freezes and submits all points as one job array; returns it, the table, and remarks.

    Raises:
        UserError: for what the user can mend; then nothing was submitted, and nothing was left behind.
    """
    require_sbatch()
    configs, points, remarks = prepare_points(order, axes)
    runs = [run_path(config) for config in configs]
    above, prefix = _place(order, configs[0])
    with ExitStack() as made:
        made.enter_context(one_at_a_time(above.parent))
        remarks += refuse_live(runs, **order.waits_for)
        sweep = made.enter_context(new_folder(above, prefix))
        shipped = any(map(needs_shipped_teacher, configs))
        code = freeze_code(sweep / "code", shipped_teacher=shipped)
        folders = []
        for config, run in zip(configs, runs):
            made.enter_context(run_folder(run, aside=order.force_new))
            folders.append(made.enter_context(new_folder(run / "jobs")))
            write_config(folders[-1], config)
        lines = table(configs, points)
        write_text(sweep / "points.txt", "\n".join(lines) + "\n")
        write_text(
            sweep / "tasks.tsv",
            "".join(f"{folder / 'config.yaml'}\t{run}\n" for folder, run in zip(folders, runs)),
        )
        script = sweep / "job.sbatch"
        frozen = _frozen(order, configs, sweep, code)
        write_text(script, render("pretrain", order.cluster, frozen, mounts_of(configs[0])))
        for folder in folders:
            os.symlink(os.path.relpath(script, folder), folder / "job.sbatch")
        options, avoided = without_nodes(order, runs)
        facts: dict[str, Any] = submission_facts(order, code)
        with interrupts_wait() as came:
            ids, error = send(order, script, options, came, remarks)
            record(sweep, ids, **facts, points=len(points))
            for number, folder in enumerate(folders):
                record(folder, ids, **facts, array_task=number, sweep=str(sweep))
    if error is not None:
        raise Fault(f"{len(ids)} of {order.chain} job arrays were submitted, then: {error}")
    log = str(sweep / LOG.replace("%A", str(ids[0])).replace("%a", "0"))
    watch = f"{above.parent / prefix}*"
    return Submitted(tuple(ids), sweep, sweep, log, watch), lines, [*remarks, *avoided]


def _frozen(order: Order, configs: Sequence[Config], sweep: Path, code: Path) -> Frozen:
    one = frozen_job(order, configs[0], code, sweep)
    return replace(
        one,
        name=prepare_name(order),
        run=str(sweep),
        config="",
        output=f"{str(sweep).replace('%', '%%')}/{LOG}",
        points=len(configs),
        tasks=str(sweep / "tasks.tsv"),
    )


def _place(order: Order, config: Config) -> tuple[Path, str]:
    """The folder above the sweep's, and what the sweep's name begins with."""
    return run_path(config).parent / "sweeps", f"{prepare_name(order)}-"


def _divide(values: str) -> list[str]:
    """Parts between the commas outside of brackets; none if one is empty, or a bracket stays open."""
    parts, depth = [""], 0
    for sign in values:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    parts = [part.strip() for part in parts]
    return parts if depth == 0 and all(parts) else []


def _short(pair: str) -> str:
    key, _, value = pair.partition("=")
    return f"{key.rpartition('.')[2]}_{re.sub(r'[^A-Za-z0-9.-]+', '_', value).strip('_')}"


def _value(values: dict[str, Any], pair: str) -> str:
    key, _, text = pair.partition("=")
    return json.dumps(values[key]) if key in values else text
