"""Adapters: from the width of the vision tower to the width of the language model."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .attention_hires_lmm import HiResLmmQueryFormer, square_side
from .bases_hires_lmm import HiResLmmAdapter, PartContext, Traits
from .carriers_hires_lmm import ViewGroup
from .geometry_hires_lmm import KINDS, Grid
from .noise_hires_lmm import HiResLmmNoise


class HiResLmmIdentityAdapter(HiResLmmAdapter):
    """Passes features through; for chains whose token operations project by themselves."""

    @classmethod
    def output_width(cls, options: Any, width: int, text_width: int) -> int:
        """Width of the adapted features: unchanged."""
        return width

    def forward(self, features: torch.Tensor, kind: int) -> torch.Tensor:
        """Return the features `(V, L, C)` as they are."""
        return features


class HiResLmmLinearAdapter(HiResLmmAdapter):
    """One linear layer (LLaVA)."""

    @strict
    @dataclass
    class Options:
        """Options of `linear`.

        Args:
            bias (`bool`): Add a bias.
        """

        bias: bool = True

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.linear = nn.Linear(context.width, context.text_width, bias=options.bias)

    def forward(self, features: torch.Tensor, kind: int) -> torch.Tensor:
        """Project `(V, L, C)` -> `(V, L, D)`."""
        return self.linear(features)


class HiResLmmMlp(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, width: int, text_width: int, hidden_act: str = "gelu", bias: bool = True):
        super().__init__()
        if hidden_act not in ACT2FN:
            raise ValueError(f"Unknown hidden_act {hidden_act!r}; use one of {', '.join(sorted(ACT2FN))}.")
        self.linear_1 = nn.Linear(width, text_width, bias=bias)
        self.act = ACT2FN[hidden_act]
        self.linear_2 = nn.Linear(text_width, text_width, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Project `(..., C)` -> `(..., D)`."""
        return self.linear_2(self.act(self.linear_1(features)))


class HiResLmmMlpAdapter(HiResLmmAdapter):
    """Two-layer perceptron (LLaVA-1.5, LLaVA-NeXT)."""

    @strict
    @dataclass
    class Options:
        """Options of `mlp`.

        Args:
            hidden_act (`str`): Activation between the layers.
        """

        hidden_act: str = "gelu"
        bias: bool = True

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.mlp = HiResLmmMlp(context.width, context.text_width, options.hidden_act, options.bias)

    def forward(self, features: torch.Tensor, kind: int) -> torch.Tensor:
        """Project `(V, L, C)` -> `(V, L, D)`."""
        return self.mlp(features)


class HiResLmmQueryFormerAdapter(HiResLmmAdapter):
    """A query former before a two-layer perceptron, for every view.

    Source: SliME, huggingface.co/papers/2406.08487, Fig. 1 (the adapter of the alternating-training study).
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `query_former`.

        Args:
            num_queries (`int`): Tokens of a view after the adapter, a square number; the paper uses 576.
            num_heads (`int`, *optional*): Heads; by default one per 128 channels.
            hidden_act (`str`): Activation of the perceptron.
        """

        num_queries: int = 576
        num_heads: int | None = None
        hidden_act: str = "gelu"

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.query_former = HiResLmmQueryFormer(
            context.config, context.width, options.num_queries, context.grid("all").size, options.num_heads
        )
        self.mlp = HiResLmmMlp(context.width, context.text_width, options.hidden_act)

    @classmethod
    def output_grid(cls, options: Any, grid: Grid) -> Grid:
        """Token grid of a view after the adapter: the grid of the queries."""
        side = square_side(options.num_queries, "num_queries")
        return replace(grid, rows=side, cols=side, stride=None)

    def forward(self, features: torch.Tensor, kind: int) -> torch.Tensor:
        """Compress and project `(V, L, C)` -> `(V, num_queries, D)`."""
        return self.mlp(self.query_former(features))


