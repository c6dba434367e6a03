"""Verdicts on single ranks are merged into lines."""

from uniemox_dist.core.formatting import format_range
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, Trouble, find_worst, make_findings


def told(*facts: object) -> list[RankFacts[object]]:
    return [RankFacts(rank, f"node{rank // 2}", one) for rank, one in enumerate(facts)]


def judge(_: RankFacts[object], fact: object) -> Problem | None:
    return Problem("warn", f"{fact} is odd", "make it even") if isinstance(fact, int) and fact % 2 else None


def test_without_problems_one_line_covers_all_ranks() -> None:
    found = make_findings("numbers", told(2, 4, 6), judge, lambda facts: f"sum {sum(facts)}")
    assert found == [Finding("ok", "numbers", "sum 12")]


def test_the_same_problem_on_several_ranks_is_one_line_that_counts_them() -> None:
    found = make_findings("numbers", told(2, 3, 3, 3, 5), judge, lambda _: "")
    assert found == [
        Finding("warn", "numbers", "3 is odd (and 2 more ranks)", "make it even", 1, "node0"),
        Finding("warn", "numbers", "5 is odd", "make it even", 4, "node2"),
    ]
    everywhere = make_findings("numbers", told(3, 3), judge, lambda _: "")
    assert [finding.value for finding in everywhere] == ["3 is odd (on all 2 ranks)"]


def test_a_rank_that_could_not_measure_fails_and_is_named() -> None:
    found = make_findings("numbers", told(2, Trouble("no numbers here", "write some")), judge, lambda _: "")
    assert found == [Finding("fail", "numbers", "no numbers here", "write some", 1, "node0")]
    assert found[0].line() == "fail  numbers      rank 1 on node0: no numbers here; write some"


def test_the_gravest_status_counts() -> None:
    ok, warn, fail = (Finding(status, "", "") for status in ("ok", "warn", "fail"))
    assert [find_worst(found) for found in ([], [ok], [ok, warn], [warn, fail, ok])] == [
        "ok",
        "ok",
        "warn",
        "fail",
    ]


def test_a_range_of_equal_texts_shows_one_number() -> None:
    assert format_range([1.0, 1.0001], "GB") == "1 GB"
    assert format_range([2.5, 0.25, 1.0], "GB") == "0.25 … 2.5 GB"
    assert format_range([123456.0], "MB") == "123456 MB"
