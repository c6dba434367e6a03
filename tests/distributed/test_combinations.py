"""ZeRO stages, ranks, accumulation, compilation and activation checkpointing together: they change how a step is
computed, and not what it computes."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ranks import TINY, events, largest_difference, losses, run_ranks
from safetensors.torch import load_file

from uniemox_dist.checkpoints.folders import list_complete_checkpoints
from uniemox_dist.checkpoints.format import FragmentReader
from uniemox_dist.core.errors import UserError
from uniemox_dist.release.export import release

STEPS = 10
DECAY = 0.6
LAYERS = ("optim.layer_decay=0.6",)


def train(
    tmp_path: Path,
    data: Path,
    teacher: Path,
    name: str,
    *more: str,
    world_size: int = 1,
    steps: int = STEPS,
    kill_when: Callable[[], bool] | None = None,
) -> Path:
    settings = (
        f"run.dir={tmp_path}",
        f"run.name={name}",
        f"run.max_steps={steps}",
        f"data.path={data / 'train'}",
        "data.eval_path=null",
        f"teacher.name=local-dir:{teacher}",
        "optim.blr=4e-3",
        "optim.clip_grad=1",
    )
    codes = run_ranks([*TINY, *settings, *more], world_size=world_size, kill_when=kill_when)
    assert codes == ([] if kill_when else [0] * world_size)
    return tmp_path / name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_teacher: Path) -> dict[str, Path]:
    """One process, one micro-batch, nothing switched on; and the same with layer decay."""
    folder = tmp_path_factory.mktemp("plain")
    whole = "batch.micro_batch=24"
    return {
        "equal rates": train(folder, tiny_data, tiny_teacher, "equal", whole),
        "layer decay": train(folder, tiny_data, tiny_teacher, "layers", whole, *LAYERS),
    }


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> pytest.MonkeyPatch:  # type: ignore[misc]
    """One cache of compiled code for all runs, outside of the repository."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield patch


