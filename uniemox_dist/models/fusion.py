"""Fusion of scene and person into the teacher's space.

The psychological prior is the paper's (UniEmoX, IEEE TIP 34, 2025, doi 10.1109/TIP.2025.3587577). The other kinds are
choices of its released code. To be comparable they also begin with one LN for both views and end with the same
projection (in the released code they end in other ways, and one takes a softmax over a single number, which is 1).
Shape legend: B samples, F decoder width, E teacher embedding width, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fusion(nn.Module):
    """Base of all kinds: LN of both class tokens, `join` (B×F and B×F to B×F), then γ = ELU(Linear(joined))."""

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.projection = nn.Linear(width, embedding_width)

    def join(self, scene_BF: Tensor, person_BF: Tensor) -> Tensor:
        """Joins the normalised class tokens into one vector of width F."""
        raise NotImplementedError

    def forward(self, scene_BF: Tensor, person_BF: Tensor | None) -> Tensor:
        """Fuses the class tokens of scene (α) and person (β) into γ, B×E."""
        assert person_BF is not None
        return F.elu(self.projection(self.join(self.norm(scene_BF), self.norm(person_BF))))


class PriorFusion(Fusion):
    """The psychological prior, which joins environment (scene) and individual (person).

    γ = ELU(Linear(λ ⊙ LN(α) + LN(β))) with a learnable weight λ (width F, initially 1) and one LN for both views.

    Without the person branch (`fusion: none`), γ = ELU(Linear(λ ⊙ LN(α))).
    """

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__(width, embedding_width)
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, scene_BF: Tensor, person_BF: Tensor | None) -> Tensor:
        joined_BF = self.weight * self.norm(scene_BF)
        if person_BF is not None:
            joined_BF = joined_BF + self.norm(person_BF)
        return F.elu(self.projection(joined_BF))


class MultiHeadFusion(Fusion):
    """Multi-head weighted sum: Σ_h a_h ⊙ LN(α) + b_h ⊙ LN(β), with learnable weights a, b of H×F.

    They start with different values around 1/H, so that the sum starts near the prior's.
    """

    def __init__(self, width: int, embedding_width: int, heads: int) -> None:
        super().__init__(width, embedding_width)
        self.scene_weights = nn.Parameter((1 + torch.randn(heads, width)) / heads)
        self.person_weights = nn.Parameter((1 + torch.randn(heads, width)) / heads)

    def join(self, scene_BF: Tensor, person_BF: Tensor) -> Tensor:
        return self.scene_weights.sum(0) * scene_BF + self.person_weights.sum(0) * person_BF


class AttentionFusion(Fusion):
    """Attention-weighted sum.

    Each head scores both views, weighs them by a softmax over the two scores, and sums its F/H channels of both; the
    heads are concatenated.
    """

    def __init__(self, width: int, embedding_width: int, heads: int) -> None:
        super().__init__(width, embedding_width)
        self.heads = heads
        self.scene_score = nn.Linear(width, heads)
        self.person_score = nn.Linear(width, heads)

    def join(self, scene_BF: Tensor, person_BF: Tensor) -> Tensor:
        scores_BH2 = torch.stack([self.scene_score(scene_BF), self.person_score(person_BF)], dim=-1)
        scene_BH1, person_BH1 = scores_BH2.softmax(dim=-1).split(1, dim=-1)
        by_head = scene_BF.unflatten(1, (self.heads, -1)), person_BF.unflatten(1, (self.heads, -1))
        return (scene_BH1 * by_head[0] + person_BH1 * by_head[1]).flatten(1)


class GatedMlpFusion(Fusion):
    """Gated MLP.

    Each head weighs the channels of both views by a softmax of a linear layer (times F, which keeps the scale of a
    channel) and adds them. An MLP over all heads gives m, and the result is m ⊙ σ(Linear(m)).
    """

    def __init__(self, width: int, embedding_width: int, heads: int) -> None:
        super().__init__(width, embedding_width)
        self.heads = heads
        self.scene_attention = nn.Linear(width, heads * width)
        self.person_attention = nn.Linear(width, heads * width)
        self.mlp = nn.Sequential(nn.Linear(heads * width, width), nn.ReLU(), nn.Linear(width, width))
        self.gate = nn.Linear(width, width)

    def join(self, scene_BF: Tensor, person_BF: Tensor) -> Tensor:
        weighed_BHF = sum(
            attention(view_BF).unflatten(1, (self.heads, -1)).softmax(dim=-1) * view_BF[:, None]
            for attention, view_BF in ((self.scene_attention, scene_BF), (self.person_attention, person_BF))
        )
        assert isinstance(weighed_BHF, Tensor)
        mixed_BF: Tensor = self.mlp(weighed_BHF.flatten(1) * scene_BF.shape[1])
        return mixed_BF * self.gate(mixed_BF).sigmoid()


def make_fusion(kind: str, width: int, embedding_width: int, heads: int) -> Fusion:
    """Creates the fusion of a kind; `none` is the prior's formula without the person."""
    if kind in ("prior", "none"):
        return PriorFusion(width, embedding_width)
    classes = {"multi_head": MultiHeadFusion, "attention": AttentionFusion, "gated_mlp": GatedMlpFusion}
    return classes[kind](width, embedding_width, heads)
