"""Compares the clocks of the ranks."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings, select_with_facts
from uniemox_dist.doctor.ranks import barrier

WHAT = "clock"
WARN_S, FAIL_S = 1.0, 30.0
ROUNDS = 3


@dataclass(frozen=True)
class ClockFacts:
    """Seconds since 1970 that a rank read after each of several barriers."""

    times: tuple[float, ...]


def measure() -> ClockFacts:
    """Reads the clock after each of several barriers. Collective."""
    barrier()  # the first barrier may have to connect
    times = []
    for _ in range(ROUNDS):
        barrier()
        times.append(time.time())
    return ClockFacts(tuple(times))


def measure_ahead(gathered: Sequence[RankFacts[ClockFacts]]) -> dict[int, float]:
    """Seconds by which each rank's clock is ahead of the median. Of several rounds the smallest difference counts,
    because a rank that was not running when a barrier ended appears late."""
    everyone = select_with_facts(gathered)
    # The lower median: with two ranks the full difference counts.
    medians = [statistics.median_low(times) for times in zip(*(facts.times for _, facts in everyone))]
    return {
        one.rank: min((own - median for own, median in zip(facts.times, medians)), key=abs)
        for one, facts in everyone
    }


def judge(gathered: Sequence[RankFacts[ClockFacts]]) -> list[Finding]:
    """Warns above a second, fails above half a minute."""
    found = measure_ahead(gathered)

    def of_rank(one: RankFacts[ClockFacts], _: ClockFacts) -> Problem | None:
        off = found[one.rank]
        if abs(off) <= WARN_S:
            return None
        way = "ahead of" if off > 0 else "behind"
        remedy = "synchronise that host's clock (chronyc tracking; systemctl restart chronyd)"
        return Problem(
            "fail" if abs(off) > FAIL_S else "warn", f"{abs(off):.1f} s {way} the ranks' median", remedy
        )

    def all_well(_: list[ClockFacts]) -> str:
        if len(gathered) == 1:
            return "one rank: nothing to compare with"
        return f"at most {max(map(abs, found.values())) * 1e3:.1f} ms from the ranks' median"

    return make_findings(WHAT, gathered, of_rank, all_well)
