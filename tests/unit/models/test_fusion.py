"""Fusions against NumPy computations written from their formulas."""

import numpy as np
import pytest
import torch
from torch import nn

from uniemox_dist.models.fusion import Fusion, make_fusion

B, F, E, H = 5, 12, 7, 3
KINDS = ("prior", "multi_head", "attention", "gated_mlp")


def made(kind: str) -> Fusion:
    torch.manual_seed(0)
    fusion = make_fusion(kind, F, E, H)
    for parameter in fusion.parameters():  # no formula may hide behind a weight of 1 or a bias of 0
        nn.init.normal_(parameter, std=0.5)
    return fusion


def tokens(seed: int) -> torch.Tensor:
    return torch.randn(B, F, generator=torch.Generator().manual_seed(seed))


def weights(fusion: Fusion) -> dict[str, np.ndarray]:
    return {name: p.detach().double().numpy() for name, p in fusion.named_parameters()}


def linear(w: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def joined(kind: str, w: dict[str, np.ndarray], a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The expected input of the projection, from the normalised class tokens of scene and person."""
    if kind == "prior":
        return w["weight"] * a + b
    if kind == "multi_head":
        return sum(w["scene_weights"][h] * a + w["person_weights"][h] * b for h in range(H))  # type: ignore[return-value]
    if kind == "attention":
        out = np.zeros((B, F))
        scores = linear(w, "scene_score", a), linear(w, "person_score", b)
        for i in range(B):
            for h in range(H):
                weight = softmax(np.array([scores[0][i, h], scores[1][i, h]]))
                part = slice(h * F // H, (h + 1) * F // H)
                out[i, part] = weight[0] * a[i, part] + weight[1] * b[i, part]
        return out
    heads = []
    for h in range(H):
        part = slice(h * F, (h + 1) * F)
        scene = softmax(linear(w, "scene_attention", a)[:, part]) * a
        person = softmax(linear(w, "person_attention", b)[:, part]) * b
        heads.append(F * (scene + person))
    hidden = np.maximum(linear(w, "mlp.0", np.concatenate(heads, axis=1)), 0)
    mixed = linear(w, "mlp.2", hidden)
    return mixed * sigmoid(linear(w, "gate", mixed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fusion_is_its_formula(kind: str) -> None:
    fusion = made(kind)
    w = weights(fusion)

    def norm(x: np.ndarray) -> np.ndarray:
        centred = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-6)
        return centred * w["norm.weight"] + w["norm.bias"]

    scene, person = tokens(1), tokens(2)
    z = linear(w, "projection", joined(kind, w, norm(scene.double().numpy()), norm(person.double().numpy())))
    expected = np.where(z > 0, z, np.exp(np.minimum(z, 0)) - 1)
    np.testing.assert_allclose(fusion(scene, person).detach().numpy(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_both_views_and_every_weight_count(kind: str) -> None:
    fusion = made(kind)
    scene, person = tokens(1).requires_grad_(), tokens(2).requires_grad_()
    (fusion(scene, person) * torch.randn(B, E)).sum().backward()
    for tensor in (scene, person, *fusion.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.abs().sum() > 0


def test_without_fusion_the_formula_is_the_priors_without_the_person() -> None:
    fusion = made("none")
    w = weights(fusion)
    scene = tokens(1).double().numpy()
    normed = (scene - scene.mean(1, keepdims=True)) / np.sqrt(scene.var(1, keepdims=True) + 1e-6)
    z = linear(w, "projection", w["weight"] * (normed * w["norm.weight"] + w["norm.bias"]))
    expected = np.where(z > 0, z, np.exp(np.minimum(z, 0)) - 1)
    np.testing.assert_allclose(fusion(tokens(1), None).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
