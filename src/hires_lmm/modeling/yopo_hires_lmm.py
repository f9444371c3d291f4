"""`yopo`: visual tokens cost less in each layer of the language model, whatever is in them."""

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmLayerOp, LayerCall, PartContext, Traits


HEAD_RATIOS = "head_ratios"
"""Key of `layer_options`: True = say in `aux` how much each head attends to visual tokens."""


def near_cells(view: torch.Tensor, cell: torch.Tensor, window: int) -> torch.Tensor:
    """Which tokens of the same view stand within a window around each other: `(B, m, m)`.

    Args:
        view (`torch.Tensor` of shape `(B, m)`): View of each token.
        cell (`torch.Tensor` of shape `(B, m, 2)`): Its row and column.
        window (`int`): Rows and columns of the window.
    """
    gaps = (cell[:, :, None] - cell[:, None]).abs().amax(dim=-1)
    return (gaps <= (window - 1) // 2) & (view[:, :, None] == view[:, None])


def head_ratios(weights: torch.Tensor, visual: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Attention of each head to visual tokens over that to others, summed over queries: `(B, heads)`.

    Args:
        weights (`torch.Tensor` of shape `(B, heads, m, m)`): Attention.
        visual, real (`torch.Tensor` of shape `(B, m)`): True at visual tokens, and at all but padding.
    """
    received = (weights * real[:, None, :, None]).sum(dim=2)
    return (received * visual[:, None]).sum(dim=-1) / (received * (real & ~visual)[:, None]).sum(dim=-1)


def vote_heads(ratios: torch.Tensor, threshold: float, share: float = 0.4, first: int = 2) -> list[list[int]]:
    """The option `heads` from calibration samples: 1 for heads that go on seeing visual tokens.

    Args:
        ratios (`torch.Tensor` of shape `(samples, layers, heads)`): `aux["head_ratios/<layer>"]` of each sample.
        threshold (`float`): Ratio above which a sample votes for a head.
        share (`float`): Share of the samples above which the head stays.
        first (`int`): Layers at the beginning that keep all heads.
    """
    kept = (ratios > threshold).float().mean(dim=0) > share
    kept[:first] = True
    return kept.long().tolist()


class HiResLmmYopo(HiResLmmLayerOp):
    """Neighbour attention, fewer heads and neurons for visual tokens, and layers without them.

    Source: YOPO, huggingface.co/papers/2410.06169, and its released code, which simulates by masks: with
    `renormalise=False, causal=False` as released, but for rows of a batch, of which it treats the first alone while
    decoding. Ours, the default: softmax over what is left, tokens that leave for good, no token sees a later one.
    Layers without some of their heads compute attention a second time.
    """

    reads_attention = True
    changes_attention = True
    splits_feed = True
    reads_options = (HEAD_RATIOS,)
    switches = ("heads",)

    @strict
    @dataclass
    class Options(HiResLmmLayerOp.Options):
        """Options of `yopo`.

        Args:
            window (`int`, *optional*): Rows and columns of its view, around it, that a visual token sees of visual
                tokens; None = all.
            causal (`bool`): Whether it sees earlier ones alone.
            heads (`list[list[int]]`, *optional*): By layer and head, 0 where a head neither shows visual tokens to
                others nor changes them; see `vote_heads`.
            neurons (`float`): Share of the neurons of the feed-forward, the first ones, that visual tokens use.
            drop_from (`int`, *optional*): Layer from which on visual tokens are gone.
            renormalise (`bool`): False: what attention gave to tokens that are gone is lost, and they stay in.
        """

        window: int | None = 5
        causal: bool = True
        heads: list | None = None
        neurons: float | int = 0.5
        drop_from: int | None = None
        renormalise: bool = True

        def __post_init__(self) -> None:
            if self.of != "language_model":
                raise ValueError('yopo works in the language model; leave out of="vision_tower".')
            if self.window is not None and (self.window < 1 or self.window % 2 == 0):
                raise ValueError(f"window={self.window} must be odd and at least 1.")
            if not 0 <= self.neurons <= 1:
                raise ValueError(f"neurons={self.neurons} must lie between 0 and 1.")

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """Nothing changes but inside the language model.

        Raises:
            ValueError: If `drop_from` or `heads` do not fit its layers.
        """
        depth = context.depths["language_model"]
        if options.drop_from is not None and options.drop_from - 1 not in context.layers:
            raise ValueError(f"drop_from={options.drop_from}: the layer before it is none of {context.layers}.")
        if options.heads is not None and (
            len(options.heads) != depth or len({len(row) for row in options.heads}) != 1
        ):
            raise ValueError(f"heads has {len(options.heads)} rows; give one of equal length a layer, {depth}.")
        return super().describe(options, context)

    def __init__(self, context: PartContext, options: Any):
        super().__init__(context, options)
        self.heads, self.masks_attention = options.heads, options.window is not None

    def see(self, layer: int, seen: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Neighbour attention; see `HiResLmmLayerOp.see`.

        Raises:
            ValueError: If the image features came without their geometry.
        """
        if call.tokens is None:
            raise ValueError("yopo asks where tokens stand; pass image features as get_image_features returned them.")
        token = call.token.clamp(min=0).cpu()
        view, cell = (part[token].to(seen.device) for part in (call.tokens.view, call.tokens.cell))
        visual = call.visual & (view >= 0)
        near = near_cells(view, cell, self.options.window)[:, None]
        pairs = (visual[:, :, None] & visual[:, None])[:, None]
        return torch.where(pairs, near & seen if self.options.causal else near, seen)

    def attend(self, layer: int, call: LayerCall) -> torch.Tensor | None:
        """Attention with fewer heads for visual tokens; see `HiResLmmLayerOp.attend`."""
        options, attention = self.options, call.attention
        cut = options.drop_from
        drops = not options.renormalise and cut is not None and layer >= cut
        if not drops and (self.heads is None or all(self.heads[layer])):
            return None
        seen = attention.seen()
        if self.masks_attention and call.is_prefill:
            start, stop = attention.start, attention.start + call.visual.shape[1]
            seen = torch.cat(
                [seen[..., :start], self.see(layer, seen[..., start:stop], call), seen[..., stop:]], dim=-1
            )
        logits = attention.all_logits()
        if self.heads is not None and len(self.heads[layer]) != logits.shape[1]:
            raise ValueError(f"heads has {len(self.heads[layer])} of {logits.shape[1]} heads of layer {layer}.")
        heads = [1] * logits.shape[1] if self.heads is None else self.heads[layer]
        off = (torch.tensor(heads, device=logits.device) == 0)[None, :, None, None]
        keys = attention.visual[:, None, None]
        if options.renormalise:
            seen = seen & ~(off & keys & ~call.visual[:, None, :, None])
        weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        if not options.renormalise:
            weights = weights.masked_fill((off | drops) & keys, 0.0)
        return attention.mix(weights).masked_fill(off & call.visual[:, None, :, None], 0.0)

    def feed(self, layer: int, module: Any, hidden: torch.Tensor) -> torch.Tensor:
        """The feed-forward `(N, D)` with its first neurons alone; see `HiResLmmLayerOp.feed`."""
        parts: Any = (module.gate_proj, module.up_proj, module.down_proj)
        number = int(parts[0].out_features * self.options.neurons)
        if all(type(part) is nn.Linear and not hasattr(part, "_hf_hook") for part in parts):
            sizes = [(part.weight[:number], None if part.bias is None else part.bias[:number]) for part in parts[:2]]
            gate, up = (nn.functional.linear(hidden, *size) for size in sizes)
            return nn.functional.linear(module.act_fn(gate) * up, parts[2].weight[:, :number], parts[2].bias)
        middle = module.act_fn(parts[0](hidden)) * parts[1](hidden)  # quantised, offloaded or adapted
        return parts[2](torch.where(torch.arange(middle.shape[-1], device=hidden.device) < number, middle, 0.0))

    def forward(self, layer: int, hidden: torch.Tensor, call: LayerCall) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Let visual tokens leave where layers without them begin; see `HiResLmmLayerOp.forward`."""
        if not call.is_prefill:
            return hidden, None
        if call.options.get(HEAD_RATIOS):
            rows = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
            weights = call.attention.weights(rows)
            call.aux[f"{HEAD_RATIOS}/{layer}"] = head_ratios(weights, call.visual, call.real)
        leaves = self.options.renormalise and layer + 1 == self.options.drop_from
        return hidden, ~call.visual if leaves else None
