"""What a run says of itself: metrics.jsonl, TensorBoard, and one readable line per interval."""

import logging
import time
from typing import Any

import psutil
import torch

from uniemox_dist.runtime.run_folder import RunFolder
from uniemox_dist.train.schedule import Schedule
from uniemox_dist.train.step import StepResult

log = logging.getLogger("uniemox")


class Meter:
    """Times and losses of a run; writes on rank 0 only."""

    def __init__(
        self, folder: RunFolder, schedule: Schedule, global_batch: int, *, writes: bool, first_step: int
    ) -> None:
        self.folder, self.schedule, self.global_batch, self.writes = folder, schedule, global_batch, writes
        self.skipped = self.damaged = self.samples = 0
        self._board: Any = None
        if writes:
            try:
                from torch.utils.tensorboard import SummaryWriter

                # purge_step hides what an earlier attempt wrote beyond the checkpoint that is resumed.
                self._board = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)
            except OSError as error:
                log.warning(
                    "%s: %s; training goes on without TensorBoard", folder.tensorboard, error.strerror
                )
        self._begin()

    def _begin(self) -> None:
        self._since, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count(self, result: StepResult, waited_s: float) -> None:
        """Takes in a step, and the seconds that it waited for data."""
        self._steps += 1
        self._waited_s += waited_s
        self.skipped += not result.applied
        self.damaged += result.damaged
        self.samples += result.keys

    def write(self, step: int, result: StepResult, lr: float) -> dict[str, Any]:
        """Closes an interval: rates are of the interval, losses of its last step."""
        seconds = time.perf_counter() - self._since
        slots = step * self.global_batch
        samples_per_s = self._steps * self.global_batch / seconds
        line = {
            "step": step,
            "epoch": round(slots / self.schedule.epoch_samples, 4),
            "slots": slots,
            "loss": result.loss,
            "relation": result.relation,
            "similarity": result.similarity,
            "reconstruction": result.reconstruction,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "samples_per_s": round(samples_per_s, 2),
            "data_wait_share": round(self._waited_s / seconds, 4),
            "skipped_steps": self.skipped,
            "damaged_samples": self.damaged,
            "host_memory_gb": round(psutil.Process().memory_info().rss / 1e9, 3),
            "time": round(time.time(), 3),
        }
        if torch.cuda.is_available():
            line["device_memory_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
        if self.writes:
            self.folder.metric(line)
            self._to_board(step, line)
            left_s = (self.schedule.max_steps - step) * self.global_batch / samples_per_s
            log.info(
                "step %d/%d  epoch %.2f  loss %.4f (relation %.4f similarity %.4f reconstruction %.4f)  lr %.2e  "
                "%.1f samples/s  data wait %.0f%%  %.1f GB  %s left",
                step,
                self.schedule.max_steps,
                line["epoch"],
                result.loss,
                result.relation,
                result.similarity,
                result.reconstruction,
                lr,
                samples_per_s,
                100 * line["data_wait_share"],
                line["host_memory_gb"],
                _duration(left_s),
            )
        self._begin()
        return line

    def picture(self, step: int, sheet: Any) -> None:
        """A sheet of reconstructions (uint8 H×W×3) to TensorBoard."""
        if self._board is not None:
            self._guard(lambda: self._board.add_image("reconstructions", sheet, step, dataformats="HWC"))

    def close(self) -> None:
        """Flushes TensorBoard."""
        if self._board is not None:
            self._guard(self._board.close)

    def _to_board(self, step: int, line: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in line.items():
            if name not in ("step", "time", "slots"):
                group = "loss" if name in ("loss", "relation", "similarity", "reconstruction") else "run"
                self._guard(
                    lambda tag=f"{group}/{name}", value=value: self._board.add_scalar(tag, value, step)
                )

    def _guard(self, write: Any) -> None:
        """A TensorBoard folder that cannot be written costs the pictures, never the run."""
        try:
            write()
        except OSError as error:
            log.warning("%s: %s; training goes on without TensorBoard", self.folder.tensorboard, error)
            self._board = None


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s"
