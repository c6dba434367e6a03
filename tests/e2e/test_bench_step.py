"""The benchmark of a step compares schedules, not different work; and it reports all of its rows."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import step_rows  # noqa: E402
from bench_step import counted, useful_flops  # noqa: E402

from uniemox_dist.models.student import Targets  # noqa: E402

SMALL = [
    "model.name=null",
    "model.width=192",
    "model.depth=4",
    "model.heads=2",
    "model.image_size=64",
    "model.decoder_width=64",
    "model.decoder_depth=2",
    "model.decoder_heads=2",
]


def options(teacher: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    step_rows.add_options(parser)
    parsed = parser.parse_args(["--micro-batch", "2"])
    return argparse.Namespace(**{**vars(parsed), "teacher_shape": f"local-dir:{teacher}", "set": SMALL})


@pytest.fixture(scope="module")
def at(tiny_teacher: Path) -> step_rows.Setting:
    return step_rows.setting(options(tiny_teacher), 0.75)


def test_on_equal_weights_and_masks_the_released_schedule_has_our_losses(at: step_rows.Setting) -> None:
    ours = at.of("a")()
    with torch.no_grad():
        total, parts = step_rows.Released(at).losses(*step_rows.orders_of(at))
    assert list(ours.parts.values()) == pytest.approx(parts.tolist(), rel=1e-5, abs=1e-6)
    assert ours.loss == pytest.approx(float(total), rel=1e-5)


def test_on_equal_weights_and_masks_the_released_schedule_has_our_gradients(at: step_rows.Setting) -> None:
    released = step_rows.Released(at)
    released.losses(*step_rows.orders_of(at))[0].backward()
    expected = {name: p.grad for name, p in released.student.named_parameters() if p.grad is not None}
    views = step_rows.make_views(at.batch)
    targets = Targets(at.teacher.embed_pictures(at.batch.scene_B3HW), at.batch.texts_BE)
    at.student.zero_grad()
    at.student(views, targets)[0].backward()
    found = {name: p.grad for name, p in at.student.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient is not None
        torch.testing.assert_close(
            gradient, expected[name], rtol=1e-3, atol=1e-6 + 1e-4 * float(gradient.abs().max())
        )


def test_cached_embeddings_give_the_losses_of_the_live_teacher(at: step_rows.Setting) -> None:
    live, cached = at.of("a")(), at.of("a'")()
    assert cached.loss == pytest.approx(live.loss, rel=1e-6)


def test_plain_mae_has_the_reconstruction_loss_and_no_other(at: step_rows.Setting) -> None:
    mae = at.of("c")()
    assert mae.parts["reconstruction"] == pytest.approx(at.of("a")().parts["reconstruction"], rel=1e-5)
    assert (mae.parts["relation"], mae.parts["similarity"]) == (0, 0)


def test_no_step_changes_the_weights_that_the_next_one_sees(at: step_rows.Setting) -> None:
    for row in step_rows.ROWS:
        step = at.of(row)
        if row == "b":  # draws its masks again
            torch.manual_seed(1)
            first = step().loss
            torch.manual_seed(1)
            assert step().loss == first
        else:
            assert step().loss == step().loss


def test_our_rows_do_exactly_their_useful_work(at: step_rows.Setting) -> None:
    for row in ("a", "a'", "c"):
        assert counted(at.of(row)) / 2 == pytest.approx(useful_flops(at, row), rel=0.02)
    assert counted(at.of("b")) / 2 > 1.1 * useful_flops(at, "b")


@pytest.mark.slow
def test_all_rows_are_printed_and_written(tmp_path: Path, tiny_teacher: Path) -> None:
    out = tmp_path / "step.json"
    command = [sys.executable, str(ROOT / "tools/bench_step.py"), *(f"--set={pair}" for pair in SMALL)]
    command += ["--micro-batch", "1", "--rounds", "1", "--mask", "0.9", "--json", str(out)]
    command += ["--teacher-shape", f"local-dir:{tiny_teacher}", "--no-peaks"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    rows = json.loads(out.read_text())["rows"]
    assert [row["row"] for row in rows] == ["a", "a'", "b", "c"]
    for row in rows:
        assert f"({row['row']})" in printed
        assert min(row["samples_per_s"], row["flops"], row["useful_flops"], row["tflops_per_s"]) > 0
    assert next(row["ratio"] for row in rows if row["row"] == "b") == 1


@pytest.mark.slow
def test_a_profile_names_the_ten_dearest_operations_and_writes_a_trace(
    tmp_path: Path, tiny_teacher: Path
) -> None:
    trace = tmp_path / "trace.json"
    command = [sys.executable, str(ROOT / "tools/profile_step.py"), *(f"--set={pair}" for pair in SMALL)]
    command += ["--micro-batch", "1", "--steps", "1", "--row", "a'", "--trace", str(trace)]
    command += ["--teacher-shape", f"local-dir:{tiny_teacher}"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    table = printed.split("calls a step\n")[1].split("\n\n")[0].splitlines()
    assert len(table) == 10
    own_ms = [float(line[58:].split()[0]) for line in table]
    assert own_ms == sorted(own_ms, reverse=True)
    assert any("aten::addmm" in line for line in table)
    assert json.loads(trace.read_text())["traceEvents"]
