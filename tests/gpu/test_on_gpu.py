"""The promises of training and of releases on a GPU, with NCCL and bf16. The same bodies run on a CPU, with one rank.

A test with the parameter `cuda` is skipped where there is no GPU.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from labelled_sets import labels_set, packed
from ranks import TINY, events, largest_difference, losses, run_ranks

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.checkpoints.format import FragmentReader
from uniemox_dist.inference.embed import embed
from uniemox_dist.inference.inputs import Pictures
from uniemox_dist.inference.predict import load_classifier_predictor, predict
from uniemox_dist.release.export import release
from uniemox_dist.release.load import load_encoder

STEPS = 6
BAD_STEP = 3
CLOSE = {"cpu": 1e-5, "cuda": 1e-4}
"""Largest relative difference of losses in fp32. A GPU multiplies matrices of other sizes by other kernels."""


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch.cuda.is_available() is false")
    return str(request.param)


@pytest.fixture(scope="module")
def ranks(device: str) -> int:
    """Two ranks where there are two GPUs."""
    return 1 if device == "cpu" else min(2, torch.cuda.device_count())


class Runs:
    """Runs of the tiny model in one folder, all on one kind of device."""

    def __init__(self, folder: Path, data: Path, teacher: Path, device: str, ranks: int) -> None:
        self.folder, self.data, self.teacher, self.device, self.ranks = folder, data, teacher, device, ranks

    def train(self, runs: dict[str, tuple[str, ...]], **options: Any) -> None:
        """Trains all runs, by name with their settings, one after the other in the same ranks."""
        settings = [
            (
                "demo",
                [
                    *TINY,
                    f"run.dir={self.folder}",
                    f"run.name={name}",
                    f"run.max_steps={STEPS}",
                    "run.save_every=2",
                    "run.keep_last=9",
                    f"data.path={self.data / 'train'}",
                    "data.eval_path=null",
                    f"teacher.name=local-dir:{self.teacher}",
                    "teacher.precision=fp32",
                    "optim.clip_grad=1",
                    "batch.micro_batch=12",
                    *more,
                ],
            )
            for name, more in runs.items()
        ]
        (recipe, first), *others = settings
        codes = run_ranks(
            first, recipe=recipe, more=others, world_size=self.ranks, device=self.device, **options
        )
        assert codes == [0] * self.ranks

    def losses(self, name: str) -> dict[int, tuple[float, ...]]:
        return losses(self.folder / name)

    def log(self, name: str) -> str:
        return (self.folder / name / "logs/rank0.log").read_text()


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path, device: str, ranks: int
) -> Runs:
    """`plain` (ZeRO-1), and the same training divided in other ways."""
    made = Runs(tmp_path_factory.mktemp(device), tiny_data, tiny_teacher, device, ranks)
    made.train(
        {
            "plain": (),
            "small-batches": ("batch.micro_batch=4", "zero.stage=2"),
            "sharded": ("zero.stage=3", "compute.checkpoint_blocks=true"),
        }
    )
    return made


def test_a_run_is_on_the_device_and_reports_the_time_of_its_first_step(runs: Runs) -> None:
    assert f"ZeRO-1, fp32 on {runs.device}" in runs.log("plain")
    [started] = events(runs.folder / "plain", "started")
    assert started["seconds"]["first step"] > 0


@pytest.mark.parametrize("name", ["small-batches", "sharded"])
def test_losses_do_not_depend_on_micro_batches_and_zero_stage(runs: Runs, name: str) -> None:
    assert largest_difference(runs.losses("plain"), runs.losses(name)) < CLOSE[runs.device]


def test_a_checkpoint_is_complete_finite_and_resumed_by_any_stage(runs: Runs) -> None:
    names = {"again": "zero.stage=1", "sharded-again": "zero.stage=3"}
    for name in names:
        run = shutil.copytree(runs.folder / "plain", runs.folder / name)
        for checkpoint in list_complete_checkpoints(run / "checkpoints"):
            if checkpoint.step > 2:
                (checkpoint.folder / "complete.json").unlink()  # as if killed while saving
    runs.train({name: (stage,) for name, stage in names.items()})
    for name in names:
        assert [event["step"] for event in events(runs.folder / name, "resume")] == [2]
        assert largest_difference(runs.losses("plain"), runs.losses(name)) < CLOSE[runs.device]
    if runs.device == "cpu":  # some of a GPU's sums have no fixed order
        assert runs.losses("again") == runs.losses("plain")
    found = list_complete_checkpoints(runs.folder / "again/checkpoints")
    assert [checkpoint.step for checkpoint in found] == [2, 4, 6]
    assert [checkpoint.problem(hashes=True) for checkpoint in found] == [None] * 3
    reader = FragmentReader(found[-1])
    assert all(reader.parameter(name).isfinite().all() for name in reader.shapes)


def spoil_the_third_step(rank: int) -> None:
    """Makes rank 0's loss NaN in the third step of each of several runs of STEPS steps."""
    from uniemox_dist.models.student import Student

    forward, passes = Student.forward, 0

    def changed(self: Student, *arguments: Any) -> Any:
        nonlocal passes
        passes += 1
        total, parts = forward(self, *arguments)
        return total + (math.nan if passes % STEPS == BAD_STEP else 0.0), parts

    if rank == 0:
        Student.forward = changed  # type: ignore[method-assign, assignment]


