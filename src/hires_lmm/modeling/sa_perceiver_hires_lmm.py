"""The spatially aware perceiver: the low-resolution view reads all crops and alone reaches the language model."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_hires_lmm import attend_by_count, eager_attention_forward
from .bases_hires_lmm import HiResLmmPart, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures
from .geometry_hires_lmm import MAIN_TOWER, Kind
from .silu_attention_hires_lmm import silu_attention


FLASH_HEAD_WIDTH = 256
"""Widest head that flash attention runs."""

NORM_FLOOR = 1.0
"""Added to the mean square under the root of a norm, which so shrinks what is large and never amplifies. A query with
scores far below zero reads next to nothing, in bfloat16 all rounding error, which a small epsilon would blow up."""

SILU_KERNEL = "silu_triton"
"""Name of the kernel in the attention interface, where `hires_lmm.kernels` was imported."""

GLOBAL_EMBEDDING = "global_embedding"
"""Name of the global embeddings `(I, C)` in `aux`."""


def check_backend(implementation: str | None, head_width: int, num_heads: int) -> None:
    """Refuse heads of more than 256 channels for flash attention."""
    if implementation is not None and "flash" in implementation and head_width > FLASH_HEAD_WIDTH:
        least = -(-head_width * num_heads // FLASH_HEAD_WIDTH)
        raise ValueError(
            f"sa_perceiver with softmax has num_heads={num_heads} of {head_width} channels, but {implementation} runs "
            f"at most {FLASH_HEAD_WIDTH}; use num_heads={least} or more, activation and self_attention 'silu' or "
            f'\'none\', or another backend for the connector: attn_implementation={{"connector_config": "sdpa"}}.'
        )


class HiResLmmWideRMSNorm(nn.RMSNorm):
    """RMS norm of states that may be wider than its weights; the result has the dtype of the weights."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise `(..., C)`."""
        weight = self.weight.to(states.dtype)
        return nn.functional.rms_norm(states, self.normalized_shape, weight, self.eps).to(self.weight.dtype)


class HiResLmmWideLayerNorm(nn.LayerNorm):
    """Layer norm, without bias, of states that may be wider than its weights, whose dtype the result has."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Normalise `(..., C)`."""
        weight = self.weight.to(states.dtype)
        return nn.functional.layer_norm(states, self.normalized_shape, weight, None, self.eps).to(self.weight.dtype)


