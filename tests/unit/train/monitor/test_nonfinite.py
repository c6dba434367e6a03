import math

import torch

from uniemox_dist.train.monitor.nonfinite import statistics


def test_statistics_cover_finite_numbers_only() -> None:
    tensor = torch.tensor([1.0, -3.0, math.nan, math.inf, -math.inf])
    assert statistics(tensor) == {"shape": [5], "nan": 1, "infinite": 2, "mean": -1.0, "largest": 3.0}
    assert statistics(torch.full((2,), math.nan))["largest"] is None
