"""How far the ranks' clocks are apart."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from uniemox_dist.doctor.findings import Finding, Problem, Told, judged, sound
from uniemox_dist.doctor.ranks import meet

WHAT = "clock"
WARN_S, FAIL_S = 1.0, 30.0
ROUNDS = 3


@dataclass(frozen=True)
class ClockFacts:
    """Seconds since 1970 that a rank read as it left each of some barriers."""

    times: tuple[float, ...]


def measure() -> ClockFacts:
    """Collective."""
    meet()  # the first one may have to connect
    times = []
    for _ in range(ROUNDS):
        meet()
        times.append(time.time())
    return ClockFacts(tuple(times))


def ahead(told: Sequence[Told[ClockFacts]]) -> dict[int, float]:
    """Seconds that each rank's clock is before the median: of several rounds the one where it was nearest, since a
    rank that was not running as it left a barrier looks late."""
    everyone = sound(told)
    # The lower of two in the middle: of two ranks the full difference counts.
    medians = [statistics.median_low(times) for times in zip(*(facts.times for _, facts in everyone))]
    return {
        one.rank: min((own - median for own, median in zip(facts.times, medians)), key=abs)
        for one, facts in everyone
    }


def judge(told: Sequence[Told[ClockFacts]]) -> list[Finding]:
    """Warns above a second, fails above half a minute."""
    found = ahead(told)

    def of_rank(one: Told[ClockFacts], _: ClockFacts) -> Problem | None:
        off = found[one.rank]
        if abs(off) <= WARN_S:
            return None
        way = "ahead of" if off > 0 else "behind"
        remedy = "synchronise that host's clock (chronyc tracking; systemctl restart chronyd)"
        return Problem(
            "fail" if abs(off) > FAIL_S else "warn", f"{abs(off):.1f} s {way} the ranks' median", remedy
        )

    def all_well(_: list[ClockFacts]) -> str:
        if len(told) == 1:
            return "one rank: nothing to compare with"
        return f"at most {max(map(abs, found.values())) * 1e3:.1f} ms from the ranks' median"

    return judged(WHAT, told, of_rank, all_well)
