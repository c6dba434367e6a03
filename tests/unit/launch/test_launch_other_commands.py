"""`uniemox launch KIND -- COMMAND …`: commands without a run folder, each with its own submission folder."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from fake_commands import write_commands
from small import make_release

from launch.freeze import content_hash
from uniemox_dist.cli.main import run
from uniemox_dist.core.errors import EXIT_FAULT, EXIT_USER

SITE = "{nodes: 2, gpus_per_node: 4, time: 60}"


@pytest.fixture(scope="module")
def small_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_release(tmp_path_factory.mktemp("released"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "site.yaml").write_text(SITE)
    tools = write_commands(tmp_path / "bin", {"sbatch": 'echo "$*" >>calls; echo 41', "squeue": "true"})
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(
    *words: str,
    options: tuple[str, ...] = (),
    kind: str = "slurm",
    unseen: tuple[str, ...] = ("--unseen-data",),
) -> int:
    return run(["launch", kind, "--cluster", "site.yaml", *unseen, *options, "--", *words])


def test_script_code_and_command_are_kept_in_a_folder_of_the_submission(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = "rel ease's"
    words = ("evaluate", "probe", strange, "data", "--json", "out.json")
    assert launch(*words, options=("--time", "20", "--after", "7", "--exclude", "n3")) == 0
    own = place / "jobs/evaluate-probe-0001"
    assert (place / "calls").read_text() == (
        f"--parsable --exclude=n3 --dependency=afterany:7 {own}/job.sbatch\n"
    )
    script = (own / "job.sbatch").read_text()
    for line in ("job-name=evaluate-probe", "nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "time=20"):
        assert f"#SBATCH --{line}\n" in script
    [line] = [line for line in script.splitlines() if line.startswith("set -- ")]
    assert shlex.split(line)[2:] == list(words)
    assert script.splitlines()[-1].startswith("exec srun ")
    assert "requeue" not in script.partition("set -uo")[2]  # no exit code 75, and so nothing to queue again
    [code] = (place / "jobs/code").iterdir()
    assert content_hash(code) == code.name
    assert f"export PYTHONPATH={code}$" in script
    facts = json.loads((own / "submission.json").read_text())
    assert (facts["job_ids"], facts["code"], facts["nodes"]) == ([41], code.name, "1")
    printed = capsys.readouterr().out
    for text in (f"submitted job 41; folder {own}", f"tail -F {own}/slurm-41.out", "scancel 41"):
        assert text in printed
    assert launch(*words) == 0
    assert (place / "jobs/evaluate-probe-0002/submission.json").exists()


def test_teaching_uses_all_ranks_and_other_commands_use_one(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("teach", "data", "--teacher", "shipped:demo", options=("--chain", "2")) == 0
    script = (place / "jobs/teach-0001/job.sbatch").read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=4\n#SBATCH --gpus-per-node=4\n" in script
    assert "--dependency=afterany:41" in (place / "calls").read_text().splitlines()[1]
    for options, text in {
        ("--nodes", "2"): "--nodes=2: release is one process",
        ("--chain", "2"): "--chain=2: release does not continue where it was stopped",
        ("--array", "optim.blr=1,2"): "--array: only for pretrain and finetune",
        ("--force-new",): "--force-new: only for pretrain and finetune",
    }.items():
        assert launch("release", "runs/r", "out", options=options) == EXIT_USER
        assert text in capsys.readouterr().err
    assert not (place / "jobs").joinpath("release-0001").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["evaluate", "prob", "r", "d"], "No such command 'prob'"),
        (
            ["evaluate"],
            "-- evaluate: names no command of evaluate; give one of distribution, gallery, knn, probe, protocol",
        ),
        (
            ["--help"],
            "-- --help: neither a command of uniemox nor a recipe; commands are shards, teach, pretrain",
        ),
        (
            ["evalute", "probe"],
            "-- evalute: neither a command of uniemox nor a recipe; did you mean evaluate?",
        ),
        (["evaluate", "probe", "r"], "Missing argument 'DATA'"),
        (["embed", "in", "out", "--batch", "no", "--release", "r"], "Invalid value for '--batch'"),
        (["status", "runs/r"], "status: is not submitted as a job"),
    ],
)
def test_a_mistake_in_the_command_is_reported_before_anything_is_queued(
    place: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert launch(*words) == EXIT_USER
    assert text in capsys.readouterr().err
    assert not (place / "calls").exists()
    assert not (place / "jobs").exists()


def test_either_a_recipe_or_a_command_is_given(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["launch", "slurm", "--cluster", "site.yaml"]) == EXIT_USER
    assert "RECIPE: missing" in capsys.readouterr().err
    assert launch("release", "a", "b", options=("demo",)) == EXIT_USER
    assert "RECIPE=demo: give a recipe, or a command after --" in capsys.readouterr().err
    # As before there were commands: what follows -- may be a recipe.
    assert run(["launch", "slurm", "--cluster", "site.yaml", "--", "no_recipe"]) == EXIT_USER
    assert "-- no_recipe: neither a command of uniemox nor a recipe" in capsys.readouterr().err
    assert run(["launch", "slurm", "--cluster", "site.yaml", "--", "demo", "model.widht=3"]) == EXIT_USER
    assert "model.widht: unknown key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["evaluate", "probe", "none", "data"],
            "RELEASE=none: no such folder; give a folder that `uniemox release",
        ),
        (["evaluate", "probe", "timm:a=b", "data"], "timm:a=b: b is not a safetensors file"),
        (["evaluate", "gallery", "{release}", "none", "--out", "g.json"], "DATA=none: no such folder"),
        (["evaluate", "probe", "{release}", "{data}", "--test", "x"], "DATA={data}/x: no such folder"),
        (
            ["evaluate", "probe", "{release}", "{data}", "--val", "train"],
            "--train=train and --val=train: are",
        ),
        (["evaluate", "knn", "{release}", "{data}", "--json", "bin"], "--json=bin: is a folder; give a file"),
        (["embed", "none", "out.parquet", "--release", "{release}"], "INPUT=none: no such file or folder"),
        (["embed", "{data}", "out.parquet", "--release", "{data}"], "--release={data}: lacks uniemox.json"),
        (["predict", "{release}", "{data}", "--texts", "bin"], "--texts=bin: is a folder"),
        (["reconstruct", "{release}", "none", "x.png"], "PICTURES=none: no such file or folder"),
        (["release", "none", "out"], "RUN=none: no such folder"),
        (["release", "none"], "Missing argument 'OUT'. See `uniemox release --help`"),
        (["release", "{release}", "out"], "RUN={release}: is a release; give the folder of a run"),
        (["report", "none", "--evaluation", "bin"], "--evaluation=bin: is a folder"),
        (["teach", "none", "--teacher", "shipped:demo"], "DIR=none: no such folder; build it with"),
        (["teach", "{data}", "--teacher", "local-dir:none"], "teacher.name=local-dir:none: none lacks"),
        (["checkpoint", "verify", "none"], "RUN=none: no such folder"),
        (["shards", "pack", "none", "out"], "SOURCE=none: no such file or folder"),
        (["shards", "verify", "bin"], "DIR=bin"),
        (["shards", "index", "bin"], "DIR=bin: has no .tar files"),
        (["shards", "split", "none", "out"], "DIR=none: no such folder"),
        (["shards", "merge", "out", "none"], "PARTS=none"),
    ],
)
def test_a_missing_input_is_reported_before_anything_is_queued(
    place: Path,
    small_release: Path,
    emoji_shards: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    text: str,
) -> None:
    paths = {"release": str(small_release), "data": str(emoji_shards)}
    words = [word.format(**paths) for word in words]
    assert launch(*words, unseen=()) == EXIT_USER
    [line] = capsys.readouterr().err.splitlines()
    assert text.format(**paths) in line
    assert not (place / "calls").exists()
    assert not (place / "jobs").exists()


def test_inputs_that_an_earlier_job_writes_are_not_checked(
    place: Path, small_release: Path, emoji_shards: Path
) -> None:
    assert launch("evaluate", "probe", "none", "data", options=("--after", "7"), unseen=()) == 0
    assert launch("evaluate", "probe", str(small_release), str(emoji_shards), unseen=()) == 0
    assert len((place / "calls").read_text().splitlines()) == 2


def test_a_refused_submission_leaves_nothing_unless_another_one_uses_its_code(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("release", "runs/r", "out")
    sbatch, text = place / "bin/sbatch", (place / "bin/sbatch").read_text()
    refuses = "#!/bin/bash\necho 'sbatch: error: no' >&2; exit 1\n"
    sbatch.write_text(refuses)
    assert launch(*words) == EXIT_USER
    assert capsys.readouterr().err == "uniemox: error: sbatch: no\n"
    assert not (place / "jobs").exists()
    (place / "jobs/release-0001").mkdir(parents=True)  # a submission that is being made
    assert launch(*words) == EXIT_USER
    assert [path.name for path in sorted((place / "jobs").iterdir())] == ["code", "release-0001"]
    (place / "jobs/release-0001").rmdir()
    sbatch.write_text(text)
    assert launch(*words) == 0
    sbatch.write_text(refuses)
    assert launch(*words) == EXIT_USER
    assert [path.name for path in sorted((place / "jobs").iterdir())] == ["code", "release-0001"]
    [code] = (place / "jobs/code").iterdir()
    assert content_hash(code) == code.name


def test_a_dry_run_prints_the_script_of_the_submission_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("release", "runs/r", "out", options=("--dry-run", "--jobs", "mine")) == 0
    script = capsys.readouterr().out
    assert not (place / "mine").exists()
    assert launch("release", "runs/r", "out", options=("--jobs", "mine")) == 0
    assert (place / "mine/release-0001/job.sbatch").read_text() == script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_containers_mount_the_paths_that_the_command_names(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (place / "site.yaml").write_text("{gpus_per_node: 1, container: {kind: apptainer, image: x.sif}}")
    assert launch("evaluate", "probe", str(elsewhere), "data") == 0
    script = (place / "jobs/evaluate-probe-0001/job.sbatch").read_text()
    assert f"--bind {elsewhere} x.sif" in script


def test_submitit_accepts_commands_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("release", "runs/r", "out", options=("--dry-run",), kind="submitit") == 0
    script = capsys.readouterr().out
    assert f"#SBATCH --chdir={place}/jobs/release-0001\n" in script
    for line in ("nodes=1", "ntasks-per-node=1", "gpus-per-node=1", "job-name=release"):
        assert f"#SBATCH --{line}\n" in script


@pytest.mark.long
def test_a_local_command_runs_from_its_frozen_code_and_keeps_its_exit_code(
    place: Path, emoji_shards: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "uniemox_dist").mkdir()
    (place / "uniemox_dist/__init__.py").write_text("raise RuntimeError('the wrong one')\n")
    assert launch("shards", "stats", str(emoji_shards / "train"), kind="local") == 0
    assert "samples" in capfd.readouterr().out
    facts = json.loads((place / "jobs/shards-stats-0001/submission.json").read_text())
    assert (facts["job_ids"], facts["ranks_per_node"]) == ([], 1)
    assert launch("shards", "stats", "nowhere", kind="local") == EXIT_USER
    assert launch("shards", "verify", str(place / "site.yaml"), kind="local") in (EXIT_USER, EXIT_FAULT)


def test_options_of_the_queue_are_refused_on_this_machine(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, value in (("--nodes", "2"), ("--partition", "gpu"), ("--time", "10"), ("--mem", "1G")):
        assert launch("shards", "stats", "x", options=(option, value), kind="local") == EXIT_USER
        assert f"{option}={value}: has no effect on this machine" in capsys.readouterr().err
    assert run(["launch", "local", "--help"]) == 0
    page = capsys.readouterr().out
    assert "--ranks-per-node" in page
    assert "--partition" not in page


def test_a_task_of_submitit_runs_the_command_line_in_place(place: Path, emoji_shards: Path) -> None:
    submitit = pytest.importorskip("submitit")
    code = (
        "import sys\nfrom launch.backends.submitit import Task\n"
        f"task = Task(('shards', 'stats', {str(emoji_shards / 'train')!r}), {str(place)!r})\n"
        "print(task._run(), sys.argv[1:])\n"
        "print(Task(('shards', 'stats', 'nowhere'), '.')._run())\n"
    )
    assert submitit
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2].startswith("0 ['shards', 'stats'")
    assert done.stdout.splitlines()[-1] == "2"
    assert "nowhere" in done.stderr


@pytest.mark.parametrize(
    ("jobs", "fix"),
    [("j\n#SBATCH --x\nk", "has characters that a script cannot contain"), ("site.yaml", "is a file")],
)
def test_a_folder_for_jobs_that_a_script_cannot_name_is_refused(
    place: Path, jobs: str, fix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch("evaluate", "probe", "r", "d", options=("--jobs", jobs, "--dry-run")) == EXIT_USER
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n"), fix in printed.err) == ("", 1, True)
