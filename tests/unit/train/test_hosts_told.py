"""Which nodes a problem is about: in what users read, and in what keeps later jobs from them."""

from pathlib import Path

import pytest

from uniemox_dist.core.errors import UserError
from uniemox_dist.distributed import collectives
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor.findings import Finding, Problem, RankFacts, make_findings
from uniemox_dist.runs.folder import RunFolder, read_bad_nodes
from uniemox_dist.train import startup


@pytest.mark.parametrize(
    ("everyone", "says"),
    [
        ([("n1", "x: no such folder")], "x: no such folder"),
        ([("n1", None), ("n2", "x: gone")], "on n2, and not on n1: x: gone"),
        ([("n1", "x: gone"), ("n2", "x: gone")], "on n1, n2: x: gone"),
        ([("n1", "x: gone"), ("n1", "x: gone")], "x: gone"),
        (
            [(f"n{i}", "x" if i > 2 else None) for i in range(9)],
            "on n3, n4, n5 and 3 more, and not on n0, n1, n2: x",
        ),
    ],
)
def test_a_problem_of_some_hosts_is_reported_with_their_names(
    monkeypatch: pytest.MonkeyPatch, everyone: list[tuple[str, str | None]], says: str
) -> None:
    monkeypatch.setattr(collectives, "gather_objects", lambda value, world: everyone)
    with pytest.raises(UserError) as error:
        collectives.on_all(World(), lambda: None)
    assert str(error.value) == says


def failing(*hosts: str) -> list[Finding]:
    """Findings about ranks of four nodes, of which some have too little."""
    told = [RankFacts(rank, f"n{rank}", f"n{rank}" in hosts) for rank in range(4)]
    problem = Problem("fail", "too small", "enlarge it")
    return make_findings("/dev/shm", told, lambda one, bad: problem if bad else None, lambda facts: "fine")


@pytest.mark.parametrize(
    ("failed", "hosts", "reported"),
    [
        (failing("n2"), 4, ["n2"]),
        (failing("n1", "n3"), 4, ["n1", "n3"]),
        (failing("n0", "n1", "n2", "n3"), 4, []),  # all nodes have it, so other nodes would not help
        ([Finding("fail", "clock", "late", "", 0, "n0")], 1, ["n0"]),
        ([Finding("fail", "collectives", "wrong", "")], 4, []),
    ],
)
def test_nodes_that_differ_from_the_others_are_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: list[Finding], hosts: int, reported: list[str]
) -> None:
    run = RunFolder(tmp_path)
    names = {f"n{number}": f"n{number}" for number in range(hosts)}
    startup._report_bad_nodes(run, failed, names)
    assert not run.bad_nodes.exists()  # outside of Slurm there is nothing to leave out
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    startup._report_bad_nodes(run, failed, names)
    assert [line["node"] for line in read_bad_nodes(run)] == reported
    assert {line["job_id"] for line in read_bad_nodes(run)} <= {17}


def test_nodes_are_written_down_by_the_names_that_slurm_gives_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    run = RunFolder(tmp_path)
    names = {"n1": "gpu001", "n2": "gpu002", "n3": "gpu003", "n0": "gpu000"}
    startup._report_bad_nodes(run, failing("n2"), names)
    assert [line["node"] for line in read_bad_nodes(run)] == ["gpu002"]


def test_a_rank_without_its_own_gpu_fails_before_it_joins_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="rank 5 is local rank 1 and sees only 1 of the GPUs"):
        collectives.init(World(5, 8, 1, "n1", 1234), 60)
