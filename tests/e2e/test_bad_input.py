"""A user's mistakes: one clear line on the error stream, exit code 2, and nothing half-written."""

import json
import shutil
from pathlib import Path

import pytest

from uniemox_dist.cli.main import run

DATA = "data.path={data}/train"
TEACHER = "teacher.name=local-dir:{teacher}"


@pytest.fixture
def places(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> dict[str, str]:
    return {"tmp": str(tmp_path), "data": str(tiny_data), "teacher": str(tiny_teacher)}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["optim.bllr=1"], "optim.bllr: unknown key; did you mean optim.blr?"),
        (["loss.relatoin=1"], "loss.relatoin: unknown key; did you mean loss.relation?"),
        (["batch.global_batch=100"], "batch.global_batch=100 is not a multiple of batch.streams=12; try 96"),
        (
            ["batch.micro_batch=40"],
            "batch.global_batch=96 is not a multiple of micro_batch x world_size = 40 x 2; try",
        ),
        (["data.path={tmp}/nowhere"], "data.path={tmp}/nowhere: no such folder"),
        (["data.path={tmp}"], "data.path={tmp}: has no manifest.json"),
        (["data.path={data}"], "name one of its splits: test, train"),
        (["model.mask_ratio=1"], "model.mask_ratio=1: input should be less than 1"),
        (
            ["model.image_size=100"],
            "model.image_size=100 is not a multiple of model.patch_size=8; try 96 or 104",
        ),
        (
            ["loss.relation=0", "loss.similarity=0", "loss.reconstruction=0"],
            "are all 0; switch at least one on",
        ),
        (["teacher.name=ViT-B-16"], "also needs teacher.weights, teacher.mean, teacher.std"),
        (["nonsense"], "nonsense: expected key=value"),
        (["optim.warmup_epochs=900"], "does not fit in a run of"),
    ],
)
def test_pretrain_names_the_mistake_before_any_rank_starts(
    places: dict[str, str], capfd: pytest.CaptureFixture[str], settings: list[str], says: str
) -> None:
    overrides = [s.format(**places) for s in (DATA, TEACHER, "run.dir={tmp}/runs", *settings)]
    assert run(["pretrain", "demo", "--nproc", "2", *overrides]) == 2
    error = capfd.readouterr().err.strip()
    assert says.format(**places) in error
    assert len(error.splitlines()) == 1
    assert not (Path(places["tmp"]) / "runs").exists()


