"""`keep_after`: of the visual tokens, those that the end of the prompt attends to stay in the language model."""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict

from .bases_hires_lmm import HiResLmmLayerOp, LayerCall


def keep_share(
    scores: torch.Tensor, candidates: torch.Tensor, share: float, number: int | None = None
) -> torch.Tensor:
    """Keep the highest scores `(B, m)` of each row: a share of the candidates, rounded half up, or a number."""
    counts = candidates.sum(dim=1, keepdim=True)
    wanted = torch.full_like(counts, number) if number is not None else (counts.double() * share + 0.5).floor().long()
    order = scores.masked_fill(~candidates, float("-inf")).argsort(dim=1, descending=True, stable=True)
    return (order.argsort(dim=1) < wanted) | ~candidates


class HiResLmmKeepAfter(HiResLmmLayerOp):
    """Behind a layer, the visual tokens that the last token of the prompt attends to least leave.

    Their score is the layer's attention: softmax over all keys that the token sees, mean over the heads.

    Source: FastV, huggingface.co/papers/2403.06764; its K = 2 is layer 1 here. Ours: the scores come from one query
    of that layer under any attention backend, and tokens leave for good, so later layers cache fewer.
    """

    reads_attention = True

    @strict
    @dataclass
    class Options(HiResLmmLayerOp.Options):
        """Options of `keep_after`.

        Args:
            share (`float`): Share of the visual tokens of a row, of those still there, that stays.
            number (`int`, *optional*): Number of them that stays, in place of the share.
        """

        layers: int | list | str = 1
        share: float | int = 0.5
        number: int | None = None

        def __post_init__(self) -> None:
            if self.of != "language_model":
                raise ValueError('keep_after works in the language model; leave out of="vision_tower".')
            if not 0 <= self.share <= 1:
                raise ValueError(f"share={self.share} must lie between 0 and 1.")
            if self.number is not None and self.number < 0:
                raise ValueError(f"number={self.number} must be at least 0.")

    @torch.no_grad()
    def forward(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose what stays; see `HiResLmmLayerOp.forward`."""
        if not call.is_prefill:
            return hidden, None
        scores = call.attention.weights(call.last[:, None])[:, :, 0].mean(dim=1)
        return hidden, keep_share(scores, call.visual, float(self.options.share), self.options.number)
