"""Ways from vectors to labels: k nearest neighbours, a linear probe, and texts of labels.

Shape legend: n samples to learn from, m to answer, D width of vectors, C classes.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from uniemox_dist.evaluate.features import unit

KS = (1, 3, 5, 10, 20, 50, 100, 200)
PENALTIES = tuple(10.0**power for power in range(-6, 2))
TEMPERATURE = 0.07
"""Of the neighbours' weights, as in Wu et al. 2018 and DINO (Caron et al. 2021)."""
CHUNK = 1024


def neighbours(
    x_nD: np.ndarray, target_n: np.ndarray, classes: int, new_mD: np.ndarray, ks: Sequence[int]
) -> dict[int, np.ndarray]:
    """For each k, the m answers of the k nearest rows by cosine, each counting exp(cosine / 0.07)."""
    x, new = torch.from_numpy(unit(x_nD)).float(), torch.from_numpy(unit(new_mD)).float()
    votes_nC = F.one_hot(torch.from_numpy(target_n), classes).float()
    answers: dict[int, list[Tensor]] = {k: [] for k in ks}
    for some in new.split(CHUNK):
        cosine, index = (some @ x.T).topk(min(max(ks), len(x)), dim=1)
        weight = ((cosine - cosine[:, :1]) / TEMPERATURE).exp()
        for k in ks:
            scores = (votes_nC[index[:, :k]] * weight[:, :k, None]).sum(1)
            answers[k].append(scores.argmax(1))
    return {k: torch.cat(parts).numpy() for k, parts in answers.items()}


def linear(
    x_nD: np.ndarray, target_n: np.ndarray, classes: int, penalty: float
) -> Callable[[np.ndarray], np.ndarray]:
    """Multinomial logistic regression on standardised features by L-BFGS; returns what answers for other rows. The
    loss is the mean cross-entropy plus `penalty` times the sum of squared weights (not of the biases)."""
    centre, scale = x_nD.mean(0), x_nD.std(0) + 1e-6
    x, target = torch.from_numpy((x_nD - centre) / scale).float(), torch.from_numpy(target_n)
    weight = torch.zeros(x.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, target) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]

    def answer(new_mD: np.ndarray) -> np.ndarray:
        new = torch.from_numpy((new_mD - centre) / scale).float()
        found: np.ndarray = (new @ weight.detach() + bias.detach()).argmax(1).numpy()
        return found

    return answer


def by_texts(new_mE: np.ndarray, texts_CE: np.ndarray) -> np.ndarray:
    """The class whose text is nearest, by cosine."""
    found: np.ndarray = (unit(new_mE) @ unit(texts_CE).T).argmax(1)
    return found
