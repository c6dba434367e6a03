"""Mistakes with names of encoders and files of weights, through the command line: one line, exit code 2."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mae
import pytest
import timm
import torch
from safetensors.torch import save_file

from uniemox_dist.cli.main import run
from uniemox_dist.core.signals import STOP_SIGNALS

SETTINGS = [
    "run.epochs=null",
    "run.max_steps=2",
    "optim.warmup_epochs=null",
    "batch.global_batch=24",
    "batch.micro_batch=24",
    "data.workers=0",
    "data.eval_path=null",
    "optim.precision=fp32",
    "loss.relation=0",
    "loss.similarity=0",
]
TINY = ["model.image_size=32", "model.width=32", "model.depth=2", "model.heads=4"]
DECODER = ["model.decoder_width=16", "model.decoder_depth=2", "model.decoder_heads=2"]
NAMED = [
    "model.width=null",
    "model.depth=null",
    "model.heads=null",
    "model.patch_size=16",
    "model.image_size=32",
]


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These runs are ranks of this very process: signals and the environment are put back."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(environment)
    for number, handler in handlers.items():
        signal.signal(number, handler)


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("code-was-run",)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    state = mae.save(folder / "good.pth", mae.Shape())
    broken = state["blocks.1.attn.proj.weight"].clone()
    broken[3, 4] = torch.nan
    torch.save({"model": {**state, "blocks.1.attn.proj.weight": broken}}, folder / "nan.pth")
    torch.save({"model": state, "hook": Code()}, folder / "code.pth")
    save_file({"conv1.weight": torch.ones(2, 2), "fc.weight": torch.ones(2)}, folder / "resnet.safetensors")
    small: Any = timm.create_model("vit_small_patch16_224", num_classes=10)
    save_file(small.state_dict(), folder / "small.safetensors")
    return folder


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["model.name=vit_smal_patch16_224", *NAMED],
            "model.name=vit_smal_patch16_224: not a vision transformer of timm; nearest: vit_small_patch16_224",
        ),
        (["model.name=vit_tiny"], "model.width=128 contradicts model.name=vit_tiny, whose width is 192"),
        (
            ["model.name=vit_tiny", *NAMED, "model.image_size=40"],
            "model.image_size=40 is not a multiple of model.patch_size=16; try 32 or 48",
        ),
        ([*TINY, "model.init_from={files}/nowhere.pth"], "nowhere.pth: no such file or folder"),
        (
            ["model.name=vit_base", *NAMED, "model.init_from={files}/small.safetensors"],
            "small.safetensors: is of another architecture: encoder.blocks.0.attn.qkv.weight is 1152x384 there and "
            "2304x768 here; it has width 384 and depth 12, set model.name=vit_small or model.width/depth",
        ),
        (
            [*TINY, "model.init_from={files}/nan.pth"],
            "nan.pth: encoder.blocks.1.attn.proj.weight has weights that are NaN or infinite",
        ),
        (
            [*TINY, "model.init_from={files}/code.pth"],
            "code.pth: holds pickled code (posix.mkdir), which is not run",
        ),
        (
            [*TINY, "model.init_from={files}/resnet.safetensors"],
            "resnet.safetensors: nothing in it matches a vision transformer in timm's or MAE's names (it has "
            "conv1.weight, fc.weight, … and no patch_embed.proj.weight)",
        ),
    ],
)
def test_a_user_error_is_one_line_and_exit_code_2(
    tmp_path: Path,
    tiny_data: Path,
    files: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    where = [f"data.path={tiny_data / 'train'}", f"run.dir={tmp_path / 'runs'}"]
    given = [setting.format(files=files) for setting in settings]
    assert run(["pretrain", "demo", *SETTINGS, *where, *DECODER, *given]) == 2
    error = capfd.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1
    assert not list((tmp_path / "runs").rglob("step_*"))
    assert not (tmp_path / "code-was-run").exists()


def test_a_user_error_is_reported_once_for_all_ranks(
    tmp_path: Path, tiny_data: Path, files: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = [f"data.path={tiny_data / 'train'}", f"run.dir={tmp_path / 'runs'}", "batch.micro_batch=12"]
    given = [*TINY, *DECODER, f"model.init_from={files / 'nan.pth'}"]
    assert run(["pretrain", "demo", "--nproc", "2", *SETTINGS, *where, *given]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("uniemox: error:")]
    assert len(lines) == 1
    assert "NaN or infinite" in lines[0]
