"""Models that learn from frozen features: k nearest neighbours, logistic regression and ridge regression.

Hyperparameters are chosen by cross-validation on training data only; look-alikes stay in one fold.

Shape legend: n training samples, m new samples, D width of features, C classes, E width of a target.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.core.errors import UserError
from uniemox_dist.evaluate.metrics import distribution_scores, softmax, unit

FOLDS = 5
KS = (1, 3, 5, 10, 20, 50, 100, 200)
PENALTIES = tuple(10.0**power for power in range(1, -7, -1))
"""Strongest first: of penalties with equal scores the strongest is chosen."""
ALPHAS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Strengths of ridge regression, per hundred samples."""
TEMPERATURE = 0.07
"""Temperature of the neighbours' weights, as in Wu et al. 2018 and DINO (Caron et al. 2021)."""
CHUNK = 1024
MAX_ITERATIONS, GRADIENT_TOLERANCE = 200, 1e-5
"""Stopping criteria of logistic regression; scikit-learn's defaults are 100 and 1e-4."""
ROUGH_ITERATIONS, ROUGH_TOLERANCE = 50, 1e-3
"""Those of the solutions that only compare penalties: their scores settle long before weights do."""

Classifier = Callable[[np.ndarray, np.ndarray, int, np.ndarray, Sequence[float]], dict[float, np.ndarray]]
"""A function of training features n×D, classes n, the number of classes C, new features m×D and hyperparameters.
Returns m answers for each hyperparameter."""


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
    """Returns the accuracy of each hyperparameter over all samples. Each sample is answered by a classifier that did
    not learn from its fold. Hyperparameters that do not suit every fold (k larger than its number of samples) are left
    out.

    Raises:
        UserError: if all samples are in one group, so that none can be held out.
    """
    if classify is logistic_regression:
        classify = partial(logistic_regression, rough=True)
    right = dict.fromkeys(values, 0)
    for held in _held_out(groups):
        answers = classify(x_nD[~held], target_n[~held], classes, x_nD[held], list(right))
        right = {value: right[value] + int((a == target_n[held]).sum()) for value, a in answers.items()}
    return {value: count / len(x_nD) for value, count in right.items()}


def cross_validate_distributions(
    x_nD: np.ndarray, share_nC: np.ndarray, groups: Sequence[str], penalties: Sequence[float]
) -> dict[float, float]:
    """Returns for each penalty the mean Kullback-Leibler divergence of `fit_distributions` over all samples. Each
    sample is estimated by a regression that did not learn from its fold.

    Raises:
        UserError: if all samples are in one group, so that none can be held out.
    """
    total = dict.fromkeys(penalties, 0.0)
    for held in _held_out(groups):
        found = fit_distributions(x_nD[~held], share_nC[~held], x_nD[held], penalties, rough=True)
        for penalty, logits_mC in found.items():
            total[penalty] += distribution_scores(softmax(logits_mC), share_nC[held])["kl_divergence"].sum()
    return {penalty: float(divergence) / len(x_nD) for penalty, divergence in total.items()}


def _held_out(groups: Sequence[str]) -> Iterator[np.ndarray]:
    """The samples of each fold, as masks.

    Raises:
        UserError: if there is one group only.
    """
    fold_n = folds(groups)
    if not fold_n.any():
        raise UserError(
            f"--group-by: all {len(fold_n)} training samples are of one group ({groups[0]}), so none can be held out; "
            "give another attribute, or --val"
        )
    for fold in np.unique(fold_n):
        yield fold_n == fold


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
    x_nD: np.ndarray,
    target_n: np.ndarray,
    classes: int,
    new_mD: np.ndarray,
    penalties: Sequence[float],
    *,
    rough: bool = False,
) -> dict[float, np.ndarray]:
    """For each penalty, the answers of a multinomial logistic regression: the linear probe. It minimises what
    `fit_distributions` does for distributions that are one label each."""
    share_nC = np.eye(classes)[target_n]
    found = fit_distributions(x_nD, share_nC, new_mD, penalties, rough=rough)
    return {penalty: logits_mC.argmax(1) for penalty, logits_mC in found.items()}


