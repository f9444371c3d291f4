"""`atp`: visual tokens leave the language model where neither their attention nor their place passes a threshold."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmLayerOp, LayerCall, PartContext


QUERIES_AT_ONCE = 256


def spatial_scores(cells: torch.Tensor, rates: list[float], factor: float) -> torch.Tensor:
    """For cells `(..., 2)`, row and column: the most that a lattice of one of the rates gives them, 0 beside all.

    A lattice of rate R has every `round(sqrt(1 / R))`-th row and column from (0, 0) on and gives `1 - factor R`.
    """
    found = torch.zeros(cells.shape[:-1], dtype=torch.float32, device=cells.device)
    for rate in rates:
        on = (cells % round(math.sqrt(1 / rate)) == 0).all(dim=-1)
        found = torch.maximum(found, on.float() * max(0.0, 1 - factor * rate))
    return found


def mean_over_queries(read: Any, queries: torch.Tensor) -> torch.Tensor:
    """Mean over queries and heads of what `read(rows)` gives, `(B, heads, r, m)`, some rows at a time.

    Args:
        read (`Callable`): `weights` or `logits` of a `LayerAttention`.
        queries (`torch.Tensor` of shape `(B, m)`): True at the queries of each row.

    Returns:
        `(B, m)` float32; 0 in rows without queries.
    """
    rows = (~queries).to(torch.int8).argsort(dim=1, stable=True)[:, : int(queries.sum(dim=1).max())]
    found = torch.zeros(queries.shape, dtype=torch.float32, device=queries.device)
    for part in rows.split(QUERIES_AT_ONCE, dim=1) if rows.shape[1] else ():
        found += (read(part).mean(dim=1) * queries.gather(1, part)[..., None]).sum(dim=1)
    return found / queries.sum(dim=1, keepdim=True).clamp(min=1)


def mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `(B, m)` over a mask: `(B,)`."""
    return (values * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


class HiResLmmTokenThresholds(nn.Module):
    """From the means of two scores `(B, 2)` to the thresholds of redundancy and of place, `(B, 1)` float32 each."""

    def __init__(self, middle: int, activation: str):
        super().__init__()
        self.middle, self.activation = nn.Linear(2, middle), activation
        self.redundancy, self.spatial = nn.Linear(middle, 1), nn.Linear(middle, 1)

    def forward(self, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Thresholds between 0 and 1."""
        middle = self.middle(means.to(self.middle.weight.dtype))
        middle = middle.relu() if self.activation == "relu" else middle
        return self.redundancy(middle).sigmoid().float(), self.spatial(middle).sigmoid().float()


class HiResLmmAtp(HiResLmmLayerOp):
    """Behind each of its layers a visual token stays if its redundancy score or its spatial score passes a threshold.

    The redundancy score is half the mean logit that it gets from visual tokens, plus half the mean attention that it
    gets from the prompt's text behind the last image. Heads read the means of both and give the thresholds. In
    training nothing leaves: later layers weigh tokens as keys by the sigmoid of the larger margin, and
    `aux["token_budget/<layer>"]` `(B, 2)` has the sum of that mask and the number of tokens, for the objective of that
    name. Gradients reach the heads and what the masks change, not the scores.

    Source: ATP-LLaVA, huggingface.co/papers/2412.00447, which has no public code: logits from all visual tokens,
    later ones too, the width of the heads and several rates (with one, place decides over all alike) are ours.
    """

    reads_attention = True
    is_soft = True

    @strict
    @dataclass
    class Options(HiResLmmLayerOp.Options):
        """Options of `atp`.

        Args:
            layers (`int`, `list[int]` or `"all"`): Layers behind which tokens leave; the paper's are 3, 13 and 23.
            middle (`int`): Width of the heads.
            activation (`str`): `"relu"` or `"none"` in the heads.
            rates (`list[float]`): Shares of the grid that lattices have, for the spatial score.
            factor (`float`): What a rate counts against its lattice.
            temperature (`float`): Steepness of the mask in training.
        """

        middle: int = 16
        activation: Literal["relu", "none"] = "relu"
        rates: list = field(default_factory=lambda: [1 / 4, 1 / 9, 1 / 16])
        factor: float | int = 3.0
        temperature: float | int = 10.0

        def __post_init__(self) -> None:
            if self.of != "language_model":
                raise ValueError('atp works in the language model; leave out of="vision_tower".')
            if self.middle < 1 or self.temperature <= 0:
                raise ValueError(f"middle={self.middle} and temperature={self.temperature} must be above 0.")
            if not all(isinstance(rate, float | int) and 0 < rate <= 1 for rate in self.rates):
                raise ValueError(f"rates={self.rates} must be numbers above 0 and at most 1.")

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        self.thresholds = nn.ModuleList(
            HiResLmmTokenThresholds(options.middle, options.activation) for _ in context.layers
        )

    @torch.no_grad()
    def scores(self, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Redundancy and spatial score of each token, and what the heads read: `(B, m)` twice, and `(B, 2)`.

        Raises:
            ValueError: If the image features came without their geometry.
        """
        if call.tokens is None:
            raise ValueError("atp asks where tokens stand; pass image features as get_image_features returned them.")
        visual = call.visual
        text = call.text & call.prompt & (visual.cumsum(dim=1) == visual.sum(dim=1, keepdim=True))
        own = mean_over_queries(call.attention.logits, visual)
        cross = mean_over_queries(call.attention.weights, text)
        token = call.token.clamp(min=0).cpu()
        place = spatial_scores(call.tokens.cell[token], self.options.rates, float(self.options.factor))
        place = place.masked_fill(call.tokens.view[token] < 0, 0.0).to(own.device)  # separators
        means = torch.stack([mean_where(own, visual), mean_where(cross, visual)], dim=1)
        return (own + cross) / 2, place, means

    def forward(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choose or weigh tokens; see `HiResLmmLayerOp.forward`."""
        if not call.is_prefill:
            return hidden, None
        redundancy, place, means = self.scores(call)
        least, least_place = self.thresholds[self.layers.index(layer)](means)
        margin = torch.maximum(redundancy - least, place - least_place)
        mask = (margin * float(self.options.temperature)).sigmoid() if call.training else margin > 0
        counts = [(mask * call.visual).sum(dim=1), call.visual.sum(dim=1)]
        call.aux[f"token_budget/{layer}"] = torch.stack([count.float() for count in counts], dim=1)
        return hidden, mask
