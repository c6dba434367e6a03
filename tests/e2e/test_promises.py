"""What users rely on stays: commands, options, resolved recipes, bytes of shards, losses, earlier files."""

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from old_shards import rewrite_as_before
from PIL import Image
from ranks import TINY, losses, run_ranks
from skimage import data as photographs

import launch
from shards.edit.select import select
from shards.inspect.verify import verify
from shards.pack.pipeline import PackSettings, pack
from uniemox_dist.cli.main import run, uniemox
from uniemox_dist.config.load import load_config
from uniemox_dist.core.files import sha256_file
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.release.classifier import load_classifier
from uniemox_dist.release.load import load_encoder, load_uniemox

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = (
    *("model.patch_size=8", "model.width=16", "model.depth=1", "model.decoder_width=16"),
    *("batch.micro_batch=24", "data.eval_path=null", "teacher.name=shipped:demo", "run.save_every=2"),
)
LOSSES = {
    1: (4.177987575531006, 0.2702159285545349, 0.9519669413566589, 2.9558048248291016),
    2: (3.7626218795776367, 0.08022593706846237, 0.8815768361091614, 2.800819158554077),
    3: (3.9237799644470215, 0.04978112503886223, 0.8589386343955994, 3.0150601863861084),
    4: (3.700441598892212, 0.036582063883543015, 0.8336965441703796, 2.83016300201416),
}
"""Total, relation, similarity and reconstruction by step, of the run whose checkpoint is in golden/."""
TARS = {
    "train/000000.tar": "2a8b4790070a5ec07d72561712649fc574d6bd1e296f8ac1acce5738c078f488",
    "train/000004.tar": "be3248959f6eb851881525e0eb8285026113dcccf90180338aefd945a1765c42",
    "test/000001.tar": "dceaa0da81d7906e79799f45279c2bed4a907594ad4234e56265edeb1fd0a34f",
}
"""SHA-256 of shards of today's form."""
TARS_BEFORE = {
    "train/000000.tar": "af07a974158e77b25cffe413d2f9ef5f89d33979fc0752d58f7e867476e7bad3",
    "train/000004.tar": "e55bfa6a1f108e46b261d57dc49ea975d91925cc025f176dad9121c44c02a4ba",
    "test/000001.tar": "c6fc0d6fc196f8175c991e19df90713df441c0db57ae370cf84263be0b06bccd",
}
FEATURES = (-2.049185, -1.319528, 0.931327, 0.273876, 1.232687, 1.520209, 0.292899, -0.477418)
GAMMA = (0.147592, 0.005573, 0.040567, 0.019776, -0.009029, -0.053792, 0.040231, -0.053433)


def options(command: click.Command, context: click.Context, path: str) -> dict[str, list[str]]:
    """All commands below one, each with its options; arguments are counted."""
    names = [
        name for p in command.params if isinstance(p, click.Option) for name in (*p.opts, *p.secondary_opts)
    ]
    found = {path: sorted(names) + ["ARGUMENT"] * sum(isinstance(p, click.Argument) for p in command.params)}
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found |= options(inner, click.Context(inner, info_name=name, parent=context), f"{path} {name}")
    return found


def test_no_command_and_no_option_was_removed() -> None:
    before = json.loads((GOLDEN / "options.json").read_text())
    now = options(uniemox, click.Context(uniemox, info_name="uniemox"), "uniemox")
    assert before.keys() <= now.keys()
    gone = {command: sorted(set(names) - set(now[command])) for command, names in before.items()}
    assert {command: names for command, names in gone.items() if names} == {}


def test_every_recipe_resolves_to_its_recorded_configuration() -> None:
    recipes = yaml.safe_load((GOLDEN / "recipes.yaml").read_text())
    shipped = {path.stem for path in (Path(launch.__file__).parent / "recipes").glob("*.yaml")}
    assert recipes.keys() <= shipped

    def kept(before: Any, now: Any) -> Any:
        """Today's values of the recorded configuration keys."""
        if not isinstance(before, dict):
            return now
        return {key: kept(value, now.get(key)) for key, value in before.items()}

    for name, before in recipes.items():
        now = load_config(name, []).model_dump(mode="json")
        assert kept(before, now) == before, name


def test_shards_have_the_same_bytes(emoji_shards: Path) -> None:
    assert {name: sha256_file(emoji_shards / name) for name in TARS} == TARS


