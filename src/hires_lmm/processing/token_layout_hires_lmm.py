"""How many tokens an image becomes: from its plan and the layout of the model, without pixels."""

import json
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

from .geometry_hires_lmm import KINDS, OBJECTS, Grid, Kind, check_stride, kinds_on, object_view
from .sequence_hires_lmm import Arrangement, LayoutOptions
from .view_plans_hires_lmm import ViewPlan


OWN = "own"
"""Budget of a part that makes a number of tokens of its own."""


@dataclass(frozen=True)
class TokenLayout:
    """The order of an image's tokens and what the parts of the model leave of them; a small JSON dict.

    Args:
        patch_grid (`tuple[int, int]`): Patches of a view of the tower's own size (rows, columns).
        grids (`dict[str, Grid]`): Token grid of the views of each kind, by its name.
        layout (`dict`): Fields of `LayoutOptions`.
        own_tokens (`int` or `str`, *optional*): The image has exactly that many tokens, whatever its size, or those of
            the views of that kind.
        later_tokens (`int`, *optional*): Tokens of the turns after the first, where a model uses some there.
        budget (`dict`, *optional*): `{"on": "all", a kind, a list of kinds or "own"}`: which tokens `max_image_tokens`
            may take away; `"elastic": True` where the part makes fewer from the start, `"reads_question": True` where
            the question says which; `None` = no part does.

    Raises:
        ValueError: If a value has the wrong type or is unknown.
    """

    patch_grid: tuple[int, int]
    grids: dict
    layout: dict = field(default_factory=dict)
    own_tokens: int | str | None = None
    later_tokens: int | None = None
    budget: dict | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch_grid", _checked_grid("patch_grid", self.patch_grid))
        if not isinstance(self.grids, dict) or any(name not in KINDS for name in self.grids):
            raise ValueError(f"token_layout: grids={self.grids!r} must be token grids by kind: {', '.join(KINDS)}.")
        for name in ("own_tokens", "later_tokens"):
            value = getattr(self, name)
            if name == "own_tokens" and value in self.grids:
                continue
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"token_layout: {name}={value!r} must be null, an integer of at least 1, or for own_tokens a kind "
                    "of views that has a grid."
                )
        try:
            for name, grid in self.grids.items():
                check_stride(_as_grid(grid), self.patch_grid, f"grids.{name}")
            self.arrangement  # noqa: B018  # reads layout and grids
            if self.budget is not None and self.budget["on"] != OWN:
                kinds_on(self.budget["on"])
        except Exception as error:
            raise ValueError(f"token_layout: {error} Take it from config.token_layout().") from error

    @cached_property
    def arrangement(self) -> Arrangement:
        """The arrangement that the model places by."""
        grids = {int(KINDS[name]): _as_grid(grid) for name, grid in self.grids.items()}
        is_elastic = bool((self.budget or {}).get("elastic"))
        return Arrangement(
            LayoutOptions(**self.layout), grids, kinds_on((self.budget or {})["on"]) if is_elastic else ()
        )

    @property
    def reads_objects(self) -> bool:
        """Whether objects of an image become tokens."""
        return OBJECTS in self.grids

    @classmethod
    def from_dict(cls, values: dict) -> "TokenLayout":
        """Read a layout from its JSON dict, as `HiResLmmConfig.token_layout()` gives it."""
        if not isinstance(values, dict):
            raise ValueError(f"token_layout={values!r} must be a dict; take it from config.token_layout().")
        known = [each.name for each in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in ("patch_grid", "grids") if name not in values]
        if unknown or missing:
            wrong = f"unknown keys {unknown}" if unknown else f"no {', '.join(missing)}"
            raise ValueError(f"token_layout has {wrong}; its keys are {', '.join(known)}.")
        try:
            return _read(json.dumps(values))
        except TypeError:  # holds what JSON does not know, such as grids as objects
            return cls(**values)

    @classmethod
    def plain(cls, side: int) -> "TokenLayout":
        """Every patch of every view is a token; `side` patches along each side of a view."""
        grid = Grid(side, side)
        grids = {"global": grid, "crops": grid, "frames": grid}
        return cls(grid.size, grids, {"order": list(grids)}, budget={"on": "all"})

    def to_dict(self) -> dict:
        """The layout as a dict of JSON types with all keys."""
        return {
            "patch_grid": list(self.patch_grid),
            "grids": {name: _as_grid(grid).to_dict() for name, grid in self.grids.items()},
            "layout": self.layout,
            "own_tokens": self.own_tokens,
            "later_tokens": self.later_tokens,
            "budget": self.budget,
        }


