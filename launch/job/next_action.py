"""The end of an attempt inside a Slurm job: chooses what the batch script does next."""

import sys
import time
from dataclasses import dataclass, replace

from launch.job import lock
from launch.job.attempts import JobAttempts, count_attempts
from launch.restarts import LONGEST_PAUSE_S, find_newest_step
from uniemox_dist.core.errors import EXIT_DONE, EXIT_FAULT, EXIT_REQUEUE, EXIT_USER
from uniemox_dist.runs.events.jobs import Requeue, Restart, Resubmit
from uniemox_dist.runs.events.training import End, FaultEvent, Save, Signal
from uniemox_dist.runs.folder import RunFolder, read_bad_nodes, read_lines
from uniemox_dist.scheduler.states import Phase, find_phase

NO_RANK_S = 240.0
"""Seconds to wait after an attempt in which no rank wrote an event: a node may be lost, and Slurm takes some minutes
(SlurmdTimeout, 300 s by default) to notice that and to requeue the job."""


@dataclass(frozen=True)
class OwnJobState:
    """The state of this job after its ranks have ended."""

    word: str = "RUNNING"
    queued_again: bool = False
    """Slurm has requeued the job: because of a node, for another job, or on request."""

    @classmethod
    def parse(cls, text: str | None, restarts: int) -> "OwnJobState":
        """Parses `STATE [RESTARTS]`, where RESTARTS counts the requeues until now; `restarts` counts those before this
        attempt. An empty text means that Slurm did not answer, and counts as RUNNING."""
        words = (text or "").split()
        now = int(words[1]) if len(words) > 1 and words[1].isdigit() else restarts
        word = words[0].upper() if words else "RUNNING"
        return cls(word, now > restarts or find_phase(word) is Phase.WAITING)

    @property
    def ours(self) -> bool:
        """Whether the job still has its allocation and may choose the next action."""
        return self.word == "RUNNING" and not self.queued_again


@dataclass(frozen=True)
class NextAction:
    """The next action of the batch script, with a remark for the log."""

    line: str
    """`end CODE`, `again`, `requeue` or `resubmit NODELIST`."""
    remark: str = ""
    pause_s: float = 0.0
    """Seconds to wait first."""


def choose_next_action(
    folder: RunFolder, code: int, state: OwnJobState, job_id: int, *, may_requeue: bool = True
) -> NextAction:
    """Chooses the next action, records it as an event, and releases the run unless this job continues it.

    Args:
        may_requeue: whether jobs may queue themselves again on this cluster.
    """
    held = lock.read(folder.job)
    if held is None or held.job_id != job_id:
        return NextAction(f"end {_exit_code(code)}", f"{folder.job} belongs to another job now")
    attempts = count_attempts(read_lines(folder.events))
    action = _decide(folder, code, state, held, attempts, may_requeue=may_requeue)
    if not (action.line in ("again", "requeue") or state.queued_again):
        lock.release(folder, job_id)
    return action


def _decide(
    folder: RunFolder,
    code: int,
    state: OwnJobState,
    held: lock.JobLock,
    attempts: JobAttempts,
    *,
    may_requeue: bool,
) -> NextAction:
    step = find_newest_step(folder)
    saved = step is not None and (step > held.began_step or attempts.has(Save, step=step))
    if code in (EXIT_DONE, EXIT_USER):
        return NextAction(f"end {code}")
    if attempts.has(End):
        return NextAction(f"end {EXIT_DONE}", f"the run is complete; a rank exited with {code} afterwards")
    if saved and attempts.has(Signal, step=step, saved=True):
        code = EXIT_REQUEUE  # everything is saved, even if a rank failed on exit
    if code == EXIT_REQUEUE and saved:
        if state.queued_again:
            folder.write(Requeue(step=step, job_id=held.job_id, by="slurm"))
            return NextAction(f"end {code}", f"saved step {step}; Slurm has requeued the job")
        if not state.ours:
            return NextAction(
                f"end {code}",
                f"saved step {step}; the job was ended ({state.word}), so it is not requeued",
            )
        if not may_requeue:
            how = "jobs may not requeue themselves on this cluster; submit again, or use --chain"
            return NextAction(f"end {code}", f"saved step {step}; {how}")
        folder.write(Requeue(step=step, job_id=held.job_id, by="job"))
        return NextAction("requeue", f"saved step {step}; the job is requeued")
    if not state.ours:
        return NextAction(f"end {EXIT_FAULT}", f"the job was ended ({state.word})")
    if code == EXIT_REQUEUE:
        return NextAction(
            f"end {EXIT_FAULT}",
            "exit code 75 without a complete checkpoint of this attempt: the job is not requeued",
        )
    if nodes := _find_bad_nodes(folder, held):
        return _resubmit_without_nodes(folder, held, attempts, nodes, may_requeue=may_requeue)
    return _decide_after_fault(folder, code, held, attempts, step)


