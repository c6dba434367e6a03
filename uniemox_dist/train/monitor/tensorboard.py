"""A run's TensorBoard folder: one curve over all its attempts, each step once.

Every attempt writes its own file. Readers read the files in the order of their names, which begin with the second of
their creation. Each file starts with the step from which on it replaces the earlier files.
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
LOSSES = {"loss", *LOSS_NAMES, "categories", "labels", "dimensions"}
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


class TensorBoard:
    """Scalars, pictures and texts for TensorBoard. If the folder cannot be written, training continues without."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """`first_step` is the resumed step; readers hide the later steps of earlier attempts."""
        self.folder = folder
        self._writer: Any = None
        try:
            folder.mkdir(exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            keep_order(folder, int(time.time()))
            self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
            threading.excepthook = _silence_writer_thread
        except (OSError, ImportError) as error:
            self._give_up(error)

    def add_scalars(self, step: int, line: dict[str, Any]) -> None:
        """Writes the numbers of a line of metrics, and flushes them."""
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

    def add_pictures(self, step: int, size: tuple[int, int], png: bytes, texts: str) -> None:
        """Writes a PNG of `size` (height, width) and a Markdown table of its nearest texts."""
        self._guard(partial(_add_png, tag="reconstructions", size=size, png=png, step=step))
        if texts:
            self._guard(lambda writer: writer.add_text("nearest_texts", texts, step))

    def close(self) -> None:
        """Flushes and closes the file."""
        self._guard(lambda writer: writer.close())

    def _guard(self, write: Callable[[Any], object]) -> None:
        if self._writer is None:  # a full disk may have closed it
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        log.warning("%s: %s; training continues without TensorBoard", self.folder, reason)


def keep_order(folder: Path, now: int) -> None:
    """Renames earlier files whose names would not sort before a file of this second, because the clock of the host
    that wrote them was ahead or because they were created in this second."""
    latest, moves = now - 1, []
    for path in sorted(folder.glob("events.out.tfevents.*"), reverse=True):
        found = NAME.fullmatch(path.name)
        if found is None:
            continue
        second = min(int(found[1]), latest)
        moves.append((path, path.with_name(f"events.out.tfevents.{second:010d}.{found[2]}")))
        latest = second - 1
    for path, earlier in reversed(moves):  # the earliest first, so that none is overwritten
        if earlier != path:
            path.rename(earlier)


def _add_scalar(writer: Any, *, tag: str, number: float, step: int) -> None:
    writer.add_scalar(tag, number, step)


def _add_png(writer: Any, *, tag: str, size: tuple[int, int], png: bytes, step: int) -> None:
    """Like `SummaryWriter.add_image`, which would encode the picture again."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=png)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def _silence_writer_thread(error: threading.ExceptHookArgs) -> None:
    """Ignores an OSError of TensorBoard's writer thread; the next call raises it again."""
    if not issubclass(error.exc_type, OSError):
        threading.__excepthook__(error)
