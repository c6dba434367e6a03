"""Lightning's Trainer on the elastic stream, in one process. docs/elastic.md kills a run on several ranks."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from elastic_tars import open_stream, write_tars
from torch.utils.data import DataLoader, default_collate

from shards.edit.index_members import index_members
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.lightning import rescale_batches

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

pytestmark = pytest.mark.long
STEPS = 9  # of 24 samples in a pass over 210


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tars(tmp_path_factory.mktemp("tars"))
    index_members(str(folder))
    return folder


class Died(Exception):
    """Stands for the end of a process."""


class Net(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self, tars: Path, kind: str = "loader", die_at: int = -1, rescale: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tars, self.kind, self.die_at, self.rescale = tars, kind, die_at, rescale
        self.steps: dict[int, list[int]] = {}
        self.epochs: list[tuple[int, int]] = []
        self.validated: list[int] = []

    def train_dataloader(self) -> Any:
        self.stream = stream = open_stream(self.tars)
        micro_batch = 24 // self.trainer.accumulate_grad_batches
        if self.kind == "loader":
            return stream.loader(micro_batch, collate=default_collate)
        loader = DataLoader(stream, batch_sampler=stream.sampler(micro_batch))  # type: ignore[arg-type]
        return stream.track(loader, micro_batch)

    def val_dataloader(self) -> Any:
        return DataLoader([0])  # type: ignore[arg-type]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.rescale:
            rescale_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def training_step(self, batch: Any, _: int) -> Any:
        step = self.trainer.global_step
        if step == self.die_at:
            raise Died
        self.steps.setdefault(step, []).extend(batch.tolist())
        self.epochs.append((step, self.trainer.current_epoch))
        return self.weight.sum()

    def validation_step(self, *_: Any) -> None:
        self.validated.append(self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train(
    net: Net,
    folder: Path,
    *,
    resume: Path | None = None,
    accumulate: int = 1,
    epochs: int = 2,
    **options: Any,
) -> Net:
    mid_epoch = {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"}
    callback = options.pop("callback", None) or ModelCheckpoint(folder, **mid_epoch)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[callback],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if net.die_at < 0:
            trainer.fit(net, ckpt_path=resume)
        else:
            with pytest.raises(Died):
                trainer.fit(net, ckpt_path=resume)
    return net


@pytest.fixture(scope="module")
def whole(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """The samples of each step of an undisturbed run of two epochs."""
    net = train(Net(tars), tmp_path_factory.mktemp("whole"))
    assert net.epochs == [(step, step // STEPS) for step in range(2 * STEPS)]
    assert net.validated == [STEPS, 2 * STEPS]
    assert len({number for step in range(STEPS) for number in net.steps[step]}) == 210
    assert net.stream.state_dict()["samples"] == 2 * STEPS * 24
    return net.steps


@pytest.mark.parametrize("saved", [1, 5, STEPS, STEPS + 4])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 4), (4, 2)])
def test_a_run_goes_on_at_any_step_with_other_micro_batches(
    saved: int, before: int, after: int, tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    first = train(Net(tars, die_at=saved), tmp_path, accumulate=before)
    net = train(Net(tars), tmp_path, accumulate=after, resume=tmp_path / f"step={saved}.ckpt")
    assert {**first.steps, **net.steps} == whole
    assert min(net.steps) == saved
    assert [epoch for _, epoch in net.epochs] == [step // STEPS for step, _ in net.epochs]
    assert net.validated == [step for step in (STEPS, 2 * STEPS) if step > saved]


def test_a_loader_of_torch_that_is_tracked_goes_on_too(
    tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    first = train(Net(tars, "tracked", die_at=5), tmp_path, accumulate=2)
    net = train(Net(tars, "tracked"), tmp_path, accumulate=2, resume=tmp_path / "step=5.ckpt")
    assert {**first.steps, **net.steps} == whole


def test_a_checkpoint_of_the_end_of_an_epoch_goes_on_with_the_next(
    tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    callback = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
    first = train(Net(tars, die_at=STEPS + 1), tmp_path, callback=callback)
    net = train(Net(tars), tmp_path, accumulate=2, resume=tmp_path / "end.ckpt")
    assert {**first.steps, **net.steps} == whole
    assert min(net.steps) == STEPS


@pytest.mark.parametrize(
    "options",
    [
        {"epochs": -1, "max_steps": 2 * STEPS},
        {"reload_dataloaders_every_n_epochs": 1},
        {"val_check_interval": 4},
    ],
    ids=["max_steps", "reloaded", "validated within"],
)
@pytest.mark.parametrize("saved", [4, STEPS, STEPS + 4])
def test_other_settings_of_the_trainer_go_on_too(
    saved: int, options: dict[str, Any], tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    first = train(Net(tars, die_at=saved), tmp_path, **options)
    net = train(Net(tars), tmp_path, resume=tmp_path / f"step={saved}.ckpt", **options)
    assert {**first.steps, **net.steps} == whole
    assert min(net.steps) == saved


def test_a_checkpoint_of_a_validation_within_a_pass_goes_on(
    tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)

    first = train(Net(tars, die_at=STEPS + 6), tmp_path, callback=saver(), val_check_interval=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=13.ckpt", "step=4.ckpt", "step=8.ckpt"]
    for saved in (4, 8, 13):
        resume = tmp_path / f"step={saved}.ckpt"
        net = train(Net(tars), tmp_path / "more", callback=saver(), val_check_interval=4, resume=resume)
        assert {**first.steps, **net.steps} == whole
        assert min(net.steps) == saved


@pytest.mark.parametrize("name", ["limit_train_batches", "overfit_batches"])
def test_a_limit_trains_the_first_batches_of_every_pass(
    name: str, tars: Path, whole: dict[int, list[int]], tmp_path: Path
) -> None:
    net = train(Net(tars), tmp_path, **{name: 4})
    assert list(net.steps.values()) == [whole[step] for step in (0, 1, 2, 3, 9, 10, 11, 12)]


def test_other_micro_batches_without_rescaling_are_refused(tars: Path, tmp_path: Path) -> None:
    train(Net(tars, die_at=5), tmp_path, accumulate=2)
    with pytest.raises(UserError, match=r"^micro_batch=24: a step has 1 micro-batch here and had 2 where"):
        train(Net(tars, rescale=False), tmp_path, resume=tmp_path / "step=5.ckpt")


def test_checkpoints_that_cannot_be_rescaled_are_named() -> None:
    counts = {"ready": 3, "started": 3, "processed": 3, "completed": 2}
    loop = {
        "state_dict": {"combined_loader": [{"accumulate": 2}]},
        "epoch_loop.batch_progress": {"total": dict(counts), "current": dict(counts)},
    }
    with pytest.raises(
        UserError, match=r"^checkpoint: was written within a step, after 3 batches of 2 in a step"
    ):
        rescale_batches({"loops": {"fit_loop": loop}}, 1)
    for strange in ({}, {"loops": {"fit_loop": {"state_dict": {"combined_loader": [{"position": 1}]}}}}):
        with pytest.raises(UserError, match=r"^checkpoint: has no state of a loader of ElasticShards"):
            rescale_batches(strange, 1)
