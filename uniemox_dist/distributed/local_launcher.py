"""Starts the ranks of one machine. This launcher keeps a rank's exit code 75, which torchrun would turn into 1.

It forwards signals to the ranks, which save together. If one rank fails, it ends the others.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE, EXIT_USER
from uniemox_dist.core.signals import LAUNCHER_PID, stop_signals, unblock

GRACE_S = 10
"""Seconds that the other ranks get after one failed, before they are killed."""
PORTS = range(10_000, 32_768)
LOOK_S = 0.05
"""Seconds between two polls of the ranks and of the received signals."""


class Signals:
    """The signals received while this process has ranks. The handler only records them, so that none is lost while
    ranks are started, or between two attempts."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self._previous = {number: signal.signal(number, self._note) for number in stop_signals()}
        unblock()  # the parent may have blocked them, as a rank does for its helpers
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)


@dataclass(frozen=True)
class Ended:
    """The end of one attempt."""

    code: int
    """The exit code of the attempt."""
    reason: str | None = None
    """The rank that failed first, and how."""
    unprepared: bool = False
    """True if a forwarded signal killed a rank, which had not installed its handler yet."""


def print_line(text: str) -> None:
    """Prints one line on standard error; a closed terminal must not stop the launcher."""
    with suppress(OSError):
        print(f"uniemox: {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    """Returns a random free port at which the ranks can meet.

    It is below the range from which the system numbers outgoing connections (32768 and above on Linux), so that no
    connection takes it before rank 0 listens there.

    Raises:
        OSError: if none of many ports is free.
    """
    for port in random.SystemRandom().sample(PORTS, 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError(f"none of 200 ports from {PORTS.start} to {PORTS.stop - 1} is free")


def run_ranks(command: Sequence[str], ranks: int, *, gpus: bool) -> int:
    """Runs `command` once per rank with torchrun's variables; returns the exit code (see `run_attempt`)."""
    with Signals() as signals:
        return run_attempt(command, ranks, signals, gpus=gpus).code


def run_attempt(command: Sequence[str], ranks: int, signals: Signals, *, gpus: bool) -> Ended:
    """Starts the ranks, forwards signals to them, and waits until all have ended.

    Without `gpus`, DeepSpeed uses the CPU; otherwise it uses GPUs where there are any.

    The exit code is 0, 2 or 75 if all ranks ended with it. It is also 2 if some ranks ended with 2 and all others with
    1 or by SIGKILL. Otherwise it is 1.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        LAUNCHER_PID: str(os.getpid()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **({} if gpus else {"DS_ACCELERATOR": "cpu"}),
    }
    children: list[subprocess.Popen[bytes]] = []
    try:
        for r in range(ranks):
            env = {**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)}
            # A new session, so that Ctrl-C reaches only this launcher, which forwards it once.
            children.append(subprocess.Popen(command, env=env, start_new_session=True))
        return _wait(children, signals)
    finally:
        for child in children:
            if child.returncode != EXIT_DONE:  # also the processes that it started, such as loader workers
                _kill(child)


def _wait(children: Sequence["subprocess.Popen[bytes]"], signals: Signals) -> Ended:
    passed_on, deadline = 0, None
    reason: str | None = None
    while any(child.poll() is None for child in children):
        while passed_on < len(signals.received):
            for child in children:
                if child.poll() is None:
                    child.send_signal(signals.received[passed_on])
            passed_on += 1
        failed = [c for c in children if c.poll() not in (None, EXIT_DONE, EXIT_REQUEUE)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
            reason = _explain(children, failed, signals.received)
        if deadline is not None and time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if child.poll() is None:
                    print_line(
                        f"error: rank {rank} (pid {child.pid}) did not end within {GRACE_S} s after another rank "
                        "failed, and is killed; if it left no stacks in logs/, it is the rank that hung"
                    )
                    _kill(child)
        time.sleep(LOOK_S)
    failed = [c for c in children if c.returncode not in (EXIT_DONE, EXIT_REQUEUE)]
    if failed and deadline is None:  # all ended between two polls
        reason = _explain(children, failed, signals.received)
    codes = {child.returncode for child in children}
    unprepared = any(-code in signals.received for code in codes)
    if len(codes) == 1 and codes <= {EXIT_DONE, EXIT_USER, EXIT_REQUEUE}:
        return Ended(codes.pop(), reason)
    # Ranks that did not report the user's mistake are killed while they wait for the rank that did, or fail because it
    # has ended.
    if EXIT_USER in codes and codes <= {EXIT_USER, EXIT_FAULT, -signal.SIGKILL}:
        return Ended(EXIT_USER, reason)
    return Ended(EXIT_FAULT, reason, unprepared)


def _explain(
    children: Sequence["subprocess.Popen[bytes]"],
    failed: Sequence["subprocess.Popen[bytes]"],
    expected: Sequence[int],
) -> str:
    """Reports how the first failing ranks ended; a rank that was killed by a signal cannot report it itself."""
    says = []
    for child in failed:
        rank, code = children.index(child), child.returncode
        if code >= 0:
            says.append(f"rank {rank} ended with exit code {code}")
            continue
        name = signal.Signals(-code).name
        perhaps = " (possibly out of memory)" if name == "SIGKILL" else ""
        says.insert(0, f"rank {rank} (pid {child.pid}) died of {name}{perhaps}")
        if -code not in expected:
            print_line(f"error: {says[0]}")
    return says[0]


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """Kills a rank, even a suspended one, with all processes of its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
