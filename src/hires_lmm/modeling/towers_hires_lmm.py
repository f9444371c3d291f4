"""Running a vision tower: bounded chunks of views, one layer of hidden states, and what parts ask for beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .bases_hires_lmm import Needs
from .carriers_hires_lmm import ImageGeometry, ViewGroup, constant_index, constant_indices
from .compat_hires_lmm import layers_of
from .geometry_hires_lmm import KINDS, MAIN_TOWER, WHOLE_KINDS, Kind
from .inputs_hires_lmm import ImageInputs
from .layer_ops_hires_lmm import TowerPass, open_tower
from .layout_hires_lmm import idle_image
from .tower_table_hires_lmm import (
    own_side,
    patch_side,
    prefix_tokens,
    tower_depth,
    tower_family,
    tower_grid,
    tower_levels,
    tower_width,
    view_side,
)


logger = logging.get_logger(__name__)

EXTRA_LAYER = -1
"""Layer of an extra tower whose hidden states are used."""


DEPTH: ContextVar[int | None] = ContextVar("hires_lmm_tower_depth", default=None)
"""Layers that the running tower goes through; None = all."""


class TowerLayers(torch.nn.ModuleList):
    """The layers of a tower; a pass goes through as many as are read."""

    def __iter__(self) -> Iterator[torch.nn.Module]:
        depth = None if torch.compiler.is_compiling() else DEPTH.get()
        return iter([*self._modules.values()][:depth])


def build_tower(config: Any, unequal_views: bool = False) -> PreTrainedModel:
    """A new tower, which can stop behind the last layer that is read.

    Raises:
        ValueError: If a timm tower gives other features than its configuration says.
    """
    family = tower_family(config)
    if family.has_layers:
        tower = AutoModel.from_config(config)
        layers = layers_of(tower)
        for module in list(tower.modules()):
            for name, child in module.named_children():
                if child is layers:
                    setattr(module, name, TowerLayers(layers))
        return tower
    tower = AutoModel.from_config(config, attn_implementation="sdpa" if family.reads_last else "eager")
    for name in ("sdpa", "flash_attn", "flex_attn"):  # nothing in it asks, so it goes with what the others have
        setattr(tower, f"_supports_{name}", True)
    if family.reads_last:
        check_timm(tower, unequal_views)
    return tower


def check_timm(tower: Any, unequal_views: bool) -> None:
    """Compare a timm tower with what its configuration says."""
    config = tower.config
    inner = tower.timm_model
    found = {"hidden_size": inner.num_features, "patch_size": inner.feature_info[-1]["reduction"]}
    if getattr(inner, "output_fmt", "NCHW") != "NCHW":
        raise ValueError(f"timm's {config.architecture} shrinks its maps as Swin does; use a ViT or a ConvNeXt.")
    for name, value in found.items():
        if getattr(config, name) != value:
            raise ValueError(
                f"timm's {config.architecture} has {name}={value}, not {getattr(config, name)}; correct vision_config "
                "(and vision_patch_size)."
            )
    patches = getattr(inner, "patch_embed", None)
    own: Any = getattr(patches, "img_size", None)
    is_free = own is None or getattr(inner, "dynamic_img_size", False) or not getattr(patches, "strict_img_size", True)
    if not is_free and (unequal_views or tuple(own) != (view_side(config),) * 2):
        raise ValueError(
            f"timm's {config.architecture} takes views of {own[0]} pixels alone, not {view_side(config)}"
            f"{' and unequal ones' if unequal_views else ''}; put model_args={{'dynamic_img_size': True}} into its "
            "configuration."
        )


@contextmanager
def going_through(tower: PreTrainedModel, depth: int) -> Iterator[None]:
    """Let a tower go through so many layers; all where it is spread over processes or compiled."""
    if torch.compiler.is_compiling() or depth >= tower_depth(tower.config) or is_sharded(tower):
        yield
        return
    before = DEPTH.set(depth)
    try:
        yield
    finally:
        DEPTH.reset(before)


@torch.compiler.assume_constant_result  # names of types are nothing to compile
def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the parameters of a module are spread over processes (FSDP, ZeRO-3), which then call it in step."""
    kinds = {type(parameter).__name__ for parameter in module.parameters()}
    return bool(kinds & {"DTensor", "FlatParameter"}) or any(hasattr(p, "ds_id") for p in module.parameters())


