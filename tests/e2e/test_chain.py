"""The whole chain through the command line, with real ranks, real kills and a fresh process at the end."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from commands import run_with_ranks
from ranks import TINY_MODEL
from web import serve

from shards.format.manifest import read_manifest
from uniemox_dist.checkpoints.folders import list_complete_checkpoints, open_checkpoint
from uniemox_dist.cli.main import run
from uniemox_dist.release.export import load_student

UNIEMOX = [sys.executable, "-m", "uniemox_dist.cli"]
TIMEOUT_S = 240
SETTINGS = [
    "run.log_every=1",
    "optim.precision=fp32",  # `auto` is measured, and may differ between two runs on a busy machine
    "run.pictures_every=4",
    "run.save_every=2",
    "run.epochs=null",
    "run.max_steps=16",
    "optim.warmup_epochs=null",
    "optim.warmup_steps=2",
    "batch.global_batch=24",
    "batch.micro_batch=6",
    "data.workers=1",
    *TINY_MODEL,
]


def arguments(tmp: Path, name: str, data: Path, teacher: Path, *more: str) -> list[str]:
    where = [
        f"run.dir={tmp}",
        f"run.name={name}",
        f"data.path={data / 'train'}",
        f"data.eval_path={data / 'test'}",
    ]
    return [
        "pretrain",
        "demo",
        "--nproc",
        "2",
        *SETTINGS,
        *where,
        f"teacher.name=local-dir:{teacher}",
        *more,
    ]


def command(tmp: Path, name: str, data: Path, teacher: Path, *more: str) -> list[str]:
    return [*UNIEMOX, *arguments(tmp, name, data, teacher, *more)]


def losses(run: Path) -> dict[int, tuple[float, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: (x["relation"], x["similarity"], x["reconstruction"]) for x in lines}


def wait_for_step(run: Path, step: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be disturbed"
        if (run / "metrics.jsonl").exists() and step in losses(run):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    """An uninterrupted run on two ranks with a loader process each."""
    tmp = tmp_path_factory.mktemp("whole")
    subprocess.run(
        command(tmp, "run", tiny_data, tiny_teacher),
        check=True,
        timeout=TIMEOUT_S,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as the other runs have it
    )
    return tmp / "run"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, whole_run: Path) -> Path:
    """The release of `whole_run`. No test writes into it."""
    out = tmp_path_factory.mktemp("released") / "release"
    with redirect_stdout(io.StringIO()) as said:
        assert run(["release", str(whole_run), str(out)]) == 0
    assert "every tensor compared" in said.getvalue()
    return out


def test_a_run_writes_every_file_that_the_docs_promise(whole_run: Path) -> None:
    assert list(losses(whole_run)) == list(range(1, 17))
    assert [c.step for c in list_complete_checkpoints(whole_run / "checkpoints")] == [
        14,
        16,
    ]  # demo keeps two
    assert sorted(p.name for p in (whole_run / "samples").iterdir()) == [
        f"step_{n:08d}.{kind}" for n in (4, 8, 12, 16) for kind in ("json", "png")
    ]
    lines = (whole_run / "events.jsonl").read_text().splitlines()
    # A machine that does other work beside it makes stragglers.
    events = [kind for line in lines if (kind := json.loads(line)["event"]) != "straggler"]
    assert events == ["start", "started", *["save"] * 8, "end"]
    assert (whole_run / "logs" / "rank1.log").exists()
    assert any((whole_run / "tensorboard").iterdir())
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(whole_run / "tensorboard")).Reload()
    for name in ("data_wait_share", "bytes_read_per_rank", "source_samples/0", "damaged_samples"):
        assert [scalar.step for scalar in board.Scalars(f"data/{name}")] == list(range(1, 17))
    assert board.Scalars("data/source_samples/0")[-1].value == 16 * 24
    assert losses(whole_run)[16][1] < 0.7 * losses(whole_run)[1][1]


def kill(process: "subprocess.Popen[bytes]") -> None:
    """kill -9 of a launcher and its ranks."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    for pid in [int(child) for child in children.stdout.split()] + [process.pid]:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.5)  # loader processes notice that their rank has ended


def stop(start: list[str], run: Path, number: signal.Signals) -> int:
    """Starts a run that saves nothing unasked, and sends it a signal after step 3; returns the step that it saved."""
    process = subprocess.Popen([*start, "run.save_every=100"])
    wait_for_step(run, 3, process)
    process.send_signal(number)
    assert process.wait(TIMEOUT_S) == 75
    saved = list_complete_checkpoints(run / "checkpoints")
    assert len(saved) == 1
    assert 3 <= saved[0].step < 16
    return saved[0].step


