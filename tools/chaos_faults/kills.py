"""Faults of processes: kill -9 of one rank, of all ranks, of a loader process and during saves; a rank that hangs; a
rank that always dies."""

import os
import signal
import time
from contextlib import suppress
from functools import partial
from itertools import count

import psutil

from chaos_faults.lab import SAVE_EVERY, STEPS, Lab, Run
from chaos_faults.processes import Patch
from chaos_faults.verdict import Outcome, compare, finished, recovery

STEP = 6
"""The step after which runs are disturbed: two steps after a save, two before the next."""
HANG_S = 8
"""run.step_timeout_s of the run that hangs: no step on a busy machine takes as long."""


def into_a_step(lab: Lab, name: str, run: Run) -> None:
    """Waits for a random moment of the step that follows `STEP`."""
    took = lab.reference().events("save")
    step_s = (took[1]["time"] - took[0]["time"]) / SAVE_EVERY
    run.wait_for_step(STEP)
    time.sleep(lab.dice(name).uniform(0.1, 0.9) * step_s)


def kill(processes: list[psutil.Process]) -> float:
    """Sends SIGKILL to processes; returns the time."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    return time.time()


def restarted(outcome: Outcome, lab: Lab, run: Run, when: float, *, model: str = "tiny") -> None:
    """Checks that the launcher restarted the ranks and that the run's results equal those of the reference."""
    finished(outcome, run, run.finish())
    recovery(outcome, run, when)
    outcome.expect(run.events("restart", since=when), "no event says that the launcher started it again")
    compare(outcome, run, lab.reference(model))


def one_rank(lab: Lab) -> Outcome:
    """Rank 1 is killed in the middle of a step."""
    outcome, run = Outcome("1a"), lab.run("1a").start()
    into_a_step(lab, "1a", run)
    when = kill([run.ranks()[1]])
    restarted(outcome, lab, run, when)
    outcome.expect(run.says("rank 1 (pid "), "the launcher does not name the rank")
    return outcome


def all_ranks(lab: Lab) -> Outcome:
    """All ranks are killed in the middle of a step."""
    outcome, run = Outcome("1b"), lab.run("1b").start()
    into_a_step(lab, "1b", run)
    when = kill(run.ranks())
    restarted(outcome, lab, run, when)
    return outcome


def loader_worker(lab: Lab) -> Outcome:
    """A loader process of rank 1 is killed."""
    outcome, run = Outcome("1c"), lab.run("1c", "data.workers=1").start()
    into_a_step(lab, "1c", run)
    when = kill(run.ranks()[1].children()[:1])
    restarted(outcome, lab, run, when)
    told = [str(event.get("error")) for event in run.events("fault", since=when)]
    outcome.expect(any("loader process 0" in text for text in told), f"no fault names it: {told}")
    return outcome


def during_saves(lab: Lab) -> Outcome:
    """All ranks are killed at random moments of saves."""
    outcome, dice = Outcome("2"), lab.dice("2")
    save_s = max(event["seconds"] for event in lab.reference("large").events("save"))
    # One more than the kills, because the first may come before anything was saved.
    every = min(SAVE_EVERY, max(1, STEPS // (lab.kills + 1)))
    settings = (f"run.save_every={every}", f"run.max_restarts={lab.kills + 1}")
    run = lab.run("2", *settings, model="large").start()
    beyond, noticed, left, when = 0, [], 0, 0.0
    for attempts in range(1, lab.kills + 1):
        # Once an attempt has started, it has deleted the remains of the interrupted save.
        run.wait_until(partial(_has_events, run, "start", attempts), f"the start of attempt {attempts}")
        step = run.wait_for_save(beyond)
        time.sleep(dice.uniform(0.0, save_s))
        left += (run.folder.checkpoints / f".step_{step:08d}.tmp").exists()
        when = kill(run.ranks())
        restarts = len(run.events("restart"))
        run.wait_until(partial(_has_events, run, "restart", restarts + 1), "the launcher's restart")
        noticed.append(run.noticed(when) or 0.0)
        for checkpoint in run.checkpoints():
            problem = checkpoint.problem(hashes=True)
            outcome.expect(problem is None, f"after a kill: {problem}")
        beyond = step  # the next kill hits a later save, if there is one
    restarted(outcome, lab, run, when, model="large")
    outcome.noticed_s = max(noticed)
    outcome.notes.append(f"{lab.kills} kills, {left} of them in the middle of a save")
    unfinished = list(run.folder.checkpoints.glob(".step_*"))
    outcome.expect(not unfinished, f"left behind: {[path.name for path in unfinished]}")
    return outcome


def hanging_rank(lab: Lab) -> Outcome:
    """Rank 1 hangs (SIGSTOP)."""
    outcome = Outcome("6")
    run = lab.run("6", "data.timeout_s=2", f"run.step_timeout_s={HANG_S}").start()
    into_a_step(lab, "6", run)
    stopped, when = run.ranks()[1], time.time()
    stopped.suspend()
    restarted(outcome, lab, run, when)
    outcome.expect(not psutil.pid_exists(stopped.pid), "the stopped rank still exists")
    stacks = sorted(run.folder.logs.glob("stacks_rank*.txt"))
    outcome.expect(stacks, "no logs/stacks_rank*.txt was written")
    for path in stacks:
        outcome.expect("File " in path.read_text(), f"{path.name} holds no stack")
    outcome.notes.append(f"run.step_timeout_s={HANG_S}, stacks of {len(stacks)} ranks")
    return outcome


def dies_in_step(step: int, run: Run) -> Patch:
    """Rank 1 kills itself in its `step`-th step of every attempt."""

    def patch(rank: int) -> None:
        from uniemox_dist.models.student import Student

        forward, calls = Student.forward, count(1)

        def dying(self: Student, *args: object, **more: object) -> object:
            if self.training and next(calls) == step and rank == 1:
                run.mark()
                os.kill(os.getpid(), signal.SIGKILL)
            return forward(self, *args, **more)  # type: ignore[arg-type]

        Student.forward = dying  # type: ignore[method-assign, assignment]

    return patch


def always_dies(lab: Lab) -> Outcome:
    """A rank dies in the second step of each attempt: the launcher gives up after run.max_restarts."""
    restarts = 2
    outcome, run = Outcome("10"), lab.run("10", f"run.max_restarts={restarts}")
    code = run.start(patch=dies_in_step(2, run)).finish()
    outcome.expect(code == 1, f"exit code {code} instead of 1")
    found = [event["left"] for event in run.events("restart")]
    outcome.expect(found == list(range(restarts))[::-1], f"restarts left were {found}")
    outcome.expect(len(run.events("start")) == restarts + 1, "not so many attempts as restarts and one")
    last = run.last_words()
    says = f"giving up after {restarts} restarts" in last and "died of SIGKILL" in last
    outcome.expect(says, f"its last line: {last}")
    outcome.notes.append(f"gave up after {restarts} restarts; then went well without the fault")
    finished(outcome, run, run.start().finish())
    recovery(outcome, run, run.moment())
    if not outcome.problems:
        compare(outcome, run, lab.reference())
    return outcome


def _has_events(run: Run, kind: str, number: int) -> bool:
    return len(run.events(kind)) >= number
