"""Runs that start from other weights: every rank has them, and what was fixed outlives the file that it came from."""

import json
from pathlib import Path

import mae
import pytest
import torch
from ranks import TINY, largest_difference, losses, run_ranks

from uniemox_dist.checkpoints.folders import COMPLETE, FIXED, list_complete_checkpoints, open_checkpoint
from uniemox_dist.checkpoints.format import FragmentReader, read_fixed_tensors
from uniemox_dist.release.export import load_student, release

# Another grid and patch size than the run's, so that the tables of positions and the projection are resampled.
SHAPE = mae.Shape(patch=16, side=3, heads=2, decoder_width=32, decoder_depth=1)
STEPS = 4


def train(folder: Path, name: str, data: Path, teacher: Path, *more: str, world_size: int = 1) -> Path:
    settings = (
        f"run.dir={folder}",
        f"run.name={name}",
        f"run.max_steps={STEPS}",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
        f"batch.micro_batch={24 // world_size}",
        "run.save_every=1",
        "run.keep_last=99",
        *more,
    )
    assert run_ranks([*TINY, *settings], world_size=world_size) == [0] * world_size
    return folder / name


def forget(run: Path, after: int) -> None:
    """Simulates a kill while the run saved step `after` + 1."""
    for checkpoint in list_complete_checkpoints(run / "checkpoints"):
        if checkpoint.step > after:
            (checkpoint.folder / COMPLETE).unlink()


def events(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> Path:
    """An uninterrupted run on one rank, from a file beside it."""
    folder = tmp_path_factory.mktemp("whole")
    mae.save(folder / "mae.pth", SHAPE)
    return train(folder, "run", tiny_data, tiny_teacher, f"model.init_from={folder / 'mae.pth'}")


def test_a_run_records_the_weights_that_it_started_from(whole: Path) -> None:
    init = next(e for e in events(whole) if e["event"] == "init")
    assert init["init_from"] == str(whole.parent / "mae.pth")
    assert init["resampled"] == {
        "encoder.pos_embed": "3x3 -> 4x4",
        "encoder.patch_embed.proj.weight": "16x16 -> 8x8",
        "decoder.pos_embed": "3x3 -> 4x4",
    }
    log = (whole / "logs" / "rank0.log").read_text()
    assert "its learned positions stay fixed (model.positions=fixed)" in log
    assert "missing: fusion (5), decoder.prediction.weight, decoder.prediction.bias" in log


def test_a_run_resumes_exactly_without_the_file_it_started_from(
    tmp_path: Path, whole: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    mae.save(tmp_path / "mae.pth", SHAPE)
    settings = (f"model.init_from={tmp_path / 'mae.pth'}", "zero.stage=3")
    run = train(tmp_path, "run", tiny_data, tiny_teacher, *settings, world_size=2)
    before = losses(run)
    assert largest_difference(losses(whole), before) < 1e-5  # every rank had the file's weights
    wanted = open_checkpoint(run, "RUN")
    expected = {name: FragmentReader(wanted).parameter(name) for name in FragmentReader(wanted).shapes}
    fixed = read_fixed_tensors(wanted)
    assert fixed.keys() == {"encoder.pos_embed", "decoder.pos_embed"}
    forget(run, after=2)
    (tmp_path / "mae.pth").unlink()
    train(tmp_path, "run", tiny_data, tiny_teacher, *settings, world_size=2)
    assert losses(run) == before
    assert [e["step"] for e in events(run) if e["event"] == "resume"] == [2]
    found = open_checkpoint(run, "RUN")
    assert all(torch.equal(FragmentReader(found).parameter(name), expected[name]) for name in expected)
    assert all(torch.equal(read_fixed_tensors(found)[name], fixed[name]) for name in fixed)


def test_a_resumed_run_may_name_another_init_from_which_is_not_read(
    tmp_path: Path, whole: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    mae.save(tmp_path / "mae.pth", SHAPE)
    run = train(tmp_path, "run", tiny_data, tiny_teacher, f"model.init_from={tmp_path / 'mae.pth'}")
    forget(run, after=2)
    train(tmp_path, "run", tiny_data, tiny_teacher, f"model.init_from={tmp_path / 'nowhere.pth'}")
    assert losses(run) == losses(whole)


def test_a_release_of_such_a_run_has_its_positions_in_full_precision(
    tmp_path: Path, whole: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    source = f"model.init_from={whole.parent / 'mae.pth'}"
    rough = train(tmp_path, "rough", tiny_data, tiny_teacher, source, "optim.precision=bf16")
    tables = [read_fixed_tensors(open_checkpoint(run, "RUN")) for run in (whole, rough)]
    for name, table in tables[0].items():
        assert torch.equal(tables[1][name], table)
        assert not torch.equal(table, table.bfloat16().float())
    release(rough, tmp_path / "release")
    student = load_student(open_checkpoint(rough, "RUN"))
    assert torch.equal(student.encoder.state_dict()["pos_embed"], tables[0]["encoder.pos_embed"])
    more = train(tmp_path, "more", tiny_data, tiny_teacher, f"model.init_from={tmp_path / 'release'}")
    init = next(e for e in events(more) if e["event"] == "init")
    assert init["missing"] == []
    assert torch.equal(
        read_fixed_tensors(open_checkpoint(more, "RUN"))["encoder.pos_embed"], tables[0]["encoder.pos_embed"]
    )


def test_a_checkpoint_without_fixed_parameters_is_resumed_as_before(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run = train(tmp_path, "run", tiny_data, tiny_teacher)
    before = losses(run)
    forget(run, after=2)
    old = open_checkpoint(run, "RUN")
    del old.info["files"][FIXED]  # earlier versions recomputed their fixed positions
    (old.folder / FIXED).unlink()
    (old.folder / COMPLETE).write_text(json.dumps(old.info))
    train(tmp_path, "run", tiny_data, tiny_teacher)
    assert losses(run) == before
    assert (open_checkpoint(run, "RUN").folder / FIXED).is_file()
