"""Room for checkpoints: what is free for all ranks together, and deleting what the policy no longer keeps."""

import logging
import threading
from pathlib import Path

from uniemox_dist.checkpoints.folders import complete_checkpoints, step_folder
from uniemox_dist.checkpoints.retention import free_bytes, prune, superfluous
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World

log = logging.getLogger("uniemox")


class Retention:
    """The policy of a run's checkpoints/: the newest `keep_last`, and those whose step `keep_every` divides."""

    def __init__(self, folder: Path, world: World, keep_last: int, keep_every: int | None) -> None:
        self._folder, self._world = folder, world
        self._keep_last, self._keep_every = keep_last, keep_every
        self._pruner: threading.Thread | None = None

    def lack(self, own: int) -> str | None:
        """What is missing if `own` bytes of each rank have no room, even after what the policy deletes next is deleted;
        collective."""
        self.close()
        needed, free, rank = self._room(own)
        if free < needed and free + collectives.on_main(self._world, self._prunable) >= needed:
            # One fewer than the policy says, since the one that is about to come counts.
            collectives.on_main(
                self._world, lambda: _pruned(self._folder, self._keep_last - 1, self._keep_every)
            )
            needed, free, rank = self._room(own)
        if free >= needed:
            return None
        return (
            f"{self._folder}: a checkpoint needs {needed / 1e6:.1f} MB and rank {rank} has {free / 1e6:.1f} MB free "
            "there; make room, or keep fewer (run.keep_last, run.keep_every)"
        )

    def prune(self) -> list[str]:
        """Deletes what the policy no longer keeps, in the background since it may take its time; returns names."""
        self.close()
        steps = [checkpoint.step for checkpoint in complete_checkpoints(self._folder)]
        doomed = superfluous(steps, self._keep_last, self._keep_every)
        if doomed:
            policy = (self._folder, self._keep_last, self._keep_every)
            self._pruner = threading.Thread(target=_pruned, args=policy, name="pruner", daemon=True)
            self._pruner.start()
        return [step_folder(step) for step in doomed]

    def close(self) -> None:
        """Waits for deletions that are under way."""
        if self._pruner is not None:
            self._pruner.join()

    def _prunable(self) -> int:
        """Bytes that go when there is room for one fewer."""
        sizes = {checkpoint.step: checkpoint.bytes for checkpoint in complete_checkpoints(self._folder)}
        return sum(sizes[step] for step in superfluous(sizes, self._keep_last - 1, self._keep_every))

    def _room(self, own: int) -> tuple[float, float, int]:
        """Bytes that all ranks' parts need together, the least that any rank sees free, and that rank. The folder is
        one for all ranks, so its room is too."""
        rows = collectives.gather_numbers([_free(self._folder), own], self._world)
        free, rank = min((row[0], rank) for rank, row in enumerate(rows))
        return sum(row[1] for row in rows), free, rank


def _pruned(folder: Path, keep_last: int, keep_every: int | None) -> None:
    try:
        prune(folder, keep_last, keep_every)
    except OSError as error:  # the next save will see whether there is room
        log.warning("%s: old checkpoints could not be deleted: %s", folder, error.strerror or error)


def _free(folder: Path) -> float:
    """What a rank may still write; nothing where its disk does not answer."""
    try:
        folder.mkdir(parents=True, exist_ok=True)  # somebody may have tidied up
        return float(free_bytes(folder))
    except OSError:
        return 0.0
