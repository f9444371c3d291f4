"""The noise of training, one class, so that everything which switches dropout off finds it."""

import torch
from torch import nn


class HiResLmmNoise(nn.Dropout):
    """Adds normal noise in training mode.

    `eval()` and `p = 0`, which trainers set on every dropout to compare a model with itself, switch it off; any other
    `p` leaves it whole. With `p = 0` in training mode the scale still takes part, so every parameter gets a gradient.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def forward(self, scores: torch.Tensor, scale: torch.Tensor | float = 1.0) -> torch.Tensor:
        """Add noise of that standard deviation, which broadcasts, to scores of any shape."""
        if not self.training:
            return scores
        return scores + (torch.randn_like(scores) if self.p else torch.zeros_like(scores)) * scale
