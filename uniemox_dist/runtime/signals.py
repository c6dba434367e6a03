"""Signals that ask a run to end: they only set a flag, which the loop reads at a step's boundary."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Remembers the first stop signal. A second SIGINT interrupts at once: someone is waiting at a terminal."""

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> "StopFlag":
        """Takes the signals over; only possible in the main thread."""
        for number in STOP_SIGNALS:
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