def test_ranks_that_do_not_divide_the_streams(
    places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = [DATA.format(**places), "run.dir={tmp}/runs".format(**places)]
    assert run(["pretrain", "demo", "--nproc", "5", *settings]) == 2
    assert "batch.streams=12 is not a multiple of the 5 ranks; use 6 ranks" in capfd.readouterr().err


def test_a_manifest_without_samples(
    places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from shards.format.manifest import Manifest

    (tmp_path / "empty").mkdir()
    Manifest((), {}).write(tmp_path / "empty")
    assert run(["pretrain", "demo", "--nproc", "2", f"data.path={tmp_path}/empty"]) == 2
    assert "has no samples" in capfd.readouterr().err


def test_a_missing_and_a_cut_shard_are_named(
    places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(Path(places["data"]) / "train", broken)
    tar = broken / "000001.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    assert run(["pretrain", "demo", "--nproc", "2", f"data.path={broken}"]) == 2
    assert "shard 000001.tar has 5000 bytes instead of" in capfd.readouterr().err
    tar.unlink()
    assert run(["pretrain", "demo", "--nproc", "2", f"data.path={broken}"]) == 2
    assert "shard 000001.tar is missing" in capfd.readouterr().err


def test_an_unknown_recipe_lists_the_shipped_ones(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["pretrain", "uniemox_vit_b61"]) == 2
    assert "uniemox_vit_b16" in capfd.readouterr().err


def test_a_teacher_file_that_does_not_fit_its_model(
    places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    weights = f"{places['teacher']}/open_clip_model.safetensors"
    assert run(["teach", places["data"], "--teacher", "ViT-B-32", "--weights", weights]) == 2
    assert f"teacher.weights={weights}: does not fit the model ViT-B-32" in capfd.readouterr().err


def test_a_teacher_of_another_size_in_its_folder(
    places: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(places["teacher"], folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"]["width"] = 128
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert run(["teach", places["data"], "--teacher", f"local-dir:{folder}"]) == 2
    error = capfd.readouterr().err.strip()
    assert "does not fit the model" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--image-size", "64"], "--image-size: applies to views only; add --views K"),
        (["--no-flip"], "--flip: applies to views only; add --views K"),
        (["--views", "0"], "'--views': 0 is not in the range x>=1"),
        (["--views", "2", "--scene-scale", "0.5,0.2"], "--scene-scale=0.5,0.2: needs 0 < LOW <= HIGH <= 1"),
        (
            ["--views", "2", "--scene-scale", "half"],
            "--scene-scale=half: give 2 numbers separated by commas",
        ),
        (["--views", "2", "--colour-jitter", "2"], "'--colour-jitter': 2.0 is not in the range 0<=x<=1"),
        (["--views", "2", "--part", "3/2"], "--part=3/2: expected I/N with I from 1 to N"),
        (["--views", "2", "--mean", "0.5,0.5,0.5"], "its folder states weights, mean and std"),
        (
            ["--views", "2", "--teacher", "ViT-B-16", "--weights", "{tmp}/w"],
            "--teacher=ViT-B-16: an open_clip model name needs --mean R,G,B, --std R,G,B",
        ),
        (
            ["--teacher", "ViT-B-61", "--weights", "{teacher}/open_clip_model.safetensors"],
            "teacher.name=ViT-B-61: not an open_clip model; did you mean ViT-B-16",
        ),
        (["--teacher", "local-dir:{tmp}"], "lacks open_clip_config.json"),
    ],
)
def test_teach_names_the_wrong_option_and_writes_nothing(
    places: dict[str, str], capfd: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    given = [option.format(**places) for option in options]
    teacher = [] if "--teacher" in given else ["--teacher", f"local-dir:{places['teacher']}"]
    before = set(Path(places["data"]).rglob("*"))
    assert run(["teach", places["data"], *teacher, *given]) == 2
    error = capfd.readouterr().err.strip()
    assert says.format(**places) in error
    assert len(error.splitlines()) == 1
    assert set(Path(places["data"]).rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            [DATA],
            "teacher.source=cache: {data}/train: has no cached views; build them with `uniemox teach {data}/train "
            "--teacher local-dir:{teacher} --views 8 --image-size 32 --scene-scale 0.4,1`",
        ),
        (
            ["data.path={taught}", "model.image_size=40"],
            "model.image_size is 32 there and 40 here; build the views of this run with `uniemox teach {taught} ",
        ),
        (
            ["data.path={taught}", "loss.relation=0", "loss.similarity=0"],
            "teacher.source=cache: no loss needs a teacher; switch loss.relation or loss.similarity on",
        ),
    ],
)
def test_pretrain_reports_missing_views_before_any_rank_starts(
    places: dict[str, str],
    taught_data: Path,
    capfd: pytest.CaptureFixture[str],
    settings: list[str],
    says: str,
) -> None:
    places["taught"] = str(taught_data)
    overrides = [
        s.format(**places)
        for s in (TEACHER, "run.dir={tmp}/runs", "teacher.source=cache", "model.image_size=32", *settings)
    ]
    assert run(["pretrain", "demo", "--nproc", "2", *overrides]) == 2
    error = capfd.readouterr().err.strip()
    assert says.format(**places) in error
    assert len(error.splitlines()) == 1
    assert not (Path(places["tmp"]) / "runs").exists()


def test_release_of_a_run_without_a_complete_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert run(["release", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "has no complete checkpoint; let the run save one first" in capfd.readouterr().err
    assert run(["release", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_evaluating_a_folder_that_is_not_a_release_is_an_error(
    places: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["evaluate", "protocol", places["tmp"], places["data"]]) == 2
    assert "lacks uniemox.json; write it with `uniemox release RUN OUT`" in capfd.readouterr().err
