"""Starts the ranks of one machine. torchrun turns a child's exit code 75 into 1; this launcher keeps it.

Signals are passed on to the ranks, which save together; when one rank fails, the others are ended.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from uniemox_dist.runtime.errors import EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE, EXIT_USER

GRACE_S = 10
"""Seconds that the other ranks get after one failed, before they are killed."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


def free_port() -> int:
    """A port that is free now, for the ranks to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(command: Sequence[str], ranks: int, *, gpus: bool) -> int:
    """Runs `command` once per rank with torchrun's variables; returns the exit code of the whole.

    75 only if every rank ended with 75; 2 if the ranks agree on a user's mistake; 1 for anything else that is
    not 0.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    shared = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        **({} if gpus else {"DS_ACCELERATOR": "cpu"}),
    }
    # A session of its own: Ctrl-C at a terminal reaches this launcher alone, which passes it on once.
    children = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(r), "LOCAL_RANK": str(r)},
            start_new_session=True,
        )
        for r in range(ranks)
    ]

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        return _wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: Sequence["subprocess.Popen[bytes]"]) -> int:
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        failed = [c for c in children if c.poll() not in (None, EXIT_DONE, EXIT_REQUEUE)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE_S
            for child in failed:
                if child.returncode < 0:  # it could say nothing itself
                    name = signal.Signals(-child.returncode).name
                    perhaps = " (killed, perhaps for its memory)" if name == "SIGKILL" else ""
                    rank = children.index(child)
                    print(
                        f"uniemox: error: rank {rank} (pid {child.pid}) died of {name}{perhaps}",
                        file=sys.stderr,
                    )
        if deadline is not None and time.monotonic() > deadline:
            for child in children:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        time.sleep(0.05)
    codes = {child.returncode for child in children}
    if len(codes) == 1 and codes <= {EXIT_DONE, EXIT_USER, EXIT_REQUEUE}:
        return codes.pop()
    # The ranks that a user's mistake did not reach are killed while they wait for the one that found it.
    if EXIT_USER in codes and codes <= {EXIT_USER, -signal.SIGKILL}:
        return EXIT_USER
    return EXIT_FAULT
