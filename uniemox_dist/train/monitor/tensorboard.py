"""A run's TensorBoard folder: one curve over all its attempts, each step once.

Every attempt writes a file of its own, and readers take the files in the order of their names, which begin with the
second of their making. A file says first from which step on those before it do not count any more.
"""

import logging
import re
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from uniemox_dist.config.losses import LOSS_NAMES

log = logging.getLogger("uniemox")
LOSSES = {"loss", *LOSS_NAMES, "categories", "dimensions"}
DATA = {
    "data_wait_share",
    "data_wait_share_max",
    "bytes_read_per_rank",
    "bytes_read_per_rank_max",
    "read_retries",
    "cache_hit_share",
    "source_samples",
    "damaged_samples",
}
NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(.+)")


class Board:
    """Scalars, pictures and texts for TensorBoard. A folder that cannot be written costs these, never the run."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step` is the one that was resumed: what an earlier attempt wrote beyond it is hidden."""
        self.folder = folder
        self._writer: Any = None
        try:
            folder.mkdir(exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            keep_order(folder, int(time.time()))
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
            threading.excepthook = _of_writer
        except (OSError, ImportError) as error:
            self._give_up(error)

    def scalars(self, step: int, line: dict[str, Any]) -> None:
        """The numbers of a line of metrics; what is written here survives a kill."""
        for name, value in line.items():
            if name in ("step", "time", "slots"):
                continue
            group = "loss" if name in LOSSES else "data" if name in DATA else "run"
            values = (
                {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            )
            for tag, number in values.items():
                self._guard(partial(_add_scalar, tag=f"{group}/{tag}", number=number, step=step))
        self._guard(lambda writer: writer.flush())

    def pictures(self, step: int, sheet: Any, texts: str) -> None:
        """A sheet of pictures (uint8 H×W×3) and a Markdown table of their nearest texts."""
        self._guard(lambda writer: writer.add_image("reconstructions", sheet, step, dataformats="HWC"))
        if texts:
            self._guard(lambda writer: writer.add_text("nearest_texts", texts, step))

    def close(self) -> None:
        """Writes what is left to write."""
        self._guard(lambda writer: writer.close())

    def _guard(self, write: Callable[[Any], object]) -> None:
        if self._writer is None:  # a full disk may have ended it
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: %s; training goes on without TensorBoard", self.folder, reason)


def keep_order(folder: Path, now: int) -> None:
    """Gives earlier files earlier names where a file of this second would not come after them: the clock of the host
    that wrote them was ahead, or they are of this very second, and may even have the name that comes next."""
    latest, moves = now - 1, []
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        found = NAME.fullmatch(path.name)
        if found is None:
            continue
        second = min(int(found[1]), latest)
        moves.append((path, path.with_name(f"events.out.tfevents.{second:010d}.{found[2]}")))
        latest = second - 1
    for path, earlier in reversed(moves):  # the earliest first, so that none is written over
        if earlier != path:
            path.rename(earlier)


def _add_scalar(writer: Any, *, tag: str, number: float, step: int) -> None:
    writer.add_scalar(tag, number, step)


def _of_writer(error: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread of its own, whose error its next call raises: once is enough."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)
