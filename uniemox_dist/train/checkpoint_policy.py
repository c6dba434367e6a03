"""Decides when a run saves, and reports its saves. It connects the loop, which counts steps, and the writer, which
writes bytes."""

import logging
import time
from collections.abc import Callable
from typing import Any

from uniemox_dist.checkpoints.async_writer import AsyncWriter
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.core.formatting import short_duration, size
from uniemox_dist.core.watchdog import Watchdog
from uniemox_dist.distributed.world import World
from uniemox_dist.runs.events.training import FaultEvent, Save
from uniemox_dist.runs.folder import RunFolder

log = logging.getLogger("uniemox")


class CheckpointPolicy:
    """The saves of a run. All methods are collective: all ranks call them at the same steps."""

    def __init__(
        self,
        writer: AsyncWriter,
        run_state: Callable[[int], RunState],
        folder: RunFolder,
        world: World,
        watchdog: Watchdog,
        *,
        timeout_s: float,
        saved_step: int = -1,
    ) -> None:
        """`saved_step` is the step of the checkpoint that the run resumed; -1 without one."""
        self._writer, self._run_state, self._folder, self._world = writer, run_state, folder, world
        self._watchdog, self._timeout_s, self._saved = watchdog, timeout_s, saved_step

    @property
    def written(self) -> bool:
        """True if this rank has written its part of the current save, or there is none."""
        return self._writer.written

    def start(self, step: int) -> None:
        """Starts to save a step. Waits for a save that is still being written, because the checkpoints that exist
        after a fault must not depend on the disk's speed."""
        if self._writer.under_way is not None:
            before, began = self._writer.under_way, time.perf_counter()
            self._commit()
            if self._world.is_main:
                log.warning(
                    "step %d waited %.1f s until step %d was written; raise run.save_every, or use a faster disk",
                    step,
                    time.perf_counter() - began,
                    before,
                )
        self._watchdog.expect(f"the copy for a checkpoint of step {step}", self._timeout_s)
        failed = self._writer.start(self._run_state(step))
        if failed is not None:
            self._report({"step": step, **failed})

    def commit_if(self, all_written: bool) -> None:
        """Completes the current save once every rank has written its part."""
        if all_written and self._writer.under_way is not None:
            self._commit()

    def finish(self, step: int | None = None) -> bool:
        """Completes the current save, then saves `step` unless it is saved already; returns whether `step` is
        saved."""
        if self._writer.under_way is not None:
            self._commit()
        if step is not None and self._saved != step:
            self.start(step)
            if self._writer.under_way is not None:
                self._commit()
        self._writer.close()
        return self._saved == step

    def _commit(self) -> None:
        self._watchdog.expect(f"writing the checkpoint of step {self._writer.under_way}", self._timeout_s)
        facts = self._writer.commit()
        if "error" not in facts:
            self._saved = facts["step"]
        self._report(facts)

    def _report(self, facts: dict[str, Any]) -> None:
        if not self._world.is_main:
            return
        step = facts["step"]
        if "error" in facts:
            self._folder.write(FaultEvent(step=step, error=f"save failed: {facts['error']}"))
            log.error("could not save step %d, training continues: %s", step, facts["error"])
            return
        self._folder.write(Save(**facts))
        log.info(
            "saved step %d: %s in %s, of which training waited %s",
            step,
            size(facts["bytes"]),
            short_duration(facts["seconds"]),
            short_duration(facts["blocked_s"]),
        )
