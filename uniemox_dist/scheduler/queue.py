"""Asking Slurm about the jobs of runs, without ever waiting long for it."""

import time
from collections.abc import Mapping, Sequence

from uniemox_dist.core.errors import Fault, UserError
from uniemox_dist.core.formatting import cut
from uniemox_dist.scheduler.commands import JobState, NoSlurm, job_states

PATIENCE_S = 5.0
"""Seconds that Slurm may take to answer: people look at a screen meanwhile."""
AGAIN_S = 60.0
"""Seconds after which it is asked again if it did not answer."""


class Queue:
    """Slurm, as far as it answers."""

    def __init__(self) -> None:
        self.remark = ""
        """Why there is no answer, in one line; empty where there is one, or where nothing was to be asked."""
        self._silent_until = 0.0

    def ask(self, ids: Sequence[int]) -> Mapping[int, JobState] | None:
        """The jobs that Slurm knows; None without an answer. One call for all."""
        if not ids:
            self.remark = ""
            return {}
        if time.monotonic() < self._silent_until:
            return None
        try:
            found = job_states(ids, timeout_s=PATIENCE_S)
        except NoSlurm:
            why = "there is no squeue on this machine"
        except (Fault, UserError) as error:
            why = cut(str(error), 100)
        else:
            self.remark = ""
            return found
        self.remark = f"Without Slurm, as the run folders tell: {why}"
        self._silent_until = time.monotonic() + AGAIN_S
        return None