@pytest.mark.parametrize(
    ("stage", "ranks", "accumulation", "compiles", "checkpoints", "rates"),
    [
        (0, 2, 2, False, True, "equal rates"),
        (0, 1, 2, False, False, "layer decay"),
        pytest.param(1, 2, 2, True, False, "equal rates", marks=pytest.mark.slow),
        (1, 2, 1, False, True, "layer decay"),
        (2, 2, 2, False, True, "equal rates"),
        (3, 2, 2, False, True, "layer decay"),
        pytest.param(3, 2, 1, True, False, "equal rates", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, True, True, "layer decay", marks=pytest.mark.slow),
        pytest.param(3, 2, 2, True, True, "layer decay", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_one_plain_process(
    tmp_path: Path,
    plain: dict[str, Path],
    tiny_data: Path,
    tiny_teacher: Path,
    stage: int,
    ranks: int,
    accumulation: int,
    compiles: bool,
    checkpoints: bool,
    rates: str,
) -> None:
    run = train(
        tmp_path,
        tiny_data,
        tiny_teacher,
        "run",
        f"zero.stage={stage}",
        f"batch.micro_batch={24 // ranks // accumulation}",
        f"compute.compile={str(compiles).lower()}",
        f"compute.checkpoint_blocks={str(checkpoints).lower()}",
        *(LAYERS if rates == "layer decay" else ()),
        world_size=ranks,
    )
    assert largest_difference(losses(plain[rates]), losses(run)) < 1e-5


@pytest.mark.slow
def test_a_killed_run_finds_its_compiled_code_again(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    run, settings = tmp_path / "run", ("batch.micro_batch=6", "compute.compile=true", "run.save_every=2")

    def saved() -> bool:
        return bool(list_complete_checkpoints(run / "checkpoints"))

    train(tmp_path, tiny_data, tiny_teacher, "run", *settings, world_size=2, steps=5000, kill_when=saved)
    [cache] = set(re.findall(r"compiled code is kept in (.+)", (run / "logs/rank0.log").read_text()))
    assert Path(cache).stat().st_mode & 0o077 == 0
    before = {path for path in Path(cache).rglob("*") if path.is_file()}
    assert any(path.suffix == ".so" for path in before)
    step = list_complete_checkpoints(run / "checkpoints")[-1].step
    train(tmp_path, tiny_data, tiny_teacher, "run", *settings, world_size=2, steps=step + 1)
    assert [event["step"] for event in events(run, "resume")] == [step]
    assert {path for path in Path(cache).rglob("*") if path.is_file()} == before


def test_layer_decay_changes_the_run(plain: dict[str, Path]) -> None:
    assert largest_difference(losses(plain["equal rates"]), losses(plain["layer decay"])) > 1e-4


@pytest.mark.parametrize(("stage", "ranks"), [(0, 2), (1, 2), (3, 3)])
def test_the_moving_average_is_that_of_the_saved_weights_and_is_resumed_by_any_other_layout(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, stage: int, ranks: int
) -> None:
    keep = ("run.save_every=1", "run.keep_last=99", f"optim.ema_decay={DECAY}", "optim.min_lr=1e-4")
    constant = "optim.blr=1.0666666666666667e-3"  # times 24/256 = min_lr
    for (zero, world), steps in (((stage, ranks), 3), ((1, 1), 5)):
        run = train(
            tmp_path,
            tiny_data,
            tiny_teacher,
            "run",
            *keep,
            constant,
            f"zero.stage={zero}",
            f"batch.micro_batch={24 // world}",
            world_size=world,
            steps=steps,
        )
    saved = list_complete_checkpoints(run / "checkpoints")
    assert [checkpoint.step for checkpoint in saved] == [1, 2, 3, 4, 5]
    name = "encoder.blocks.1.attn.qkv.weight"
    weights = [FragmentReader(checkpoint).parameter(name) for checkpoint in saved]
    averages = [FragmentReader(checkpoint).parameter(name, "ema") for checkpoint in saved]
    for n in range(2, 6):
        decay = min(DECAY, (1 + n) / (10 + n))
        expected = decay * averages[n - 2] + (1 - decay) * weights[n - 1]
        torch.testing.assert_close(averages[n - 1], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(averages[-1], weights[-1])
    out = release(run, tmp_path / "out", ema=True)
    assert out["weights"] == "moving average"
    released = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(released[name.removeprefix("encoder.")], averages[-1])
    assert "moving average of the encoder, decay 0.6" in (tmp_path / "out/README.md").read_text()
    with_average = {name for name, cuts in saved[-1].info["fragments"].items() if "ema" in " ".join(cuts)}
    assert with_average
    assert not any("decoder" in name for name in with_average)


def test_a_run_without_an_average_can_be_given_one(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    settings = ("batch.micro_batch=24", "run.save_every=1", "run.keep_last=9")
    train(tmp_path, tiny_data, tiny_teacher, "run", *settings, steps=2)
    run = train(tmp_path, tiny_data, tiny_teacher, "run", *settings, "optim.ema_decay=0.5", steps=3)
    assert "it starts from the weights" in (run / "logs/rank0.log").read_text()
    with pytest.raises(UserError, match=r"--ema: .*step_00000002 holds no moving average"):
        release(run / "checkpoints/step_00000002", tmp_path / "out", ema=True)
    reader = FragmentReader(list_complete_checkpoints(run / "checkpoints")[-1])
    name = "encoder.norm.weight"
    assert not torch.equal(reader.parameter(name, "ema"), reader.parameter(name))


@pytest.mark.parametrize("stage", [0, 3])
def test_drop_path_is_drawn_alike_after_a_resume(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path, stage: int
) -> None:
    settings = ("batch.micro_batch=12", "model.drop_path=0.5", "run.save_every=2", f"zero.stage={stage}")
    whole = train(tmp_path, tiny_data, tiny_teacher, "whole", *settings, world_size=2, steps=4)
    parts = shutil.copytree(whole, tmp_path / "parts")
    (parts / "checkpoints/step_00000004/complete.json").unlink()
    train(tmp_path, tiny_data, tiny_teacher, "parts", *settings, world_size=2, steps=4)
    events = [json.loads(line) for line in (parts / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [2]
    assert losses(parts) == losses(whole)


def test_drop_path_does_not_depend_on_ranks(tmp_path: Path, tiny_data: Path, tiny_teacher: Path) -> None:
    drops = ("model.drop_path=0.5", "loss.person_reconstruction=true")
    one = train(tmp_path, tiny_data, tiny_teacher, "one", "batch.micro_batch=24", *drops)
    again = ("batch.micro_batch=6", "zero.stage=2", "compute.checkpoint_blocks=true")
    two = train(tmp_path, tiny_data, tiny_teacher, "two", *again, *drops, world_size=2)
    whole = train(tmp_path, tiny_data, tiny_teacher, "whole", "batch.micro_batch=24", drops[1])
    for step, found in losses(one).items():
        assert losses(two)[step] == pytest.approx(found, rel=1e-5)
        assert losses(whole)[step] != pytest.approx(found, rel=1e-3)


def test_keys_that_deepspeed_does_not_accept_are_refused_in_one_line(
    tmp_path: Path, tiny_data: Path, tiny_teacher: Path
) -> None:
    for key, why in (("reduce_bucket_size=many", "valid integer"), ("nonsense=1", "not permitted")):
        more = ("batch.micro_batch=24", f"deepspeed.zero_optimization.{key}")
        name = key.partition("=")[0]
        with pytest.raises(AssertionError, match=rf"deepspeed=.*{name}: .*{why}.*remove these keys"):
            train(tmp_path, tiny_data, tiny_teacher, "never", *more)
    assert not (tmp_path / "never").exists()
