"""`uniemox plan`: its tables, its JSON, and one line for each mistake."""

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from shards.format.entries import ShardEntry
from shards.format.manifest import Manifest
from uniemox_dist.cli.main import run
from uniemox_dist.config.load import dump_yaml, load_config

JOB = ["--nodes", "2", "--gpus-per-node", "8"]
LARGE = ["plan", "uniemox_vit_l16", *JOB, "--gpu", "h100", "--samples", "118102", "--network", "400"]


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert run(arguments) == 0
    return click.unstyle(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def test_the_page_has_a_section_for_each_question(capsys: pytest.CaptureFixture[str]) -> None:
    page = told(
        capsys, [*LARGE, "--cpus-per-node", "64", "--mfu", "0.4", "--mtbf-hours", "1000", "--disk", "2"]
    )
    lines = page.splitlines()
    assert lines[0] == "uniemox_vit_l16: vit_large_patch16_224 on 2 nodes x 6 H100"
    assert "student     329.5 M trained parameters (encoder 303.1, decoder 25.6, fusion 0.3), bf16" in lines
    assert "step        768 samples = 12 ranks x micro-batch 32 x accumulation 2, ZeRO 1" in lines
    reason = "batch.micro_batch=32 does not divide a rank's 48 samples of a step"
    assert f"warn        2 GPUs per node would stay idle, 4 of 16 GPUs: {reason}" in " ".join(
        page.split("\n" + " " * 12)
    )
    for title in (
        "Memory of one GPU, GB (of 85.9)",
        "Exchanges in a step",
        "Time",
        "Loader, of one node",
        "Data",
        "Checkpoints",
    ):
        assert title in lines
    assert "length      30,756 steps = 23,620,608 samples = 200 epochs of 118,102" in lines
    assert "pace        33,006 samples/s, 40 % of the peak, 0.0233 s per step (by --mfu)" in lines
    assert "ok          recommended: zero.stage=1 batch.micro_batch=64: " in page
    assert "exchanges take longer than a step computes" in page
    assert "a node fails every 1,000 h, so the job every 20 d 20 h" in page
    assert max(map(len, lines)) <= 112


def test_the_chosen_stage_and_choices_that_do_not_fit_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    page = told(capsys, [*LARGE, "--gpu-memory", "3.1", "zero.stage=2"])
    assert re.search(r"^ \* 2  bf16 .*too large$", page, re.M)
    assert re.search(r"^   1  bf16 .*too large$", page, re.M)
    assert "! does not fit in 2.8 GB, which leaves a tenth free" in page
    assert "recommended: zero.stage=2 batch.micro_batch=32 compute.checkpoint_blocks=true: 2.73 GB" in page
    nothing = told(capsys, [*LARGE, "--gpu-memory", "1"])
    assert "nothing of this fits in 0.9 GB" in nothing


def test_without_a_known_gpu_the_plan_names_the_missing_option(capsys: pytest.CaptureFixture[str]) -> None:
    page = told(capsys, ["plan", "demo", *JOB[:3], "1", "--samples", "1251", "batch.micro_batch=24"])
    assert "give --gpu or --gpu-memory to see what fits" in page
    assert "pace        not known: give --gpu NAME with --mfu, or --samples-per-s, or --from-run RUN" in page
    assert "give --network GBIT_PER_S of a node, to see the time between nodes" in page


def test_json_holds_the_same_and_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*LARGE, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["format_version"]) == ("uniemox-plan", 1)
    assert (facts["ranks"], facts["idle"], facts["nodes_used"], facts["ranks_per_node"]) == (12, 4, 2, 6)
    assert facts["parameters"]["trained"] == 329_503_488
    assert facts["recommended"] == {"zero_stage": 1, "micro_batch": 64, "checkpoint_blocks": False}
    assert facts["steps"] == 30756
    assert facts["legal_ranks"] == [1, 2, 3, 4, 6, 8, 12, 24]
    assert {row["stage"] for row in facts["memory"]} == {0, 1, 2, 3}
    assert facts["saving"]["lead"]["seconds"] > 0


@pytest.fixture
def data(tmp_path: Path) -> Path:
    hashes = ["0" * 64] * 3
    shards = tuple(ShardEntry(f"s{i}.tar", 100, 10_000_000, *hashes) for i in range(6))
    Manifest(shards, {}).write(tmp_path)
    return tmp_path


