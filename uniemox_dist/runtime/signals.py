"""Signals that ask a run to end: they only set a flag, which the loop reads at a step's boundary."""

import ctypes
import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
LAUNCHER_PID = "UNIEMOX_LAUNCHER_PID"
"""The variable in which the launcher of one machine tells its ranks which process it is."""
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


class StopFlag:
    """Remembers the first stop signal. A second SIGINT interrupts at once: someone is waiting at a terminal."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> "StopFlag":
        """Takes the signals over; only possible in the main thread."""
        for number in stop_signals():
            signal.signal(number, self._on_signal)
        return self

    def ignore_from_now_on(self) -> None:
        """The loop is over and only the way out is left. srun --kill-on-bad-exit sends SIGTERM to the ranks that
        leave a little later than the first, which would turn their 75 into 143."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.received is not None
