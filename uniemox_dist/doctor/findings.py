"""What the doctor says: one finding a line, judged by pure functions from what each rank measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    status: Status
    what: str
    """Which check, such as `clock`."""
    value: str
    """What was measured, with units."""
    remedy: str = ""
    """What to do about it; empty where all is well."""
    rank: int | None = None
    """The first rank that it is about; None where it is about all."""
    host: str | None = None
    """That rank's host."""
    hosts: tuple[str, ...] = field(default=(), compare=False)
    """The hosts of all ranks that it is about."""

    @property
    def about(self) -> tuple[str, ...]:
        """The hosts that it is about; none where it is about all ranks together."""
        return self.hosts or (() if self.host is None else (self.host,))

    def line(self) -> str:
        """For a terminal or a log: `warn  clock        rank 3 on node7: 2.1 s ahead; …`."""
        where = "" if self.rank is None else f"rank {self.rank} on {self.host}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:<4}  {self.what:<11}  {where}{self.value}{remedy}"

    def facts(self) -> dict[str, Any]:
        """As an object of JSON."""
        facts = asdict(self)
        del facts["hosts"]  # for this program; the value counts the ranks
        return facts


@dataclass(frozen=True)
class Trouble:
    """What a rank has instead of facts, where measuring itself failed."""

    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Told(Generic[T]):
    """What one rank measured."""

    rank: int
    host: str
    facts: T | Trouble


@dataclass(frozen=True)
class Problem:
    """A verdict on one rank that is not `ok`."""

    status: Status
    value: str
    remedy: str


def sound(told: Iterable[Told[T]]) -> list[tuple[Told[T], T]]:
    """The ranks that have facts, with their facts."""
    return [(one, one.facts) for one in told if not isinstance(one.facts, Trouble)]


def judged(
    what: str,
    told: Sequence[Told[T]],
    judge: Callable[[Told[T], T], Problem | None],
    all_well: Callable[[list[T]], str],
) -> list[Finding]:
    """One finding for each different problem, or else one that says how things are on all ranks.

    `judge` looks at one rank, `all_well` sums up the facts of all of them.
    """
    found: list[Finding] = []
    for one in told:
        problem = (
            Problem("fail", one.facts.text, one.facts.remedy)
            if isinstance(one.facts, Trouble)
            else judge(one, one.facts)
        )
        if problem is not None:
            found.append(Finding(problem.status, what, problem.value, problem.remedy, one.rank, one.host))
    if found:
        return merged(found, len(told))
    return [Finding("ok", what, all_well([facts for _, facts in sound(told)]))]


def merged(findings: Sequence[Finding], ranks: int) -> list[Finding]:
    """Findings that differ in nothing but the rank as one, which names the first and counts the others."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.status, finding.what, finding.value, finding.remedy)
        groups.setdefault(key, []).append(finding)
    together = []
    for group in groups.values():
        hosts = tuple(dict.fromkeys(host for finding in group for host in finding.about))
        first, *others = replace(group[0], hosts=hosts), *group[1:]
        if others and len(others) + 1 == ranks:
            first = replace(first, value=f"{first.value} (so on all {ranks} ranks)")
        elif others:
            first = replace(first, value=f"{first.value} (and {counted(len(others), 'more rank')})")
        together.append(first)
    return together


def by_host(told: Iterable[Told[T]]) -> dict[str, list[Told[T]]]:
    """The ranks of each host."""
    hosts: dict[str, list[Told[T]]] = {}
    for one in told:
        hosts.setdefault(one.host, []).append(one)
    return hosts


def span(values: Iterable[float], unit: str, digits: int = 3) -> str:
    """`1.2 … 3.4 GB`, or one number where they do not differ in what is shown."""
    shown = sorted(values)
    low, high = (f"{value:.{digits}g}" if value < 1000 else f"{value:.0f}" for value in (shown[0], shown[-1]))
    return f"{low} {unit}" if low == high else f"{low} … {high} {unit}"


def counted(number: int, thing: str) -> str:
    """`1 host`, `2 hosts`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def sized(count: float) -> str:
    """Bytes as people write them: `65.5 kB`, `16.8 MB`, `1.2 GB`."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def worst(findings: Iterable[Finding]) -> Status:
    """The gravest status among them."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"