def fit_distributions(
    x_nD: np.ndarray,
    share_nC: np.ndarray,
    new_mD: np.ndarray,
    penalties: Sequence[float],
    *,
    rough: bool = False,
) -> dict[float, np.ndarray]:
    """For each penalty, the logits m×C of a multinomial logistic regression from features, standardised by the
    training rows, to distributions over classes.

    Minimises the mean cross-entropy plus `penalty` times the sum of squared weights (not of biases) in float64, as
    scikit-learn's LogisticRegression does with C = 1 / (2 · n · penalty).

    The features are rotated to their principal axes, where the penalty is the same, and each axis is scaled by a bound
    of its curvature, so that L-BFGS needs tens of iterations instead of thousands. BLAS uses one thread: the products
    are small, and results do not depend on the number of cores.

    Args:
        share_nC: the true distributions; rows sum to 1.
        rough: solve in float32 with the rough stopping criteria, to compare penalties.
    """
    with threadpool_limits(1):
        x = x_nD.astype(np.float64)
        centre, scale = x.mean(0), x.std(0) + 1e-6
        z_nD = (x - centre) / scale
        axes_DK, variance_K = _principal_axes(z_nD)
        kind = np.float32 if rough else np.float64
        z_nK = (z_nD @ axes_DK).astype(kind)
        z_mK = (((new_mD - centre) / scale) @ axes_DK).astype(kind)
        stop = {
            "maxiter": ROUGH_ITERATIONS if rough else MAX_ITERATIONS,
            "gtol": ROUGH_TOLERANCE if rough else GRADIENT_TOLERANCE,
        }
        found = {}
        classes = share_nC.shape[1]
        weight_KC, bias_C = np.zeros((len(variance_K), classes)), np.zeros(classes)
        for penalty in sorted(penalties, reverse=True):  # each starts from the solution of a stronger one
            unit_K = 1 / np.sqrt(variance_K / 4 + 2 * penalty)
            weight_KC, bias_C = _minimise(z_nK, share_nC, penalty, unit_K, weight_KC, bias_C, stop)
            found[penalty] = z_mK @ weight_KC + bias_C
    return {penalty: found[penalty] for penalty in penalties}


def _principal_axes(z_nD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orthonormal axes D×K that span the rows, and the mean square of the rows along each."""
    n, D = z_nD.shape
    squares, vectors = np.linalg.eigh(z_nD.T @ z_nD if n >= D else z_nD @ z_nD.T)
    kept = squares > 1e-10 * max(squares[-1], 1e-300)
    squares_K, vectors = squares[kept], vectors[:, kept]
    return (vectors if n >= D else z_nD.T @ vectors / np.sqrt(squares_K)), squares_K / n


def _minimise(
    z_nK: np.ndarray,
    share_nC: np.ndarray,
    penalty: float,
    unit_K: np.ndarray,
    weight_KC: np.ndarray,
    bias_C: np.ndarray,
    stop: dict[str, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Minimises the loss from given weights and biases. L-BFGS works on weights in units of `unit_K`."""
    n, shape = len(z_nK), weight_KC.shape

    def unpack(flat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return unit_K[:, None] * flat[: -shape[1]].reshape(shape), flat[-shape[1] :]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = unpack(flat)
        logits_nC = z_nK @ weight.astype(z_nK.dtype) + bias
        logits_nC -= logits_nC.max(1, keepdims=True)
        log_found_nC = logits_nC - np.log(np.exp(logits_nC).sum(1, keepdims=True))
        excess_nC = (np.exp(log_found_nC) - share_nC) / n
        loss = penalty * np.square(weight).sum() - (log_found_nC * share_nC).sum() / n
        by_weight = unit_K[:, None] * (z_nK.T @ excess_nC.astype(z_nK.dtype) + 2 * penalty * weight)
        return float(loss), np.concatenate([by_weight.ravel(), excess_nC.sum(0)])

    start = np.concatenate([(weight_KC / unit_K[:, None]).ravel(), bias_C])
    options = {**stop, "ftol": 64 * np.finfo(z_nK.dtype).eps}
    return unpack(minimize(loss_and_gradient, start, jac=True, method="L-BFGS-B", options=options).x)


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
