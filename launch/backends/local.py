"""`uniemox launch local`: a run on this machine, checked and frozen as one that is submitted."""

import sys
from collections.abc import Callable, Sequence

from launch.checks import check, resolve, run_path
from launch.conflicts import refuse_other_settings
from launch.dispatch import Order, needs_shipped_teacher, submission_facts
from launch.freeze import freeze_code
from launch.plan.ranks import largest_legal
from launch.restarts import run_with_restarts, stopped
from launch.submission import new_folder, record, run_folder, write_config
from uniemox_dist.config.schema import Config
from uniemox_dist.distributed.local_launcher import Signals
from uniemox_dist.runs.folder import RunFolder


def prepare_here(order: Order) -> tuple[Config, int, list[str]]:
    """The checked configuration, the number of ranks, and remarks.

    Raises:
        UserError: with a line for each thing that would make the run fail, or a run of that name with other settings.
    """
    config = resolve(order.recipe, order.overrides, order.cluster)
    remarks = check(config, order.cluster, nodes=False, data=order.data)
    refuse_other_settings(config, resume=order.resume, force_new=order.force_new)
    return config, largest_legal(config, 1, order.cluster.ranks)[1], remarks


def run_here(order: Order, say: Callable[[Sequence[str]], None]) -> int:
    """Freezes and runs; returns the exit code.

    Raises:
        UserError: for what the user can mend; then nothing was started, and nothing was left behind.
    """
    with Signals() as signals:
        config, ranks, remarks = prepare_here(order)
        say(remarks)
        folder = RunFolder(run_path(config))
        with run_folder(folder.path, aside=order.force_new) as aside:
            folder.lock()
            folder.unlock()
            with new_folder(folder.path / "jobs") as own:
                code = freeze_code(folder.path / "code", shipped_teacher=needs_shipped_teacher(config))
                frozen = write_config(own, config)
                record(own, [], **{**submission_facts(order, code), "nodes": "1", "ranks_per_node": ranks})
        if aside is not None:
            say([f"the run that was there is now {aside}"])
        if signals.received:
            return stopped(folder, signals)
        # A folder as a program: what is in it comes before the working directory and all that is installed.
        command = [sys.executable, str(code), "pretrain", str(frozen)]
        return run_with_restarts(
            lambda: command,
            ranks,
            folder,
            signals,
            max_restarts=config.run.max_restarts,
            gpus=order.cluster.gpus_per_node > 0,
        )
