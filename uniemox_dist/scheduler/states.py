"""The states that squeue, sacct and scontrol report for a job, and what each means for the run that the job trains.

Source: squeue(1), "JOB STATE CODES", and https://slurm.schedmd.com/job_state_codes.html.
"""

from enum import Enum


class Phase(Enum):
    """Whether a job waits for its nodes, has them, or has ended."""

    WAITING = "waiting"
    """In the queue: the job starts, or starts again, without being submitted again."""
    RUNNING = "running"
    """The job holds its nodes, even if it is suspended or about to end."""
    ENDED = "ended"
    """The job holds nothing, and does not start again."""


PHASES = {
    "PENDING": Phase.WAITING,
    "CONFIGURING": Phase.WAITING,  # it has nodes that are still booting
    "POWER_UP_NODE": Phase.WAITING,
    "REQUEUED": Phase.WAITING,
    "REQUEUE_FED": Phase.WAITING,
    "REQUEUE_HOLD": Phase.WAITING,
    "RESV_DEL_HOLD": Phase.WAITING,  # a pending job, held because its reservation was deleted
    "SPECIAL_EXIT": Phase.WAITING,  # requeued and held
    "EXPEDITING": Phase.WAITING,
    "RUNNING": Phase.RUNNING,
    "COMPLETING": Phase.RUNNING,
    "RESIZING": Phase.RUNNING,
    "SIGNALING": Phase.RUNNING,
    "STAGE_OUT": Phase.RUNNING,
    "STOPPED": Phase.RUNNING,
    "SUSPENDED": Phase.RUNNING,
    "UPDATE_DB": Phase.RUNNING,
    "BOOT_FAIL": Phase.ENDED,
    "CANCELLED": Phase.ENDED,
    "COMPLETED": Phase.ENDED,
    "DEADLINE": Phase.ENDED,
    "FAILED": Phase.ENDED,
    "LAUNCH_FAILED": Phase.ENDED,
    "NODE_FAIL": Phase.ENDED,
    "OUT_OF_MEMORY": Phase.ENDED,
    "PREEMPTED": Phase.ENDED,  # a job that Slurm preempts and requeues is PENDING again afterwards
    "RECONFIG_FAIL": Phase.ENDED,
    "REVOKED": Phase.ENDED,
    "TIMEOUT": Phase.ENDED,
}
"""The phase of each state."""


def find_phase(state: str) -> Phase:
    """Finds the phase of a state such as `PENDING`, or `CANCELLED by 1000` as sacct prints it.

    A state that this table lacks counts as RUNNING: the job may still hold its run, so no other job takes it over.
    """
    word = state.split()[0].rstrip("+").upper() if state.split() else ""
    return PHASES.get(word, Phase.RUNNING)
