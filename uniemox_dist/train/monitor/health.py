"""Reports problems of a step (damaged samples, skipped steps, loss spikes), and decides when a run must end."""

import logging
import math
import statistics
from collections import deque
from collections.abc import Sequence

from uniemox_dist.checkpoints.folders import find_newest_complete
from uniemox_dist.config.schema import Config
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events.training import BadSample, Skip, Spike
from uniemox_dist.runs.folder import RunFolder, read_lines
from uniemox_dist.train.monitor import nonfinite
from uniemox_dist.train.monitor.metrics import Metrics
from uniemox_dist.train.step import StepResult

log = logging.getLogger("uniemox")
WINDOW = 100
"""Number of previous steps whose median loss each loss is compared with."""
MIN_STEPS = 20
"""Steps before the median is used."""
MAX_NAMED = 20
"""Damaged samples that a run's last log line names; events.jsonl has all of them."""
MIN_DAMAGED = 8
"""Number of damaged samples that any run may have, even if it has read few samples."""


class Health:
    """Watches the steps of a run; every rank checks every step."""

    def __init__(self, folder: RunFolder, world: World, config: Config, metrics: Metrics) -> None:
        """`metrics` counts damaged and all samples; it must be updated with each step before `check`."""
        self.folder, self.world, self.config, self.metrics = folder, world, config, metrics
        self.skipped_in_a_row = 0
        self._spikes = LossSpikes(config.run.spike_factor)

    def check(self, step: int, result: StepResult, batches: Sequence[MicroBatch]) -> bool:
        """Reports the events of a step; returns whether training must end, on all ranks alike.

        Each rank reports the samples that it replaced, and writes its own evidence of the first and of the last of
        several skipped steps in a row.
        """
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        for line in (line for batch in batches for line in batch.damaged):
            self.folder.write(BadSample(step=step, damaged=line))
            log.warning("replaced a damaged sample: %s", line)
        self._report_skip(step, result)
        median = self._spikes.check(result.loss)
        if median is not None and self.world.is_main:
            self.folder.write(Spike(step=step, loss=result.loss, median=median))
            log.warning(
                "step %d: the loss of %.4f is far above the median of %.4f", step, result.loss, median
            )
        return self._skips_too_much or self._damaged_too_much

    def _report_skip(self, step: int, result: StepResult) -> None:
        if result.evidence is not None and self.skipped_in_a_row in (1, self.config.optim.max_skipped):
            name = f"nonfinite_step_{step:08d}_rank{self.world.rank:05d}.json"
            nonfinite.write(self.folder.logs / name, result.evidence)
        if not result.applied and self.world.is_main:
            where = "gradients" if math.isfinite(result.loss) else "loss"
            in_a_row, loss = self.skipped_in_a_row, str(result.loss)
            self.folder.write(Skip(step=step, in_a_row=in_a_row, loss=loss, where=where))
            verb = "is" if where == "loss" else "are"
            log.warning("skipped step %d: its %s %s not finite", step, where, verb)

    @property
    def _skips_too_much(self) -> bool:
        return self.skipped_in_a_row >= self.config.optim.max_skipped

    @property
    def _damaged_too_much(self) -> bool:
        share = self.config.data.max_bad_share
        return self.metrics.damaged > max(MIN_DAMAGED, share * self.metrics.samples)

    def describe_end(self) -> str:
        """Returns the reason why training must end. All ranks call it, when no save is under way."""
        if self._skips_too_much:
            saved = find_newest_complete(self.folder.checkpoints)
            kept = (
                f"the checkpoint of step {saved.step} is kept"
                if saved
                else "no checkpoint has been saved yet"
            )
            return (
                f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient; see "
                f"{self.folder.logs}/nonfinite_*.json; {kept}; lower optim.blr or fix the data"
            )
        collectives.barrier()  # wait until every rank has reported its samples
        share = f"more than data.max_bad_share={self.config.data.max_bad_share:g}"
        found = f"{self.metrics.damaged} of {self.metrics.samples} pictures are damaged, {share}"
        return f"{found}: {list_damaged(self.folder)}"


class LossSpikes:
    """Compares each loss with the running median of the previous ones. A spike may indicate bad data, a learning rate
    that is too high, or a failing device."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float) -> float | None:
        """Returns the median if this loss exceeds `factor` times the median; a loss that is not finite never does."""
        if not math.isfinite(loss):
            return None
        median = statistics.median(self._losses) if len(self._losses) >= MIN_STEPS else math.inf
        self._losses.append(loss)
        return median if loss > self.factor * median > 0 else None


def list_damaged(folder: RunFolder) -> str:
    """The damaged samples that the ranks have reported so far, each once."""
    lines = [event["damaged"] for event in read_lines(folder.events) if "damaged" in event]
    # A sample occurs once per epoch, in different slots; the text after the slot identifies it.
    names = list(dict.fromkeys(line.partition(": ")[2] for line in lines))
    rest = f"; and {len(names) - MAX_NAMED} more in {folder.events}" if len(names) > MAX_NAMED else ""
    return "; ".join(names[:MAX_NAMED]) + rest