@pytest.fixture(scope="module")
def shards_of_before(emoji_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`emoji_shards` in version 1 of the format, in which the checkpoint of golden/ was trained."""
    folder = tmp_path_factory.mktemp("before")
    for name in ("train", "test"):
        rewrite_as_before(emoji_shards / name, folder / name)
    return folder


def test_shards_of_the_first_form_hold_the_same_samples(emoji_shards: Path, shards_of_before: Path) -> None:
    """Hugging Face `datasets` needs one extension and one type for each field, hence the other bytes of today."""
    assert {name: sha256_file(shards_of_before / name) for name in TARS_BEFORE} == TARS_BEFORE
    assert not any(verdict.problems for verdict in verify([shards_of_before / "train"]))
    today, before = (ShardReader.from_folder(f / "train", "x") for f in (emoji_shards, shards_of_before))
    for shard, count in enumerate(today.counts):
        for row in range(count):
            assert today.record(shard, row) == before.record(shard, row)
            assert vars(today.read(shard, row)) == vars(before.read(shard, row))


def test_selecting_and_repacking_shards_of_the_first_form_gives_those_of_today(
    emoji_shards: Path, shards_of_before: Path, tmp_path: Path
) -> None:
    select(shards_of_before / "test", tmp_path / "selected")
    select(emoji_shards / "test", tmp_path / "today")
    assert sha256_file(tmp_path / "selected/000000.tar") == sha256_file(tmp_path / "today/000000.tar")
    for folder, out in ((shards_of_before, "repacked before"), (emoji_shards, "repacked today")):
        pack(PackSettings(str(folder), "wds", persons="none"), tmp_path / out)
    tars = [sha256_file(tmp_path / f"repacked {name}/train/000000.tar") for name in ("before", "today")]
    assert tars[0] == tars[1]


def settings(tmp_path: Path, shards: Path) -> list[str]:
    return [*TINY, *SMALL, f"run.dir={tmp_path}", "run.name=run", "run.max_steps=4", f"data.path={shards}/train",
            "model.decoder_depth=1"]  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_has_the_same_losses(tmp_path: Path, emoji_shards: Path, world_size: int) -> None:
    micro = f"batch.micro_batch={24 // world_size}"
    codes = run_ranks([*settings(tmp_path, emoji_shards), micro], world_size=world_size)
    assert codes == [0] * world_size
    found = losses(tmp_path / "run")
    assert found.keys() == LOSSES.keys()
    for step, expected in LOSSES.items():
        assert found[step] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_of_before_resumes_with_the_same_losses(tmp_path: Path, shards_of_before: Path) -> None:
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "run/checkpoints/step_00000002")
    # It does not state data.resize, which did not exist.
    with pytest.raises(AssertionError, match=r"data\.resize was bicubic and is bilinear"):
        run_ranks([*settings(tmp_path, shards_of_before), "data.resize=bilinear"], world_size=1)
    assert run_ranks(settings(tmp_path, shards_of_before), world_size=1) == [0]
    found = losses(tmp_path / "run")
    assert sorted(found) == [3, 4]
    for step in (3, 4):
        assert found[step] == pytest.approx(LOSSES[step], rel=1e-5)


def test_a_checkpoint_of_an_earlier_version_is_intact_and_can_be_released(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "run/checkpoints/step_00000002")
    assert run(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    assert run(["release", str(tmp_path / "run/checkpoints/step_00000002"), str(tmp_path / "out")]) == 0
    for file in ("model.safetensors", "uniemox.safetensors"):
        assert sha256_file(tmp_path / "out" / file) == sha256_file(GOLDEN / "release" / file)


def test_a_release_of_before_loads_and_gives_the_same_features() -> None:
    encoder, preprocess = load_encoder(GOLDEN / "release", verify=True)
    picture = Image.fromarray(photographs.astronaut())
    with torch.no_grad():
        features = encoder(preprocess(picture)[None])[0]
    assert features[:8].tolist() == pytest.approx(FEATURES, abs=2e-5)
    gamma = load_uniemox(GOLDEN / "release").embed(picture)
    assert torch.as_tensor(gamma).flatten()[:8].tolist() == pytest.approx(GAMMA, abs=2e-5)


def test_a_classifier_of_before_loads_and_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classifier = load_classifier(GOLDEN / "classifier")
    assert not classifier.training
    Image.fromarray(photographs.chelsea()).save(tmp_path / "chelsea.png")
    command = ["predict", str(GOLDEN / "classifier"), str(tmp_path / "chelsea.png"), "--format", "json"]
    assert run(command) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[0])
    assert {"people", "things"} <= set(json.dumps(answer).replace('"', " ").split())
