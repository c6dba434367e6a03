"""Cluster events on a real Slurm: after each of them, a run's losses are those of an undisturbed run."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import TINY, largest_difference, losses, run_ranks
from slurm_jobs import Cluster, Job, events, lines, reached, repeated, until

pytestmark = pytest.mark.cluster
STEPS = 60
ACROSS_RANKS = 1e-5
"""Relative difference of fp32 losses of runs with other numbers of ranks."""

Start = Callable[..., Job]


def settings(folder: Path, data: Path, teacher: Path) -> list[str]:
    return [
        *TINY,
        f"run.dir={folder}",
        f"run.max_steps={STEPS}",
        "run.save_every=20",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
        "batch.micro_batch=2",
    ]


@pytest.fixture(scope="session")
def undisturbed(
    tiny_data: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[float, ...]]:
    """Losses by step of a run of one rank that was left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_ranks([*settings(folder, tiny_data, tiny_teacher), "run.name=run"], world_size=1) == [0]
    return losses(folder / "run")


@pytest.fixture
def start(cluster: Cluster, tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> Start:
    """Submits the run `tmp_path`/run with options of sbatch and further settings."""

    def submit(*options: str, more: tuple[str, ...] = (), **env: str) -> Job:
        arguments = ["demo", *settings(tmp_path, tiny_data, tiny_teacher), "run.name=run", *more]
        return cluster.submit(tmp_path, options, arguments, **env)

    return submit


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def as_undisturbed(run: Path, undisturbed: dict[int, tuple[float, ...]]) -> None:
    """Every step once in effect, with the losses that it would have had anyway."""
    assert largest_difference(losses(run), undisturbed) < ACROSS_RANKS
    assert [event["step"] for event in events(run, "end")] == [STEPS]


def test_a_job_completes_and_each_rank_writes_to_its_own_log(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=2")
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    [began] = events(run, "job")
    assert (began["job_id"], began["restarts"], began["nodes"], began["ranks"]) == (
        job.number,
        0,
        began["nodes"],
        4,
    )
    [start_event] = events(run, "start")
    assert start_event["hosts"] == began["nodes"]
    assert f"step {STEPS}/{STEPS}" in job.log
    assert "first step after " in job.log
    assert sorted(path.name for path in (run / "logs").glob("*.out")) == [
        "rank1.out",
        "rank2.out",
        "rank3.out",
    ]
    [seconds] = [event["seconds"] for event in events(run, "started")]
    parts = (
        "batch script",
        "imports",
        "meeting",
        "preflight",
        "data",
        "checkpoint",
        "teacher",
        "engine",
        "first step",
    )
    assert set(parts) <= seconds.keys()
    assert not (run / "job.json").exists()


def test_a_run_that_reaches_its_time_limit_twice_completes(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    # Slurm checks the limit only now and then, so that a signal 55 s before it comes soon after the start.
    slow = ("batch.micro_batch=1",)
    job = start(
        "--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=USR2@55", more=slow, UNIEMOX_LEAD_S="55"
    )
    until(lambda: len(events(run, "requeue")) >= 2 or job.state == "COMPLETED", lambda: job.log)
    assert len(events(run, "requeue")) >= 2, job.log
    job.cluster.run("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    assert [event["restarts"] for event in events(run, "job")] == list(range(job.restarts + 1))
    assert {event["signal"] for event in events(run, "signal")} == {"SIGUSR2"}
    assert repeated(run) == 0


def test_ranks_that_start_after_the_signal_save_before_the_time_limit(
    start: Start, run: Path, cluster: Cluster, tmp_path: Path
) -> None:
    slow = tmp_path / "slow"  # the signal comes 20 to 50 s after the start, when no rank is there
    slow.write_text(f'#!/bin/sh\n[ "$2" != begin ] || sleep 55\nexec {cluster.env["UNIEMOX"]} "$@"\n')
    slow.chmod(0o755)
    job = start("--nodes=1", "--time=3", "--signal=USR2@160", UNIEMOX_LEAD_S="160", UNIEMOX=str(slow))
    until(lambda: bool(events(run, "requeue")) or job.state == "TIMEOUT", lambda: job.log)
    assert [(event["signal"], event["step"]) for event in events(run, "signal")] == [("SIGUSR2", 1)]
    assert [event["by"] for event in events(run, "requeue")] == ["job"], job.log


def test_preemption_by_a_higher_partition_repeats_one_step_at_most(
    start: Start, run: Path, cluster: Cluster, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=1")
    until(reached(run, 8), lambda: job.log)
    cluster.occupy(4)
    until(lambda: job.restarts == 1, lambda: job.log)
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    assert [event["by"] for event in events(run, "requeue")] == ["job"]
    assert repeated(run) <= 1


def test_a_job_that_somebody_requeues_saves_and_is_queued_once(
    start: Start, run: Path, cluster: Cluster, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=1")
    until(reached(run, 8), lambda: job.log)
    cluster.run("scontrol", "requeue", str(job.number))
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    assert job.restarts == 1
    assert {event["by"] for event in events(run, "requeue")} <= {"slurm"}
    assert [event["saved"] for event in events(run, "signal")] == [True]
    assert repeated(run) == 0


def test_after_a_node_crash_the_run_continues_with_the_largest_legal_number_of_ranks(
    start: Start, run: Path, cluster: Cluster, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    # With one task a node Slurm would give two nodes only: as many as there are tasks in the least that is asked for.
    job = start("--nodes=2-4", "--ntasks-per-node=2", more=("batch.micro_batch=8",))
    until(reached(run, 22), lambda: job.log)  # and so step 20 is saved
    [first] = events(run, "job")
    assert (first["nodes"], first["ranks"], first["idle"]) == (["n1", "n2", "n3"], 3, 5)
    idle = "idle: node n4, 1 of 2 tasks on each other node"
    assert f"3 ranks is the largest legal number in 4 nodes x 2 tasks; {idle}" in job.log
    cluster.kill_nodes("n2", "n3")
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    second = events(run, "job")[1]
    assert (second["restarts"], second["nodes"], second["ranks"], second["idle"]) == (1, ["n1"], 1, 3)
    [resumed] = events(run, "resume")
    assert resumed["step"] >= 20


def test_a_node_that_fails_the_preflight_is_reported_and_left_out_of_a_new_job(
    start: Start, run: Path, cluster: Cluster, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    cluster.in_node("n2", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/dev/shm")
    try:
        job = start("--nodes=2", "--ntasks-per-node=1", "--nodelist=n1,n2", more=("data.workers=1",))
        assert job.ended() == ("FAILED", 1), job.log
    finally:
        cluster.in_node("n2", "umount", "/dev/shm")
    [bad] = lines(run / "nodes.jsonl")
    assert (bad["node"], bad["job_id"]) == ("n2", job.number)
    assert "/dev/shm" in bad["finding"]
    assert "the preflight failed on n2: " in job.log
    until(lambda: len(events(run, "job")) == 2, lambda: job.log)
    after = Job(cluster, events(run, "job")[1]["job_id"], job.folder)
    assert after.ended() == ("COMPLETED", 0), after.log
    assert after.facts()["ExcNodeList"] == "n2"
    assert events(run, "job")[1]["after"] == job.number
    assert len(events(run, "job")[1]["nodes"]) == 2
    as_undisturbed(run, undisturbed)


def test_shards_that_a_compute_node_does_not_see_are_reported_with_its_name(
    start: Start, run: Path, cluster: Cluster, tiny_data: Path
) -> None:
    cluster.in_node("n2", "mount", "-t", "tmpfs", "tmpfs", str(tiny_data))
    try:
        job = start("--nodes=2", "--ntasks-per-node=1", "--nodelist=n1,n2")
        assert job.ended() == ("FAILED", 2), job.log
    finally:
        cluster.in_node("n2", "umount", str(tiny_data))
    assert f"uniemox: error: on n2, and not on n1: data.path={tiny_data}/train: no such folder" in job.log
    assert not (run / "job.json").exists()


def test_a_controller_that_restarts_is_not_even_noticed(
    start: Start, run: Path, cluster: Cluster, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=1")
    until(reached(run, 5), lambda: job.log)
    cluster.kill_controller()
    until(reached(run, 15), lambda: job.log)
    cluster.heal()
    assert job.ended() == ("COMPLETED", 0), job.log
    as_undisturbed(run, undisturbed)
    assert len(events(run, "start")) == 1


def test_a_cancelled_job_saves_and_is_not_queued_again(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=1")
    until(reached(run, 8), lambda: job.log)
    job.cancel()
    assert job.ended()[0] == "CANCELLED"
    until(lambda: not (run / "job.json").exists(), lambda: job.log)
    [signal] = events(run, "signal")
    assert (signal["signal"], signal["saved"]) == ("SIGTERM", True)
    assert job.restarts == 0
    again = start("--nodes=2", "--ntasks-per-node=1")
    assert again.ended() == ("COMPLETED", 0), again.log
    assert [event["step"] for event in events(run, "resume")] == [signal["step"]]
    as_undisturbed(run, undisturbed)
    assert repeated(run) == 0


def test_of_two_submissions_at_once_the_second_is_refused(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    jobs = [start("--nodes=2", "--ntasks-per-node=1") for _ in range(2)]
    ends = [job.ended() for job in jobs]
    assert sorted(ends) == [("COMPLETED", 0), ("FAILED", 2)], [job.log for job in jobs]
    second, first = (jobs[ends.index(end)] for end in (("FAILED", 2), ("COMPLETED", 0)))
    assert f"uniemox: error: run.dir/run.name={run}: job {first.number} of " in second.log
    assert f"scancel {first.number}" in second.log
    assert [event["job_id"] for event in events(run, "job")] == [first.number]
    as_undisturbed(run, undisturbed)


def test_the_lock_of_a_lost_job_is_taken_over(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    run.mkdir()
    (run / "job.json").write_text(
        '{"job_id": 99999, "restarts": 0, "nodes": ["n9"], "host": "n9", "user": "ann", "time": 1.0, "began_step": 0}\n'
    )
    job = start("--nodes=1", "--ntasks-per-node=2")
    assert job.ended() == ("COMPLETED", 0), job.log
    assert "uniemox: took the run over from job 99999, which no longer runs" in job.log
    as_undisturbed(run, undisturbed)


def test_after_a_fault_the_ranks_start_again_in_the_allocation_until_nothing_comes_of_it(
    start: Start, run: Path, undisturbed: dict[int, tuple[float, ...]]
) -> None:
    job = start("--nodes=2", "--ntasks-per-node=1", more=("run.max_restarts=1",))
    until(reached(run, 22), lambda: job.log)
    job.kill_ranks()
    until(lambda: len(events(run, "start")) == 2, lambda: job.log)
    assert [(event["step"], event["left"], event["code"]) for event in events(run, "restart")] == [
        (20, 0, 137)
    ]
    job.kill_ranks()
    assert job.ended() == ("FAILED", 1)
    assert "giving up after 1 restart without a new checkpoint (run.max_restarts=1)" in job.log
    again = start("--nodes=2", "--ntasks-per-node=1")
    assert again.ended() == ("COMPLETED", 0), again.log
    as_undisturbed(run, undisturbed)


def test_a_signal_while_compiling_saves_and_is_no_fault(start: Start, run: Path, tmp_path: Path) -> None:
    job = start(
        "--nodes=1",
        "--ntasks-per-node=2",
        more=("compute.compile=true", "run.max_steps=4"),
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"),
    )
    compiling = lambda: any((tmp_path / "inductor").rglob("*.cpp"))  # noqa: E731
    until(compiling, lambda: job.log)
    job.cancel("-s", "USR2")
    until(lambda: bool(events(run, "requeue")), lambda: job.log)
    [signal] = events(run, "signal")
    assert (signal["signal"], signal["saved"]) == ("SIGUSR2", True)
    assert signal["step"] <= 2  # the one that compiles, and perhaps the next
    assert job.ended() == ("COMPLETED", 0), job.log
    assert not events(run, "fault")
