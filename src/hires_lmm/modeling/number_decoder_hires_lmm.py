"""A head that reads the numbers of a chart off one token."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmHead, PartContext


class HiResLmmNumberDecoder(HiResLmmHead):
    """The numbers of a chart in the order of the answer, min-max normalised, from the state of a token such as
    `<Number>`: three layers.

    Labels `(N, slots)` are the numbers as they are, NaN behind the last. The loss is the mean distance over all
    numbers of a batch; charts whose numbers are all equal have no range and count nothing.

    Source: OneChart, huggingface.co/papers/2404.09987 (LingyvKong/OneChart at 4bf11d9), which reads the place of the
    token in the first sample of a batch for all of them; here each row has its own.
    """

    @strict
    @dataclass
    class Options(HiResLmmHead.Options):
        """Options of `number_decoder`, beside `token_id` and `weight`.

        Args:
            slots (`int`): Most numbers.
        """

        slots: int = 256

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        width, half = context.text_width, context.text_width // 2
        self.num_decoder = nn.Sequential(
            nn.Linear(width, half), nn.ReLU(), nn.Linear(half, half), nn.ReLU(), nn.Linear(half, options.slots)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Read `(N, D)` states: `(N, slots)`."""
        return self.num_decoder(hidden)

    def loss(self, output: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The mean distance to the normalised labels, where they have a value."""
        given = ~labels.isnan()
        low = labels.masked_fill(~given, torch.inf).amin(dim=1, keepdim=True)
        high = labels.masked_fill(~given, -torch.inf).amax(dim=1, keepdim=True)
        targets = (labels - low) / (high - low)
        counted = ~targets.isnan()
        return (output.float() - targets.float())[counted].abs().sum() / counted.sum().clamp(min=1)
