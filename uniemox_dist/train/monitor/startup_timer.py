"""How long it took from the start of a job to its first step, part by part."""

import logging
import os
import time
from collections.abc import Callable, Mapping

from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.runs.events import FirstStep
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")
BATCH_BEGAN = "UNIEMOX_BATCH_BEGAN"
"""The variable in which a batch script says when it began, in seconds since 1970."""
PARTS = {
    "the preflight": "preflight",
    "opening the data": "data",
    "choosing a checkpoint, whose files are hashed": "checkpoint",
    "opening the teacher": "teacher",
    "choosing the pictures that are shown": "pictures",
    "making the engine, and loading the checkpoint": "engine",
}
"""The part that begins with what is announced to the watchdog; what else is announced belongs to the part before."""


class Started:
    """Adds up seconds by part, in the order in which parts first came."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        """The time until now is that of the batch script, where one said when it began, and of imports."""
        self.seconds: dict[str, float] = {}
        now, began = time.time(), process_began()
        try:
            batch = float(
                env.get(BATCH_BEGAN, "").replace(",", ".")
            )  # bash writes the language's decimal sign
        except ValueError:
            batch = began
        if batch < began:
            self.seconds["batch script"] = began - batch
        self.seconds["imports"] = max(0.0, now - began)
        self._part, self._since = "meeting", time.monotonic()

    def now(self, doing: str) -> None:
        """From now on this is under way."""
        part = PARTS.get(doing, self._part)
        if part != self._part:
            self.begins(part)

    def begins(self, part: str) -> None:
        """The part before is over."""
        now = time.monotonic()
        self.seconds[self._part] = self.seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    def expecting(self, watchdog: Watchdog, limit_s: float) -> Callable[[str], None]:
        """What tells the watchdog, and this, what is under way; each may take `limit_s` seconds."""

        def expect(doing: str) -> None:
            watchdog.expect(doing, limit_s)
            self.now(doing)

        return expect

    def say(self, folder: RunFolder, step: int) -> None:
        """The event and the line of the first step, which came after `step` others."""
        seconds = self.facts()
        folder.write(FirstStep(step=step, seconds=seconds))
        log.info("%s", describe(seconds))

    def facts(self) -> dict[str, float]:
        """Seconds by part, and `total`."""
        under_way = self.seconds.get(self._part, 0.0) + time.monotonic() - self._since
        seconds = {**self.seconds, self._part: under_way}
        rounded = {part: round(value, 2) for part, value in seconds.items()}
        return {**rounded, "total": round(sum(seconds.values()), 2)}


def describe(seconds: Mapping[str, float]) -> str:
    """`first step after 14.2 s: imports 6.1, …`."""
    parts = ", ".join(f"{part} {value:.1f}" for part, value in seconds.items() if part != "total")
    return f"first step after {seconds['total']:.1f} s: {parts}"


def process_began() -> float:
    """When this process began, in seconds since 1970; from the kernel, and so before the interpreter was read."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = float(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime", encoding="ascii") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return time.time()
    return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