# test_chaos.py stops and kills runs in `make test`.
@pytest.mark.slow
def test_stopped_and_killed_and_resumed_twice_gives_the_losses_of_an_uninterrupted_run(
    tmp_path: Path, whole_run: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    start = command(tmp_path, "run", tiny_data, tiny_teacher)
    saved = stop(start, tmp_path / "run", signal.SIGUSR2)
    process = subprocess.Popen(start, start_new_session=True)
    wait_for_step(tmp_path / "run", min(saved + 3, 15), process)
    kill(process)
    assert subprocess.run(start, timeout=TIMEOUT_S, check=False).returncode == 0
    assert losses(tmp_path / "run") == losses(whole_run)
    lines = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    first, second = [e["step"] for e in lines if e["event"] == "resume"]
    assert first == saved
    # Which save was the newest complete one depends on how far the writer had come when the kill fell.
    assert second == saved or (second in range(saved, 16) and second % 2 == 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_after_a_stop_signal_the_run_saves_exits_with_75_and_can_resume(
    tmp_path: Path, whole_run: Path, tiny_data: Path, tiny_teacher: Path, number: signal.Signals
) -> None:
    start = command(tmp_path, "run", tiny_data, tiny_teacher)
    stop(start, tmp_path / "run", number)
    assert subprocess.run(start, timeout=TIMEOUT_S, check=False).returncode == 0
    assert losses(tmp_path / "run") == losses(whole_run)


TIMM = """
import sys, torch, timm
from safetensors.torch import load_file, save_file
x = load_file(sys.argv[2])["x"]
found = []
for _ in range(2):
    encoder = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=0).eval()
    with torch.no_grad():
        found.append(encoder(x))
assert torch.equal(*found)
head = timm.create_model("local-dir:" + sys.argv[1], pretrained=True, num_classes=8)
assert head(x).shape == (len(x), 8)
assert not {"deepspeed", "webdataset", "uniemox_dist"} & {m.partition(".")[0] for m in sys.modules}
save_file({"y": found[0].contiguous()}, sys.argv[3])
"""


def test_timm_loads_the_release_in_a_fresh_process_and_gives_the_students_features(
    tmp_path: Path, whole_run: Path, released: Path
) -> None:
    from safetensors.torch import load_file, save_file

    from uniemox_dist.models.patches import normalise

    student = load_student(open_checkpoint(whole_run, "RUN"))
    pixels = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    expected = student.embed(pixels, pixels)[0]
    save_file(
        {"x": normalise(pixels, student.model.mean, student.model.std, torch.float32)},
        tmp_path / "x.safetensors",
    )
    files = [str(released), str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run(
        [sys.executable, "-c", TIMM, *files], check=True, timeout=TIMEOUT_S, env=environment, cwd=tmp_path
    )
    torch.testing.assert_close(load_file(tmp_path / "y.safetensors")["y"], expected, rtol=1e-5, atol=1e-5)
    checked = subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=released, check=False)
    assert checked.returncode == 0
    assert not [p for p in released.iterdir() if p.suffix in (".bin", ".pth", ".pt", ".pkl")]


def test_release_evaluate_and_report(
    tmp_path: Path, whole_run: Path, released: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = str(tmp_path / "evaluation.json")
    assert run(["evaluate", "protocol", str(released), str(tiny_data), "--json", evaluation]) == 0
    assert "Masked MSE" in capsys.readouterr().out
    table = json.loads((tmp_path / "evaluation.json").read_text())
    rows = {m["name"]: {r["row"]: r for r in m["rows"]} for m in table["metrics"]}
    assert {"student", "untrained", "linear interpolation"} <= rows["masked_mse"].keys()
    assert {"student", "untrained", "teacher", "colour histogram", "24x24 pixels", "chance"} <= rows[
        "retrieval_r10"
    ].keys()
    assert {"student", "untrained", "colour histogram"} <= rows["teacher_cosine"].keys()
    assert rows["masked_mse"]["student"]["high"] < rows["masked_mse"]["untrained"]["low"]
    for metric in rows.values():
        assert all(r["low"] <= r["value"] <= r["high"] for r in metric.values())
    assert table["verdict"]
    options = ["--evaluation", evaluation, "--out", str(tmp_path / "r.html")]
    assert run(["report", str(whole_run), *options]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "Masked MSE" in page
    assert all(f"Student at step {step}" in page for step in (4, 16))
    last = json.loads((whole_run / "samples" / "step_00000016.json").read_text())
    for picture in last["pictures"]:
        for side in ("student", "teacher"):
            assert len(picture[side]["nearest"]) == 3
            for line in picture[side]["nearest"]:
                assert f"{line['cosine']:.2f}".replace("-", "−") in page
                assert line["text"].split(":")[0].split("’")[0] in page


def test_a_release_is_measured_by_each_task(
    tmp_path: Path, whole_run: Path, released: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = released
    for task, baselines in (
        ("knn", "untrained,teacher,histogram,pixels"),
        ("probe", "histogram"),
        ("zeroshot", "teacher"),
        ("retrieval", "untrained,teacher"),
    ):
        found = tmp_path / f"{task}.json"
        options = ["--baselines", baselines, "--json", str(found), "--device", "cpu"]
        options += [] if task == "retrieval" else ["--confusion", str(tmp_path / f"{task}.png")]
        options += ["--labels", "smileys-emotion,people-body"] if task == "zeroshot" else []
        assert run(["evaluate", task, str(out), str(tiny_data), *options]) == 0
        result = json.loads(found.read_text())
        assert result["format"] == f"uniemox-{task}"
        assert result["data"]["test"]["samples"] == 20
        rows = set(result["rows"]) - {"most common label"}
        assert rows == {"release", *baselines.split(",")}
        if task != "retrieval":
            classes = result["rows"]["release"]["classes"]
            assert sum(row["support"] for row in classes) == 20  # each sample once
            assert (tmp_path / f"{task}.png").is_file()
    shown = whole_run / "gallery.json"
    assert run(["evaluate", "gallery", str(out), str(tiny_data / "test"), "--out", str(shown)]) == 0
    gallery = json.loads(shown.read_text())
    assert len(gallery["pictures"]) == 20
    assert gallery["zeroshot"] is None  # all have one label
    assert run(["report", str(whole_run), "--out", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg;base64,") >= 20 + 10 * 7
    shown.unlink()
    capsys.readouterr()
    for options, says in (
        (["knn", str(out), str(tiny_data), "--baselines", "magic"], "--baselines=magic: is not a baseline"),
        (["knn", str(out), str(tiny_data / "test")], "is one data set; give the folder that holds train/"),
        (
            ["zeroshot", str(out), str(tiny_data), "--baselines", "pixels"],
            "has no vectors in the texts' space",
        ),
        (["zeroshot", str(out), str(tiny_data)], "--labels: names one class only"),
        (["zeroshot", str(out), str(tiny_data), "--labels", "a,b,a"], "--labels: names a twice"),
        (
            ["probe", str(out), str(tiny_data), "--test", "train"],
            "--train=train and --test=train: are the same data set",
        ),
        (
            ["probe", str(out), str(tiny_data), "--val", "train"],
            "--train=train and --val=train: are the same data set",
        ),
        (["probe", str(out), str(tmp_path)], "/train: no such folder"),
    ):
        assert run(["evaluate", *options]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert says in lines[0]


def test_a_web_source_that_fails_ends_the_run_and_the_run_resumes_when_it_is_back(
    tmp_path: Path, whole_run: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    shards = read_manifest(tiny_data / "train").shards
    with serve(tiny_data) as web:
        start = arguments(
            tmp_path, "run", tiny_data, tiny_teacher, f"data.path={web.url}/train", "data.retry_s=2"
        )
        web.away_after = 150
        log = tmp_path / "first.log"
        assert run_with_ranks(start, log) == 1, log.read_text()
        said = log.read_text()
        faults = [line for line in said.splitlines() if "could not be read for 2 s" in line]
        assert faults, said
        assert f"data.path={web.url}/train: shard 0" in faults[0]
        assert "resume the run when the source is available again" in faults[0]
        assert "Traceback" not in said
        done = max(losses(tmp_path / "run"))
        assert 1 <= done < 16
        web.away_after = None
        web.asked.clear()
        cache = tmp_path / "cache"
        log = tmp_path / "second.log"
        again = [*start, f"data.cache_dir={cache}", "data.cache_gb=1"]
        assert run_with_ranks(again, log) == 0, log.read_text()
        assert f"cache {cache}: 1 GB; this node reads " in log.read_text()
    assert losses(tmp_path / "run") == losses(whole_run)
    # Each shard came into the node's cache once, for both ranks and all their loader processes.
    assert sorted(path.name for path in cache.glob("*.tar")) == sorted(f"{s.sha256}.tar" for s in shards)
    whole = [
        name for name, first_byte, count in web.asked if (first_byte, count) in {(0, s.bytes) for s in shards}
    ]
    assert sorted(whole) == sorted(shard.name for shard in shards)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[0].get("cache_hit_share") is None
    assert lines[-1]["cache_hit_share"] == 1.0
    assert lines[-1]["bytes_read_per_rank_max"] == 0
