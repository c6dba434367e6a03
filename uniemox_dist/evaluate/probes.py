"""What is learned on frozen features: k nearest neighbours, logistic regression and ridge regression.

Hyperparameters are chosen by cross-validation on training data alone; look-alikes stay in one fold.

Shape legend: n training samples, m new samples, D width of features, C classes, E width of a target.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.metrics import unit

FOLDS = 5
KS = (1, 3, 5, 10, 20, 50, 100, 200)
PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Strongest first: of penalties that score equally the strongest is chosen."""
ALPHAS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Strengths of ridge regression, per hundred samples."""
TEMPERATURE = 0.07
"""Of the neighbours' weights, as in Wu et al. 2018 and DINO (Caron et al. 2021)."""
CHUNK = 1024
MAX_ITERATIONS, GRADIENT_TOLERANCE = 200, 1e-5
"""Where logistic regression stops; scikit-learn's defaults are 100 and 1e-4."""

Classifier = Callable[[np.ndarray, np.ndarray, int, np.ndarray, Sequence[float]], dict[float, np.ndarray]]
"""From training features n×D, classes n, their number C, new features m×D and hyperparameters to m answers for each."""


def folds(groups: Sequence[str], count: int = FOLDS) -> np.ndarray:
    """A fold number per sample; samples of one group share it. There are at most as many folds as groups."""
    names = sorted(set(groups))
    order = np.random.RandomState(0).permutation(len(names))
    fold = {name: int(i) % min(count, len(names)) for name, i in zip(names, order)}
    return np.array([fold[group] for group in groups])


def cross_validate(
    x_nD: np.ndarray,
    target_n: np.ndarray,
    classes: int,
    groups: Sequence[str],
    classify: Classifier,
    values: Sequence[float],
) -> dict[float, float]:
    """The accuracy of each hyperparameter over all samples, each answered by a classifier that did not learn from its
    fold. Hyperparameters that do not suit every fold (k beyond its samples) are left out.

    Raises:
        UserError: if all samples are of one group, so that nothing can be held out.
    """
    fold_n = folds(groups)
    if len(np.unique(fold_n)) < 2:
        raise UserError(
            f"--group-by: all {len(x_nD)} training samples are of one group ({groups[0]}), so none can be held out; "
            "give another attribute, or --val"
        )
    right: dict[float, list[int]] = {value: [] for value in values}
    for fold in np.unique(fold_n):
        held = fold_n == fold
        answers = classify(x_nD[~held], target_n[~held], classes, x_nD[held], values)
        right = {value: [*right[value], int((a == target_n[held]).sum())] for value, a in answers.items()}
    return {value: sum(counts) / len(x_nD) for value, counts in right.items()}


def knn(
    x_nD: np.ndarray, target_n: np.ndarray, classes: int, new_mD: np.ndarray, ks: Sequence[float]
) -> dict[float, np.ndarray]:
    """For each k up to n, the answers of the k nearest rows by cosine, each voting with exp(cosine / 0.07)."""
    known = [int(k) for k in ks if k <= len(x_nD)]
    x, new = torch.from_numpy(unit(x_nD)).float(), torch.from_numpy(unit(new_mD)).float()
    votes_nC = F.one_hot(torch.from_numpy(target_n), classes).float()
    answers: dict[float, list[Tensor]] = {float(k): [] for k in known}
    for some in new.split(CHUNK):
        cosine, index = (some @ x.T).topk(max(known), dim=1)
        weight = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
        for k in known:
            scores = (votes_nC[index[:, :k]] * weight[:, :k, None]).sum(1)
            answers[float(k)].append(scores.argmax(1))
    return {k: torch.cat(parts).numpy() for k, parts in answers.items()}


