"""Faults of numbers: a loss that is not finite, once on one rank or repeatedly."""

from itertools import count

from chaos_faults.kills import STEP
from chaos_faults.lab import SAVE_EVERY, Lab, Run
from chaos_faults.processes import Patch
from chaos_faults.verdict import Outcome, compare, finished, recovery, same_weights

IN_A_ROW = 2


def poisoned(calls: range, on_rank: int, run: Run) -> Patch:
    """Makes the student's loss NaN on one rank, in a range of calls."""

    def patch(rank: int) -> None:
        from uniemox_dist.models.student import Student

        forward, counter = Student.forward, count(1)

        def sick(self: Student, *args: object, **more: object) -> object:
            found = forward(self, *args, **more)  # type: ignore[arg-type]
            if self.training and next(counter) in calls and rank == on_rank:
                run.mark()
                total, parts = found
                return total * float("nan"), parts
            return found

        Student.forward = sick  # type: ignore[method-assign, assignment]

    return patch


def one_step(lab: Lab) -> Outcome:
    """The loss of one rank is NaN in one step: no rank takes that step."""
    outcome, steps = Outcome("7a"), range(STEP, STEP + 1)
    run, other = lab.run("7a"), lab.run("7a-other-rank")
    finished(outcome, run, run.start(patch=poisoned(steps, on_rank=1, run=run)).finish())
    skips = [(event["step"], event["in_a_row"]) for event in run.events("skip")]
    outcome.expect(skips == [(STEP, 1)], f"skips (step, in a row): {skips}")
    outcome.expect(len(run.events("start")) == 1, "training was interrupted")
    # If a single rank had applied the step, the result would depend on which rank it was.
    finished(outcome, other, other.start(patch=poisoned(steps, on_rank=0, run=other)).finish())
    if not outcome.problems:
        compare(outcome, run, lab.reference(), losses=False)
        same_weights(outcome, run, other)
    outcome.noticed_s = run.noticed(run.moment())
    outcome.notes.append(f"step {STEP} skipped")
    return outcome


def many_steps(lab: Lab) -> Outcome:
    """The loss is NaN again and again: the run stops, with the evidence."""
    outcome, first = Outcome("7b"), SAVE_EVERY + 1
    run = lab.run("7b", f"optim.max_skipped={IN_A_ROW}")
    code = run.start(patch=poisoned(range(first, 10**9), on_rank=1, run=run)).finish()
    outcome.expect(code == 1, f"exit code {code} instead of 1")
    outcome.expect(not run.events("restart"), "the launcher started it again")
    skips = [event["step"] for event in run.events("skip")]
    outcome.expect(skips == [first + i for i in range(IN_A_ROW)], f"skipped steps: {skips}")
    evidence = sorted(run.folder.logs.glob("nonfinite_*.json"))
    outcome.expect(evidence, "no logs/nonfinite_*.json was written")
    same_weights(outcome, run, lab.reference())
    newest = max((c.step for c in run.checkpoints()), default=0)
    outcome.expect(newest == SAVE_EVERY, f"the newest checkpoint is of step {newest}")
    outcome.notes.append(f"stopped after {IN_A_ROW} in a row; {len(evidence)} files nonfinite_*.json")
    finished(outcome, run, run.start().finish())
    recovery(outcome, run, run.moment())
    if not outcome.problems:
        compare(outcome, run, lab.reference(), losses=False)
        same_weights(outcome, run, lab.reference())
    return outcome
