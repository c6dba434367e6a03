"""Each loss against an independent NumPy computation, written from the method's formulas."""

import numpy as np
import pytest
import torch

from uniemox_dist.config.losses import LOSS_NAMES, LOSS_TERMS, LossConfig
from uniemox_dist.models import losses


def rows(n: int, width: int, seed: int) -> np.ndarray:
    return np.random.RandomState(seed).randn(n, width)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(axis=1, keepdims=True))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b)))


def test_similarity_loss_is_mean_of_one_minus_cosine() -> None:
    fused, teacher = rows(5, 7, 0), rows(5, 7, 1)
    expected = np.mean([1 - cosine(g, o) for g, o in zip(fused, teacher)])
    found = losses.similarity_loss(torch.tensor(fused), torch.tensor(teacher))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_relation_loss_compares_rows_of_similarities_with_all_texts_of_the_step() -> None:
    fused, teacher, texts = rows(4, 6, 0), rows(4, 6, 1), unit(rows(11, 6, 2))
    total = 0.0
    for i in range(4):
        student_row = [float(np.dot(unit(fused)[i], text)) for text in texts]
        teacher_row = [float(np.dot(unit(teacher)[i], text)) for text in texts]
        total += 1 - cosine(np.array(student_row), np.array(teacher_row))
    found = losses.relation_loss(*(torch.tensor(x) for x in (fused, teacher, texts)))
    assert found.item() == pytest.approx(total / 4, rel=1e-6)


def test_relation_loss_as_kl_between_softmaxes_at_the_teachers_scale() -> None:
    fused, teacher, texts = rows(4, 6, 3), rows(4, 6, 4), unit(rows(9, 6, 5))

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    p, q = softmax(20 * unit(teacher) @ texts.T), softmax(20 * unit(fused) @ texts.T)
    expected = float((p * np.log(p / q)).sum(axis=1).mean())
    tensors = [torch.tensor(x) for x in (fused, teacher, texts)]
    assert losses.relation_loss(*tensors, form="kl", logit_scale=20.0).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_relation_loss_is_zero_for_equal_directions_of_any_length() -> None:
    teacher, texts = rows(3, 6, 0), unit(rows(8, 6, 1))
    assert (
        losses.relation_loss(torch.tensor(5 * teacher), torch.tensor(teacher), torch.tensor(texts)).item()
        < 1e-6
    )


def test_relation_loss_over_micro_batches_averages_to_that_of_the_whole_batch() -> None:
    fused, teacher, texts = (torch.tensor(x) for x in (rows(6, 5, 0), rows(6, 5, 1), unit(rows(6, 5, 2))))
    whole = losses.relation_loss(fused, teacher, texts)
    halves = [losses.relation_loss(fused[i : i + 3], teacher[i : i + 3], texts) for i in (0, 3)]
    assert (sum(halves) / 2).item() == pytest.approx(whole.item(), rel=1e-6)


def test_reconstruction_loss_and_norm_pix_targets() -> None:
    pixels, predicted = rows(2 * 3, 12, 0).reshape(2, 3, 12), rows(2 * 3, 12, 1).reshape(2, 3, 12)
    plain = losses.reconstruction_targets(torch.tensor(pixels), norm_pix=False)
    assert losses.reconstruction_loss(torch.tensor(predicted), plain).item() == pytest.approx(
        float(((predicted - pixels) ** 2).mean()), rel=1e-6
    )
    standard = losses.reconstruction_targets(torch.tensor(pixels), norm_pix=True).numpy()
    mean, variance = pixels.mean(axis=2, keepdims=True), pixels.var(axis=2, ddof=1, keepdims=True)
    np.testing.assert_allclose(standard, (pixels - mean) / np.sqrt(variance + 1e-6), rtol=1e-4, atol=1e-5)


def test_every_loss_of_the_table_has_a_function_and_a_weight() -> None:
    assert tuple(losses.LOSSES) == LOSS_NAMES == tuple(LossConfig().weights)
    assert len({colour for term in LOSS_TERMS for colour in term.colours}) == 2 * len(LOSS_TERMS)
