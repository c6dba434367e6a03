"""The classifier's losses and learning rates, how answers are measured, and what is known of validations."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn import metrics as sk
from torch.nn import functional as F

from uniemox_dist.config.finetune import FinetuneRun
from uniemox_dist.config.load import load_config
from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.core.errors import UserError
from uniemox_dist.data.crops import ViewSettings
from uniemox_dist.data.labels import WHOLE_PICTURE, LabelledReader
from uniemox_dist.data.reader import ShardReader
from uniemox_dist.distributed.world import World
from uniemox_dist.evaluate import metrics
from uniemox_dist.evaluate.embedding_pass import embed_splits
from uniemox_dist.evaluate.intervals import LOOK_ALIKES, Bootstrap
from uniemox_dist.evaluate.subject import Rows
from uniemox_dist.models.classifier import Classifier, Outputs, category_weights
from uniemox_dist.models.flops import classifier_flops
from uniemox_dist.models.init_from import load_initial_weights
from uniemox_dist.train.engine import parameter_groups
from uniemox_dist.train.finetune.trainer import measure
from uniemox_dist.train.finetune.validation import Validations, append_validation, predict_split

TINY = ModelConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, positions="learned")
NAN = float("nan")


def classifier(model: ModelConfig = TINY, **more: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(model, Outputs(**{"task": "single", "labels": ("a", "b", "c"), **more}))


def test_learning_rates_fall_by_layers_as_computed_by_hand() -> None:
    # Depth 3 and decay 0.5: patches and tokens are layer 0, the blocks 1 to 3, all behind them layer 4.
    table = {
        "encoder.cls_token": (0.0625, 0.0),
        "encoder.pos_embed": (0.0625, 0.0),
        "encoder.patch_embed.proj.weight": (0.0625, 0.05),
        "encoder.patch_embed.proj.bias": (0.0625, 0.0),
        "encoder.blocks.0.attn.qkv.weight": (0.125, 0.05),
        "encoder.blocks.0.norm1.weight": (0.125, 0.0),
        "encoder.blocks.1.mlp.fc1.weight": (0.25, 0.05),
        "encoder.blocks.1.mlp.fc1.bias": (0.25, 0.0),
        "encoder.blocks.2.mlp.fc2.weight": (0.5, 0.05),
        "encoder.fc_norm.weight": (1.0, 0.0),
        "encoder.fc_norm.bias": (1.0, 0.0),
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
    }
    module = classifier()
    names = {id(p): name for name, p in module.named_parameters()}
    found = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in parameter_groups(module, 0.05, 0.5)
        for p in group["params"]
    }
    assert {name: found[name] for name in table} == table
    assert found.keys() == dict(module.named_parameters()).keys()


@pytest.mark.parametrize("pooling", ["mean", "token"])
def test_a_classifier_is_timms_model_with_a_layer_over_its_feature(pooling: Any) -> None:
    ours = classifier(pooling=pooling).eval()
    torch.nn.init.normal_(ours.head.weight)
    pool = "avg" if pooling == "mean" else "token"
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=3, global_pool=pool, **shape).eval()
    state = {**ours.encoder.state_dict(), **{f"head.{k}": v for k, v in ours.head.state_dict().items()}}
    plain.load_state_dict(state)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.mean, TINY.std))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels, None)[0], plain((pixels / 255 - mean) / std))


def test_scene_and_person_are_joined_behind_one_encoder() -> None:
    ours = classifier(persons=True).eval()
    torch.nn.init.normal_(ours.head.weight)
    scene, person = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        found = ours(scene, person)[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (TINY.mean, TINY.std))
        both = torch.cat([ours.encoder((view / 255 - mean) / std) for view in (scene, person)], dim=1)
        torch.testing.assert_close(found, ours.head(both))
        assert not torch.allclose(found, ours(person, scene)[0])


def test_the_loss_of_one_label_is_timms_smoothed_cross_entropy() -> None:
    from timm.loss import LabelSmoothingCrossEntropy

    answers, truth = torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 0])
    loss = classifier(smoothing=0.1).losses(answers, F.one_hot(truth, 3).float())
    torch.testing.assert_close(loss[0], LabelSmoothingCrossEntropy(0.1)(answers, truth))
    assert loss[1] == 0


def test_categories_are_weighed_and_unknown_dimensions_left_out() -> None:
    module = classifier(task="multi", labels=("a", "b"), dimensions=("v", "d"), weights=(0.5, 1.5))
    answers = torch.tensor([[0.3, -1.0, 0.5, 0.0], [2.0, 0.1, -0.5, 0.2]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0, 10.0, NAN], [0.0, 1.0, NAN, NAN]])
    labels, dimensions = module.losses(answers, targets)
    p = torch.sigmoid(answers.detach())
    hand = [0.5 * -math.log(p[0, 0]), 1.5 * -math.log(1 - p[0, 1])]
    hand += [0.5 * -math.log(1 - p[1, 0]), 1.5 * -math.log(p[1, 1])]
    assert labels.item() == pytest.approx(sum(hand) / 4, rel=1e-5)
    assert dimensions.item() == pytest.approx(
        (0.5 - 1) ** 2 / 2
    )  # one of four is known; 10 is 1 for the network
    (labels + dimensions).backward()
    assert answers.grad is not None
    assert answers.grad.isfinite().all()
    assert answers.grad[1, 2:].tolist() == [0, 0]
    outputs = Outputs("single", ("a", "b"), ("v", "a"), ranges=((1, 9), (0, 100)))
    values = torch.tensor([[1.0, 50.0], [9.0, 0.0], [3.0, 100.0]])
    assert outputs.to_unit(values).tolist() == [[-1, 0], [1, -1], [-0.5, 1]]
    torch.testing.assert_close(outputs.from_unit(outputs.to_unit(values)), values)


def test_rare_categories_weigh_more() -> None:
    raw = [1 / math.log(1.2 + share) for share in (0.0, 0.5)]
    assert category_weights([0.0, 0.5]) == pytest.approx([2 * raw[0] / sum(raw), 2 * raw[1] / sum(raw)])


def test_an_encoder_begins_with_others_weights_and_its_last_layer_stays_new(tmp_path: Path) -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    there = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    args = {"model_args": shape}
    timm.models.save_for_hf(there, str(tmp_path / "there"), model_config=args, safe_serialization=True)
    module = classifier()
    head = module.head.weight.clone()
    loaded = load_initial_weights(module, tmp_path / "there")
    assert torch.equal(module.encoder.blocks[1].mlp.fc1.weight, there.blocks[1].mlp.fc1.weight)
    assert torch.equal(module.head.weight, head)
    assert set(loaded.missing) == {
        "encoder.fc_norm.weight",
        "encoder.fc_norm.bias",
        "head.weight",
        "head.bias",
    }
    deep = classifier(TINY.model_copy(update={"depth": 2}))
    with pytest.raises(UserError, match="is of another architecture"):
        load_initial_weights(deep, tmp_path / "there")


def test_flops_equal_torchs_count() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    module = classifier(persons=True).eval()
    for block in module.encoder.blocks:
        block.attn.fused_attn = False
    view = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(view, view)
    assert classifier_flops(TINY, 2, 3).student == counter.get_total_flops()


# ---- measuring


def test_accuracy_has_an_interval_and_each_class_its_row() -> None:
    true = [0, 0, 0, 1, 1, 2]
    found = [0, 0, 1, 1, 0, 1]
    result = metrics.single_label(np.eye(4)[found], np.eye(4)[true], ("a", "b", "c", "d"))
    assert result["accuracy"] == 0.5
    low, high = result["accuracy_interval"]
    assert 0 <= low < 0.5 < high <= 1
    by = {row["label"]: (row["samples"], row["recall"], row["precision"]) for row in result["per_class"]}
    assert by == {"a": (3, 2 / 3, 2 / 3), "b": (2, 0.5, 1 / 3), "c": (1, 0, None), "d": (0, None, None)}
    assert result["mean_recall"] == pytest.approx((2 / 3 + 0.5) / 3)


def test_the_interval_counts_families_of_look_alikes_not_pictures() -> None:
    # Twenty look-alikes, all right, and one other picture, wrong: two observations, so anything from 0 to 1.
    true, found, groups = [0] * 21, [0] * 20 + [1], ["family"] * 20 + ["other"]
    answers, targets = np.eye(2)[found], np.eye(2)[true]
    assert metrics.single_label(answers, targets, ("a", "b"), groups)["accuracy_interval"] == [0.0, 1.0]
    low, high = metrics.single_label(answers, targets, ("a", "b"))["accuracy_interval"]
    assert low > 0.8
    assert high == 1.0


def test_fine_tuning_and_evaluation_group_the_same_look_alikes(emoji_shards: Path) -> None:
    config = load_config(
        "finetune",
        [f"data.path={emoji_shards}", "model.image_size=32", "model.patch_size=8", "data.workers=0"],
    )
    assert isinstance(config, FinetuneRun)
    reader = ShardReader.from_folder(emoji_shards / "test", "DATA")
    items = [np.array([(row, WHOLE_PICTURE) for row in range(count)]) for count in reader.counts]
    targets = [np.eye(3, dtype=np.float32)[np.zeros(count, int)] for count in reader.counts]
    test = LabelledReader(reader, items, targets, [""] * reader.samples)

    def answer(scene_B3HW: torch.Tensor, _: Any) -> tuple[torch.Tensor]:
        return (scene_B3HW.float().mean((2, 3)),)

    first = predict_split(answer, test, config, World(), torch.device("cpu"))
    assert test.groups is not None
    assert np.array_equal(predict_split(answer, test, config, World(), torch.device("cpu")), first)
    rows = [reader.record(shard, row) for shard, count in enumerate(reader.counts) for row in range(count)]
    assert test.groups == [record["attributes"]["family"] for record in rows]
    split = embed_splits(
        {"test": reader},
        ViewSettings(image_size=32),
        lambda role, batch: Rows({}, {}, {}),
        group_by=LOOK_ALIKES,
    )["test"]
    assert test.groups == split.groups
    assert len(test.groups) == test.samples == 24


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], 0.5 * 1 + 0.5 * 2 / 3),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.5 * 1 + 0.5 * 2 / 3),  # scikit-learn's own example: 0.83
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 0.25),  # equal scores have no order
        ([0.9, 0.5, 0.5, 0.1], [0, 1, 0, 1], 0.5 * 1 / 3 + 0.5 * 2 / 4),
        ([0.2, 0.1], [1, 1], 1.0),
        ([0.2, 0.1], [0, 0], None),
    ],
)
def test_average_precision_matches_its_definition(
    scores: list[float], positive: list[int], expected: float | None
) -> None:
    assert metrics.average_precision(np.array(scores), np.array(positive, bool)) == pytest.approx(expected)


def test_figures_are_scikit_learns_of_the_same_answers() -> None:
    random = np.random.RandomState(0)
    true, answers = random.randint(0, 4, 200), random.randn(200, 4).round(1)
    answers[np.arange(200), true] += 1
    result = metrics.single_label(answers, np.eye(4)[true], ("a", "b", "c", "d"))
    found = answers.argmax(1)
    assert result["accuracy"] == pytest.approx(sk.accuracy_score(true, found))
    assert result["mean_recall"] == pytest.approx(sk.balanced_accuracy_score(true, found))
    recalls, precisions = (
        sk.recall_score(true, found, average=None),
        sk.precision_score(true, found, average=None),
    )
    assert [row["recall"] for row in result["per_class"]] == pytest.approx(recalls.tolist())
    assert [row["precision"] for row in result["per_class"]] == pytest.approx(precisions.tolist())
    several = random.rand(200, 4) < 0.3  # and scores with ties
    result = metrics.multi_label(answers, several.astype(float), ("a", "b", "c", "d"))
    expected = [sk.average_precision_score(several[:, i], answers[:, i]) for i in range(4)]
    assert [row["average_precision"] for row in result["per_class"]] == pytest.approx(expected)
    assert result["mean_average_precision"] == pytest.approx(np.mean(expected))


def test_dimensions_are_measured_over_samples_where_they_are_known() -> None:
    answers = np.array([[2.0, 5, 3], [4.0, 5, 3], [9.0, 5, 3]])
    targets = np.array([[1.0, NAN, 4], [3.0, NAN, 4], [NAN, NAN, 4]])
    result = metrics.dimensions(answers, targets, ("valence", "arousal", "dominance"))
    valence, arousal, dominance = result["dimensions"]
    assert (valence["samples"], valence["mean_absolute_error"]) == (2, 1.0)
    assert valence["correlation"] == pytest.approx(1)
    # s_xy = s_x² = s_y² = 1 and the means differ by 1: 2 / (1 + 1 + 1).
    assert valence["ccc"] == pytest.approx(2 / 3)
    assert valence["mean_absolute_error_interval"] == [1.0, 1.0]
    names = ("mean_absolute_error", "correlation", "ccc")
    unknown = dict.fromkeys((*names, *(f"{name}_interval" for name in names)))
    assert arousal == {"dimension": "arousal", "samples": 0, **unknown}
    # A constant has no correlation and no concordance.
    assert (dominance["samples"], dominance["mean_absolute_error"]) == (3, 1.0)
    assert dominance["correlation"] is dominance["ccc"] is dominance["ccc_interval"] is None
    means = {name: value for name, value in result.items() if name != "dimensions"}
    assert means == pytest.approx({"mean_absolute_error": 1.0, "mean_correlation": 1, "mean_ccc": 2 / 3})


def test_correlation_and_concordance_are_those_of_their_definitions() -> None:
    random = np.random.RandomState(0)
    true = random.randn(60) * 2 + 5e3  # far from zero, where moments lose digits
    found = 0.5 * true + random.randn(60) + 2.5e3
    [row] = metrics.dimensions(found[:, None], true[:, None], ("valence",))["dimensions"]
    assert row["correlation"] == pytest.approx(np.corrcoef(found, true)[0, 1], abs=1e-9)
    covariance = ((found - found.mean()) * (true - true.mean())).mean()
    expected = 2 * covariance / (found.var() + true.var() + (found.mean() - true.mean()) ** 2)
    assert row["ccc"] == pytest.approx(expected, abs=1e-9)
    assert row["mean_absolute_error"] == pytest.approx(np.abs(found - true).mean())
    for name in ("mean_absolute_error", "correlation", "ccc"):
        low, high = row[f"{name}_interval"]
        assert low < row[name] < high
    # The interval of the correlation is that of the slow way: resample, then correlate.
    slow = Bootstrap([str(i) for i in range(60)]).statistic(
        lambda i: float(np.corrcoef(found[i], true[i])[0, 1])
    )
    assert row["correlation_interval"] == pytest.approx(slow, abs=1e-9)
    # Constant estimates agree with nothing, but are defined; three pictures of one group are one observation.
    [flat] = metrics.dimensions(np.full((3, 1), 4.0), np.array([[1.0], [2], [3]]), ("v",), ["g"] * 3)[
        "dimensions"
    ]
    assert (flat["correlation"], flat["ccc"]) == (None, 0)
    assert flat["mean_absolute_error_interval"] == [2.0, 2.0]


def test_measures_of_distributions_are_those_of_their_formulas() -> None:
    true = np.array([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    found = np.array([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    scores = metrics.distribution_scores(found, true)
    # Row 1 by hand: gaps .25 .25 .5; sums .75 .75 .5, so relative gaps 1/3 1/3 1.
    hand = {
        "chebyshev": 0.5,
        "clark": math.sqrt(1 / 9 + 1 / 9 + 1),
        "canberra": 1 / 3 + 1 / 3 + 1,
        "kl_divergence": math.log(2),
        "cosine": 0.25 / (math.sqrt(0.5) * math.sqrt(0.0625 + 0.0625 + 0.25)),
        "intersection": 0.5,
    }
    assert {name: score[0] for name, score in scores.items()} == pytest.approx(hand)
    same = {"chebyshev": 0, "clark": 0, "canberra": 0, "kl_divergence": 0, "cosine": 1, "intersection": 1}
    assert {name: score[1] for name, score in scores.items()} == pytest.approx(same)
    # An estimate of 0 where the truth is not: finite, by the smallest share that counts.
    missed = metrics.distribution_scores(np.array([[0.0, 1.0]]), np.array([[0.5, 0.5]]))
    assert missed["kl_divergence"][0] == pytest.approx(0.5 * math.log(0.5 / 1e-12) + 0.5 * math.log(0.5))


def test_distributions_are_measured_with_intervals_and_the_most_likely_label() -> None:
    true = np.array([[0.6, 0.4, 0.0], [0.4, 0.4, 0.2], [0.1, 0.0, 0.9], [0.2, 0.8, 0.0]])
    # Softmax of these logits: the shares themselves, except that the last row answers the wrong label.
    found = np.array([[0.6, 0.3, 0.1], [0.3, 0.5, 0.2], [0.1, 0.1, 0.8], [0.7, 0.2, 0.1]])
    result = metrics.label_distribution(np.log(found) + 3, true, ("a", "b", "c"))
    scores = metrics.distribution_scores(found, true)
    for name, score in scores.items():
        assert result[name] == pytest.approx(score.mean()), name
        low, high = result[f"{name}_interval"]
        assert low <= result[name] <= high
    # The second picture has two most likely labels, and either is right.
    assert result["accuracy"] == 0.75
    by = {row["label"]: (row["samples"], row["recall"]) for row in result["per_class"]}
    assert by == {"a": (1, 1.0), "b": (2, 0.5), "c": (1, 1.0)}
    assert [row["mean_share"] for row in result["per_class"]] == pytest.approx(true.mean(0).tolist())
    assert [row["mean_estimate"] for row in result["per_class"]] == pytest.approx(found.mean(0).tolist())


def test_the_loss_of_a_distribution_is_its_divergence_also_smoothed_and_with_dimensions() -> None:
    shares = torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.0, 1.0]])
    answers = torch.tensor([[0.3, -1.0, 0.5, 0.25], [2.0, 0.1, -0.5, 0.5]], requires_grad=True)
    more: dict[str, Any] = {"dimensions": ("valence",), "ranges": ((1.0, 9.0),), "target": "distribution"}
    targets = torch.cat([shares, torch.tensor([[9.0], [NAN]])], dim=1)
    for smoothing in (0.0, 0.3):
        labels, dimensions = classifier(smoothing=smoothing, **more).losses(answers, targets)
        soft = shares * (1 - smoothing) + smoothing / 3
        log_p = answers[:, :3].detach().log_softmax(1)
        hand = [
            float((row[row > 0] * (row[row > 0].log() - q[row > 0])).sum()) for row, q in zip(soft, log_p)
        ]
        assert labels.item() == pytest.approx(sum(hand) / 2, rel=1e-5)
        assert dimensions.item() == pytest.approx((0.25 - 1) ** 2 / 2)
    (labels + dimensions).backward()
    assert answers.grad is not None
    assert answers.grad.isfinite().all()
    assert answers.grad[1, 3] == 0
    # Equal shares and estimates: nothing is lost.
    exact = torch.tensor([[0.75, 0.25]])
    module = classifier(labels=("a", "b"), target="distribution")
    assert module.losses(exact.log(), exact)[0].item() == pytest.approx(0, abs=1e-6)


def test_without_labels_the_loss_and_the_measures_are_those_of_the_dimensions() -> None:
    module = classifier(labels=(), dimensions=("valence", "arousal"), target="dimensions", smoothing=0.1)
    assert module.head.out_features == 2
    answers = torch.tensor([[0.5, -1.0], [0.0, 0.25]])
    labels, dimensions = module.losses(answers, torch.tensor([[10.0, 1.0], [5.5, NAN]]))
    assert labels.item() == 0
    assert dimensions.item() == pytest.approx(((0.5**2 + 0) / 2 + 0) / 2)
    true = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]], np.float32)
    found = measure(true + 1, true, module.outputs, None, ["a", "b", "c"])
    assert found["samples"] == 3
    assert "accuracy" not in found
    # By hand: shifted by 1, with variances 2/3 and 8/3, CCC is 2 v / (2 v + 1).
    expected = (4 / 3 / (4 / 3 + 1) + 16 / 3 / (16 / 3 + 1)) / 2
    assert found["mean_ccc"] == pytest.approx(expected)
    assert found["mean_absolute_error"] == pytest.approx(1)


def test_the_best_of_divergences_is_the_lowest() -> None:
    lines = [{"step": i, "metric": "kl_divergence", "value": v} for i, v in enumerate((0.5, 0.2, None, 0.3))]
    found = Validations(tuple(lines))
    assert found.best == lines[1]
    assert found.since_best == 2


def test_the_history_ends_at_the_resumed_step(tmp_path: Path) -> None:
    values = {2: 0.5, 4: 0.75, 6: 0.75, 8: None, 10: 0.9}
    for step, value in values.items():
        append_validation(tmp_path, {"step": step, "value": value})
    found = Validations.read(tmp_path, 8)
    assert found.best == {"step": 4, "value": 0.75}  # the first of equals
    assert found.since_best == 2
    assert found.has(8)
    assert not found.has(10)
    append_validation(tmp_path, {"step": 4, "value": 0.1})  # the same step again, after a kill
    assert Validations.read(tmp_path, 8).best == {"step": 6, "value": 0.75}
    assert Validations.read(tmp_path, 1) == Validations(())
    assert Validations(()).best is None
    assert Validations(()).since_best == 0