class HiResLmmGate(nn.Module):
    """Weights of the two experts of the mixture, one pair a token.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.1; noisy gating of huggingface.co/papers/1701.06538.
    """

    NOISE_FLOOR = 1e-2
    RENORMALISATION = 1e-6

    def __init__(self, width: int, rule: str):
        super().__init__()
        self.rule = rule
        self.gate_weight = nn.Parameter(torch.empty(width, 2))
        self.noise_weight = nn.Parameter(torch.empty(width, 2))
        self.noise = HiResLmmNoise()

    def init_weights(self) -> None:
        """Start from an even mixture."""
        init.zeros_(self.gate_weight)
        init.zeros_(self.noise_weight)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Weights `(V, L, 2)` of perceptron and query former for `(V, L, C)` features, summing to (about) one."""
        logits = features @ self.gate_weight.to(features.dtype)
        if self.training:
            spread = logits if self.rule == "release" else features @ self.noise_weight.to(features.dtype)
            logits = self.noise(logits, nn.functional.softplus(spread) + self.NOISE_FLOOR)
        gates = logits.softmax(dim=-1)
        if self.rule == "release":
            gates = gates / (gates.sum(dim=-1, keepdim=True) + self.RENORMALISATION)
        return gates


class HiResLmmMixtureAdapter(HiResLmmAdapter):
    """Mixture of a perceptron and a query former on some views, the perceptron alone on the others.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.1. Both experts end in the same perceptron, as in the
    released weights.
    """

    needs_equal_views = True

    switches = ("forced_expert",)  # options that may change in a live model

    @strict
    @dataclass
    class Options:
        """Options of `mixture`.

        Args:
            mix_on (`str`): Views that are mixed: `"global"` (the paper) or `"crops"`.
            gate (`str`): `"paper"`: softmax of noisy logits, the noise scaled by its own weights. `"release"`: the
                noise is scaled by the gate logits and the weights are divided by their sum + 1e-6.
            forced_expert (`str`, *optional*): Use only `"mlp"` or `"query_former"`, as the first two stages do.
            num_heads (`int`, *optional*): Heads of the query former; by default one per 128 channels.
        """

        mix_on: Literal["global", "crops"] = "global"
        gate: Literal["paper", "release"] = "paper"
        forced_expert: Literal["mlp", "query_former"] | None = None
        num_heads: int | None = None

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """As other adapters; the released gate never reads its second table."""
        if not context.keys(options.mix_on):
            raise ValueError(
                f"The adapter 'mixture' mixes on {options.mix_on!r} views of the main tower, and there are none here; "
                "use another adapter, for an extra tower in tower_adapters, such as mlp."
            )
        untrained = ("gate.noise_weight",) if options.gate == "release" else ()
        return replace(super().describe(options, context), untrained=untrained)

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.mix_on = KINDS[options.mix_on]
        self.forced_expert = options.forced_expert
        grid = context.grid(options.mix_on).size
        self.mlp = HiResLmmMlp(context.width, context.text_width)
        self.query_former = HiResLmmQueryFormer(
            context.config, context.width, grid[0] * grid[1], grid, options.num_heads
        )
        self.gate = HiResLmmGate(context.width, options.gate)

    def adapt(self, group: ViewGroup) -> ViewGroup:
        """Adapt one group; `aux["gates"]` holds the weights of the experts `(V, L, 2)` where they are mixed."""
        aux: dict[str, torch.Tensor] = {}
        return replace(group, features=self(group.features, group.kind, aux), aux=aux)

    def forward(self, features: torch.Tensor, kind: int, aux: dict | None = None) -> torch.Tensor:
        """Adapt the views `(V, L, C)` of one kind -> `(V, L, D)`; `aux` takes the weights of the experts."""
        if kind != self.mix_on or self.forced_expert == "mlp":
            return self.mlp(features)
        queried = self.mlp(self.query_former(features))
        if self.forced_expert == "query_former":
            return queried
        gates = self.gate(features)
        if aux is not None:
            aux["gates"] = gates
        gates = gates.to(queried.dtype)
        return self.mlp(features) * gates[..., :1] + queried * gates[..., 1:]
