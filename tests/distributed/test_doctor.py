"""`uniemox doctor` by real processes: two gloo ranks, one rank with everything wrong, and one without torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from uniemox_dist.cli.main import run
from uniemox_dist.distributed.local_launcher import run_ranks

PREFLIGHT = """
import json, sys, time
from pathlib import Path
from uniemox_dist.config.load import load_config
from uniemox_dist.doctor import clock
from uniemox_dist.doctor.preflight import preflight
from uniemox_dist.distributed.world import World
from uniemox_dist.distributed import collectives as comm

out, *overrides = sys.argv[1:]
world = World.from_env()
device = comm.init(world, 60)
config = load_config("demo", overrides)
found = [preflight(config, world, device, Path(out))]
if world.rank == 1:
    class AnHourAhead:
        time = staticmethod(lambda: time.time() + 3600)
    clock.time = AnHourAhead
found.append(preflight(config, world, device, Path(out)))
Path(out, f"{world.rank}.json").write_text(json.dumps([[one.facts() for one in each] for each in found]))
comm.close()
"""
WITHOUT_TORCH = """
import sys

class Without:
    def __init__(self, inner):
        self.inner = inner
    def find_spec(self, name, *rest):
        gone = ("torch", "deepspeed", "timm", "safetensors", "open_clip")
        return None if name.partition(".")[0] in gone else self.inner.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.inner, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
from uniemox_dist.cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def settings(data: Path, teacher: Path) -> list[str]:
    paths = [f"data.path={data}/train", f"data.eval_path={data}/test"]
    return [*paths, f"teacher.name=local-dir:{teacher}"]


def test_two_ranks_check_everything_that_a_recipe_names(
    tiny_data: Path, tiny_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = ["demo", *settings(tiny_data, tiny_teacher), f"run.dir={tmp_path}/runs"]
    assert run(["doctor", *recipe, "--nproc", "2", "--json", f"{tmp_path}/found.json"]) == 0
    record = json.loads((tmp_path / "found.json").read_text())
    assert (record["format"], record["ranks"]) == ("uniemox-doctor", 2)
    assert record["status"] != "fail"
    values = {finding["what"]: finding["value"] for finding in record["findings"]}
    assert list(values) == [
        "versions",
        "devices",
        "cores",
        "memory",
        "/dev/shm",
        "open files",
        "processes",
        "clock",
        "collectives",
        "all_reduce",
        "links",
        "bf16 rate",
        "run folder",
        "shards",
        "teacher",
    ]
    assert values["collectives"] == "4 operations gave the exact result on all 2 ranks"
    assert "MB) take" in values["all_reduce"]
    assert f"{tiny_data}/test: 20 samples in 1 shard," in values["shards"]
    assert "embeddings of 32" in values["teacher"]
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == len(record["findings"]) + 1  # one rank reports it
    assert lines[-1].endswith(" 0 fail")
    assert not (tmp_path / "runs").exists()


def test_the_short_form_gives_all_ranks_the_same_findings_and_names_the_faulty_rank(
    tiny_data: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", PREFLIGHT, str(tmp_path), *settings(tiny_data, tiny_teacher)]
    assert run_ranks(command, 2, gpus=False) == 0
    (sound, wrong), of_rank_1 = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert [sound, wrong] == of_rank_1
    assert [one["what"] for one in sound] == [
        "versions",
        "collectives",
        "clock",
        "run folder",
        "/dev/shm",
        "open files",
        "processes",
    ]
    assert {one["status"] for one in sound} <= {"ok", "warn"}
    assert [(one["what"], one["rank"]) for one in wrong if one["status"] == "fail"] == [("clock", 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.json", "1.json"]


def test_a_check_that_hangs_ends_its_rank_with_a_line_and_its_stack() -> None:
    code = (
        "import time\nfrom uniemox_dist.doctor.ranks import limit_time\n"
        "from uniemox_dist.distributed.world import World\n"
        "with limit_time(30, 'quick', World()): pass\n"
        "with limit_time(0.1, 'all_reduce', World(rank=3, size=4)): time.sleep(60)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stdout.splitlines()
    assert line.startswith("fail  all_reduce   rank 3 on ")
    assert "still running after 0.1 s; this rank hangs" in line
    assert 'File "<string>", line 5' in result.stderr


@pytest.mark.slow
def test_all_problems_are_reported_at_once(
    tiny_data: Path, tiny_teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    clip = tmp_path / "clip"
    clip.mkdir()
    for path in tiny_teacher.iterdir():
        (clip / path.name).write_bytes(path.read_bytes()[: 1000 if path.suffix == ".safetensors" else None])
    wrong = [f"data.path={tmp_path}/nowhere", f"data.eval_path={tiny_data}/test", f"run.dir={tmp_path}/file"]
    wrong += [f"teacher.name=local-dir:{clip}", f"model.init_from={tmp_path}/nothing"]
    command = [sys.executable, "-m", "uniemox_dist.cli", "doctor", "demo", *wrong]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    fails = [line for line in result.stdout.splitlines() if line.startswith("fail")]
    assert [line.split("  ")[1].strip() for line in fails] == ["run folder", "shards", "teacher", "init_from"]
    assert "file cannot be written (Not a directory); set run.dir" in fails[0]
    assert f"data.path={tmp_path}/nowhere: no such folder; build it with" in fails[1]
    assert "open_clip_model.safetensors is damaged" in fails[2]
    assert f"model.init_from={tmp_path}/nothing: no such file or folder; give" in fails[3]
    assert all(": " in line and "rank 0 on " in line for line in fails)
    assert result.stdout.splitlines()[-1].endswith(" 4 fail")


def test_without_torch_the_doctor_runs_the_remaining_checks_and_says_so(
    tiny_data: Path, tmp_path: Path
) -> None:
    options = ["doctor", "--data", f"{tiny_data}/train", "--run-dir", f"{tmp_path}/run", "--nproc", "2"]
    command = [sys.executable, "-c", WITHOUT_TORCH, *options]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith('warn  torch        not installed; run pip install -e ".[train]" in your')
    assert [line[6:17].strip() for line in lines[1:-1]] == [
        "versions",
        "devices",
        "cores",
        "memory",
        "/dev/shm",
        "open files",
        "processes",
        "clock",
        "run folder",
        "shards",
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["data.path=x"], "data.path=x: KEY=VALUE pairs come on top of a RECIPE; name one before them"),
        (["demo", "optim.bllr=1"], "optim.bllr: unknown key; did you mean optim.blr?"),
        (["nothing"], "recipe nothing: no such file, nor a shipped recipe"),
        (["--json", "{tmp}/no/file"], "--json={tmp}/no/file: no such folder; make {tmp}/no first"),
        (["--nproc", "0"], "'--nproc': 0 is not in the range x>=1"),
    ],
)
def test_a_user_error_is_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(["doctor", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    error = capfd.readouterr().err.strip()
    assert says.format(tmp=tmp_path) in error
    assert len(error.splitlines()) == 1