def split_views(pixels: torch.Tensor, chunk_size: int | None, tower: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Cut `(V, 3, S, S)` views into the pieces that pass the tower; all at once where it is spread over processes."""
    if chunk_size is None:
        return (pixels,)
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(
            f"vision_chunk_size={chunk_size!r} must be an integer of at least 1, or None for all views at once."
        )
    if pixels.shape[0] <= chunk_size:
        return (pixels,)
    if is_sharded(tower):
        logger.warning_once("vision_chunk_size is not used: the vision tower is spread over processes.")
        return (pixels,)
    return pixels.split(chunk_size)


@dataclass
class TowerOutput:
    """What a tower gives for views.

    Args:
        features (`torch.Tensor` of shape `(V, L, C)`): Patch features of the layer that is read.
        grid (`tuple[int, int]`): Patch rows and columns of the views.
        scores (`dict[str, torch.Tensor]`): `(V, L)` float32, those that parts need.
        hidden (`dict[int, torch.Tensor]`): `(V, L, C)` of further layers that parts need.
        output (`BaseModelOutput`): The tower's last hidden state with what the caller wants to keep.
    """

    features: torch.Tensor
    grid: tuple[int, int]
    scores: dict[str, torch.Tensor]
    hidden: dict[int, torch.Tensor]
    output: BaseModelOutput


def run_tower(
    tower: PreTrainedModel,
    pixels: torch.Tensor,
    layer: int,
    needs: Needs | None = None,
    chunk_size: int | None = None,
    sizes: list[tuple[int, ...]] | None = None,
    output_hidden_states: bool | None = None,
    output_attentions: bool | None = None,
    layers: TowerPass | None = None,
) -> TowerOutput:
    """Encode views.

    Args:
        chunk_size (`int`, *optional*): Most views that pass the tower at once; None = all. Bounds the memory of a
            forward pass; with gradients every chunk keeps its activations.
        sizes (`list[tuple[int, int]]`, *optional*): Patch rows and columns of each view, where they are unequal: each
            size is encoded by itself, with positions of its own, and padded at bottom and right.
        output_hidden_states, output_attentions (`bool`, *optional*): Keep those of all layers; the tower's
            configuration decides by default.
    """
    if sizes and len(set(sizes)) > 1:
        return _run_by_size(tower, pixels, layer, needs, chunk_size, sizes)
    needs, family = Needs() if needs is None else needs, tower_family(tower.config)
    keeps = tower.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    options: dict[str, Any] = {} if output_attentions is None else {"output_attentions": output_attentions}
    side = patch_side(tower.config)
    grid = (pixels.shape[2] // side, pixels.shape[3] // side)
    if family.has_layers and tuple(pixels.shape[2:]) != (own_side(tower.config),) * 2:
        options["interpolate_pos_encoding"] = True
    if family.reads_last:
        options["do_pooling"] = False
    count = tower_depth(tower.config) + 1
    read = {number: number % count if family.has_layers else number for number in (layer, *needs.layers)}
    depth = max([*read.values(), *([count - 2] if needs.scores else [])])
    shows_all = keeps or output_attentions or tower.config.output_attentions or not family.has_layers
    pieces = []
    views = split_views(pixels, chunk_size, tower)
    chunks: Any = [(piece, {}) for piece in views]
    if layers is not None:  # no image is split
        chunks = layers.split(pixels, chunk_size if len(views) > 1 else None)
    with going_through(tower, count if shows_all else depth):
        for piece, call in chunks:
            output = tower(
                piece.to(tower.dtype),
                output_hidden_states=not family.reads_last or keeps,
                return_dict=True,
                **options,
                **call,
            )
            states = output.hidden_states
            if family.reads_last:
                states = (*(output.hidden_states or ()), output.last_hidden_state)
            pieces.append(
                TowerOutput(
                    _patches(states[read[layer]], grid),
                    grid,
                    {name: SCORES[name](tower, states) for name in needs.scores},
                    {wanted: _patches(states[read[wanted]], grid) for wanted in needs.layers},
                    BaseModelOutput(
                        states[read[layer]],
                        output.hidden_states if keeps else None,
                        getattr(output, "attentions", None),
                    ),
                )
            )
    return pieces[0] if len(pieces) == 1 else _join_pieces(pieces)


def _run_by_size(
    tower: PreTrainedModel,
    pixels: torch.Tensor,
    layer: int,
    needs: Needs | None,
    chunk_size: int | None,
    sizes: list[tuple[int, ...]],
) -> TowerOutput:
    """Encode views of unequal sizes, one size after another."""
    if is_sharded(tower):
        raise ValueError("Views of unequal size cannot pass a tower that is spread over processes; use DDP.")
    side = patch_side(tower.config)
    grid = (pixels.shape[2] // side, pixels.shape[3] // side)
    order: list[int] = []
    pieces, views = [], pixels.unbind()  # an index would be one more constant of a compiled graph
    for size in sorted(set(sizes)):
        places = [place for place, own in enumerate(sizes) if own == size]
        own_views = torch.stack([views[place][:, : size[0] * side, : size[1] * side] for place in places])
        order += places
        pieces.append(_pad_output(run_tower(tower, own_views, layer, needs, chunk_size), grid))
    joined = _join_pieces(pieces)

    def put_back(states: torch.Tensor) -> torch.Tensor:
        rows = states.unbind()
        return torch.stack([rows[order.index(place)] for place in range(len(order))])

    return TowerOutput(
        put_back(joined.features),
        grid,
        {name: put_back(score) for name, score in joined.scores.items()},
        {number: put_back(states) for number, states in joined.hidden.items()},
        BaseModelOutput(),
    )


def _pad_output(output: TowerOutput, grid: tuple[int, int]) -> TowerOutput:
    """Patches of a smaller view in the grid of the largest, zero where there are none."""
    rows, cols = output.grid

    def pad(states: torch.Tensor) -> torch.Tensor:
        planes = states.reshape(len(states), rows, cols, -1)
        return torch.nn.functional.pad(planes, (0, 0, 0, grid[1] - cols, 0, grid[0] - rows)).flatten(1, 2)

    return TowerOutput(
        pad(output.features),
        grid,
        {name: pad(score)[..., 0] for name, score in output.scores.items()},
        {number: pad(states) for number, states in output.hidden.items()},
        BaseModelOutput(last_hidden_state=output.output.last_hidden_state.flatten(1)[:, :0]),
    )


def _patches(states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The patches `(V, L, C)` of a hidden state: without the tokens before them, a map row by row."""
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    return states[:, states.shape[1] - grid[0] * grid[1] :]


def class_products(
    tower: PreTrainedModel, states: tuple[torch.Tensor, ...], layer: int = -1, merged: bool = False
) -> torch.Tensor:
    """Scaled products of the class token's query with all keys of a layer: `(V, heads, prefix + L)` float32.

    Computed from that layer's projections, in any attention backend; `merged` takes all heads as one.
    """
    layers = layers_of(tower)
    layer = layer % len(layers)
    norm, query, key = (layers[layer].get_submodule(path) for path in tower_family(tower.config).attention or ())
    normed = norm(states[layer])
    heads = 1 if merged else tower.config.num_attention_heads
    queries = query(normed[:, :1]).unflatten(-1, (heads, -1)).float()
    keys = key(normed).unflatten(-1, (heads, -1)).float()
    return torch.einsum("vqhc,vlhc->vhl", queries, keys) * queries.shape[-1] ** -0.5


def cls_logits(tower: PreTrainedModel, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much the class token attends to each patch of the last layer, before softmax: `(V, L)`, mean of heads."""
    return class_products(tower, states).mean(dim=1)[:, prefix_tokens(tower.config) :]


def cls_probabilities(tower: PreTrainedModel, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The same behind the softmax; what it gives to tokens before the patches is left out."""
    return class_products(tower, states).softmax(dim=-1).mean(dim=1)[:, prefix_tokens(tower.config) :]


SCORES = {"cls_logits": cls_logits, "cls_probabilities": cls_probabilities}
"""Scores of patches that a part may need, by name."""


def check_needs(config: Any, needs: Needs) -> None:
    """Refuse what a tower cannot give."""
    for name in needs.scores:
        if name not in SCORES:
            raise ValueError(f"A part needs the score {name!r}; towers give {', '.join(SCORES)}.")
        if tower_family(config).attention is None:
            raise ValueError(
                f"A part needs {name}, but a tower of type {config.model_type!r} has no class token whose attention "
                "is known; use a CLIP tower, or a part that needs no scores."
            )


def _join_pieces(pieces: list[TowerOutput]) -> TowerOutput:
    """One output of those of chunks."""
    joined: dict[str, Any] = {"last_hidden_state": torch.cat([piece.output.last_hidden_state for piece in pieces])}
    for name in ("hidden_states", "attentions"):
        if getattr(pieces[0].output, name) is not None:
            layers = zip(*(getattr(piece.output, name) for piece in pieces), strict=True)
            joined[name] = tuple(torch.cat(layer) for layer in layers)
    return TowerOutput(
        torch.cat([piece.features for piece in pieces]),
        pieces[0].grid,
        {name: torch.cat([piece.scores[name] for piece in pieces]) for name in pieces[0].scores},
        {layer: torch.cat([piece.hidden[layer] for piece in pieces]) for layer in pieces[0].hidden},
        BaseModelOutput(**joined),
    )


def run_towers(
    model: Any, images: ImageInputs, layer: int | None = None, chunk_size: int | None = None, **wanted: Any
) -> tuple[list[ViewGroup], BaseModelOutput]:
    """Encode the images of a call: one group a kind and tower that is there, and the output of the main tower."""
    config, connector = model.config, model.connector
    layer = config.vision_feature_layer if layer is None else layer
    chunk_size = config.vision_chunk_size if chunk_size is None else chunk_size
    views = [view for image in images.images for view in image.views]
    used = tuple(row for row, view in enumerate(views) if connector.uses(view[0]))
    check_left_out(images.images, connector)
    source = images.source
    if len(used) < len(views):
        source = source[constant_index(used, str(source.device))]
    layers = open_tower(model, images.images, used)
    if images.is_encoded and layers is not None:
        raise ValueError("A layer op runs in the vision tower, so its features cannot be cached; pass pixel_values.")
    if images.is_encoded:
        if connector.needs != Needs():
            raise ValueError(
                f"A part needs {connector.needs} of the tower, which cached vision_features do not hold; pass "
                "pixel_values."
            )
        seen = TowerOutput(source.to(model.vision_tower.dtype), config.patch_grid, {}, {}, BaseModelOutput())
    else:
        sizes = [views[row][5:7] for row in used]
        seen = run_tower(
            model.vision_tower, source, layer, connector.needs, chunk_size, sizes, layers=layers, **wanted
        )
    kinds = dict.fromkeys(key[0] for key in connector.entering if key[1] == MAIN_TOWER)
    places = {kind: tuple(place for place, row in enumerate(used) if views[row][0] == kind) for kind in kinds}
    places = {kind: own for kind, own in places.items() if own}
    indices = constant_indices(tuple(places.values()), str(seen.features.device)) if len(places) != 1 else (None,)
    groups = [
        _take(seen, kind, tuple(used[place] for place in own), index)
        for (kind, own), index in zip(places.items(), indices, strict=True)
    ]
    rows = tuple(row for row, view in enumerate(views) if view[0] in WHOLE_KINDS)
    for name in extra_towers_used(model) if rows or connector.training else ():
        if not rows:
            groups.append(replace(_blank_extra(model, name, source.device, not images.is_encoded, (0,)), rows=()))
        elif images.is_encoded:
            groups.append(_extra_group(model, name, images.extra[f"vision_features_{name}"], rows))
        else:
            pixels = images.extra[f"pixel_values_{name}"]
            output = run_tower(model.extra_towers[name], pixels, EXTRA_LAYER, _levels(model, name), chunk_size)
            groups.append(_extra_group(model, name, output.features, rows, output.hidden))
    return groups, seen.output


def extra_towers_used(model: Any) -> list[str]:
    """Names of the extra towers that run; a training stage on crops leaves them out."""
    return [name for name in model.extra_towers if model.connector.uses(Kind.DETAIL)]


def _levels(model: Any, name: str) -> Needs:
    """The layers of an extra tower before the last one that parts need."""
    number = len(tower_levels(model.extra_towers[name].config)) if name in model.connector.needs.levels else 1
    return Needs(layers=tuple(range(-number, EXTRA_LAYER)))


def _extra_group(
    model: Any, name: str, features: torch.Tensor, rows: tuple[int, ...], hidden: dict[int, torch.Tensor] | None = None
) -> ViewGroup:
    """The group of an extra tower, which sees what global views and frames show."""
    tower = model.extra_towers[name]
    grid = tower_grid(tower.config)
    return ViewGroup(int(Kind.DETAIL), features.to(tower.dtype), grid, rows, name, hidden=hidden or {})


def _blank_extra(model: Any, name: str, device: torch.device, use_tower: bool, places: tuple[int, ...]) -> ViewGroup:
    """What an extra tower gives for blank views at these places; zeros where it does not run."""
    tower, config = model.extra_towers[name], model.extra_towers[name].config
    side, (rows, cols) = view_side(config), tower_grid(config)
    features, hidden = torch.zeros(1, rows * cols, tower_width(config), device=device), None
    if use_tower:
        blank = torch.zeros(1, config.num_channels, side, side, device=device)
        seen = run_tower(tower, blank, EXTRA_LAYER, _levels(model, name))
        features, hidden = seen.features, seen.hidden
    hidden = {layer: states.expand(len(places), -1, -1) for layer, states in (hidden or {}).items()}
    return _extra_group(model, name, features.expand(len(places), -1, -1), places, hidden)


def _take(seen: TowerOutput, kind: int, rows: tuple[int, ...], index: torch.Tensor | None) -> ViewGroup:
    """The views of one kind; without an index all."""
    if index is None:
        return ViewGroup(kind, seen.features, seen.grid, rows, scores=seen.scores, hidden=seen.hidden)
    scores = {name: score[index] for name, score in seen.scores.items()}
    hidden = {layer: states[index] for layer, states in seen.hidden.items()}
    return ViewGroup(kind, seen.features[index], seen.grid, rows, scores=scores, hidden=hidden)


def check_left_out(images: list[ImageGeometry], connector: Any) -> None:
    """Refuse batches whose sequence needs views that a training stage leaves out."""
    kinds = {view[0] for image in images for view in image.views if view[8] > view[7] and not connector.uses(view[0])}
    kinds &= set(connector.layout.kinds)
    if kinds:
        stage, names = connector.training_views, [name for name, kind in KINDS.items() if kind in kinds]
        raise ValueError(
            f"This training stage uses {stage} only, but views of the kinds {names} enter the sequence; make the "
            f"batch with views={stage!r}, without videos where the stage leaves frames out."
        )


def blank_groups(model: Any, device: torch.device, use_tower: bool) -> list[ViewGroup]:
    """What the towers give for a blank view of each kind that is used; zeros where they do not run."""
    config, groups = model.config, []
    kinds = [kind for kind, tower in model.connector.used if tower == MAIN_TOWER]
    shape = (1, config.vision_config.num_channels, config.view_size, config.view_size)
    if use_tower:
        blank = torch.zeros(shape, device=device)
        layers = open_tower(model, [idle_image(kinds[:1], config.patch_grid)], (0,))
        seen = run_tower(model.vision_tower, blank, config.vision_feature_layer, model.connector.needs, layers=layers)
    else:
        rows, cols = config.patch_grid
        features = torch.zeros(1, rows * cols, config.vision_width, device=device, dtype=model.vision_tower.dtype)
        seen = TowerOutput(features, config.patch_grid, {}, {}, BaseModelOutput())
    for row, kind in enumerate(kinds):
        groups.append(ViewGroup(kind, seen.features, seen.grid, (row,), scores=seen.scores, hidden=seen.hidden))
    rows = tuple(row for row, kind in enumerate(kinds) if kind in WHOLE_KINDS) or (0,)
    return [*groups, *(_blank_extra(model, name, device, use_tower, rows) for name in extra_towers_used(model))]
