"""Signals that ask a run to end: they only set a flag, which the loop reads at a step's boundary.

Slurm signals every process of a job step, which includes compilers and other helpers that a rank started. Handlers are
lost by exec, so a signal would kill the helpers; blocked and ignored signals stay so in every child. A rank therefore
blocks and ignores these signals, and polls for pending ones.
"""

import ctypes
import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LAUNCHER_PID = "UNIEMOX_LAUNCHER_PID"
"""The variable that holds the process id of the local launcher, for its ranks."""
LIMIT, LEAD_S = "UNIEMOX_ENDS", "UNIEMOX_LEAD_S"
"""Variables of a batch script: the time limit in seconds since 1970, and how many seconds earlier Slurm signals."""
EARLY_S = 60.0
"""Slurm checks once a minute, and so signals up to a minute too early."""
_PR_SET_PDEATHSIG = 1


def stop_signals() -> list[signal.Signals]:
    """The signals that ask this process to stop; under nohup without SIGHUP."""
    hangup_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (number == signal.SIGHUP and hangup_ignored)]


def stop_with_launcher() -> None:
    """Makes the kernel send SIGTERM to this rank when the launcher that started it ends, or at once if it has ended.

    Otherwise the rank would continue to train unnoticed and hold the run's lock.
    """
    # The variable is removed, because children of this rank do not belong to the launcher.
    launcher = os.environ.pop(LAUNCHER_PID, "")
    if not launcher:
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def unblock() -> None:
    """Unblocks the stop signals, which the parent process may have blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


class StopFlag:
    """Remembers the first stop signal. A second SIGINT interrupts at once, for a user at a terminal."""

    def __init__(self) -> None:
        self._received: str | None = None
        self._blocked: list[signal.Signals] = []
        self._deadline: float | None = None

    def install(self) -> "StopFlag":
        """Installs the handlers; call it in the main thread, before other threads and processes start.

        Only SIGINT still reaches helpers: it comes from a terminal, or to this process alone.
        """
        for number in stop_signals():
            signal.signal(number, self._on_signal)
        self._blocked = [number for number in stop_signals() if number != signal.SIGINT]
        signal.pthread_sigmask(signal.SIG_BLOCK, self._blocked)
        if len(os.listdir("/proc/self/task")) == 1:
            # Shells unblock signals, but keep ignored ones. A blocked signal stays pending here even if it is ignored;
            # with other threads, which do not block it, it could be lost.
            for number in self._blocked:
                signal.signal(number, signal.SIG_IGN)
        return self

    def watch_time_limit(self, env: Mapping[str, str] = os.environ) -> None:
        """Sets the flag by the clock if Slurm has already sent its one signal before the time limit.

        A rank that starts after that signal, because of a fault, would otherwise never receive it.
        """
        try:
            signalled = float(env.get(LIMIT, "")) - float(env.get(LEAD_S, ""))
        except ValueError:  # without a limit, or outside of a Slurm job
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
        """Ignores the signals while the process exits: srun --kill-on-bad-exit sends SIGTERM to the ranks that exit
        after the first, which would turn their exit code 75 into 143."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = self._received or signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None
