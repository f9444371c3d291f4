"""`dyvte`: behind the first layer whose gate says so, all visual tokens of a row leave the language model."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmLayerOp, LayerCall, PartContext


EXIT_AFTER = "exit_after"
"""Key of `layer_options`: the layer behind which all leave, whatever the gates say; None = they stay."""


def exit_features(hidden: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor]:
    """What a gate reads, and for which rows there is something to decide.

    Args:
        hidden (`torch.Tensor` of shape `(B, m, D)`): States behind a layer.
        call (`LayerCall`): What belongs to them.

    Returns:
        `(B, 2 D)`: mean of the text between the last visual token and the last token of the prompt, then that token;
        and `(B,)` bool, False without visual tokens or without such text.
    """
    rows = torch.arange(len(hidden), device=hidden.device)
    counts = call.visual.sum(dim=1, keepdim=True)
    text = call.text & call.prompt & (call.visual.cumsum(dim=1) == counts)
    text[rows, call.last] = False
    number = text.sum(dim=1, keepdim=True)
    mean = (hidden * text[..., None]).sum(dim=1, dtype=torch.float32) / number.clamp(min=1)
    features = torch.cat([mean.to(hidden.dtype), hidden[rows, call.last]], dim=-1)
    return features, ((counts > 0) & (number > 0))[:, 0]


class HiResLmmExitGate(nn.Module):
    """Two linear layers without bias and GELU between them; with a layer count, shared by that many layers."""

    def __init__(self, width: int, middle: int, num_layers: int = 0):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, middle, bias=False), nn.Linear(middle, 2, bias=False)
        self.layers = nn.Embedding(num_layers, middle) if num_layers else None

    def forward(self, features: torch.Tensor, number: int) -> torch.Tensor:
        """`(B, width)` behind the layer with that number among the gated ones -> logits `(B, 2)`: stay, leave."""
        middle = self.linear_1(features.to(self.linear_1.weight.dtype))
        if self.layers is not None:
            middle = middle + self.layers(torch.full((), number, device=features.device))
        return self.linear_2(nn.functional.gelu(middle))


class HiResLmmDyvte(HiResLmmLayerOp):
    """All visual tokens of a row leave behind the first layer whose gate prefers that.

    A gate reads the prompt alone: the mean of the text after the last image without its last token, and that token.
    Logits come out as `aux["exit_gate/<layer>"]` `(B, 2)`, NaN where there was nothing to decide. The argument
    `layer_options={"exit_after": layer}` of the model decides in the gates' place; None there: all stay.

    Source: DyVTE, huggingface.co/papers/2411.19628, and its released code, for `gate="per_layer"`. Ours: one gate for
    all layers with a vector a layer, its middle of 128; a row of a batch decides for itself.
    """

    reads_options = (EXIT_AFTER,)

    @strict
    @dataclass
    class Options(HiResLmmLayerOp.Options):
        """Options of `dyvte`.

        Args:
            gate (`str`): `"shared"`, or `"per_layer"` as released.
            middle (`int`): Width between the two layers of a gate; 2048 as released.
        """

        gate: Literal["shared", "per_layer"] = "shared"
        middle: int = 128

        def __post_init__(self) -> None:
            if self.of != "language_model":
                raise ValueError('dyvte works in the language model; leave out of="vision_tower".')
            if self.middle < 1:
                raise ValueError(f"middle={self.middle} must be at least 1.")

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        shared, count = options.gate == "shared", len(context.layers)
        self.gates = nn.ModuleList(
            HiResLmmExitGate(2 * context.width, options.middle, count if shared else 0)
            for _ in range(1 if shared else count)
        )

    def forward(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let gates decide; see `HiResLmmLayerOp.forward`."""
        if not call.is_prefill:
            return hidden, None
        features, can_decide = exit_features(hidden.detach(), call)
        number = self.layers.index(layer)
        logits = self.gates[min(number, len(self.gates) - 1)](features, number)
        logits = logits.masked_fill(~can_decide[:, None], float("nan"))
        call.aux[f"exit_gate/{layer}"] = logits
        leaves = logits[:, 1] > logits[:, 0]
        if EXIT_AFTER in call.options:
            chosen = call.options[EXIT_AFTER]
            if isinstance(chosen, bool) or (chosen is not None and chosen not in self.layers):
                raise ValueError(f"exit_after={chosen!r} is no layer with a gate; they are {list(self.layers)}.")
            leaves = torch.full_like(leaves, layer == chosen)
        return hidden, ~(call.visual & leaves[:, None])
