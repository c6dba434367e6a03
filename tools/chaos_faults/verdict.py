"""Computes the cost of a fault: compares a disturbed run with the undisturbed one, step by step and bit by bit."""

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from chaos_faults.lab import RANKS, STEPS, Run
from uniemox_dist.runs.folder import read_lines

NUMBERS = ("loss", "relation", "similarity", "reconstruction", "grad_norm", "lr")


@dataclass
class Outcome:
    """One row of the table."""

    fault: str
    noticed_s: float | None = None
    """Seconds from the fault until the run or its launcher reported it."""
    recovered_from: int | None = None
    """Step of the checkpoint from which the run continued; None if it never stopped."""
    steps_lost: int = 0
    """Steps that were repeated."""
    samples_lost: int = 0
    samples_doubled: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None
    """Why the fault could not be caused here."""
    seconds: float = 0.0

    @property
    def result(self) -> str:
        """ok, FAILED or skipped."""
        return "skipped" if self.skipped else "FAILED" if self.problems else "ok"

    def as_json(self) -> dict[str, Any]:
        """The row as `--json` writes it."""
        return {**asdict(self), "result": self.result}

    def expect(self, condition: object, problem: str) -> None:
        """Records a problem unless the condition holds."""
        if not condition:
            self.problems.append(problem)


def traced(run: Path) -> list[list[tuple[int, dict[int, tuple[Any, ...]]]]]:
    """For each rank all its steps in order, repeated ones included: step, and slot -> key and checksums."""
    ranks = []
    for rank in range(RANKS):
        lines = []
        for text in (run / "trace" / f"rank{rank}.jsonl").read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # a kill cut the line
            slots = zip(line["slots"], line["keys"], line["sums"])
            lines.append((line["step"], {slot: (key, *sums) for slot, key, sums in slots}))
        ranks.append(lines)
    return ranks


def recovery(outcome: Outcome, run: Run, since: float) -> None:
    """Sets when a fault was noticed, the checkpoint from which the run continued, and how many steps were repeated."""
    outcome.noticed_s = run.noticed(since)
    resumed = run.events("resume", since=since)
    started = run.events("start", since=since)
    outcome.recovered_from = resumed[-1]["step"] if resumed else 0 if started else None
    steps = [step for step, _ in traced(run.path)[0]]
    outcome.steps_lost = sum(before - after + 1 for before, after in pairwise(steps) if after <= before)


def compare(
    outcome: Outcome, run: Run, reference: Run, *, losses: bool = True, replaced: frozenset[str] = frozenset()
) -> None:
    """Counts the samples that a run lost or repeated, and checks that everything else equals the reference bit for
    bit: the views and masks of every sample, every loss, and the weights and moments of the last checkpoint.

    Args:
        losses: whether losses and weights must be equal too.
        replaced: keys of damaged samples, whose slots have other samples.
    """
    differing = 0
    for ours, theirs in zip(traced(run.path), traced(reference.path)):
        expected, last = dict(theirs), dict(ours)  # of a repeated step the last time counts
        outcome.samples_lost += sum(len(expected[s].keys() - last.get(s, {}).keys()) for s in expected)
        outcome.samples_doubled += sum(len(found.keys() - expected[s].keys()) for s, found in last.items())
        for step, found in ours:
            differing += sum(
                sample != found[slot]
                for slot, sample in expected[step].items()
                if slot in found and sample[0] not in replaced
            )
    outcome.expect(not outcome.samples_lost, f"{outcome.samples_lost} samples lost")
    outcome.expect(not outcome.samples_doubled, f"{outcome.samples_doubled} samples doubled")
    outcome.expect(not differing, f"{differing} samples differ from the undisturbed run")
    if not losses:
        return
    expected_numbers = {line["step"]: line for line in read_lines(reference.folder.metrics)}
    lines = read_lines(run.folder.metrics)
    wrong = {x["step"] for x in lines for n in NUMBERS if x[n] != expected_numbers[x["step"]][n]}
    outcome.expect(not wrong, f"losses differ at steps {sorted(wrong)}")
    outcome.expect(
        {line["step"] for line in lines} == set(range(1, STEPS + 1)), "metrics of steps are missing"
    )
    same_weights(outcome, run, reference)


def same_weights(outcome: Outcome, run: Run, reference: Run) -> None:
    """Checks that the newest checkpoint is intact and equals the reference's checkpoint of that step bit for bit."""
    found = run.checkpoints()
    if not found:
        outcome.problems.append("there is no checkpoint")
        return
    newest = found[-1]
    problem = newest.problem(hashes=True)
    outcome.expect(problem is None, f"checkpoint: {problem}")
    expected = [c for c in reference.checkpoints() if c.step == newest.step]
    if expected:
        outcome.expect(
            newest.info["files"] == expected[0].info["files"], f"weights of step {newest.step} differ"
        )


def finished(outcome: Outcome, run: Run, code: int) -> None:
    """Checks that a run has completed."""
    outcome.expect(code == 0, f"exit code {code} instead of 0: {run.last_words()}")
    newest = max((c.step for c in run.checkpoints()), default=0)
    outcome.expect(newest == STEPS, f"the newest checkpoint is of step {newest} instead of {STEPS}")
