"""The classifier that cells must fool when panels differ, so that the panel does not show in the latent space.

Source: spec section 3.4. It belongs to the fit, not to the model, and is not kept.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from anvi.nn.layers import Draws, Linear, Stack


class Adversary(nn.Module):
    """Predicts the batch (or panel) of a cell from its latent vector.

    Parameters
    ----------
    n_latent
        Width of the latent space.
    n_groups
        How many batches or panels.
    generator
        Source of the initial weights.
    """

    def __init__(self, n_latent: int, n_groups: int, generator: torch.Generator):
        super().__init__()
        self.stack = Stack(n_latent, 32, 2, dropout=0.1)
        self.head = Linear(32, n_groups)
        for module in self.modules():
            if isinstance(module, Linear):
                module.reset(generator)

    def forward(self, z: Tensor, draws: Draws) -> Tensor:
        """Log-probabilities of the groups `(cells, groups)`."""
        return self.head(self.stack(z, None, draws), None).log_softmax(-1)

    def fooling_loss(self, z: Tensor, group: Tensor, weight: Tensor, draws: Draws) -> Tensor:
        """Cross-entropy to a uniform guess among the other groups: small when the group does not show."""
        log_p = self(z, draws)
        of_others = log_p.sum(1) - log_p.gather(1, group[:, None]).squeeze(1)
        per_cell = -of_others / (log_p.shape[1] - 1)
        return (weight * per_cell).sum() / weight.sum()

    def own_loss(self, z: Tensor, group: Tensor, weight: Tensor, draws: Draws) -> Tensor:
        """Cross-entropy of the classifier itself; no gradient reaches the latent vectors."""
        per_cell = functional.cross_entropy(self(z.detach(), draws), group, reduction="none")
        return (weight * per_cell).sum() / weight.sum()