def _decide_after_fault(
    folder: RunFolder, code: int, held: lock.JobLock, attempts: JobAttempts, step: int | None
) -> NextAction:
    end, most = f"end {EXIT_FAULT}", held.max_restarts
    if (fault := attempts.hopeless) is not None:
        end = f"end {EXIT_USER if fault.get('code') == EXIT_USER else EXIT_FAULT}"
        return NextAction(
            end, f"no restart, because the same fault would happen again: {_join_lines(fault['error'])}"
        )
    if attempts.has(Signal):
        return NextAction(end, "no restart, because a signal asked the run to stop")
    reason = attempts.reason(code)
    if attempts.in_vain >= most:
        tried = (
            f"after {most} restart{'' if most == 1 else 's'} without a new checkpoint" if most else "at once"
        )
        folder.write(FaultEvent(error=f"given up {tried}: {reason}", ends=True, restart=False))
        return NextAction(end, f"giving up {tried} (run.max_restarts={most}); the last fault: {reason}")
    if not attempts.last:
        # Slurm detects a lost node itself: if it ends this job meanwhile, the attempt does not count.
        wait = f"no rank wrote an event, so a node may be lost: waits {NO_RANK_S:.0f} s for Slurm to notice"
        print(f"uniemox: {reason}; {wait}", file=sys.stderr, flush=True)
        time.sleep(NO_RANK_S)
    in_vain = attempts.in_vain + 1
    pause_s = min(LONGEST_PAUSE_S, 2.0 ** (in_vain - 1))
    folder.write(
        Restart(
            attempt=attempts.count + 1,
            left=most - in_vain,
            code=code,
            step=step,
            reason=reason,
            pause_s=pause_s,
        )
    )
    lock.update(folder, replace(held, began_step=step or 0, time=round(time.time(), 3)))
    place = "from the beginning" if step is None else f"from step {step}"
    return NextAction(
        "again", f"{reason}; restarting {place} in {pause_s:.0f} s ({in_vain} of {most})", pause_s
    )


def _find_bad_nodes(folder: RunFolder, held: lock.JobLock) -> dict[str, str]:
    """Nodes of this job on which the preflight of this attempt failed, each with the finding."""
    return {
        line["node"]: str(line.get("finding"))
        for line in read_bad_nodes(folder)
        if line.get("job_id") == held.job_id and line["time"] >= held.time and line["node"] in held.nodes
    }


def _resubmit_without_nodes(
    folder: RunFolder,
    held: lock.JobLock,
    attempts: JobAttempts,
    nodes: dict[str, str],
    *,
    may_requeue: bool,
) -> NextAction:
    """Submits the job again without these nodes, unless run.max_restarts is reached or jobs may not queue themselves
    again."""
    names, most = ",".join(nodes), held.max_restarts
    why = "; ".join(f"{node}: {finding}" for node, finding in nodes.items())
    if not may_requeue:
        text = (
            f"the preflight failed on {why}; jobs do not queue themselves again on this cluster: submit again, "
            f"and `uniemox launch` leaves out {names}"
        )
        folder.write(FaultEvent(error=text, ends=True, restart=False))
        return NextAction(f"end {EXIT_FAULT}", text)
    if attempts.in_vain >= most:
        text = f"given up after {attempts.in_vain} submissions elsewhere (run.max_restarts={most}): {why}"
        folder.write(FaultEvent(error=text, ends=True, restart=False))
        return NextAction(f"end {EXIT_FAULT}", text)
    folder.write(Resubmit(job_id=held.job_id, nodes=list(nodes), reason=why))
    return NextAction(f"resubmit {names}", f"the preflight failed on {why}; submitted again without {names}")


def _exit_code(code: int) -> int:
    return code if code in (EXIT_DONE, EXIT_USER) else EXIT_FAULT


def _join_lines(text: object) -> str:
    return " ".join(str(text).split())
