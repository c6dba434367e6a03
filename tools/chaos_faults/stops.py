"""Signals that ask a run to end: once and twice, during start-up, a step and a save."""

import signal
import time
from collections.abc import Callable

from chaos_faults.kills import into_a_step
from chaos_faults.lab import SAVE_EVERY, Lab, Run
from chaos_faults.verdict import Outcome, compare, finished, recovery

MOMENTS = ("startup", "step", "save")
SIGNALS = {"usr2": signal.SIGUSR2, "term": signal.SIGTERM}
TWICE_S = 0.05
"""Seconds between two signals."""


def _wait_for(moment: str, lab: Lab, name: str, run: Run) -> None:
    if moment == "startup":  # the rank that locks the run's folder handles signals already
        run.wait_until((run.path / "lock").exists, "the start of the ranks")
    elif moment == "step":
        into_a_step(lab, name, run)
    else:
        run.wait_for_save(SAVE_EVERY)


def stop(word: str, times: int, moment: str) -> Callable[[Lab], Outcome]:
    """Returns a fault: sends a signal once or twice at a moment, then runs the same command again."""
    name = f"5-{word}-{moment}" if times == 1 else f"5-{word}-twice-{moment}"

    def cause(lab: Lab) -> Outcome:
        model = "large" if moment == "save" else "tiny"
        outcome, run = Outcome(name), lab.run(name, model=model).start()
        _wait_for(moment, lab, name, run)
        assert run.process is not None
        when = time.time()
        for turn in range(times):
            time.sleep(TWICE_S * (turn > 0))
            run.process.send_signal(SIGNALS[word])
        code = run.finish()
        took = time.time() - when
        outcome.expect(code == 75, f"exit code {code} instead of 75: {run.last_words()}")
        saved = run.events("signal")
        outcome.expect(saved and saved[-1]["saved"], f"no event says that it saved: {saved}")
        whole = run.checkpoints()
        if whole and saved:
            outcome.expect(whole[-1].step == saved[-1]["step"], "the newest checkpoint is of another step")
            problem = whole[-1].problem(hashes=True)
            outcome.expect(problem is None, f"checkpoint: {problem}")
        outcome.notes.append(f"exit 75 after {took:.1f} s")
        noticed = run.noticed(when)
        again = time.time()
        finished(outcome, run, run.start().finish())
        recovery(outcome, run, again)
        outcome.noticed_s = noticed
        outcome.expect(not run.events("restart"), "the launcher started it again by itself")
        outcome.expect(outcome.steps_lost == 0, f"{outcome.steps_lost} steps were done again")
        if not outcome.problems:
            compare(outcome, run, lab.reference(model))
        return outcome

    cause.__doc__ = (
        f"{SIGNALS[word].name} {'once' if times == 1 else 'twice'} during "
        f"{dict(zip(MOMENTS, ('start-up', 'a step', 'a save')))[moment]}."
    )
    return cause


def all_stops() -> dict[str, Callable[[Lab], Outcome]]:
    """Every signal, number of times and moment, by name."""
    return {
        f"5-{word}-{'twice-' if times == 2 else ''}{moment}": stop(word, times, moment)
        for word in SIGNALS
        for times in (1, 2)
        for moment in MOMENTS
    }
