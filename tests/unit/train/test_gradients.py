"""The norm of gradients, their check and clipping agree with torch's, in one sum over ranks."""

import math

import pytest
import torch

from uniemox_dist.train.gradients import clip_factor, find_bad, sums_of_squares, total_norm

CPU = torch.device("cpu")
OK = torch.zeros(())


def groups(dtype: torch.dtype = torch.float32) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    shapes = [[(30, 20), (7,)], [], [(50,)]]
    return [
        {f"{g}.{i}": torch.randn(shape).to(dtype) for i, shape in enumerate(s)} for g, s in enumerate(shapes)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_that_of_all_gradients_as_one_vector(stage: int, dtype: torch.dtype) -> None:
    if stage == 0 and dtype == torch.bfloat16:
        pytest.skip("stage 0 works in fp32 only")
    found = groups(dtype)
    whole = torch.cat([gradient.flatten() for group in found for gradient in group.values()]).double()
    norm = total_norm(sums_of_squares(found, stage, 1, CPU, clips=True), stage)
    assert float(norm) == pytest.approx(float(whole.norm()), rel=1e-6)


def test_ranks_together_count_each_gradient_once() -> None:
    found = groups()
    expected = total_norm(sums_of_squares(found, 1, 1, CPU, clips=True), 1)
    # In ZeRO each rank has a share, and one can have none; in stage 0 each has all.
    shares = [[found[0], {}, {}], [{}, {}, found[2]], [{}, {}, {}]]
    summed = sum(sums_of_squares(share, 1, 3, CPU, clips=True) for share in shares)
    assert isinstance(summed, torch.Tensor)
    assert torch.equal(total_norm(summed, 1), expected)
    everywhere = 3 * sums_of_squares(found, 0, 3, CPU, clips=True)
    assert float(total_norm(everywhere, 0)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e20])
def test_a_value_that_is_not_finite_or_whose_square_is_not_is_found(stage: int, value: float) -> None:
    found = groups()
    loss = torch.tensor(1.5, dtype=torch.float64)
    assert find_bad(loss, sums_of_squares(found, stage, 1, CPU, clips=True)) == 0
    found[2]["2.0"][7] = value
    assert find_bad(loss, sums_of_squares(found, stage, 1, CPU, clips=True)) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_found(value: float) -> None:
    squares = sums_of_squares(groups(), 1, 1, CPU, clips=True)
    assert find_bad(torch.tensor(value, dtype=torch.float64), squares) == 1


def test_larger_norms_are_scaled_down_and_smaller_ones_are_left() -> None:
    norm = torch.tensor(4.0)
    assert float(clip_factor(norm, OK, 2.0)) == pytest.approx(0.5, rel=1e-6)
    assert float(clip_factor(norm, OK, 5.0)) == 1.0
    assert float(clip_factor(torch.tensor(math.nan), OK + 1, 2.0)) == 1.0