class HiResLmmSaPerceiver(HiResLmmPart):
    """Replaces each low-resolution view by what it reads in the crops of its image; the crops leave.

    With V' the tokens of the low-resolution view and, as the last row, a learned query:

        V' ← V' + W_o1 norm(act(W_q V' · Kᵀ) K),  K = W_kv (all tokens of all crops of the image)
        V' ← V' + W_o2 norm(act(V' · (W_k V')ᵀ) V'),  norm(x) = w x / √(1 + mean x²), of the mean over the keys

    The last row is the global embedding (`aux["global_embedding"]`, `(I, C)`), for a reconstruction loss; the others
    take the place of the low-resolution view. Any number of crops gives the same number of tokens. An image without
    crops has no keys: its cross step adds zero and the self step works on the low-resolution view alone.

    Stable from 1 to 64 crops needs `norm` (`rms` or `layer`) or `score_scale="1/num_keys"`: as printed (neither) the
    sum over the keys grows with their number. `norm="rms"` is therefore the default.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S; no code is public. The paper's: the query, one matrix for keys
    and values, SiLU without scale, one head, no biases, residuals. Ours: `norm`; the self step, printed as a sum of
    matrices of different shapes, is read in the style of the cross step; all tokens of all crops, padding included,
    make one list of keys; everything that is no default.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `sa_perceiver`; the defaults are the paper's but for `norm`.

        Args:
            activation (`str`): `"silu"` or `"softmax"` on the scores of the cross step.
            self_attention (`str`): `"silu"`, `"softmax"`, or `"none"`: no self step.
            score_scale (`str`): `"none"`; `"1/sqrt(d)"` with d channels a head, before the activation; `"1/num_keys"`:
                the mean over the keys in place of their sum, for SiLU only; it matters only without `norm`.
            norm (`str`): `"rms"`, `"layer"` (both without bias) or `"none"` before the output projections; a norm is
                given the mean over the keys. It divides by √(1 + mean square), so it never amplifies.
            num_heads (`int`): Heads; divides the width of the tower.
        """

        activation: Literal["silu", "softmax"] = "silu"
        self_attention: Literal["silu", "softmax", "none"] = "silu"
        score_scale: Literal["none", "1/sqrt(d)", "1/num_keys"] = "none"
        norm: Literal["rms", "layer", "none"] = "rms"
        num_heads: int = 1

        def __post_init__(self) -> None:
            if self.num_heads < 1:
                raise ValueError(f"num_heads={self.num_heads} must be at least 1.")
            if self.score_scale == "1/num_keys" and "softmax" in (self.activation, self.self_attention):
                raise ValueError(
                    "score_scale='1/num_keys' is for SiLU; softmax weights sum to one already. Use 'none' or "
                    "'1/sqrt(d)'."
                )

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        width = context.width
        if width % options.num_heads:
            raise ValueError(f"num_heads={options.num_heads} does not divide the width {width}; choose a divisor.")
        self.config = context.config
        self.is_causal, self.num_key_value_groups = False, 1
        self.head_width = width // options.num_heads
        self.scaling = self.head_width**-0.5 if options.score_scale == "1/sqrt(d)" else 1.0
        self._check_backend()
        self.global_query = nn.Parameter(torch.empty(width))
        self.q_proj, self.kv_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.cross_norm, self.cross_out = _make_norm(options.norm, width), nn.Linear(width, width, bias=False)
        if options.self_attention != "none":
            self.k_proj = nn.Linear(width, width, bias=False)
            self.self_norm, self.self_out = _make_norm(options.norm, width), nn.Linear(width, width, bias=False)

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """Crops leave; the low-resolution view enters as a whole."""
        glob = (int(Kind.GLOBAL), MAIN_TOWER)
        grids = {key: grid for key, grid in context.grids.items() if key != (int(Kind.CROP), MAIN_TOWER)}
        if glob not in grids:
            raise ValueError("sa_perceiver reads the low-resolution view, but no global view reaches it.")
        return Traits({**grids, glob: replace(grids[glob], whole=True)}, context.width)

    def init_weights(self) -> None:
        """Initialise the learned query."""
        init.normal_(self.global_query, mean=0.0, std=self.config.initializer_range)

    def _check_backend(self) -> None:
        if "softmax" in (self.options.activation, self.options.self_attention):
            check_backend(self.config._attn_implementation, self.head_width, self.options.num_heads)

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.options.num_heads, self.head_width))

    def _attend(
        self, activation: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, counts: list[int]
    ) -> torch.Tensor:
        """`(I, Q, C)` queries read the keys of their image, `counts` of the `(T, C)`: `(I, Q, C)`."""
        keys = self._heads(key)
        states = (self._heads(query), keys, keys if value is key else self._heads(value))
        if activation == "softmax":
            self._check_backend()
            name = self.config._attn_implementation
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
            return attend_by_count(self, attend, *states, counts)
        attend = ALL_ATTENTION_FUNCTIONS.get(SILU_KERNEL, silu_attention)
        mean = self.options.score_scale == "1/num_keys" or self.options.norm != "none"
        output = attend_by_count(self, attend, *states, counts, mean)
        return output if self.options.norm != "none" else output.to(query.dtype)  # the norm takes any size

    def cross_step(self, tokens: torch.Tensor, crops: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Let images `(I, Q, C)` read the next `counts` of the crops `(K, L, C)`; without the residual."""
        keys = self.kv_proj(crops).flatten(0, 1)
        numbers = [count * crops.shape[1] for count in counts]
        return self.cross_out(
            self.cross_norm(self._attend(self.options.activation, self.q_proj(tokens), keys, keys, numbers))
        )

    def self_step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Let each image read its own tokens `(I, Q, C)`; without the residual."""
        keys, values, numbers = (
            self.k_proj(tokens).flatten(0, 1),
            tokens.flatten(0, 1),
            [tokens.shape[1]] * len(tokens),
        )
        return self.self_out(self.self_norm(self._attend(self.options.self_attention, tokens, keys, values, numbers)))

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Global features of unchanged shape, no crops, and `aux["global_embedding"]` `(I, C)`."""
        glob, crops, num_images = views.group("global"), views.group("crops"), len(views.images)
        if glob is None or len(glob.rows) != num_images:
            raise ValueError(
                f"sa_perceiver needs the low-resolution view of every image, but the tower ran on "
                f"{0 if glob is None else len(glob.rows)} of {num_images}; train it in a stage whose views are 'all'."
            )
        query = self.global_query.to(glob.features).expand(num_images, 1, -1)
        tokens = torch.cat([glob.features, query], dim=1)
        keys = glob.features[:0] if crops is None else crops.features
        tokens = tokens + self.cross_step(tokens, keys, [len(image.rows(Kind.CROP)) for image in views.images])
        if self.options.self_attention != "none":
            tokens = tokens + self.self_step(tokens)
        image_tokens, embedding = tokens[:, :-1], tokens[:, -1]
        if self.training:  # the query takes part in every loss, also where none reads the embedding
            image_tokens = image_tokens + 0.0 * embedding[:, None]
        others = [group for group in views.groups if group is not glob and group is not crops]
        return replace(
            views,
            groups=[replace(glob, features=image_tokens), *others],
            aux={**views.aux, GLOBAL_EMBEDDING: embedding},
        )


def _make_norm(name: str, width: int) -> nn.Module:
    """A norm without bias, so that zero stays zero."""
    if name == "none":
        return nn.Identity()
    if name == "rms":
        return HiResLmmWideRMSNorm(width, eps=NORM_FLOOR)
    return HiResLmmWideLayerNorm(width, eps=NORM_FLOOR, bias=False)
