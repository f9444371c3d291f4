"""Tokens of objects whose boxes the caller gives, read from the map of a tower (MG-LLaVA)."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .bases_hires_lmm import HiResLmmViewOp, Needs, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures, ViewGroup
from .geometry_hires_lmm import BOX_SIDE, KINDS, MAIN_TOWER, OBJECTS, Grid, Kind


OBJECT_KEY = (KINDS["objects"], OBJECTS)


def box_weights(start: torch.Tensor, stop: torch.Tensor, length: int, bins: int) -> torch.Tensor:
    """How much each of `length` cells on a line counts in the mean over boxes `(I, N)` of cells: `(I, N, length)`.

    As torchvision's RoIAlign with aligned=False and as many points as fit: a box is at least one cell long.
    """
    size = (stop - start).clamp(min=1.0)
    points = (size / bins).ceil() * bins  # of the box, as many in each bin
    place = torch.arange(bins * math.ceil(max(length / bins, 1)), dtype=torch.float32, device=start.device)
    at = start[..., None] + (place + 0.5) * (size / points)[..., None]
    hats = 1 - (at.clamp(max=length - 1)[..., None] - place.new_tensor(range(length))).abs()
    counts = (place < points[..., None]).float() / points[..., None]
    return torch.einsum("inpl,inp->inl", hats.clamp(min=0), counts)


def resized(length: int, size: int, device: torch.device) -> torch.Tensor:
    """How a line of `length` cells is interpolated to one of `size`: `(size, length)`."""
    eye = torch.eye(length, dtype=torch.float32, device=device)[None]
    return nn.functional.interpolate(eye, size=size, mode="linear", align_corners=False)[0].T


class HiResLmmObjectTokens(HiResLmmViewOp):
    """Makes one token of each box that the caller gives: the mean of a tower's map inside it. They enter where
    `layout.order` names `objects`, by the adapter `tower_adapters["objects"]`.

    Source: MG-LLaVA, huggingface.co/papers/2406.17770, and its released code (PhoenixZ810/MG-LLaVA), whose boxes come
    from a tagger and a detector that are no part of the model. Ours: several images, none, towers of any kind; beyond
    the map its border counts.
    """

    needs_equal_views = True

    @strict
    @dataclass
    class Options:
        """Options of `object_tokens`.

        Args:
            tower (`str`, *optional*): Extra tower whose map is read, or `"vision_tower"`; the only extra tower by
                default, the main one where there is none.
            levels (`str`): Of a convolutional tower, `"all"`: the maps of all stages, brought to the size of the
                first, side by side (released), or `"last"`. Other towers have one map.
            bins (`int`): Parts along a side of a box in each of which as many points are read.
        """

        tower: str | None = None
        levels: Literal["all", "last"] = "all"
        bins: int = 56

        def __post_init__(self) -> None:
            if self.bins < 1:
                raise ValueError(f"bins={self.bins} must be at least 1.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.tower = _find_tower(options, context)
        self.num_levels = len(_level_widths(options, context))

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """One more view an image, of the kind `objects`, as long as it has objects."""
        tower, widths = _find_tower(options, context), _level_widths(options, context)
        rows, cols = context.patch_grid
        grid = Grid(rows, 1, stride=(1, cols), num_views=1)
        needs = Needs(levels=(tower,) if len(widths) > 1 else ())
        made = {OBJECTS: sum(widths)}
        return Traits({**context.grids, OBJECT_KEY: grid}, context.width, needs=needs, tower_widths=made)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Add a group of object tokens `(I, N, C)`; N is at least 1, so that the same modules run in every batch."""
        is_main = self.tower == MAIN_TOWER
        group = views.group("global") if is_main else views.group("detail", self.tower)
        if group is None or (group.rows and len(group.rows) != len(views.images)):
            raise ValueError("object_tokens needs the global view of every image; make the batch with views='all'.")
        boxes = views.boxes if group.rows else None
        if boxes is None or not boxes.shape[1]:
            boxes = torch.zeros(len(group.features), 1, 4, dtype=torch.long, device=group.features.device)
        maps = [group.hidden[level] for level in range(-self.num_levels, -1)] + [group.features]
        tokens = self.read(boxes, [states.unflatten(1, _square(states, group)) for states in maps])
        made = ViewGroup(int(Kind.OBJECT), tokens, (tokens.shape[1], 1), group.rows, OBJECTS)
        return ViewFeatures([*views.groups, made], views.images, views.limits, views.aux, views.boxes)

    def read(self, boxes: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
        """Means of maps `(I, h, w, C)` inside boxes `(I, N, 4)`, side by side: `(I, N, sum of C)`."""
        (high, wide), edges = maps[0].shape[1:3], boxes.float() / BOX_SIDE
        down = box_weights(edges[..., 0] * high, edges[..., 2] * high, high, self.options.bins)
        across = box_weights(edges[..., 1] * wide, edges[..., 3] * wide, wide, self.options.bins)
        means = []
        for plane in maps:
            rows = (down @ resized(plane.shape[1], high, down.device)).to(plane.dtype)
            cols = (across @ resized(plane.shape[2], wide, down.device)).to(plane.dtype)
            lines = (rows @ plane.flatten(2)).unflatten(2, plane.shape[2:])
            means.append(torch.einsum("inw,inwc->inc", cols, lines))
        return torch.cat(means, dim=-1)


def _square(states: torch.Tensor, group: ViewGroup) -> tuple[int, int]:
    """Rows and columns of the map of a level, as far as it is larger than the last one."""
    factor = math.isqrt(states.shape[1] // (group.grid[0] * group.grid[1]))
    return group.grid[0] * factor, group.grid[1] * factor


def _find_tower(options: Any, context: PartContext) -> str:
    """The tower that the option names, or the only extra one, or the main one."""
    names = [tower for kind, tower in context.grids if tower != MAIN_TOWER and kind == KINDS["detail"]]
    if options.tower is None and len(names) > 1:
        raise ValueError(f"object_tokens reads one tower, but there are {names}; name one by tower.")
    name = options.tower if options.tower is not None else (names or [MAIN_TOWER])[0]
    if name != MAIN_TOWER and name not in names:
        raise ValueError(
            f"object_tokens reads the tower {name!r}, but extra_towers has {names or 'none'} here; put it before "
            "parts that take the views of the tower away, such as conv_gate."
        )
    if name == MAIN_TOWER and (KINDS["global"], MAIN_TOWER) not in context.grids:
        raise ValueError("object_tokens reads the global view, but none reaches it.")
    return name


def _level_widths(options: Any, context: PartContext) -> tuple[int, ...]:
    """Channels of the maps that are read."""
    tower = _find_tower(options, context)
    if tower == MAIN_TOWER:
        return (context.width,)
    widths = context.tower_levels.get(tower, ())
    return widths if options.levels == "all" and len(widths) > 1 else (context.tower_widths[tower],)
