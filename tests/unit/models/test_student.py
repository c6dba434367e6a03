"""The student follows the method: which inputs influence which outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from handmade import TINY_STUDENT as MODEL
from torch import Tensor

from uniemox_dist.config.schema import LossConfig, ModelConfig
from uniemox_dist.data.masks import patch_order
from uniemox_dist.models.patches import normalise, patchify, select_patches, sincos_positions, unpatchify
from uniemox_dist.models.student import Student, Targets, Views

E, B = 12, 3


def student(model: ModelConfig = MODEL, **loss: float) -> Student:
    torch.manual_seed(0)
    return Student(model, LossConfig(**loss), E)


def pictures(seed: int) -> Tensor:
    return torch.randint(
        0, 256, (B, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def views() -> Views:
    slots = torch.arange(B)
    return Views(pictures(1), pictures(2), patch_order(slots, 0, 5, 16), patch_order(slots, 1, 5, 16))


def targets() -> Targets:
    g = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize
    return Targets(unit(torch.randn(B, E, generator=g), dim=1), unit(torch.randn(7, E, generator=g), dim=1))


def with_masked_patches_changed(scene: Tensor, order_BN: Tensor, visible: int) -> Tensor:
    patches = patchify(scene.float(), 8)
    changed = patches.clone()
    for b in range(B):
        masked = order_BN[b, visible:]
        changed[b, masked] = patches[b, masked.flip(0)]
    return unpatchify(changed, 8).to(torch.uint8)


def test_permuting_masked_content_does_not_change_the_encoder() -> None:
    model, v = student(), views()
    other = with_masked_patches_changed(v.scene_B3HW, v.scene_order_BN, MODEL.visible)
    assert not torch.equal(other, v.scene_B3HW)
    visible = model.split(v.scene_order_BN)[0]
    a, b = (model.encoder(model.patches(scene), visible) for scene in (v.scene_B3HW, other))
    assert torch.equal(a, b)
    parts = [model(replace(v, scene_B3HW=scene), targets())[1] for scene in (v.scene_B3HW, other)]
    assert torch.equal(parts[0][:2], parts[1][:2])  # relation and similarity
    assert parts[0][2] != parts[1][2]  # reconstruction compares with what is masked


def test_only_masked_patches_count_in_reconstruction() -> None:
    model, v = student(relation=0, similarity=0), views()
    visible, masked = model.split(v.scene_order_BN)
    assert visible.shape == (B, 4)
    assert masked.shape == (B, 12)
    _, parts = model(v, Targets())
    patches = model.patches(v.scene_B3HW)
    predicted = model.decoder(model.to_decoder(model.encoder(patches, visible)), visible, masked)  # type: ignore[misc]
    expected = np.mean(
        [
            ((predicted[b, i] - patches[b, masked[b, i]]).detach().numpy() ** 2).mean()
            for b in range(B)
            for i in range(masked.shape[1])
        ]
    )
    assert parts[2].item() == pytest.approx(expected, rel=1e-5)


def test_total_is_the_weighted_sum_of_the_parts() -> None:
    total, parts = student(relation=2, similarity=0.5, reconstruction=3)(views(), targets())
    assert total.item() == pytest.approx(
        2 * parts[0].item() + 0.5 * parts[1].item() + 3 * parts[2].item(), rel=1e-6
    )


def test_fusion_is_the_psychological_prior() -> None:
    model, v = student(), views()
    with torch.no_grad():
        assert model.fusion is not None
        model.fusion.weight.copy_(torch.linspace(0.5, 2, 16))
        tokens = [
            model.to_decoder(model.encoder(model.patches(x), model.split(o)[0]))[:, 0]
            for x, o in ((v.scene_B3HW, v.scene_order_BN), (v.person_B3HW, v.person_order_BN))  # type: ignore[arg-type]
        ]
        alpha, beta = (t.numpy() for t in tokens)

        def layer_norm(x: np.ndarray) -> np.ndarray:
            return (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)

        joined = np.linspace(0.5, 2, 16) * layer_norm(alpha) + layer_norm(beta)
        linear = joined @ model.fusion.projection.weight.numpy().T + model.fusion.projection.bias.numpy()
        gamma = np.where(linear > 0, linear, np.exp(linear) - 1)
        _, parts = model(v, targets())
    omega = targets().pictures_BE
    assert omega is not None
    cosines = (gamma * omega.numpy()).sum(1) / np.linalg.norm(gamma, axis=1)
    assert parts[1].item() == pytest.approx(float((1 - cosines).mean()), rel=1e-5)


def test_the_person_view_matters_with_fusion_and_is_not_built_without() -> None:
    v = views()
    other = replace(v, person_B3HW=pictures(9))
    model = student()
    assert model(v, targets())[1][1] != model(other, targets())[1][1]
    alone = student(MODEL.model_copy(update={"fusion": "none"}))
    assert not alone.has_person_branch
    without = replace(v, person_B3HW=None, person_order_BN=None)
    assert torch.isfinite(alone(without, targets())[0])


def test_person_patches_are_reconstructed_on_request_with_equal_weight() -> None:
    v = views()
    both = student(relation=0, similarity=0, person_reconstruction=True)
    assert both.has_person_branch
    assert both.fusion is None
    alone = student(relation=0, similarity=0)
    assert not alone.has_person_branch
    alone.load_state_dict(both.state_dict())
    of_scene = alone(v, Targets())[1][2].item()
    assert v.person_B3HW is not None
    assert v.person_order_BN is not None
    of_person = alone(replace(v, scene_B3HW=v.person_B3HW, scene_order_BN=v.person_order_BN), Targets())[1][2]
    assert both(v, Targets())[1][2].item() == pytest.approx((of_scene + of_person.item()) / 2, rel=1e-5)


def test_scheduled_weights_take_the_place_of_those_of_the_configuration() -> None:
    goal = replace(targets(), loss_weights={"relation": 0.5, "similarity": 0.0, "reconstruction": 2.0})
    total, parts = student(relation=1, similarity=1, reconstruction=1)(views(), goal)
    assert total.item() == pytest.approx(0.5 * parts[0].item() + 2 * parts[2].item(), rel=1e-6)


@pytest.mark.parametrize("fusion", ["multi_head", "attention", "gated_mlp"])
def test_every_fusion_trains_all_its_weights(fusion: str) -> None:
    model = student(MODEL.model_copy(update={"fusion": fusion, "fusion_heads": 4}))
    model(views(), targets())[0].backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_loss_that_is_off_builds_no_modules() -> None:
    assert student(reconstruction=0).decoder is None
    assert student(relation=0, similarity=0).fusion is None
    assert student(relation=0).fusion is not None


def test_every_trained_parameter_gets_a_gradient_and_the_targets_none() -> None:
    model, goal = student(), targets()
    assert goal.pictures_BE is not None
    total, _ = model(views(), goal)
    total.backward()
    missing = [
        n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []
    assert model.encoder.pos_embed.grad is None
    assert not goal.pictures_BE.requires_grad


def test_encoder_with_everything_visible_equals_timms_own_forward() -> None:
    import timm

    model = student().eval()
    reference = timm.create_model(
        "vit_base_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2
    ).eval()
    reference.load_state_dict(model.encoder.state_dict())
    scene = pictures(1)
    with torch.no_grad():
        expected = reference.forward_features(normalise(scene, MODEL.mean, MODEL.std, torch.float32))
        found = model.encoder(model.patches(scene), torch.arange(16).expand(B, -1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_reconstruction_of_known_patches_returns_pixels() -> None:
    model = student(relation=0, similarity=0)
    scene = pictures(4)
    masked = model.split(patch_order(torch.arange(B), 0, 5, 16))[1]
    found = model.to_unit(select_patches(model.patches(scene), masked))
    expected = select_patches(patchify(scene.float() / 255, 8), masked)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_unpatchify_inverts_patchify() -> None:
    x = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(x, 8), 8), x)


def test_positions_have_a_zero_class_row_and_encode_row_and_column() -> None:
    table = sincos_positions(16, 3)[0]
    assert table.shape == (10, 16)
    assert not table[0].any()
    grid = table[1:].reshape(3, 3, 16)
    assert torch.equal(grid[0, 1, :8], grid[2, 1, :8])  # the first half depends on the column only
    assert torch.equal(grid[1, 0, 8:], grid[1, 2, 8:])  # the second half on the row only
    assert grid[1, 2, 0].item() == pytest.approx(np.sin(2.0), rel=1e-6)
