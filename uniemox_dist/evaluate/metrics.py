"""Scores per sample, so that every average has an interval, and paired differences have one too."""

from collections.abc import Callable

import numpy as np
import torch
from torch.nn import functional as F

from uniemox_dist.data.masks import SCENE_VIEW, patch_order
from uniemox_dist.evaluate.baselines import folds, interpolate
from uniemox_dist.models.patches import patchify, select_patches
from uniemox_dist.models.student import Student

PENALTIES = (1e-3, 1e-2, 1e-1)
PROBE_FOLDS = 3


def in_top(pictures_nE: np.ndarray, texts_nE: np.ndarray, captions: list[str], k: int = 10) -> np.ndarray:
    """1 where a picture's own caption is among the k nearest of all held-out captions.

    Equal captions are one; of texts with equal similarity half are counted before it (an unlearned constant
    answer must not win by order).
    """
    distinct = sorted(set(captions))
    own = np.array([distinct.index(c) for c in captions])
    first = np.array([captions.index(c) for c in distinct])
    similarity = pictures_nE @ texts_nE[first].T
    mine = similarity[np.arange(len(own)), own][:, None]
    rank = (similarity > mine).sum(1) + ((similarity == mine).sum(1) - 1) / 2
    return (rank < k).astype(np.float64)


def cosines(a_nE: np.ndarray, b_nE: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows."""
    lengths = np.linalg.norm(a_nE, axis=1) * np.linalg.norm(b_nE, axis=1)
    return (a_nE * b_nE).sum(1) / np.maximum(lengths, 1e-12)


def masked_errors(student: Student, scenes_n3HW: torch.Tensor, seed: int, batch: int = 64) -> np.ndarray:
    """Mean squared error over masked pixels of each picture, pixels in 0…1, predictions clipped to it."""
    errors = []
    for start in range(0, len(scenes_n3HW), batch):
        scene = scenes_n3HW[start : start + batch]
        order = _orders(student, start, len(scene), seed)
        truth = select_patches(
            patchify(scene.float() / 255, student.model.patch_size), student.split(order)[1]
        )
        errors.append((student.reconstruct(scene, order).clamp(0, 1) - truth).square().mean((1, 2)))
    return torch.cat(errors).numpy().astype(np.float64)


def trivial_errors(student: Student, scenes_n3HW: torch.Tensor, seed: int) -> dict[str, np.ndarray]:
    """The same error, over the same masks, of linear interpolation and of the visible patches' mean colour."""
    patch, side = student.model.patch_size, student.model.image_size // student.model.patch_size
    linear, constant = [], []
    for i in range(len(scenes_n3HW)):
        picture = scenes_n3HW[i : i + 1].float() / 255
        patches_NP = patchify(picture, patch)[0].numpy()
        visible, masked = (part[0].numpy() for part in student.split(_orders(student, i, 1, seed)))
        filled = interpolate(patches_NP, visible, side, patch).transpose(2, 0, 1)[None]
        filled_NP = patchify(torch.from_numpy(filled), patch)[0].numpy()
        linear.append(np.square(filled_NP[masked] - patches_NP[masked]).mean())
        mean_3 = patches_NP[visible].reshape(len(visible), 3, -1).mean((0, 2))
        constant.append(np.square(mean_3.repeat(patch * patch) - patches_NP[masked]).mean())
    return {"linear interpolation": np.array(linear), "mean of visible patches": np.array(constant)}


def probe(
    x: np.ndarray, labels: list[str], groups: list[str], x_new: np.ndarray, labels_new: list[str]
) -> np.ndarray:
    """1 where a linear classifier on standardised features names the right label.

    Multinomial logistic regression by L-BFGS; the penalty is chosen by cross-validation over groups.
    """
    names = sorted(set(labels))
    target = torch.tensor([names.index(label) for label in labels])
    centre, scale = x.mean(0), x.std(0) + 1e-6
    x_t = torch.from_numpy((x - centre) / scale).float()
    fold_n = folds(groups, PROBE_FOLDS)
    hits = np.zeros(len(PENALTIES))
    for fold in range(PROBE_FOLDS):
        held = torch.from_numpy(fold_n == fold)
        for i, penalty in enumerate(PENALTIES):
            predict = _logistic(x_t[~held], target[~held], len(names), penalty)
            hits[i] += (predict(x_t[held]) == target[held]).sum().item()
    predict = _logistic(x_t, target, len(names), PENALTIES[int(np.argmax(hits))])
    answers = predict(torch.from_numpy((x_new - centre) / scale).float()).tolist()
    return np.array([float(names[a] == label) for a, label in zip(answers, labels_new)])


def bootstrap(
    clusters: list[str], resamples: int = 1000
) -> Callable[[Callable[[np.ndarray], float]], tuple[float, float]]:
    """A function that gives the 95 % percentile interval of a statistic of sample numbers.

    Whole clusters are drawn with replacement, since look-alikes are not independent observations.
    """
    names = sorted(set(clusters))
    members = [np.flatnonzero(np.array(clusters) == name) for name in names]
    random = np.random.RandomState(0)
    draws = [
        np.concatenate([members[i] for i in random.randint(0, len(names), len(names))])
        for _ in range(resamples)
    ]

    def interval(statistic: Callable[[np.ndarray], float]) -> tuple[float, float]:
        values = np.array([statistic(draw) for draw in draws])
        low, high = np.nanpercentile(values, [2.5, 97.5])
        return float(low), float(high)

    return interval


def _orders(student: Student, start: int, count: int, seed: int) -> torch.Tensor:
    """Masks of the evaluation: keyed by the sample's number, so that each row of a table sees the same ones."""
    return patch_order(torch.arange(start, start + count), SCENE_VIEW, seed, student.model.patches)


def _logistic(
    x: torch.Tensor, target: torch.Tensor, classes: int, penalty: float
) -> Callable[[torch.Tensor], torch.Tensor]:
    weight = torch.zeros(x.shape[1], classes, dtype=x.dtype, requires_grad=True)
    bias = torch.zeros(classes, dtype=x.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, target) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return lambda new: (new @ weight.detach() + bias.detach()).argmax(1)
