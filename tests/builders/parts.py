"""Any registered part alone: small options, clear weights and inputs of any dtype."""

import copy
import dataclasses

import torch
from torch import nn
from transformers import PreTrainedModel

from builders.tiny import randomise, tiny_config
from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, ViewGroup, VisualTokens
from hires_lmm.modeling.geometry_hires_lmm import Grid
from hires_lmm.modeling.parts_hires_lmm import ADAPTERS, SLOTS, TOKEN_OPS, VIEW_OPS, build_options


WIDTH, GRID, VOCABULARY = 64, (8, 8), 50
SMALL = {"num_queries": 16, "later_queries": 4, "num_layers": 2, "num_heads": 2, "intermediate_size": 96}
"""Given to every part that has an option of that name; `num_queries` is a square."""

VARIANTS: dict[str, dict[str, dict]] = {
    "sa_perceiver": {
        "softmax": {"activation": "softmax", "self_attention": "softmax", "score_scale": "1/sqrt(d)"},
        "layer": {"norm": "layer", "self_attention": "none"},
        "printed": {"norm": "none", "score_scale": "1/num_keys"},
    },
    "conv_merge": {"bare": {"norm": False, "residual": False}},
    "mixture": {"release": {"gate": "release"}, "crops": {"mix_on": "crops"}},
    "router": {"attention": {"score": "attention"}, "saliency": {"score": "saliency", "on": "all"}},
    "fusion": {"blind": {"question": False}},
}
"""Further options of parts that have several ways; every part also runs with its defaults."""

SLOTS_OF = {"fusion": SMALL["num_queries"]}
"""Placeholders of an image in front of the question, of parts that make their own tokens."""


def part_cases(slot: str) -> list[tuple[str, str]]:
    """Name and variant of every part of a slot, from the registry."""
    return [(name, way) for name in SLOTS[slot] for way in ("", *VARIANTS.get(name, {}))]


def build_part(name: str, way: str = "", dtype: torch.dtype = torch.float32, backend: str = "sdpa") -> nn.Module:
    """A part in evaluation mode with clear weights.

    Args:
        name (`str`): Name in its registry.
        way (`str`): A key of `VARIANTS[name]`, or empty.
        dtype (`torch.dtype`): Of the weights.
        backend (`str`): Attention implementation.
    """
    cls = {**VIEW_OPS, **ADAPTERS, **TOKEN_OPS}[name]
    known = {field.name for field in dataclasses.fields(cls.Options)}
    values = {key: value for key, value in SMALL.items() if key in known}
    options = build_options(cls.Options, {**values, **VARIANTS.get(name, {}).get(way, {})}, name)
    config = copy.deepcopy(tiny_config("slime").connector_config)
    config._attn_implementation = backend
    context = part_context(config)
    part = cls(context, options).eval()
    part.traits = cls.describe(options, context)
    randomise(part)
    for module in part.modules():  # tables that are computed, not learned
        if hasattr(module, "positions") and not isinstance(module, PreTrainedModel):
            module.init_weights()
    return part.to(dtype)


def part_context(config: PreTrainedModel) -> PartContext:
    """What surrounds a part: global views and crops of one grid."""
    grids = {(0, "vision_tower"): Grid(*GRID), (1, "vision_tower"): Grid(*GRID)}
    return PartContext(config, WIDTH, WIDTH, grids, GRID, VOCABULARY)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(features: torch.Tensor, size: float = 1e3) -> torch.Tensor:
    """Two channels that are large everywhere, as those of CLIP towers."""
    features = features.clone()
    features[..., 3], features[..., 40] = size, -0.7 * size
    return features


def geometry(crops: int, first: int = 0) -> ImageGeometry:
    """An image with a row of crops, all of which enter the sequence."""
    crop_views = tuple((1, 1, crops, 0, column, *GRID, 0, GRID[0], 0, GRID[1]) for column in range(crops))
    return ImageGeometry(first, ((0, 0, 0, 0, 0, *GRID, 0, GRID[0], 0, GRID[1]), *crop_views), 0)


def make_views(counts: list[int], features: torch.Tensor) -> ViewFeatures:
    """Features `(images + crops, L, C)` of images with the given numbers of crops, global views first."""
    starts = [sum(counts[:number]) + number for number in range(len(counts))]
    crops = [start + 1 + number for start, count in zip(starts, counts, strict=True) for number in range(count)]
    groups = [
        ViewGroup(0, features[: len(counts)], GRID, tuple(starts)),
        ViewGroup(1, features[len(counts) :], GRID, tuple(crops)),
    ]
    return ViewFeatures(groups, [geometry(n, start) for n, start in zip(counts, starts, strict=True)])


def make_tokens(counts: list[int], features: torch.Tensor, num_tokens: list[int] | None = None) -> VisualTokens:
    """Visual tokens `(N, C)`: of each image the global view, then its crops, 16 tokens a view."""
    lengths = [16 * (count + 1) for count in counts]
    kind = torch.cat([torch.tensor([0] * 16 + [1] * 16 * count) for count in counts])
    cell = torch.zeros(len(kind), 2, dtype=torch.long)
    view = torch.arange(len(kind)) // 16
    images = [geometry(count) for count in counts]
    grids = {0: Grid(4, 4, None), 1: Grid(4, 4, None)}
    return VisualTokens(features, lengths, num_tokens or list(lengths), view, cell, kind, grids, images)


def make_question(images: int, slots: int, words: int, embeds: torch.Tensor | None = None) -> Question:
    """A row an image: `slots` placeholders, then `words` readable tokens."""
    length = slots + words
    embeds = draw(images, length, WIDTH, seed=3) if embeds is None else embeds
    ids = torch.randint(0, VOCABULARY, (images, length), generator=torch.Generator().manual_seed(4))
    placeholder = (torch.arange(length) < slots).expand(images, -1)
    turn = (~placeholder).long()
    ones = torch.ones(images, dtype=torch.long)
    return Question(embeds, ids, turn, torch.arange(images), ones, placeholder, torch.ones_like(turn))


def run_part(name: str, part: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a part makes of inputs from `make_inputs`, scores and `aux` included."""
    counts, features = inputs["counts"].tolist(), inputs["features"]
    if name in TOKEN_OPS:
        own = part.traits.own_tokens
        tokens = make_tokens(counts, features, own and [own] * len(counts))
        slots = SLOTS_OF.get(name, 5)
        words = inputs["embeds"].shape[1] - slots
        tokens, _ = part(tokens, make_question(len(counts), slots, words, inputs["embeds"]))
        return [tokens.features, *tokens.scores.values()]
    if name in VIEW_OPS:
        views = part(make_views(counts, features))
        return [*(group.features for group in views.groups), *views.aux.values()]
    return [part(features[: len(counts)], 0), part(features[len(counts) :], 1)]


def make_inputs(name: str, counts: list[int], words: int = 7) -> dict[str, torch.Tensor]:
    """Inputs of a part in float32: `features` of images with the given numbers of crops, `embeds` of questions."""
    inputs = {"counts": torch.tensor(counts)}
    if name not in TOKEN_OPS:
        return {**inputs, "features": draw(len(counts) + sum(counts), GRID[0] * GRID[1], WIDTH)}
    slots = SLOTS_OF.get(name, 5)
    embeds = draw(len(counts), slots + words, WIDTH, seed=3)
    return {**inputs, "features": draw(sum(16 * (count + 1) for count in counts), WIDTH), "embeds": embeds}
