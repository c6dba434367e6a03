"""Commands in a process of their own, for tests that kill them."""

import multiprocessing
from collections.abc import Sequence
from multiprocessing.context import ForkProcess


def start_command(arguments: Sequence[str]) -> ForkProcess:
    """Starts `uniemox ARGUMENTS` in a fork of this process, which spares a fresh interpreter's imports.

    The exit code is the command's. Parallel code of the parent cannot be used after a fork, so it has one thread.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(list(arguments),))
    process.start()
    return process


def _run(arguments: list[str]) -> None:
    import torch

    from uniemox_dist.cli.main import run

    torch.set_num_threads(1)
    raise SystemExit(run(arguments))
