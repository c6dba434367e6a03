"""Signals that ask a run to end: they only set a flag, which the loop reads at a step's boundary.

Slurm signals every process of a job step, and so also compilers and other helpers that a rank has started. A handler is
lost with exec, and so those would die of it; a signal that is blocked or ignored stays so in every child. So a rank
blocks and ignores these signals, and looks which of them wait for it when it wants to know.
"""

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LAUNCHER_PID = "UNIEMOX_LAUNCHER_PID"
"""The variable in which the launcher of one machine tells its ranks which process it is."""
LIMIT, LEAD_S = "UNIEMOX_ENDS", "UNIEMOX_LEAD_S"
"""Variables of a batch script: when its time limit comes, in seconds since 1970, and how many earlier Slurm signals."""
EARLY_S = 60.0
"""Slurm looks now and then only, and so signals up to a minute too early."""
_PR_SET_PDEATHSIG = 1


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop. Under nohup a terminal that closes is no reason to."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and hangup_ignored)]


def stop_with_launcher() -> None:
    """Ties a rank to the launcher that started it, if one did: SIGTERM comes when the launcher is gone, however it
    ended, or at once if it is gone already. Otherwise the rank would train on unseen, and hold the run's lock."""
    # Taken out, as what this rank starts is not the launcher's.
    launcher = os.environ.pop(LAUNCHER_PID, "")
    if not launcher:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def unblock() -> None:
    """Lets this process get the stop signals, which whoever started it may have blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopFlag:
    """Remembers the first stop signal. A second SIGINT interrupts at once: someone is waiting at a terminal."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._blocked: list[signal.Signals] = []
        self._deadline: float | None = None

    def install(self) -> "StopFlag":
        """Takes the signals over; only possible in the main thread, and meant to come before other threads and
        processes start. SIGINT alone is not kept from helpers: it comes from a terminal, or to this process alone."""
        for number in stop_signals():
            signal.signal(number, self._on_signal)
        self._blocked = [number for number in stop_signals() if number != signal.SIGINT]
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        if len(os.listdir("/proc/self/task")) == 1:
            # Shells take up what was blocked, but never what was ignored. What is blocked waits here, even if ignored;
            # with other threads, which do not block it, it could be lost.
            for number in self._blocked:
                signal.signal(number, signal.SIG_IGN)
        return self

    def mind_limit(self, env: Mapping[str, str] = os.environ) -> None:
        """Slurm signals once, before the time limit, and who starts later, after a fault, would never hear of it: where
        that may be so, the clock stands in for the signal."""
        try:
            signalled = float(env.get(LIMIT, "")) - float(env.get(LEAD_S, ""))
        except ValueError:  # there is no limit, or this is no Slurm job
            return
        if time.time() >= signalled - EARLY_S:
            self._deadline = signalled

    @property
    def received(self) -> str | None:
        """The name of the first stop signal so far."""
        while self._blocked and (info := signal.sigtimedwait(self._blocked, 0)) is not None:
            self._on_signal(info.si_signo, None)
        if self._received is None and self._deadline is not None and time.time() >= self._deadline:
            self._received = signal.SIGUSR2.name
        return self._received

    def ignore_from_now_on(self) -> None:
        """The loop is over and only the way out is left. srun --kill-on-bad-exit sends SIGTERM to the ranks that
        leave a little later than the first, which would turn their 75 into 143."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None
