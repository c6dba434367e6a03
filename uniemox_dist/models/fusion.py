"""Fusion of scene and person into the teacher's space.

Shape legend: B samples, F decoder width, E teacher embedding width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PriorFusion(nn.Module):
    """The psychological prior: γ = ELU(Linear(λ ⊙ LN(α) + LN(β))), with a learnable weight λ (width F, from 1)
    and one LN for both (UniEmoX, IEEE TIP 2025): the environment (scene) and the individual (person) joined.

    Without the person branch (`fusion: none`), γ = ELU(Linear(λ ⊙ LN(α))).
    """

    def __init__(self, width: int, embedding_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.projection = nn.Linear(width, embedding_width)

    def forward(self, scene_BF: Tensor, person_BF: Tensor | None) -> Tensor:
        """Class tokens of scene (α) and person (β) to γ, B×E."""
        joined_BF = self.weight * self.norm(scene_BF)
        if person_BF is not None:
            joined_BF = joined_BF + self.norm(person_BF)
        return F.elu(self.projection(joined_BF))
