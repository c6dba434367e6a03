"""Findings of the doctor: one line each, made by pure functions from what each rank measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Generic, Literal, TypeVar

from uniemox_dist.core.formatting import counted

T = TypeVar("T")
Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's output."""

    status: Status
    what: str
    """Name of the check, such as `clock`."""
    value: str
    """The measurement, with units."""
    remedy: str = ""
    """The fix; empty if the status is ok."""
    rank: int | None = None
    """The first rank concerned; None for all ranks."""
    host: str | None = None
    """That rank's host."""
    hosts: tuple[str, ...] = field(default=(), compare=False)
    """The hosts of all ranks concerned."""

    @property
    def about(self) -> tuple[str, ...]:
        """The hosts concerned; empty if it concerns all ranks together."""
        return self.hosts or (() if self.host is None else (self.host,))

    def line(self) -> str:
        """The finding for a terminal or a log: `warn  clock        rank 3 on node7: 2.1 s ahead; …`."""
        where = "" if self.rank is None else f"rank {self.rank} on {self.host}: "
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{self.status:<4}  {self.what:<11}  {where}{self.value}{remedy}"

    def facts(self) -> dict[str, Any]:
        """The finding as a JSON object."""
        facts = asdict(self)
        del facts["hosts"]  # for this program; the value counts the ranks
        return facts


@dataclass(frozen=True)
class Trouble:
    """The reason why a rank could not measure."""

    text: str
    remedy: str = ""


@dataclass(frozen=True)
class RankFacts(Generic[T]):
    """The measurements of one rank."""

    rank: int
    host: str
    facts: T | Trouble


@dataclass(frozen=True)
class Problem:
    """A problem of one rank."""

    status: Status
    value: str
    remedy: str


def select_with_facts(gathered: Iterable[RankFacts[T]]) -> list[tuple[RankFacts[T], T]]:
    """The ranks that could measure, with their facts."""
    return [(one, one.facts) for one in gathered if not isinstance(one.facts, Trouble)]


def make_findings(
    what: str,
    gathered: Sequence[RankFacts[T]],
    judge: Callable[[RankFacts[T], T], Problem | None],
    all_well: Callable[[list[T]], str],
) -> list[Finding]:
    """Returns one finding per distinct problem, or one `ok` for all ranks.

    `judge` returns the problem of one rank, `all_well` the text of the `ok` from the facts of all ranks.
    """
    found: list[Finding] = []
    for one in gathered:
        problem = (
            Problem("fail", one.facts.text, one.facts.remedy)
            if isinstance(one.facts, Trouble)
            else judge(one, one.facts)
        )
        if problem is not None:
            found.append(Finding(problem.status, what, problem.value, problem.remedy, one.rank, one.host))
    if found:
        return merge_findings(found, len(gathered))
    return [Finding("ok", what, all_well([facts for _, facts in select_with_facts(gathered)]))]


def merge_findings(findings: Sequence[Finding], ranks: int) -> list[Finding]:
    """Merges findings that differ only in the rank: the result names the first and counts the others."""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for finding in findings:
        key = (finding.status, finding.what, finding.value, finding.remedy)
        groups.setdefault(key, []).append(finding)
    together = []
    for group in groups.values():
        hosts = tuple(dict.fromkeys(host for finding in group for host in finding.about))
        first, *others = replace(group[0], hosts=hosts), *group[1:]
        if others and len(others) + 1 == ranks:
            first = replace(first, value=f"{first.value} (on all {ranks} ranks)")
        elif others:
            first = replace(first, value=f"{first.value} (and {counted(len(others), 'more rank')})")
        together.append(first)
    return together


def group_by_host(gathered: Iterable[RankFacts[T]]) -> dict[str, list[RankFacts[T]]]:
    """The ranks of each host."""
    hosts: dict[str, list[RankFacts[T]]] = {}
    for one in gathered:
        hosts.setdefault(one.host, []).append(one)
    return hosts


def find_worst(findings: Iterable[Finding]) -> Status:
    """The worst status among findings."""
    found = {finding.status for finding in findings}
    return "fail" if "fail" in found else "warn" if "warn" in found else "ok"
