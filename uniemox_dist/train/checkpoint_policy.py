"""When a run saves, and what it says of it: between the loop, which knows steps, and the saver, which knows bytes."""

import logging
import time
from typing import Any

from uniemox_dist.checkpoints.async_writer import Saver
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.runs.events import FaultEvent, Save
from uniemox_dist.train.trainer import Trainer

log = logging.getLogger("uniemox")


class Saves:
    """The saves of a run. All methods are collective: all ranks call them at the same steps."""

    def __init__(self, trainer: Trainer, watchdog: Watchdog) -> None:
        run = trainer.config.run
        self._trainer, self._watchdog, self._timeout_s = trainer, watchdog, run.timeout_s
        self._saver = Saver(
            trainer.engine,
            trainer.folder.checkpoints,
            trainer.world,
            trainer.fixed,
            trainer.ema,
            keep_last=run.keep_last,
            keep_every=run.keep_every,
        )
        self._saved = trainer.chosen.step if trainer.chosen else -1

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write; the ranks tell each other with the next step."""
        return self._saver.written

    def begin(self, step: int) -> None:
        """Begins to save a step. Where the disk is slower than the steps, training waits for the one before: what is
        there after a fault should not depend on a disk's mood."""
        if self._saver.under_way is not None:
            before, began = self._saver.under_way, time.perf_counter()
            self._commit()
            if self._trainer.world.is_main:
                log.warning(
                    "step %d waited %.1f s until step %d was written; raise run.save_every, or use a faster disk",
                    step,
                    time.perf_counter() - began,
                    before,
                )
        self._watchdog.expect(f"the copy for a checkpoint of step {step}", self._timeout_s)
        failed = self._saver.begin(self._trainer.state(step))
        if failed is not None:
            self._tell({"step": step, **failed})

    def commit_if(self, all_written: bool) -> None:
        """Completes the save under way as soon as every rank has written its part."""
        if all_written and self._saver.under_way is not None:
            self._commit()

    def finish(self, step: int | None = None) -> bool:
        """Waits for the save under way and then saves `step`, if it is not saved yet; returns whether it is."""
        if self._saver.under_way is not None:
            self._commit()
        if step is not None and self._saved != step:
            self.begin(step)
            if self._saver.under_way is not None:
                self._commit()
        self._saver.close()
        return self._saved == step

    def _commit(self) -> None:
        self._watchdog.expect(f"writing the checkpoint of step {self._saver.under_way}", self._timeout_s)
        facts = self._saver.commit()
        if "error" not in facts:
            self._saved = facts["step"]
        self._tell(facts)

    def _tell(self, facts: dict[str, Any]) -> None:
        if not self._trainer.world.is_main:
            return
        step, folder = facts["step"], self._trainer.folder
        if "error" in facts:
            folder.write(FaultEvent(step=step, error=f"save failed: {facts['error']}"))
            log.error("save of step %d failed, training goes on: %s", step, facts["error"])
            return
        folder.write(Save(**facts))
        log.info(
            "saved step %d: %.1f MB in %.2f s, of which training waited %.3f s",
            step,
            facts["bytes"] / 1e6,
            facts["seconds"],
            facts["blocked_s"],
        )
