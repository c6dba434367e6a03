"""Drop path depends on slots only."""

import pytest
import timm
import torch
from timm.layers import DropPath as Timms

from uniemox_dist.config.schema import ModelConfig
from uniemox_dist.data.masks import draw_drop_paths, drop_path_factors
from uniemox_dist.models.drop_path import (
    DropPath,
    find_drop_paths,
    list_rates,
    replace_drop_paths,
    set_factors,
)
from uniemox_dist.models.encoder import MaskedEncoder


def test_our_drop_path_replaces_each_of_timms_with_its_rate() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, depth=4)
    rates = [m.drop_prob for m in vit.modules() if isinstance(m, Timms)]
    replace_drop_paths(vit)
    assert not any(isinstance(m, Timms) for m in vit.modules())
    assert [path.rate for path in find_drop_paths(vit)] == rates
    assert rates[-1] == pytest.approx(0.3)
    encoder = MaskedEncoder(
        ModelConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, drop_path=0.2)
    )
    assert [path.rate for path in find_drop_paths(encoder)] == pytest.approx([0.1, 0.1, 0.2, 0.2])
    assert all(name.startswith(("blocks", "cls", "pos", "patch", "norm")) for name in encoder.state_dict())


def test_a_sample_below_the_rate_does_without_the_branch_and_the_others_are_scaled_up() -> None:
    path, x = DropPath(0.25), torch.ones(4, 3, 2)
    draws = torch.tensor([[0.2], [0.25], [0.9], [0.0], [0.5]])  # more than samples: one view alone
    set_factors([path], drop_path_factors(draws, [0.25]))
    assert torch.equal(path(x)[:, 0, 0], torch.tensor([0.0, 4 / 3, 4 / 3, 0.0]))
    assert torch.equal(path.eval()(x), x)
    path.train().factors_B = None
    torch.manual_seed(0)
    assert set(path(torch.ones(200, 1, 1)).flatten().tolist()) == {0.0, float(torch.tensor(1.0) / 0.75)}


def test_draws_follow_from_slot_view_place_and_seed_and_are_uniform() -> None:
    slots = torch.arange(5000)
    draws = draw_drop_paths(slots, 3, 6)
    assert draws.shape == (10_000, 6)
    assert torch.equal(draw_drop_paths(slots[40:44], 3, 6), draws[[40, 41, 42, 43, 5040, 5041, 5042, 5043]])
    assert 0 <= draws.min() < draws.max() < 1
    for rate in (0.1, 0.5):
        share = (draws < rate).double().mean(0)
        assert torch.allclose(share, torch.full_like(share, rate), atol=0.02)
    columns = torch.corrcoef(torch.cat([draws[:5000], draws[5000:]], dim=1).T)
    assert (columns - torch.eye(12)).abs().max() < 0.06
    assert not torch.equal(draw_drop_paths(slots, 4, 6), draws)


def test_each_drop_path_layer_gets_its_own_column() -> None:
    encoder = MaskedEncoder(
        ModelConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, drop_path=0.2)
    )
    draws = draw_drop_paths(torch.arange(4), 0, 4)
    set_factors(find_drop_paths(encoder), drop_path_factors(draws, list_rates(encoder)))
    for k, path in enumerate(find_drop_paths(encoder)):
        assert path.factors_B is not None
        assert torch.equal(path.factors_B > 0, draws[:, k] >= path.rate)
    with pytest.raises(ValueError, match="zip"):
        set_factors(find_drop_paths(encoder), draws[:, :3])