def logistic_regression(
    x_nD: np.ndarray, target_n: np.ndarray, classes: int, new_mD: np.ndarray, penalties: Sequence[float]
) -> dict[float, np.ndarray]:
    """For each penalty, the answers of a multinomial logistic regression on features standardised by the training
    rows: the linear probe.

    Minimises the mean cross-entropy plus `penalty` times the sum of squared weights (not of biases) in float64, as
    scikit-learn's LogisticRegression does with C = 1 / (2 · n · penalty).

    The features are rotated to their principal axes, where the penalty is the same, and each axis is scaled by a bound
    of its curvature, so that L-BFGS needs tens of iterations instead of thousands.
    """
    centre, scale = x_nD.astype(np.float64).mean(0), x_nD.astype(np.float64).std(0) + 1e-6
    z_nD, z_mD = torch.from_numpy((x_nD - centre) / scale), torch.from_numpy((new_mD - centre) / scale)
    axes_DK, variance_K = _principal_axes(z_nD)
    z_nK, z_mK = z_nD @ axes_DK, z_mD @ axes_DK
    target = torch.from_numpy(target_n)
    answers = {}
    weight_KC = torch.zeros(len(variance_K), classes, dtype=torch.float64)
    bias_C = torch.zeros(classes, dtype=torch.float64)
    for penalty in sorted(penalties, reverse=True):  # each starts from the solution of a stronger one
        step_K1 = (variance_K / 4 + 2 * penalty).rsqrt()[:, None]
        weight_KC, bias_C = _minimise(z_nK, target, penalty, step_K1, weight_KC, bias_C)
        answers[penalty] = (z_mK @ weight_KC + bias_C).argmax(1).numpy()
    return {penalty: answers[penalty] for penalty in penalties}


def _principal_axes(z_nD: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes D×K that span the rows, and the mean square of the rows along each."""
    n, D = z_nD.shape
    if n >= D:
        squares_K, axes_DK = torch.linalg.eigh(z_nD.T @ z_nD)
    else:
        squares_K, rows_nK = torch.linalg.eigh(z_nD @ z_nD.T)
        axes_DK = z_nD.T @ rows_nK
    kept = squares_K > 1e-10 * squares_K[-1].clamp(min=1e-300)
    if n < D:
        axes_DK = axes_DK[:, kept] / squares_K[kept].sqrt()
    return (axes_DK if n < D else axes_DK[:, kept]), squares_K[kept] / n


def _minimise(
    z_nK: Tensor, target_n: Tensor, penalty: float, step_K1: Tensor, weight_KC: Tensor, bias_C: Tensor
) -> tuple[Tensor, Tensor]:
    n = len(z_nK)
    scaled_KC, bias_C = weight_KC / step_K1, bias_C.clone()
    truth_nC = F.one_hot(target_n, len(bias_C)).double()
    optimizer = torch.optim.LBFGS(
        [scaled_KC, bias_C],
        max_iter=MAX_ITERATIONS,
        tolerance_grad=GRADIENT_TOLERANCE,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        weight = step_K1 * scaled_KC
        log_share_nC = (z_nK @ weight + bias_C).log_softmax(1)
        excess_nC = (log_share_nC.exp() - truth_nC) / n
        scaled_KC.grad = step_K1 * (z_nK.T @ excess_nC + 2 * penalty * weight)
        bias_C.grad = excess_nC.sum(0)
        return penalty * weight.square().sum() - (log_share_nC * truth_nC).sum() / n

    optimizer.step(closure)  # type: ignore[arg-type]
    return step_K1 * scaled_KC, bias_C


def ridge(x_nD: np.ndarray, y_nE: np.ndarray, groups: Sequence[str], new_mD: np.ndarray) -> np.ndarray:
    """Ridge regression from standardised features to targets, predicted for new rows, m×E. The strength is chosen by
    cross-validation over groups."""
    fold_n = folds(groups)
    errors = np.zeros(len(ALPHAS))
    for fold in np.unique(fold_n) if fold_n.any() else ():
        held = fold_n == fold
        predictions = _ridge_path(x_nD[~held], y_nE[~held], x_nD[held])
        errors += [np.square(p - y_nE[held]).sum() for p in predictions]
    return _ridge_path(x_nD, y_nE, new_mD)[int(np.argmin(errors))]


def _ridge_path(x_nD: np.ndarray, y_nE: np.ndarray, new_mD: np.ndarray) -> list[np.ndarray]:
    """Predictions for every strength, from one eigendecomposition of the smaller Gram matrix."""
    x, y = x_nD.astype(np.float64), y_nE.astype(np.float64)
    centre, scale, offset = x.mean(0), x.std(0) + 1e-6, y.mean(0)
    z, z_new, n = (x - centre) / scale, (new_mD - centre) / scale, len(x)
    if x.shape[1] <= n:
        values, vectors = np.linalg.eigh(z.T @ z)
        left, right = vectors.T @ (z.T @ (y - offset)), z_new @ vectors
    else:
        values, vectors = np.linalg.eigh(z @ z.T)
        left, right = vectors.T @ (y - offset), (z_new @ z.T) @ vectors
    return [offset + right @ (left / (np.maximum(values, 0) + alpha * n / 100)[:, None]) for alpha in ALPHAS]
