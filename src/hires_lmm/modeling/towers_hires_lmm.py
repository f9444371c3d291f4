"""Running a vision tower: bounded chunks of views, one layer of hidden states, and what parts ask for beside it."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import logging

from .bases_hires_lmm import Needs
from .carriers_hires_lmm import ImageGeometry, ViewGroup, constant_index, constant_indices
from .geometry_hires_lmm import MAIN_TOWER, Kind
from .inputs_hires_lmm import ImageInputs
from .tower_table_hires_lmm import patch_side, tower_family, view_side


logger = logging.get_logger(__name__)


@torch.compiler.assume_constant_result  # names of types are nothing to compile
def is_sharded(module: torch.nn.Module) -> bool:
    """Whether the parameters of a module are spread over processes (FSDP, ZeRO-3), which then call it in step.

    Args:
        module (`nn.Module`): Any module.
    """
    kinds = {type(parameter).__name__ for parameter in module.parameters()}
    return bool(kinds & {"DTensor", "FlatParameter"}) or any(hasattr(p, "ds_id") for p in module.parameters())


def split_views(pixels: torch.Tensor, chunk_size: int | None, tower: torch.nn.Module) -> tuple[torch.Tensor, ...]:
    """Cut a batch of views into the pieces that pass the tower one after another.

    Args:
        pixels (`torch.Tensor` of shape `(V, 3, S, S)`): Views.
        chunk_size (`int`, *optional*): Most views of a piece; None = all.
        tower (`nn.Module`): The tower; where its parameters are spread over processes, all views stay together, since
            every process must call it equally often.

    Returns:
        At least one piece.

    Raises:
        ValueError: If `chunk_size` is no integer or below 1.
    """
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
) -> TowerOutput:
    """Encode views.

    Args:
        tower (`PreTrainedModel`): A vision tower of transformers.
        pixels (`torch.Tensor` of shape `(V, 3, H, W)`): Views.
        layer (`int`): Index into the hidden states.
        needs (`Needs`, *optional*): Scores and further layers that parts ask for.
        chunk_size (`int`, *optional*): Most views that pass the tower at once; None = all. Bounds the memory of a
            forward pass; with gradients every chunk keeps its activations.
        sizes (`list[tuple[int, int]]`, *optional*): Patch rows and columns of each view, where they are unequal: each
            size is encoded by itself, with positions of its own, and padded at bottom and right.
        output_hidden_states, output_attentions (`bool`, *optional*): Keep those of all layers; the tower's
            configuration decides by default.
    """
    if sizes and len(set(sizes)) > 1:
        return _run_by_size(tower, pixels, layer, needs, chunk_size, sizes)
    needs = Needs() if needs is None else needs
    keeps = tower.config.output_hidden_states if output_hidden_states is None else output_hidden_states
    options: dict[str, Any] = {} if output_attentions is None else {"output_attentions": output_attentions}
    side = patch_side(tower.config)
    grid = (pixels.shape[2] // side, pixels.shape[3] // side)
    if tuple(pixels.shape[2:]) != (view_side(tower.config),) * 2 and not tower_family(tower.config).is_map:
        options["interpolate_pos_encoding"] = True
    pieces = []
    for piece in split_views(pixels, chunk_size, tower):
        output = tower(piece.to(tower.dtype), output_hidden_states=True, return_dict=True, **options)
        states = output.hidden_states
        pieces.append(
            TowerOutput(
                _patches(states[layer], grid),
                grid,
                {name: SCORES[name](tower, states) for name in needs.scores},
                {wanted: _patches(states[wanted], grid) for wanted in needs.layers},
                BaseModelOutput(
                    output.last_hidden_state, states if keeps else None, getattr(output, "attentions", None)
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
    pieces = []
    for size in sorted(set(sizes)):
        places = tuple(place for place, own in enumerate(sizes) if own == size)
        views = pixels[constant_index(places, str(pixels.device)), :, : size[0] * side, : size[1] * side]
        order += places
        pieces.append(_pad_output(run_tower(tower, views, layer, needs, chunk_size), grid))
    joined = _join_pieces(pieces)
    back = constant_index(tuple(sorted(range(len(order)), key=order.__getitem__)), str(pixels.device))
    return TowerOutput(
        joined.features[back],
        grid,
        {name: score[back] for name, score in joined.scores.items()},
        {number: states[back] for number, states in joined.hidden.items()},
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
        BaseModelOutput(last_hidden_state=output.output.last_hidden_state[:, :0]),
    )


def _patches(states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The patches `(V, L, C)` of a hidden state: without the tokens before them, a map row by row."""
    if states.ndim == 4:
        return states.flatten(2).transpose(1, 2)
    return states[:, states.shape[1] - grid[0] * grid[1] :]