def test_a_loss_that_is_not_finite_is_skipped_in_every_precision_and_stage(runs: Runs) -> None:
    layouts = {f"bad-{stage}-{p}": (stage, p) for stage, p in ((1, "bf16"), (2, "bf16"), (0, "fp32"))}
    whole = f"batch.micro_batch={24 // runs.ranks}"
    runs.train(
        {
            name: (whole, f"zero.stage={stage}", f"optim.precision={precision}", "run.keep_last=1")
            for name, (stage, precision) in layouts.items()
        },
        prepare=spoil_the_third_step,
    )
    for name in layouts:
        folder = runs.folder / name
        skips = [(event["step"], event["where"]) for event in events(folder, "skip")]
        assert skips == [(BAD_STEP, "loss")], name
        last = list_complete_checkpoints(folder / "checkpoints")[-1]
        assert (last.step, last.info["adam_step"]) == (STEPS, STEPS - 1)
        reader = FragmentReader(last)
        assert all(reader.parameter(key).isfinite().all() for key in reader.shapes)
        assert [step for step, (loss, *_) in losses(folder).items() if math.isnan(loss)] == [BAD_STEP]


def test_compile_auto_compiles_on_a_gpu_alone_and_changes_no_loss(runs: Runs) -> None:
    runs.train({"auto": ("compute.compile=auto",)})
    assert ("compiles the passes" in runs.log("auto")) == (runs.device == "cuda")
    if runs.device == "cpu":
        assert runs.losses("auto") == runs.losses("plain")
    assert "WON'T CONVERT" not in runs.log("auto")
    assert largest_difference(runs.losses("plain"), runs.losses("auto")) < CLOSE[runs.device]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_passes_and_cuda_graphs_change_no_loss(runs: Runs, stage: int) -> None:
    if runs.device == "cpu" and stage != 2:
        pytest.skip("tests/distributed/test_combinations.py compiles the other stages on CPUs")
    names = {f"compiled-{stage}": "false", f"graphs-{stage}": "true"}
    whole = f"batch.micro_batch={24 // runs.ranks}"
    runs.train(
        {
            name: (whole, f"zero.stage={stage}", "compute.compile=true", f"compute.cuda_graphs={graphs}")
            for name, graphs in names.items()
        }
    )
    for name in names:
        assert largest_difference(runs.losses("plain"), runs.losses(name)) < CLOSE[runs.device]


@pytest.fixture(scope="module")
def released(runs: Runs) -> Path:
    release(runs.folder / "plain", runs.folder / "released")
    return runs.folder / "released"


def test_a_release_of_the_run_is_the_same_encoder_for_timm_on_the_device(runs: Runs, released: Path) -> None:
    ours, _ = load_encoder(released, verify=True)
    plain: Any = timm.create_model(f"local-dir:{released}", pretrained=True, num_classes=0).eval()
    pixels = torch.rand(3, 3, 32, 32)
    with torch.inference_mode():
        expected = ours(pixels)
        assert torch.equal(expected, plain(pixels))
        there = plain.to(runs.device)(pixels.to(runs.device)).cpu()
    torch.testing.assert_close(there, expected, rtol=1e-3, atol=1e-4)


def test_embed_gives_the_same_vectors_on_the_device(runs: Runs, released: Path, tmp_path: Path) -> None:
    rows = {}
    for device in ("cpu", runs.device):
        out = tmp_path / f"{device}-{len(rows)}.parquet"
        assert embed(str(runs.data / "test"), out, released, device=device).rows
        table = pq.read_table(out)
        rows[device] = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(rows[runs.device], rows["cpu"], rtol=1e-2, atol=1e-3)


def test_a_release_is_fine_tuned_on_the_device_and_the_classifier_predicts_there(
    runs: Runs, released: Path, tmp_path: Path
) -> None:
    splits = {
        split: dict.fromkeys(("cyan", "red"), n) for split, n in {"train": 8, "val": 2, "test": 2}.items()
    }
    data = packed(labels_set(tmp_path / "source", splits), tmp_path / "data")
    settings = [
        "run.epochs=null",
        "run.max_steps=3",
        "run.log_every=1",
        "run.preflight=false",
        "optim.warmup_epochs=null",
        "optim.warmup_steps=1",
        "optim.precision=auto",
        "batch.streams=4",
        "batch.global_batch=8",
        "batch.micro_batch=4",
        "data.workers=0",
        f"model.init_from={released}",
        f"run.dir={tmp_path}",
        "run.name=tuned",
        f"data.path={data}",
    ]
    codes = run_ranks(settings, recipe="finetune", world_size=runs.ranks, device=runs.device)
    assert codes == [0] * runs.ranks
    found = json.loads((tmp_path / "tuned/finetune.json").read_text())
    assert found["test"]["samples"] == 4
    answers = {}
    for device in ("cpu", runs.device):
        predictor = load_classifier_predictor(tmp_path / "tuned/best", device)
        answers[device] = [
            line["probabilities"] for line in predict(predictor, Pictures(str(tmp_path / "source")))
        ]
    assert len(answers["cpu"]) == 24
    for here, there in zip(answers["cpu"], answers[runs.device], strict=True):
        assert there == pytest.approx(here, abs=1e-2)
