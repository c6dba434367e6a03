"""`uniemox launch` with a fine-tuning recipe: recognised, checked, frozen and submitted like a pretraining one."""

import json
import subprocess
from pathlib import Path

import pytest
from fake_commands import write_commands
from labelled_sets import labels_set, packed

from uniemox_dist.cli.main import run
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.core.errors import EXIT_USER

RECIPE = """
extends: finetune
run: {name: f, dir: runs, epochs: null, max_steps: 6}
data: {path: data, workers: 0}
batch: {global_batch: 12, micro_batch: 2, streams: 12}
optim: {warmup_epochs: null, warmup_steps: 1}
model: {init_from: start}
"""
SITE = "{nodes: 2, gpus_per_node: 0, ranks_per_node: 2, time: 60, timeouts: {step_s: 700}}"
ARCHITECTURE = {"name": None, "patch_size": 8, "width": 32, "depth": 2, "heads": 2, "mlp_ratio": 4.0}
"""Of the release that the run starts from."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    counts = {split: dict.fromkeys(("joy", "fear"), 6) for split in ("train", "val", "test")}
    return packed(labels_set(folder / "source", counts), folder / "data")


@pytest.fixture
def place(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a recipe, a release, a site, and an sbatch that accepts everything."""
    (tmp_path / "f.yaml").write_text(RECIPE)
    (tmp_path / "site.yaml").write_text(SITE)
    (tmp_path / "data").symlink_to(data)
    (tmp_path / "start").mkdir()
    release = {"config": {"model": {**ARCHITECTURE, "image_size": 32, "mean": [0.5] * 3, "std": [0.2] * 3}}}
    (tmp_path / "start/uniemox.json").write_text(json.dumps(release))
    tools = write_commands(tmp_path / "bin", {"sbatch": 'echo "$*" >>calls; echo 41', "squeue": "true"})
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def launch(*words: str, kind: str = "slurm") -> int:
    return run(["launch", kind, "f.yaml", "--cluster", "site.yaml", *words])


def frozen(place: Path, name: str = "f", number: int = 1) -> FinetuneRun:
    config = load_config(str(place / f"runs/{name}/jobs/{number:04d}/config.yaml"))
    assert isinstance(config, FinetuneRun)
    return config


def test_a_fine_tuning_recipe_is_recognised_and_its_job_runs_finetune(place: Path) -> None:
    assert launch("finetune.mixup=0.5") == 0
    config = frozen(place)
    assert (config.finetune.mixup, config.run.step_timeout_s, config.model.width) == (0.5, 700, 32)
    own = place / "runs/f/jobs/0001"
    assert (place / "calls").read_text().split() == ["--parsable", f"{own}/job.sbatch"]
    script = (own / "job.sbatch").read_text()
    assert '--kill-on-bad-exit=1 "$uniemox" finetune "$@" &' in script
    assert f"set -- {own}/config.yaml\n" in script
    assert f"#SBATCH --output={place}/runs/f/logs/slurm-%j.out\n" in script
    facts = json.loads((own / "submission.json").read_text())
    assert (facts["job_ids"], facts["code"]) == ([41], next((place / "runs/f/code").iterdir()).name)


def test_the_job_trains_the_frozen_architecture_even_if_the_release_changes(place: Path) -> None:
    assert launch("model.image_size=48") == 0
    changed = {"config": {"model": {**ARCHITECTURE, "width": 64, "image_size": 32}}}
    (place / "start/uniemox.json").write_text(json.dumps(changed))
    assert (frozen(place).model.width, frozen(place).model.image_size) == (32, 48)
    # Another start in the place of the frozen one brings its own architecture.
    (place / "other").mkdir()
    (place / "other/uniemox.json").write_text(json.dumps(changed))
    other = load_config(str(place / "runs/f/jobs/0001/config.yaml"), ["model.init_from=other"])
    assert (other.model.width, other.model.image_size) == (64, 32)