@dataclass(frozen=True)
class TokenCount:
    """Tokens of one image before any budget, and how many of them a budget may take away."""

    total: int
    droppable: int


def count_tokens(plan: ViewPlan, layout: TokenLayout, num_objects: int = 0) -> TokenCount:
    """Count the tokens of one image before any budget; plan and layout must agree on the patch grid."""
    if layout.patch_grid != (plan.patch_grid, plan.patch_grid):
        raise ValueError(
            f"view_size={plan.view_size} and patch_size={plan.patch_size} give {plan.patch_grid}x{plan.patch_grid} "
            f"patches, token_layout has {layout.patch_grid[0]}x{layout.patch_grid[1]}; change one of them."
        )
    on = None if layout.budget is None else layout.budget["on"]
    if isinstance(layout.own_tokens, int):
        return TokenCount(layout.own_tokens, layout.own_tokens if on == OWN else 0)
    for kind, grid in layout.arrangement.grids.items():
        frames = sum(view.shape.kind in layout.arrangement.sources(kind) for view in plan.views)
        if frames % grid.view_stride:
            raise ValueError(
                f"This model joins {grid.view_stride} frames at a time, and a video has {frames}; set num_frames to a "
                f"multiple of {grid.view_stride}."
            )
    counts = layout.arrangement.count([*(view.shape for view in plan.views), object_view(num_objects)])
    if layout.own_tokens is not None:
        return TokenCount(counts[KINDS[layout.own_tokens]], 0)
    return TokenCount(sum(counts.values()), sum(counts.get(kind, 0) for kind in kinds_on(on)) if on else 0)


def check_frames(plan: ViewPlan, layout: TokenLayout, index: int) -> None:
    """Refuse a video where the model has no place for frames."""
    arrangement = layout.arrangement
    if plan.is_video and not any(Kind.FRAME in arrangement.sources(kind) for kind in arrangement.kinds):
        raise ValueError(
            f"Image {index} is a video, but this model places no frames. Build the model with connector_config="
            f'{{"layout": {{"order": {[*arrangement.order, "frames"]}}}}}, and the processor with '
            "HiResLmmProcessor.from_config."
        )


def min_budget(count: TokenCount) -> int:
    """The smallest `max_image_tokens` that an image of this count accepts: what no part drops, and one more."""
    return count.total - max(count.droppable - 1, 0)


def apply_budget(count: TokenCount, layout: TokenLayout, max_image_tokens: int | None, image_index: int) -> int:
    """`min(max_image_tokens, count.total)`, exactly; a budget below the smallest value that the image allows is
    refused by name, separators and protected views counted."""
    if max_image_tokens is None:
        return count.total
    if isinstance(max_image_tokens, bool) or not isinstance(max_image_tokens, int):
        raise ValueError(f"max_image_tokens={max_image_tokens!r} must be an integer number of tokens, or None.")
    least = min_budget(count)
    if max_image_tokens < least and (layout.own_tokens == least or isinstance(layout.own_tokens, str)):
        raise ValueError(
            f"Image {image_index}: max_image_tokens={max_image_tokens} is too small; this model uses {least} tokens "
            f"for it and drops none. Use {least} or more, or leave max_image_tokens out."
        )
    if max_image_tokens < least:
        reason = "separators and protected views stay" if layout.budget else "this model has no part that drops tokens"
        raise ValueError(
            f"Image {image_index}: max_image_tokens={max_image_tokens} is too small ({reason}); the smallest value "
            f"for this image is {least}, its full count is {count.total}. Raise max_image_tokens "
            f"(min_image_tokens or min_video_tokens tells it), lower max_crops or num_frames, or leave views out."
        )
    return min(max_image_tokens, count.total)


@lru_cache(maxsize=64)
def _read(text: str) -> TokenLayout:
    """One layout for equal dicts, so that a processor checks its own once and not in every call."""
    return TokenLayout(**json.loads(text))


def _as_grid(grid: Any) -> Grid:
    return grid if isinstance(grid, Grid) else Grid.from_dict(grid)


def _checked_grid(name: str, grid: Any) -> tuple[int, int]:
    valid = isinstance(grid, (list, tuple)) and len(grid) == 2
    if not valid or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in grid):
        raise ValueError(f"token_layout: {name}={grid!r} must be [rows, columns], integers of at least 1.")
    return grid[0], grid[1]


__all__ = ["TokenCount", "TokenLayout", "apply_budget", "count_tokens", "min_budget"]
