"""Runs the command `uniemox …` and its ranks in processes forked from this one, which has imported torch and DeepSpeed
once. A start then takes some seconds instead of twenty. Sessions, signals and exit codes are as from a shell.

This process must have no Python threads when it forks, so no function here starts one.
"""

import importlib
import os
import signal
import sys
import threading
import time
import traceback
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

PRELOADED = (
    "torch",
    "torch._dynamo",  # the loop imports it to draw samples, which takes seconds
    "deepspeed.runtime.zero.muon.muon_optimizer",  # DeepSpeed's engine imports it, and with it torch's compiler
    "open_clip",
    "timm",
    "torch.utils.tensorboard",
    "uniemox_dist.cli.main",
    "uniemox_dist.cli.pretrain",
    "uniemox_dist.train.pretrain",
    "launch.restarts",
)
Patch = Callable[[int], None]
"""A function that changes a rank's process before it runs; its argument is the rank."""


def preload() -> None:
    """Imports the modules that a run needs. Sets one thread per rank and no GPU, so that results are equal bit for
    bit."""
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
    # Otherwise an import starts compiler processes.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in PRELOADED:
        importlib.import_module(name)
    assert threading.active_count() == 1, "a fork would lose threads"


class Forked:
    """A forked process with the part of subprocess.Popen's interface that the launcher uses."""

    def __init__(self, work: Callable[[], int], env: Mapping[str, str] | None = None) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_as_started_anew(work, env))

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Waits until the process ends."""
        while self.poll() is None:
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal, unless the process has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def _as_started_anew(work: Callable[[], int], env: Mapping[str, str] | None) -> int:
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        return work()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def start(arguments: Sequence[str], log: Path, patch: Patch | None = None) -> Forked:
    """Runs `uniemox ARGUMENTS`; appends the output of the command and its ranks to `log`."""

    def command() -> int:
        import uniemox_dist.distributed.local_launcher
        from uniemox_dist.cli.main import run

        handle = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        uniemox_dist.distributed.local_launcher.subprocess = types.SimpleNamespace(Popen=_rank(patch))  # type: ignore[attr-defined,assignment]
        sys.argv = ["uniemox", *arguments]
        return run(list(arguments))

    return Forked(command)


def _rank(patch: Patch | None) -> Callable[..., Forked]:
    """Returns the launcher's replacement for Popen, which forks a rank for the command line [python, -m,
    uniemox_dist.cli, …]."""

    def popen(command: Sequence[str], *, env: Mapping[str, str], start_new_session: bool) -> Forked:
        assert start_new_session

        def rank() -> int:
            from uniemox_dist.cli.main import run

            if patch is not None:
                patch(int(env["RANK"]))
            sys.argv = ["uniemox", *command[3:]]
            return run(list(command[3:]))

        return Forked(rank, env)

    return popen