def test_real_data_are_dealt(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    page = told(
        capsys, ["plan", "demo", "--nodes", "1", "--gpus-per-node", "2", "--gpu", "cpu", f"data.path={data}"]
    )
    assert "600 samples in 6 shards, 60.0 MB; 12 streams, 6 per rank" in page
    assert re.search(r"^samples of a rank +300 +300 +300 +1\.000$", page, re.M)
    assert "a stream reads from at most 6 shards at a time; a node's streams from 60.0 MB of shards" in page
    assert "Memory of one rank, GB" in page
    assert re.search(r"^teacher .*live, embedding width 128$", page, re.M)


def test_a_run_before_gives_the_pace(capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "events.jsonl").write_text(
        '{"event": "start", "ranks": 2}\n{"event": "save", "seconds": 3.0, "blocked_s": 0.5}\n'
    )
    (earlier / "metrics.jsonl").write_text('{"step": 10, "slots": 960, "samples_per_s": 48.0}\n')
    job = [
        "plan",
        "demo",
        "--nodes",
        "2",
        "--gpus-per-node",
        "2",
        f"data.path={data}",
        "batch.micro_batch=24",
    ]
    page = told(capsys, [*job, "--from-run", str(earlier)])
    assert (
        "pace        96 samples/s, 1 s per step (by --from-run: 48 samples/s on 2 ranks, in proportion)"
        in page
    )
    assert "a save      steps wait 0.5 s, written after 3 s: as --from-run measured" in page
    assert (
        "lead        a signal at least 8 s before the time limit: 2 x the longest of the last saves" in page
    )  # 2 x 3 s + 2 s


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A pretraining run of the demo recipe, with a pace."""
    folder = tmp_path / "earlier"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_yaml(load_config("demo", ["data.path=x"])))
    (folder / "metrics.jsonl").write_text('{"step": 10, "slots": 960, "samples_per_s": 48.0}\n')
    return folder


def test_the_pace_of_another_kind_of_run_is_refused_and_of_other_settings_marked(
    capsys: pytest.CaptureFixture[str], data: Path, earlier: Path
) -> None:
    job = ["--nodes", "1", "--gpus-per-node", "2", "--from-run", str(earlier)]
    line = refused(capsys, ["plan", "finetune", "--samples", "1000", *job])
    assert f"--from-run={earlier}: is a pretraining run, and this plan is for a fine-tuning run; give" in line
    same = ["plan", "demo", f"data.path={data}", *job]
    assert "--from-run=" not in told(capsys, same)
    page = " ".join(told(capsys, [*same, "model.image_size=64", "batch.micro_batch=24"]).split())
    there = load_config("demo", ["data.path=x"])
    for name, value, here in (
        ("model.image_size", there.model.image_size, 64),
        ("batch.micro_batch", there.batch.micro_batch, 24),
    ):
        assert f"{name}={value} (here {here})" in page
    assert "the pace may not hold here; --samples-per-s states it" in page


@pytest.mark.parametrize(
    ("recipe", "arguments", "words"),
    [
        (
            "finetune",
            ["model.init_from=nowhere"],
            "model.init_from=nowhere: no such file or folder; give a release",
        ),
        ("finetune", ["model.init_from=."], "model.init_from=.: holds no weights; give a folder in timm's"),
        ("finetune", ["model.init_from=nowhere", "--samples", "9"], "model.init_from=nowhere: no such file"),
        ("demo", ["model.init_from=nowhere"], "model.init_from=nowhere: no such file or folder"),
        ("demo", ["data.eval_path=nowhere"], "data.eval_path=nowhere: no such folder"),
        ("demo", ["teacher.name=local-dir:nowhere"], "teacher.name=local-dir:nowhere: no such folder"),
        ("demo", ["teacher.name=local-dir:."], "teacher.name=local-dir:.: . lacks open_clip_config.json"),
    ],
)
def test_a_path_that_the_run_would_refuse_is_refused(
    capsys: pytest.CaptureFixture[str],
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    recipe: str,
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    job = ["plan", recipe, "--nodes", "1", "--gpus-per-node", "2", f"data.path={data}"]
    assert words in refused(capsys, [*job, *arguments])


def test_on_a_cpu_the_plan_names_the_values_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    page = told(
        capsys, ["plan", "demo", "--nodes", "1", "--gpus-per-node", "2", "--samples", "1251", "--gpu", "cpu"]
    )
    flat = " ".join(page.split())
    assert "--gpu=cpu: the table has no memory of CPUs; give --gpu-memory GB" in flat
    assert "--gpu=cpu: the table has peaks of GPUs only; give --samples-per-s, --from-run RUN or" in flat
    assert "or a GPU: b200, h100-pcie" in flat
    assert "give --gpu or" not in flat


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpu", "h1000"], "--gpu=h1000: not in the table; nearest: h100"),
        (
            ["--mfu", "0.4", "--samples-per-s", "5"],
            "--mfu and --samples-per-s: each states the pace; give one of them",
        ),
        (["--mfu", "0.4", "--from-run", "x"], "--mfu and --from-run: each states the pace"),
        (["--from-run", "nowhere"], "--from-run=nowhere: no such folder; give run.dir/run.name"),
        (["--mfu", "1.5"], "1.5: must be a number above 0 and at most 1"),
        (["--network", "nan"], "nan: must be a number above 0"),
        (
            ["--mfu", "0.4", "--gpu", "cpu"],
            "--mfu=0.4: the peak of cpu in fp32 is not known; set compute.peak_tflops",
        ),
        (
            ["data.path=nowhere"],
            "data.path=nowhere: no such folder; build it with `uniemox shards pack`; or give --sam",
        ),
        (["zero.stage=7"], "zero.stage=7"),
        (["batch.micro_batch=7"], "batch.micro_batch=7 does not divide batch.global_batch=96"),
    ],
)
def test_a_user_error_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    without = any(word.startswith("data.path") for word in arguments)
    samples = [] if without else ["--samples", "1000"]
    job = ["plan", "demo", "--nodes", "1", "--gpus-per-node", "2", *samples]
    assert words in refused(capsys, [*job, *arguments])


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (["--nodes", "0", "--gpus-per-node", "8"], "'--nodes': 0 is not in the range x>=1"),
        (["--nodes", "2"], "Missing option '--gpus-per-node'"),
        (
            ["--nodes", "512", "--gpus-per-node", "8"],
            "4096 ranks are more than batch.streams=96, and each needs a stream of its own; use at most 24 ranks, or "
            "set batch.streams=4096 batch.global_batch=131072",
        ),
    ],
)
def test_a_job_that_cannot_be(capsys: pytest.CaptureFixture[str], job: list[str], words: str) -> None:
    assert words in refused(capsys, ["plan", "uniemox_vit_l16", *job])


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from uniemox_dist.cli.main import run; "
        f"code = run({[*LARGE]!r}) or run(['plan', '--help']); "
        "print(sorted({'torch', 'deepspeed', 'timm', 'open_clip'} & set(sys.modules)), code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"
