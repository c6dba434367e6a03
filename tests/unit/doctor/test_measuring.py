"""Measuring on this machine: real files, real limits, and what damaged ones are called."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from uniemox_dist.checkpoints.folders import COMPLETE, FORMAT
from uniemox_dist.cli.main import run as uniemox
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import Config
from uniemox_dist.core.errors import EXIT_USER, Fault, UserError
from uniemox_dist.distributed.world import World
from uniemox_dist.doctor import collective, devices, disk, inputs, limits, memory, rate, reading
from uniemox_dist.doctor.all_checks import check_alone, describe_failed_meeting
from uniemox_dist.doctor.cgroup import Limits, read_limits
from uniemox_dist.doctor.findings import Trouble
from uniemox_dist.doctor.ranks import try_measure
from uniemox_dist.doctor.subject import Subject, count_sizes
from uniemox_dist.models.student import Student


def demo(*overrides: str) -> Config:
    return load_config("demo", overrides)


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_control_groups_of_version_2_bound_by_the_tightest_above(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "proc/self/cgroup": "0::/job/step\n",
            "sys/fs/cgroup/job/step/memory.max": "max\n",
            "sys/fs/cgroup/job/memory.max": "1000\n",
            "sys/fs/cgroup/job/memory.current": "400\n",
            "sys/fs/cgroup/job/memory.stat": "anon 1\ninactive_file 150\n",
            "sys/fs/cgroup/job/pids.max": "100\n",
            "sys/fs/cgroup/job/pids.current": "7\n",
            "sys/fs/cgroup/job/step/cpu.max": "250000 100000\n",
            "sys/fs/cgroup/job/cpu.max": "max 100000\n",
        },
    )
    assert read_limits(root) == Limits(1000, 250, 100, 7, 2.5)


def test_control_groups_of_version_1_in_a_container_that_does_not_see_the_host_path(tmp_path: Path) -> None:
    root = put(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "900\n",
            "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert read_limits(root) == Limits(2000, 800, None, 0, None)


def test_no_control_groups_are_no_limits(tmp_path: Path) -> None:
    assert read_limits(tmp_path) == Limits()
    unlimited = {
        "proc/self/cgroup": "4:memory:/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63}\n",
    }
    assert read_limits(put(tmp_path, unlimited)) == Limits()


def test_this_machine_has_memory_cores_and_files() -> None:
    facts = memory.measure(World())
    assert 0 < facts.left <= facts.available
    assert facts.own > 1 << 20
    assert devices.measure(World()).cores
    assert limits.measure(gpu=False).files > 0


def test_a_disk_is_measured_in_the_nearest_existing_folder_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step_00000010").mkdir(parents=True)
    facts = disk.measure(tmp_path / "run", 3 << 20)
    assert (facts.folder, facts.saved) == (str(tmp_path / "run"), 1)
    assert facts.written >= 3 << 20
    assert facts.seconds > 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoints"]
    assert disk.measure(tmp_path / "run/not/yet", 1000).folder == str(tmp_path / "run")
    assert not (tmp_path / "run/not").exists()


def test_a_run_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = try_measure(lambda: disk.measure(tmp_path / "file/run"))
    assert found == Trouble(f"{tmp_path}/file cannot be written (Not a directory)", disk.REMEDY)


def test_shards_are_read_and_counted(tiny_data: Path) -> None:
    facts = reading.measure("data.path", str(tiny_data / "train"), World())
    assert (facts.samples, facts.shards) == (60, 3)
    assert facts.bytes == sum(path.stat().st_size for path in (tiny_data / "train").glob("*.tar"))
    assert facts.in_a_row == (tiny_data / "train/000000.tar").stat().st_size
    assert facts.one_by_one == reading.SAMPLES
    assert facts.dropped


@pytest.mark.parametrize("damage", ["missing", "cut", "altered"])
def test_a_shard_that_differs_from_the_packed_one_is_named(
    tiny_data: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "train"
    shutil.copytree(tiny_data / "train", folder)
    tar = folder / "000001.tar"
    whole = tar.read_bytes()
    tar.unlink()
    if damage == "cut":
        tar.write_bytes(whole[:5000])
    elif damage == "altered":
        tar.write_bytes(bytes(len(whole)))
    with pytest.raises((UserError, Fault), match=r"000001\.tar"):
        reading.measure("data.path", str(folder), World())


def test_the_first_three_missing_shards_are_named(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(tiny_data / "train", folder)
    tars = sorted(folder.glob("*.tar"))
    whole = tars[1].stat().st_size
    tars[0].unlink()
    tars[1].write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        reading.measure("data.path", str(folder), World())
    assert str(caught.value) == (
        f"data.path={folder}: shard 000000.tar is missing, shard 000001.tar has 1 bytes instead of {whole}; "
        "copy them again or pack again"
    )
    assert reading._first(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_each_altered_shard_is_named(tiny_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    shutil.copytree(tiny_data / "train", folder)
    for number in (0, 2):
        tar = folder / f"00000{number}.tar"
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(Fault, match=r"000000\.tar: .*, 000002\.tar: .*; copy the shard again"):
        reading.measure("data.path", str(folder), World())


def test_findings_into_a_folder_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert uniemox(["doctor", "--json", str(tmp_path)]) == EXIT_USER
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err == (
        f"uniemox: error: --json={tmp_path}: is a folder; give a file, such as {tmp_path}/doctor.json\n"
    )


def test_a_teacher_is_known_by_its_headers(tiny_teacher: Path) -> None:
    facts = inputs.measure_teacher(demo(f"teacher.name=local-dir:{tiny_teacher}").teacher)
    assert "pictures of 32 pixels, embeddings of 32" in facts.text
    assert "tensors" in facts.text


def test_a_damaged_teacher_is_named(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(tiny_teacher, folder)
    teacher = demo(f"teacher.name=local-dir:{folder}").teacher
    weights = folder / "open_clip_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors is damaged .*copy it again"):
        inputs.measure_teacher(teacher)
    weights.write_bytes(whole)
    (folder / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="states no model_cfg"):
        inputs.measure_teacher(teacher)
    weights.unlink()
    with pytest.raises(UserError, match=r"lacks open_clip_model\.safetensors"):
        inputs.measure_teacher(teacher)


def test_cached_views_replace_a_missing_teacher(
    taught_data: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = [f"teacher.name=local-dir:{tiny_teacher}", "teacher.source=cache", "model.image_size=32"]
    config = demo(f"data.path={taught_data}", *settings)
    assert inputs.measure_cache(config, World()).text == (
        f"cached views of local-dir:{tiny_teacher} for 1 data set"
    )
    with pytest.raises(UserError, match="has no cached views; build them with"):
        inputs.measure_cache(demo(f"data.path={tiny_data}/train", *settings), World())


def test_initial_weights_of_each_layout_are_known_by_their_headers(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    weights = tiny_teacher / "open_clip_model.safetensors"
    assert "tensors" in inputs.measure_initial(weights).text
    local = tmp_path / "local"
    local.mkdir()
    shutil.copy(weights, local / "model.safetensors")
    (local / "config.json").write_text("{}")
    assert "timm's local-dir" in inputs.measure_initial(local).text
    shutil.copy(weights, local / "uniemox.safetensors")
    (local / "uniemox.json").write_text("{}")
    assert "a release" in inputs.measure_initial(local).text
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pth")
    assert "a complete archive" in inputs.measure_initial(tmp_path / "w.pth").text
    (tmp_path / "cut.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-50])
    assert "content not checked" in inputs.measure_initial(tmp_path / "cut.pth").text
    run = tmp_path / "run/checkpoints/step_00000010"
    run.mkdir(parents=True)
    (run / "part_00000.safetensors").write_bytes(b"12345")
    files = {"part_00000.safetensors": {"bytes": 5, "sha256": ""}}
    info: dict[str, object] = {"format": FORMAT, "format_version": 1, "step": 10, "files": files}
    info |= {"slots": 960, "adam_step": 10.0, "world_size": 1, "zero_stage": 1, "precision": "fp32"}
    info |= {"data_identity": "ab", "teacher": None, "embedding_width": None, "parameters": {}}
    info |= {"config": {"run": {}, "data": {}, "batch": {}, "model": {}}}
    (run / COMPLETE).write_text(json.dumps(info))
    for path in (run, tmp_path / "run"):
        assert "a checkpoint of step 10, 1 files" in inputs.measure_initial(path).text
    (run / "part_00000.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match="has 4 bytes instead of 5; give another one"):
        inputs.measure_initial(tmp_path / "run")
    with pytest.raises(UserError, match="no such file or folder"):
        inputs.measure_initial(tmp_path / "nowhere")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a rank beyond the GPUs is not fit")
def test_a_process_without_gpus_may_join_others_and_a_failure_names_the_address() -> None:
    assert check_alone(World(rank=1, size=2, local_rank=1)) == []
    found = describe_failed_meeting(RuntimeError("timed out\nat line 3"), World(1, 2, 1, "node0", 29500))
    assert (found.status, found.rank) == ("fail", 1)
    assert found.value == "timed out (ranks meet at node0:29500)"


def test_a_rate_is_measured_and_has_no_peak_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate, "SIDE", {"cpu": 64})
    monkeypatch.setattr(rate, "WARM_UP_S", 0.01)
    monkeypatch.setattr(rate, "SECONDS", 0.01)
    facts = rate.measure(torch.device("cpu"))
    assert facts.tflops > 0
    assert (facts.device, facts.peak) == ("CPU", None)
    assert rate.measure(torch.device("cpu"), 2.0).peak == 2.0


def test_contributions_of_ranks_add_up_to_the_wanted_sum_exactly() -> None:
    device = torch.device("cpu")
    total = sum(collective.make_contribution(rank, 1000, device) for rank in range(100))
    assert torch.equal(total, collective.compute_sum(100, 1000, device))
    twice = (
        total - collective.make_contribution(3, 1000, device) + collective.make_contribution(4, 1000, device)
    )
    assert not torch.equal(twice, total)  # a rank left out and another one counted twice


@pytest.mark.parametrize("ema", [0, 0.99])
def test_a_checkpoint_has_the_size_that_its_student_makes(ema: float) -> None:
    config = demo(f"optim.ema_decay={ema}")
    before = torch.random.get_rng_state()
    sizes = count_sizes(config)
    assert torch.equal(torch.random.get_rng_state(), before)
    student = Student(config.model, config.loss, 128)  # the shipped teacher's width
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    fixed = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    encoder = sum(p.numel() for p in student.encoder.parameters() if p.requires_grad)
    assert sizes.trained == trained
    assert sizes.checkpoint_bytes == 4 * (3 * trained + fixed + (encoder if ema else 0))


def test_a_recipe_names_the_inputs_and_options_override_it() -> None:
    config = demo("run.dir=there")
    subject = Subject.from_config(config)
    assert subject.run_folder == Path("there/demo")
    assert subject.data == (("data.path", "demo/shards/train"), ("data.eval_path", "demo/shards/test"))
    mixed = demo("data.path=null", "data.sources=[{path: a, weight: 1}, {path: b}]", "data.epoch_samples=9")
    assert [field for field, _ in Subject.from_config(mixed).data] == [
        "data.sources.0.path",
        "data.sources.1.path",
        "data.eval_path",
    ]
    given = Subject.from_config(config, Path("x"), ["y", "z"])
    assert (given.run_folder, given.data) == (Path("x"), (("--data", "y"), ("--data", "z")))
