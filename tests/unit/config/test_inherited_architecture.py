"""The architecture of a fine-tuning run comes from the weights it starts from, unless the user states another."""

import json
from pathlib import Path

import pytest
import yaml

from uniemox_dist.config.load import load_config

ENCODER = {"name": None, "width": 128, "depth": 6, "heads": 4, "patch_size": 8, "mlp_ratio": 4.0}
MODEL = {**ENCODER, "image_size": 80, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "drop_path": 0.4}


@pytest.fixture(params=["release", "run", "checkpoint"])
def start(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    folder.mkdir()
    if request.param == "run":
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": MODEL}))
    else:
        name = "uniemox.json" if request.param == "release" else "complete.json"
        (folder / name).write_text(json.dumps({"config": {"model": MODEL}}))
    return folder


def model_of(*pairs: str, recipe: str = "finetune") -> dict[str, object]:
    return load_config(recipe, ["data.path=d", *pairs]).model.model_dump(mode="json")


def test_the_architecture_is_that_of_the_release_run_or_checkpoint(start: Path) -> None:
    found = model_of(f"model.init_from={start}")
    assert {key: found[key] for key in (*ENCODER, "image_size", "mean")} == {
        key: MODEL[key] for key in (*ENCODER, "image_size", "mean")
    }
    assert (found["drop_path"], found["positions"]) == (0.2, "learned")  # how to train is the recipe's


def test_a_pair_overrides_the_inherited_architecture(start: Path) -> None:
    assert model_of(f"model.init_from={start}", "model.image_size=160")["image_size"] == 160
    other = model_of(f"model.init_from={start}", "model.name=vit_small")
    assert (other["width"], other["depth"], other["patch_size"]) == (384, 12, 16)


def test_pretraining_and_other_weights_keep_the_recipes(start: Path, tmp_path: Path) -> None:
    pretrained = load_config(
        "uniemox_vit_b16", ["data.path=d", "teacher.name=shipped:demo", f"model.init_from={start}"]
    )
    assert pretrained.model.width == 768
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/uniemox.json").write_text("{")
    for place in ("mae.pth", str(tmp_path / "broken"), str(tmp_path / "none")):
        assert model_of(f"model.init_from={place}")["width"] == 1024


def test_a_resumed_run_does_not_need_the_release(tmp_path: Path) -> None:
    run, gone = tmp_path / "runs/mine", tmp_path / "gone"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump({"model": {**MODEL, "init_from": str(gone)}}))
    where = [f"run.dir={tmp_path / 'runs'}", "run.name=mine"]
    assert model_of(f"model.init_from={gone}", *where)["width"] == 128
    assert model_of("model.init_from=other", *where)["width"] == 1024
