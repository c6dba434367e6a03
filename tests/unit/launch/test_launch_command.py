"""`uniemox launch` without a cluster: requests that are refused before they are queued, the frozen files, and the
options of sbatch.

sbatch and squeue are small programs here that write down how they were called; tests/cluster has the real ones.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from fake_commands import write_commands

import launch as launch_package
from launch.freeze import content_hash
from uniemox_dist.cli.main import run
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import EXIT_FAULT, EXIT_USER
from uniemox_dist.runs.folder import append_line

RECIPE = """
extends: demo
run: {name: r, dir: runs, epochs: null, max_steps: 6}
data: {eval_path: null, workers: 0}
batch: {global_batch: 12, micro_batch: 3, streams: 12}
loss: {relation: 0, similarity: 0}
optim: {warmup_epochs: null, warmup_steps: 1}
"""
SITE = "{nodes: 2, gpus_per_node: 0, ranks_per_node: 2, time: 60, timeouts: {step_s: 700, start_s: 800}}"
FAKES = {
    # Numbers of jobs from 41 on; refuses as often as there are lines in `refuse`.
    "sbatch": 'echo "$*" >>calls; n=$(wc -l <calls)\n'
    "[[ -e refuse && $n -ge $(cat refuse) ]] && { echo 'sbatch: error: Invalid account' >&2; exit 1; }\n"
    "echo $((40 + n))",
    "squeue": "cat live 2>/dev/null || true",
}


@pytest.fixture
def place(tmp_path: Path, emoji_shards: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a recipe, a site and a Slurm that accepts every job."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "data").symlink_to(emoji_shards / "train")
    (tmp_path / "site.yaml").write_text(SITE)
    tools = write_commands(tmp_path / "bin", FAKES)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*arguments: str, kind: str = "slurm", site: str = "site.yaml") -> int:
    return run(["launch", kind, "r.yaml", "data.path=data", "--cluster", site, *arguments])


def calls(place: Path) -> list[str]:
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


def submission(place: Path, name: str = "r", number: int = 1) -> dict[str, object]:
    found = json.loads((place / f"runs/{name}/jobs/{number:04d}/submission.json").read_text())
    assert isinstance(found, dict)
    return found


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    mark = "uniemox: error: "
    lines = capsys.readouterr().err.splitlines()
    return [line.removeprefix(mark) for line in lines if line.startswith(mark)]


# ---- what is submitted


def test_configuration_code_and_script_are_frozen_and_submitted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("optim.blr=2e-3") == 0
    own = place / "runs/r/jobs/0001"
    assert calls(place) == [f"--parsable {own}/job.sbatch"]
    config = load_config(str(own / "config.yaml"))
    assert (config.optim.blr, config.run.step_timeout_s, config.run.start_timeout_s) == (2e-3, 700, 800)
    facts = submission(place)
    assert (facts["job_ids"], facts["nodes"], facts["ranks_per_node"]) == ([41], "2", 2)
    assert (facts["format"], facts["format_version"], facts["cluster"]) == (
        "uniemox-submission",
        1,
        "site.yaml",
    )
    code = place / "runs/r/code" / str(facts["code"])
    assert content_hash(code) == code.name
    script = (own / "job.sbatch").read_text()
    assert f"export PYTHONPATH={code}$" in script
    assert f"set -- {own}/config.yaml\n" in script
    assert f"#SBATCH --output={place}/runs/r/logs/slurm-%j.out\n" in script
    said = capsys.readouterr().out
    for hint in ("submitted job 41", "tail -F", "slurm-41.out", "uniemox status", "scancel 41"):
        assert hint in said


def test_key_values_beat_the_time_outs_of_the_site(place: Path) -> None:
    assert launch("run.step_timeout_s=650") == 0
    config = load_config(str(place / "runs/r/jobs/0001/config.yaml"))
    assert (config.run.step_timeout_s, config.run.start_timeout_s) == (650, 800)


def test_options_of_the_command_beat_the_file(place: Path) -> None:
    options = [
        "--nodes",
        "1-2",
        "--time",
        "2:00:00",
        "--partition",
        "big",
        "--mem",
        "4G",
        "--signal-lead-s",
        "90",
    ]
    assert launch(*options, "--gpus-per-node", "2") == 0
    script = (place / "runs/r/jobs/0001/job.sbatch").read_text()
    for line in ("nodes=1-2", "time=2:00:00", "partition=big", "mem=4G", "gpus-per-node=2", "signal=USR2@90"):
        assert f"#SBATCH --{line}\n" in script


def test_a_dry_run_prints_the_script_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(place.rglob("*"))
    monkeypatch.setenv("PATH", str(place / "nothing"))  # and needs no Slurm
    assert launch("--dry-run") == 0
    script = capsys.readouterr().out
    assert sorted(place.rglob("*")) == before
    monkeypatch.setenv("PATH", f"{place}/bin:/usr/bin:/bin")
    assert launch() == 0
    assert (place / "runs/r/jobs/0001/job.sbatch").read_text() == script


def test_dependencies_chains_and_nodes_to_leave_out(place: Path) -> None:
    failed = place / "runs/r/nodes.jsonl"
    failed.parent.mkdir(parents=True)
    for node, age_s in (("n3", 60.0), ("n4", 25 * 3600.0), ("n3", 30.0)):
        append_line(failed, {"time": time.time() - age_s, "node": node, "job_id": 1, "finding": "x"})
    assert launch("--after", "7", "--chain", "3", "--exclude", "n9") == 0
    script = f"{place}/runs/r/jobs/0001/job.sbatch"
    assert calls(place) == [
        f"--parsable --exclude=n9,n3 --dependency=afterany:7 {script}",
        f"--parsable --exclude=n9,n3 --dependency=afterany:41 {script}",
        f"--parsable --exclude=n9,n3 --dependency=afterany:42 {script}",
    ]
    assert submission(place)["job_ids"] == [41, 42, 43]
    assert launch("--dependency", "singleton") == 0
    assert "--dependency=singleton" in calls(place)[-1]


# ---- what is refused


def test_a_machine_without_sbatch_is_a_one_line_error(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(place / "nothing"))
    assert launch() == EXIT_USER
    [line] = errors(capsys)
    assert line.startswith("sbatch: there is no such command on this machine; call this on a login node")
    assert not (place / "runs").exists()


def test_a_refusal_of_sbatch_is_one_line_and_leaves_no_files(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "refuse").write_text("1")
    assert launch() == EXIT_USER
    assert errors(capsys) == ["sbatch: Invalid account"]
    assert not (place / "runs").exists()
    (place / "refuse").unlink()
    assert launch() == 0
    (place / "refuse").write_text("1")
    (place / "runs/r/mine.txt").write_text("stays")
    assert launch("--force-new") == EXIT_USER
    assert [p.name for p in (place / "runs").iterdir()] == ["r"]
    assert (place / "runs/r/mine.txt").exists()
    assert [p.name for p in (place / "runs/r/jobs").iterdir()] == ["0001"]


def test_an_incomplete_chain_reports_which_jobs_are_queued(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "refuse").write_text("3")
    assert launch("--chain", "4") == EXIT_FAULT
    assert errors(capsys) == ["2 of 4 jobs were submitted (41, 42), then: sbatch: Invalid account"]
    assert submission(place)["job_ids"] == [41, 42]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["data.path=nowhere"],
            "data.path=nowhere: no such folder; build it with `uniemox shards pack`; if only compute nodes see it, "
            "give --unseen-data",
        ),
        (
            ["--nodes", "8"],
            "8 nodes of 2 ranks: 16 ranks are more than batch.streams=12, and each needs a stream of its own; use at "
            "most 4 ranks, or set batch.streams=16 batch.global_batch=48",
        ),
        (
            ["batch.micro_batch=5"],
            "batch.micro_batch=5 does not divide batch.global_batch=12, so that no number of ranks can run; set "
            "batch.micro_batch=4",
        ),
        (
            ["teacher.name=local-dir:nowhere", "loss.similarity=1"],
            "teacher.name=local-dir:nowhere: no such folder; if only compute nodes see it, give --unseen-data",
        ),
    ],
)
def test_requests_that_would_fail_in_the_queue_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
) -> None:
    assert launch(*arguments) == EXIT_USER
    assert errors(capsys) == [line]
    assert calls(place) == []
    assert not (place / "runs").exists()


def test_a_missing_shard_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(place / "data", place / "cut")
    lost = sorted((place / "cut").glob("*.tar"))[-1]
    lost.unlink()
    assert launch("data.path=cut") == EXIT_USER
    [line] = errors(capsys)
    assert line.startswith(f"data.path=cut: shard {lost.name} is missing")


def test_shards_that_only_compute_nodes_see_can_be_taken_on_trust(place: Path) -> None:
    assert launch("data.path=/only/there", "--unseen-data") == 0
    assert len(calls(place)) == 1


def test_a_time_limit_that_leaves_no_time_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = place / "runs/r/events.jsonl"
    events.parent.mkdir(parents=True)
    append_line(events, {"time": 1.0, "event": "save", "step": 3, "seconds": 100.0})
    assert launch("--time", "3", "--signal-lead-s", "60") == EXIT_USER
    [line] = errors(capsys)
    assert line.startswith(
        "time=3: the limit of 180 s leaves no time to train: Slurm signals the run 60 s before it, and a save may "
        "take 230 s (2 x the longest of the last saves"
    )
    assert launch("--signal-lead-s", "60") == EXIT_USER
    [line] = errors(capsys)
    assert line.startswith(
        "signal_lead_s=60: a save before the limit may take 230 s (2 x the longest of the last saves"
    )
    assert line.endswith("give --signal-lead-s 231 or more")
    assert launch("--signal-lead-s", "231") == 0


def test_ranks_that_stay_idle_and_a_folder_of_this_node_are_remarks(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--nodes", "2-3") == 0
    said = capsys.readouterr().err
    assert "of 3 nodes with 2 ranks each, 4 ranks (2 x 2) can run, and 2 stay idle" in said
    assert f"run.dir={place}/runs is below /tmp, which is most likely this machine's own" in said


# ---- a run that is there


def test_a_run_with_other_settings_is_shown_as_a_diff_and_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch() == 0
    capsys.readouterr()
    assert launch("optim.blr=1e-4", "run.step_timeout_s=600", "run.seed=3") == EXIT_USER
    assert errors(capsys) == [
        f"run.dir/run.name={place}/runs/r: there is a run with other settings (jobs/0001/config.yaml):",
        "  run.seed: 0 -> 3",
        "  optim.blr: 0.004 -> 0.0001",
        "give --resume to continue it with the new settings, --force-new to set that folder aside, or another run.name",
    ]
    assert launch("run.step_timeout_s=600") == 0  # a setting of the site does not count as a difference
    assert launch("run.seed=3", "--resume") == 0
    assert [p.name for p in sorted((place / "runs/r/jobs").iterdir())] == ["0001", "0002", "0003"]
    # The settings of the run's last start decide, not those of later submissions.
    (place / "runs/r/config.yaml").write_text((place / "runs/r/jobs/0001/config.yaml").read_text())
    assert launch("run.seed=3") == EXIT_USER


def test_force_new_sets_the_old_folder_aside(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch() == 0
    (place / "runs/r/metrics.jsonl").write_text("{}\n")
    assert launch("run.seed=3", "--force-new") == 0
    [aside] = (place / "runs").glob("r.before-*")
    assert (aside / "metrics.jsonl").exists()
    assert f"is now {aside}" in capsys.readouterr().out
    assert not (place / "runs/r/metrics.jsonl").exists()
    assert submission(place)["job_ids"] == [42]


@pytest.mark.parametrize("options", [[], ["--force-new"], ["--force-new", "--after", "41"]])
def test_a_second_job_of_a_run_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert launch() == 0
    (place / "live").write_text("41|41|PENDING|Priority||N/A|1:00:00\n")
    assert launch(*options) == EXIT_USER
    assert errors(capsys) == [
        f"run.dir/run.name={place}/runs/r: job 41 (pending) has this run; wait for it with --after 41, end it with "
        "`scancel 41`, or give another run.name"
    ]
    assert launch("--after", "40") == EXIT_USER  # which is another's
    assert "wait for it with --after 41" in errors(capsys)[0]
    assert launch("--after", "41") == 0
    assert launch("--dependency", "singleton") == 0
    (place / "live").write_text("41|41|COMPLETED|None||N/A|0:00\n")
    assert launch() == 0


def test_the_job_that_has_the_run_counts_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "runs/r").mkdir(parents=True)
    (place / "runs/r/job.json").write_text('{"job_id": 9, "restarts": 0}')
    (place / "live").write_text("9|9|RUNNING|None|n1|N/A|10:00\n")
    assert launch() == EXIT_USER
    assert "job 9 (running) has this run" in errors(capsys)[0]


def test_of_two_submissions_at_the_same_moment_one_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # sbatch queues a job, and another submission of the run begins before this one is written down.
    (place / "bin/sbatch").write_text(
        "#!/bin/bash\n[[ -e calls ]] || (echo 41 >calls; echo '41|41|PENDING|x||N/A|1:00:00' >live\n"
        f"PYTHONPATH={Path(launch_package.__file__).parents[1]} {sys.executable} -m uniemox_dist.cli "
        "launch slurm r.yaml data.path=data --cluster site.yaml >second 2>&1 3>&- &)\n"
        "sleep 1; echo 'sbatch: charged to lab7' >&2; echo 41\n"
    )
    assert launch() == 0
    assert "uniemox: sbatch: charged to lab7" in capsys.readouterr().err
    for _ in range(2400):
        if "error" in (place / "second").read_text():
            break
        time.sleep(0.05)
    assert "job 41 (pending) has this run" in (place / "second").read_text()
    assert [p.name for p in (place / "runs/r/jobs").iterdir()] == ["0001"]


def test_ctrl_c_does_not_hide_a_job_that_was_submitted(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sbatch = (
        (place / "bin/sbatch").read_text().replace("#!/bin/bash", f"#!/bin/bash\nkill -INT {os.getpid()}")
    )
    (place / "bin/sbatch").write_text(sbatch)
    assert launch("--chain", "3") == EXIT_FAULT
    assert errors(capsys) == ["1 of 3 jobs were submitted (41), then: interrupted"]
    assert submission(place)["job_ids"] == [41]
    assert sorted(p.name for p in (place / "runs").iterdir()) == ["r"]


def test_a_job_that_slurm_does_not_know_is_not_waited_for(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("--after", "999") == 0
    assert "--after 999: Slurm does not know this job" in capsys.readouterr().err


# ---- sweeps


def test_a_sweep_is_one_array_with_a_frozen_configuration_for_each_point(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    axes = ["--array", "optim.blr=1e-3,3e-4", "--array", "optim.betas=[0.9,0.95],[0.9,0.99]"]
    assert launch(*axes, "--dry-run") == 0
    assert not (place / "runs").exists()
    capsys.readouterr()
    assert launch(*axes) == 0
    sweep = place / "runs/sweeps/r-0001"
    assert calls(place) == [f"--parsable {sweep}/job.sbatch"]
    assert "#SBATCH --array=0-3\n" in (sweep / "job.sbatch").read_text()
    tasks = [line.split("\t") for line in (sweep / "tasks.tsv").read_text().splitlines()]
    configs = [load_config(config) for config, _ in tasks]
    assert [(c.optim.blr, c.optim.betas[1]) for c in configs] == [
        (1e-3, 0.95),
        (1e-3, 0.99),
        (3e-4, 0.95),
        (3e-4, 0.99),
    ]
    assert [Path(folder) for _, folder in tasks] == [place / "runs" / c.run.name for c in configs]
    assert configs[1].run.name == "r-blr_1e-3-betas_0.9_0.99"
    facts = submission(place, configs[2].run.name)
    assert (facts["job_ids"], facts["array_task"], facts["sweep"]) == ([41], 2, str(sweep))
    assert yaml.safe_load((sweep / "submission.json").read_text())["points"] == 4
    said = capsys.readouterr().out
    assert (sweep / "points.txt").read_text() in said
    assert "uniemox status" in said


@pytest.mark.parametrize(
    ("axes", "line"),
    [
        (["optim.blr"], "--array optim.blr: expected KEY=VALUE,VALUE,…, such as optim.blr=1e-3,3e-4"),
        (["run.seed=1,1"], "--array run.seed=1,1: a value is given twice; both would train the same run"),
        (["run.seed=1,0x1"], "--array run.seed=1,0x1: a value is given twice; both would train the same run"),
        (["run.seed=1,,2"], "--array run.seed=1,,2: expected KEY=VALUE,VALUE,…, such as optim.blr=1e-3,3e-4"),
        (["x=[1,2"], "--array x=[1,2: expected KEY=VALUE,VALUE,…, such as optim.blr=1e-3,3e-4"),
        (["run.seed=1", "run.seed=2"], "--array run.seed=…: given twice; put all its values into one list"),
        (
            ["run.name=a,b"],
            "--array run.name=a,b: every point gets its own run.name; sweep over another key",
        ),
        (["run.sed=1"], "run.sed=1: r.yaml: run.sed: unknown key; did you mean run.seed?"),
    ],
)
def test_an_invalid_sweep_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], axes: list[str], line: str
) -> None:
    assert launch(*(word for axis in axes for word in ("--array", axis))) == EXIT_USER
    assert errors(capsys) == [line]
    assert not (place / "runs").exists()


def test_a_sweep_that_sbatch_refuses_leaves_no_files(place: Path) -> None:
    (place / "refuse").write_text("1")
    assert launch("--array", "run.seed=1,2") == EXIT_USER
    assert not (place / "runs").exists()


# ---- other ways


def test_a_dry_run_prints_what_submitit_would_submit(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch("--dry-run", "--nodes", "2-3", kind="submitit") == 0
    script = capsys.readouterr().out
    for line in (
        "nodes=2",
        "ntasks-per-node=2",
        "signal=USR2@180",
        "time=60",
        f"chdir={place}/runs/r/jobs/0001",
    ):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1" in script
    monkeypatch.setenv("PATH", str(place / "bin"))
    assert launch(kind="submitit") == EXIT_USER
    assert errors(capsys)[-1].startswith(
        "srun: there is no such command on this machine, and submitit needs it"
    )


def test_launch_and_its_help_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom uniemox_dist.cli.main import run\n"
        "for words in (['--help'], ['launch', '--help'], ['launch', 'slurm', '--help']): assert run(words) == 0\n"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stderr.split())
    assert not loaded & {"torch", "numpy", "pyarrow", "pydantic", "jinja2", "submitit", "matplotlib"}
    assert "begin" not in done.stdout.split()
