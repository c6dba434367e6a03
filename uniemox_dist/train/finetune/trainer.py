"""A fine-tuning run: its step, validation, the best weights, an early end, and the test."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from uniemox_dist.checkpoints.folders import find_checkpoint, step_folder
from uniemox_dist.checkpoints.run_state import RunState
from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.core.errors import UserError
from uniemox_dist.core.files import write_json
from uniemox_dist.data.labels import LabelledReader
from uniemox_dist.data.loader import MicroBatch
from uniemox_dist.data.splits import Splits
from uniemox_dist.distributed import collectives
from uniemox_dist.evaluate import metrics
from uniemox_dist.models.classifier import Outputs
from uniemox_dist.release.classifier import load_classifier, read_classifier, write_classifier
from uniemox_dist.train.checkpoint_policy import CheckpointPolicy
from uniemox_dist.train.engine import find_clip_grad
from uniemox_dist.train.finetune.validation import KL, Validations, append_validation, predict_split
from uniemox_dist.train.monitor.metrics import Metrics
from uniemox_dist.train.monitor.stragglers import ComputeTimer
from uniemox_dist.train.step import RankStatus, StepResult, set_drop_paths, update_weights
from uniemox_dist.train.trainer import Expect, Trainer

log = logging.getLogger("uniemox")
BEST, RESULT = "best", "finetune.json"
METRICS = {
    ("single", "label"): "accuracy",
    ("single", "distribution"): KL,
    ("single", "dimensions"): "mean_ccc",
    ("multi", "label"): "mean_average_precision",
}
"""The metric that chooses the best weights, by task and target."""


@dataclass(kw_only=True)
class FinetuneTrainer(Trainer):
    """A fine-tuning run."""

    config: FinetuneRun
    splits: Splits
    outputs: Outputs
    validations: Validations

    def describe_teacher(self) -> str:
        return "none"

    def run_state(self, step: int) -> RunState:
        return RunState(step, self.config, self.sources.identity, self.precision, None, None)

    def train_step(
        self, batches: Sequence[MicroBatch], step: int, lr: float, status: RankStatus, timer: ComputeTimer
    ) -> StepResult:
        engine, persons = self.engine, self.outputs.persons

        def compute_loss(batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
            set_drop_paths(engine, batch)
            person_B3HW = batch.person_B3HW if persons else None
            total, terms = engine(batch.scene_B3HW, person_B3HW, batch.targets_BC)
            return total, terms[: len(self._term_names())]

        return update_weights(
            engine,
            compute_loss,
            batches,
            self.world,
            lr=lr,
            term_names=self._term_names(),
            clip_grad=find_clip_grad(self.config),
            step=step + 1,
            status=status,
            timer=timer,
        )

    def validate(self, step: int, saves: CheckpointPolicy, expect: Expect) -> str | None:
        """Validates if a validation is due and not done, and stores the weights if they are the best so far. Returns
        the reason to end training if the patience is exhausted."""
        if step and self._due(step) and not self.validations.has(step):
            expect(f"the validation of step {step}")
            self._validate(step, saves)
        patience, in_vain = self.config.finetune.patience, self.validations.since_best
        if patience is None or in_vain < patience or step >= self.schedule.max_steps:
            return None
        best = self.validations.best
        assert best is not None
        if not saves.finish(step):
            raise UserError(
                f"{self.folder.checkpoints}: step {step} could not be saved; free disk space and start again"
            )
        reason = (
            f"no better {best['metric']} than {best['value']:.4f} of step {best['step']} in {in_vain} validations "
            f"(finetune.patience={patience})"
        )
        if self.world.is_main:
            log.info("training ends at step %d: %s", step, reason)
        return reason

    def finish(self, step: int, expect: Expect) -> None:
        """Tests the best weights on the test split, and writes finetune.json."""
        expect("the test")
        best = self.folder.path / BEST
        facts: dict[str, Any] = collectives.on_main(self.world, lambda: read_classifier(best)[2])
        test = self.splits.test
        tested = None
        if test is not None:
            classifier = collectives.on_all(self.world, lambda: load_classifier(best)).to(self.device)
            found_nC = predict_split(classifier, test, self.config, self.world, self.device)
            tested = self._measure(found_nC, test)
        if self.world.is_main:
            result = {
                "format": "uniemox-finetune",
                "format_version": 1,
                "run": self.config.run.name,
                "task": self.outputs.task,
                "target": self.outputs.target,
                "labels": list(self.outputs.labels),
                "dimension_ranges": dict(zip(self.outputs.dimensions, map(list, self.outputs.ranges))),
                "samples": {
                    "train": self.splits.train.samples,
                    "val": self.splits.val.samples,
                    "test": test.samples if test is not None else None,
                },
                "remarks": self.splits.remarks,
                "steps": step,
                "best_step": facts["step"],
                "val": facts["metrics"]["val"],
                "test": tested,
            }
            write_json(self.folder.path / RESULT, result)
            log.info(
                "best of step %d: val %s; test %s; written to %s",
                facts["step"],
                self._format(facts["metrics"]["val"]),
                self._format(tested) if tested else "none",
                self.folder.path / RESULT,
            )

    def show_samples(self, step: int, metrics: Metrics) -> None:
        """Does nothing: validation shows what the classifier learns."""

    def _due(self, step: int) -> bool:
        if step == self.schedule.max_steps:
            return True
        every = self.config.finetune.validate_epochs * self.schedule.epoch_samples
        G = self.config.batch.global_batch
        return int(step * G / every) > int((step - 1) * G / every)

    def _validate(self, step: int, saves: CheckpointPolicy) -> None:
        val, module = self.splits.val, self.engine.module
        module.eval()
        found_nC = predict_split(module, val, self.config, self.world, self.device)
        module.train()
        first = len(self.outputs.labels)
        if self.outputs.dimensions:
            found_nC[:, first:] = self.outputs.from_unit(torch.from_numpy(found_nC[:, first:])).numpy()
        measured = self._measure(found_nC, val)
        name = METRICS[self.outputs.task, self.outputs.target]
        epoch = round(step * self.config.batch.global_batch / self.schedule.epoch_samples, 4)
        line = {"step": step, "epoch": epoch, "metric": name, "value": measured[name], **_numbers(measured)}
        # All ranks use rank 0's values, because the choice of the best must not depend on rounding differences.
        line = collectives.on_main(self.world, lambda: line)
        before, now = self.validations.best, self.validations.with_line(line)
        is_best = now.best is line or before is None
        if is_best:
            if not saves.finish(step):
                where = self.folder.checkpoints
                raise UserError(
                    f"{where}: the best weights could not be saved; free disk space and start again"
                )
            collectives.on_main(self.world, lambda: self._keep_best(step, measured))
        self.validations = now
        if self.world.is_main:
            append_validation(self.folder.path, line)
            log.info(
                "validation at step %d: %s%s",
                step,
                self._format(measured),
                " (the best so far)" if is_best else "",
            )

    def _keep_best(self, step: int, measured: dict[str, Any]) -> None:
        checkpoint = find_checkpoint(self.folder.checkpoints / step_folder(step), "checkpoint")
        out = self.folder.path / BEST
        try:
            write_classifier(out, checkpoint, self.config, self.outputs, {"val": measured})
        except OSError as error:
            raise UserError(f"{out}: {error.strerror or error}; free disk space and start again") from None

    def _term_names(self) -> tuple[str, ...]:
        if not self.outputs.dimensions or not self.outputs.labels:
            return ()
        return ("categories" if self.outputs.task == "multi" else "labels"), "dimensions"

    def _measure(self, found_nC: np.ndarray, reader: LabelledReader) -> dict[str, Any]:
        return measure(found_nC, reader.targets_nC, self.outputs, reader.groups, reader.keys)

    def _format(self, measured: dict[str, Any]) -> str:
        if self.outputs.target == "dimensions":
            texts = []
        elif self.outputs.task == "single":
            low, high = measured["accuracy_interval"]
            text = f"accuracy {measured['accuracy']:.4f} [{low:.4f}, {high:.4f}]"
            if self.outputs.target == "distribution":
                text = f"KL divergence {measured['kl_divergence']:.4f}, {text}"
            texts = [text]
        else:
            value = measured["mean_average_precision"]
            texts = ["mAP unknown" if value is None else f"mAP {value:.4f}"]
        for name, title in (("mean_absolute_error", "mean absolute error"), ("mean_ccc", "CCC")):
            if measured.get(name) is not None:
                texts.append(f"{title} {round(measured[name], 4) + 0.0:.4f}")  # -0.0 becomes 0.0
        return f"{', '.join(texts)} of {measured['samples']}"


def measure(
    found_nC: np.ndarray,
    targets_nC: np.ndarray,
    outputs: Outputs,
    groups: Sequence[str] | None,
    keys: Sequence[str],
) -> dict[str, Any]:
    """The scores of a classifier's outputs for a split; dimensions of both arrays are on the scale of the data.

    Args:
        groups: the groups of look-alikes; None with task=multi.
        keys: the pictures' keys; persons of one picture are resampled together.
    """
    first, labels = len(outputs.labels), outputs.labels
    answers_nL, truth_nL = found_nC[:, :first], targets_nC[:, :first]
    measured: dict[str, Any]
    if outputs.target == "dimensions":
        measured = {"samples": len(found_nC)}
    elif outputs.task == "multi":
        measured = metrics.multi_label(answers_nL, truth_nL, labels)
    elif outputs.target == "distribution":
        measured = metrics.label_distribution(answers_nL, truth_nL, labels, groups)
    else:
        measured = metrics.single_label(answers_nL, truth_nL, labels, groups)
    if not outputs.dimensions and outputs.task == "single":
        return measured
    values_nV, true_nV = found_nC[:, first:], targets_nC[:, first:]
    return {**measured, **metrics.dimensions(values_nV, true_nV, outputs.dimensions, groups or keys)}


def _numbers(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if isinstance(value, float)}
