"""Commands in forked processes, which saves the imports of a fresh interpreter."""

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path

from ranks import PRELOAD, TIMEOUT_S

TOOLS = Path(__file__).parents[2] / "tools"


def start_fork(work: Callable[..., object], *arguments: object) -> ForkProcess:
    """Starts a function in a fork of this process, to be killed by a test.

    Parallel code of the parent cannot be used after a fork, so it has one thread.
    """
    process = multiprocessing.get_context("fork").Process(target=_with_one_thread, args=(work, *arguments))
    process.start()
    return process


def _with_one_thread(work: Callable[..., object], *arguments: object) -> None:
    import torch

    torch.set_num_threads(1)
    work(*arguments)


def run_with_ranks(arguments: Sequence[str], log: Path) -> int:
    """Runs `uniemox ARGUMENTS --nproc N` to its end and returns its exit code; what it prints goes to `log`.

    The launcher and its ranks are forks of a server that has imported torch and DeepSpeed once. One thread a rank.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_run_with_ranks, args=(list(arguments), log))
    process.start()
    process.join(TIMEOUT_S)
    code = process.exitcode
    process.kill()
    assert code is not None, f"it did not end in {TIMEOUT_S} s"
    return code


def _run_with_ranks(arguments: list[str], log: Path) -> None:
    import torch

    sys.path.insert(0, str(TOOLS))
    from chaos_faults.processes import start  # type: ignore[import-not-found]

    torch.set_num_threads(1)
    raise SystemExit(start(arguments, log).wait())