def class_products(tower: PreTrainedModel, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Scaled products of the class token's query with all keys of the last layer: `(V, heads, prefix + L)` float32.

    Computed from that layer's projections, in any attention backend.
    """
    norm, query, key = (
        tower_layers(tower)[-1].get_submodule(path) for path in tower_family(tower.config).attention or ()
    )
    normed = norm(states[len(tower_layers(tower)) - 1])
    heads = tower.config.num_attention_heads
    queries = query(normed[:, :1]).unflatten(-1, (heads, -1)).float()
    keys = key(normed).unflatten(-1, (heads, -1)).float()
    return torch.einsum("vqhc,vlhc->vhl", queries, keys) * queries.shape[-1] ** -0.5


def cls_logits(tower: PreTrainedModel, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much the class token attends to each patch in the last layer, before the softmax.

    Args:
        tower (`PreTrainedModel`): A tower with a class token.
        states (`tuple[torch.Tensor]`): All hidden states `(V, 1 + L, C)`.

    Returns:
        `(V, L)` float32, the mean over the heads.
    """
    return class_products(tower, states).mean(dim=1)[:, tower_family(tower.config).prefix :]


def cls_probabilities(tower: PreTrainedModel, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The same behind the softmax; what it gives to tokens before the patches is left out."""
    return class_products(tower, states).softmax(dim=-1).mean(dim=1)[:, tower_family(tower.config).prefix :]


SCORES = {"cls_logits": cls_logits, "cls_probabilities": cls_probabilities}
"""Scores of patches that a part may need, by name."""


def check_needs(config: Any, needs: Needs) -> None:
    """Refuse what a tower cannot give.

    Raises:
        ValueError: For an unknown score, and for a score of a class token where there is none.
    """
    for name in needs.scores:
        if name not in SCORES:
            raise ValueError(f"A part needs the score {name!r}; towers give {', '.join(SCORES)}.")
        if tower_family(config).attention is None:
            raise ValueError(
                f"A part needs {name}, but a tower of type {config.model_type!r} has no class token whose attention "
                "is known; use a CLIP tower, or a part that needs no scores."
            )


def tower_layers(tower: torch.nn.Module) -> torch.nn.ModuleList:
    """The layers of a tower."""
    depth = cast("Any", tower.config).num_hidden_layers
    return next(
        module for module in tower.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == depth
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
    """Encode the images of a call.

    Args:
        model (`HiResLmmModel`): Holds the towers; its connector says which views are used and what parts need.
        images (`ImageInputs`): The images.
        layer, chunk_size (`int`, *optional*): In place of those of the configuration.
        wanted: See `run_tower`.

    Returns:
        One group a kind and tower that is there, and the output of the main tower.
    """
    config, connector = model.config, model.connector
    layer = config.vision_feature_layer if layer is None else layer
    chunk_size = config.vision_chunk_size if chunk_size is None else chunk_size
    views = [view for image in images.images for view in image.views]
    used = tuple(row for row, view in enumerate(views) if connector.uses(view[0]))
    check_left_out(images.images, connector)
    source = images.source
    if len(used) < len(views):
        source = source[constant_index(used, str(source.device))]
    if images.is_encoded:
        if connector.needs != Needs():
            raise ValueError(
                f"A part needs {connector.needs} of the tower, which cached vision_features do not hold; pass "
                "pixel_values."
            )
        seen = TowerOutput(source.to(model.vision_tower.dtype), config.patch_grid, {}, {}, BaseModelOutput())
    else:
        sizes = [views[row][5:7] for row in used]
        seen = run_tower(model.vision_tower, source, layer, connector.needs, chunk_size, sizes, **wanted)
    kinds = dict.fromkeys(key[0] for key in connector.entering if key[1] == MAIN_TOWER)
    places = {kind: tuple(place for place, row in enumerate(used) if views[row][0] == kind) for kind in kinds}
    places = {kind: own for kind, own in places.items() if own}
    indices = constant_indices(tuple(places.values()), str(seen.features.device)) if len(places) != 1 else (None,)
    groups = [
        _take(seen, kind, tuple(used[place] for place in own), index)
        for (kind, own), index in zip(places.items(), indices, strict=True)
    ]
    for name, tower in model.extra_towers.items():
        output = run_tower(tower, images.extra[name], -1, chunk_size=chunk_size)
        rows = tuple(row for row, view in enumerate(views) if view[0] == Kind.GLOBAL)
        if len(rows) != len(output.features):
            raise ValueError(
                f"pixel_values_{name} has {len(output.features)} views, but there are {len(rows)} images; pass all "
                "that the processor gives."
            )
        groups.append(ViewGroup(int(Kind.DETAIL), output.features, output.grid, rows, name))
    return groups, seen.output


def _take(seen: TowerOutput, kind: int, rows: tuple[int, ...], index: torch.Tensor | None) -> ViewGroup:
    """The views of one kind; without an index all."""
    if index is None:
        return ViewGroup(kind, seen.features, seen.grid, rows, scores=seen.scores, hidden=seen.hidden)
    scores = {name: score[index] for name, score in seen.scores.items()}
    hidden = {layer: states[index] for layer, states in seen.hidden.items()}
    return ViewGroup(kind, seen.features[index], seen.grid, rows, scores=scores, hidden=hidden)


def check_left_out(images: list[ImageGeometry], connector: Any) -> None:
    """Refuse batches whose sequence needs views that a training stage leaves out."""
    left_out = connector.training and connector.training_views == "crops"
    if left_out and any(view[0] == Kind.GLOBAL and view[8] > view[7] for image in images for view in image.views):
        raise ValueError(
            "This training stage uses crops only, but global views enter the sequence; make the batch with "
            "views='crops'."
        )


def blank_groups(model: Any, device: torch.device, use_tower: bool) -> list[ViewGroup]:
    """What the towers give for a blank view of each kind that is used, for training batches without images.

    Args:
        model (`HiResLmmModel`): Holds the towers.
        device (`torch.device`): Where the views are made.
        use_tower (`bool`): Run the main tower; else its features are zero, as where they come from a cache.
    """
    config, groups = model.config, []
    kinds = [kind for kind, tower in model.connector.used if tower == MAIN_TOWER]
    shape = (1, config.vision_config.num_channels, config.view_size, config.view_size)
    if use_tower:
        seen = run_tower(
            model.vision_tower, torch.zeros(shape, device=device), config.vision_feature_layer, model.connector.needs
        )
    else:
        rows, cols = config.patch_grid
        features = torch.zeros(1, rows * cols, config.vision_width, device=device, dtype=model.vision_tower.dtype)
        seen = TowerOutput(features, config.patch_grid, {}, {}, BaseModelOutput())
    for row, kind in enumerate(kinds):
        groups.append(ViewGroup(kind, seen.features, seen.grid, (row,), scores=seen.scores, hidden=seen.hidden))
    for name, tower in model.extra_towers.items():
        side = view_side(tower.config)
        output = run_tower(tower, torch.zeros(1, tower.config.num_channels, side, side, device=device), -1)
        groups.append(ViewGroup(int(Kind.DETAIL), output.features, output.grid, (0,), name))
    return groups
