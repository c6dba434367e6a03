import math

import pytest
import torch

from uniemox_dist.train.monitor.nonfinite import count, statistics

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_with_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    tensors = [torch.full((300,), 1e10, dtype=dtype) for _ in range(4)]
    assert count(tensors, CPU) == 0
    tensors[0][7] = math.nan
    tensors[2][299] = -math.inf
    assert count(tensors, CPU) == 2


def test_a_rank_without_a_share_counts_nothing() -> None:
    assert count([], CPU) == 0


def test_statistics_cover_finite_numbers_only() -> None:
    tensor = torch.tensor([1.0, -3.0, math.nan, math.inf, -math.inf])
    assert statistics(tensor) == {"shape": [5], "nan": 1, "infinite": 2, "mean": -1.0, "largest": 3.0}
    assert statistics(torch.full((2,), math.nan))["largest"] is None