def test_the_script_differs_from_that_of_pretraining_only_in_the_command(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "r.yaml").write_text(
        "extends: demo\nrun: {name: f, dir: runs}\ndata: {path: data/train, eval_path: null}\n"
        "batch: {global_batch: 12, micro_batch: 2, streams: 12}\nloss: {relation: 0, similarity: 0}\n"
        "optim: {warmup_epochs: null, warmup_steps: 1}\n"
    )
    scripts = []
    for recipe in ("f.yaml", "r.yaml"):
        capsys.readouterr()
        assert run(["launch", "slurm", recipe, "--cluster", "site.yaml", "--dry-run"]) == 0
        scripts.append(capsys.readouterr().out.splitlines())
    different = [pair for pair in zip(*scripts) if pair[0] != pair[1]]
    assert [a.replace(" finetune ", " pretrain ") == b for a, b in different[-1:]] == [True]
    assert all("/code/" in a for a, _ in different[:-1])  # the demo's teacher comes with its code
    assert len(scripts[0]) == len(scripts[1])


def test_the_command_can_be_named_and_must_fit_the_recipe(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["launch", "slurm", "--cluster", "site.yaml", "--", "finetune", "f.yaml", "run.name=g"]
    assert run(words) == 0
    assert frozen(place, "g").run.max_steps == 6
    words[-3] = "pretrain"
    assert run(words) == EXIT_USER
    assert "finetune.*: this recipe is for fine-tuning" in capsys.readouterr().err
    assert run([*words, "--nproc", "2"]) == EXIT_USER
    assert "--nproc: jobs are started without it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pairs", "line"),
    [
        (["data.path=nowhere"], "data.path=nowhere: no such folder"),
        (
            ["model.init_from=gone"],
            "model.init_from=gone: no such file or folder, and a fine-tuning run takes its architecture from there",
        ),
        (["finetune.labels=[joy,rage]"], "the label 'fear' is not among those that finetune.labels names"),
    ],
)
def test_commands_that_would_fail_are_reported_before_they_are_queued(
    place: Path, capsys: pytest.CaptureFixture[str], pairs: list[str], line: str
) -> None:
    assert launch(*pairs) == EXIT_USER
    assert line in capsys.readouterr().err
    assert not (place / "calls").exists()
    assert not (place / "runs").exists()


def test_other_settings_and_bad_nodes_count_as_for_pretraining(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch() == 0
    capsys.readouterr()
    assert launch("finetune.smoothing=0") == EXIT_USER
    assert "finetune.smoothing: 0.1 -> 0" in capsys.readouterr().err
    assert launch("finetune.smoothing=0", "--resume", "--chain", "2") == 0
    assert len((place / "calls").read_text().splitlines()) == 3


def test_a_sweep_over_fine_tuning_settings_is_one_array(place: Path) -> None:
    assert launch("--array", "optim.layer_decay=0.65,0.75", "--array", "finetune.mixup=0,0.8") == 0
    sweep = place / "runs/sweeps/f-0001"
    script = (sweep / "job.sbatch").read_text()
    assert "#SBATCH --array=0-3\n" in script
    assert '"$uniemox" finetune "$@" &' in script
    names = [path.name for path in sorted((place / "runs").glob("f-*"))]
    assert len(names) == 4
    assert {(c.optim.layer_decay, c.finetune.mixup) for c in (frozen(place, name) for name in names)} == {
        (decay, mixup) for decay in (0.65, 0.75) for mixup in (0, 0.8)
    }


def test_submitit_runs_finetune_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch("--dry-run", kind="submitit") == 0
    script = capsys.readouterr().out
    assert f"#SBATCH --chdir={place}/runs/f/jobs/0001\n" in script
    assert "#SBATCH --ntasks-per-node=2\n" in script


@pytest.mark.slow
def test_a_local_fine_tuning_run_trains_from_its_frozen_code(place: Path) -> None:
    (place / "f.yaml").write_text(
        RECIPE.replace("model: {init_from: start}", "").replace(
            "max_steps: 6", "max_steps: 2, preflight: false"
        )
        + "model: {name: null, image_size: 32, patch_size: 8, width: 32, depth: 2, heads: 2}\n"
    )
    assert launch("optim.precision=fp32", kind="local") == 0
    found = json.loads((place / "runs/f/finetune.json").read_text())
    assert found["labels"] == ["fear", "joy"]
    subprocess.run(
        ["bash", "-c", "! ls runs/f/code/*/uniemox_dist/teacher/demo_teacher"], check=True, cwd=place
    )
