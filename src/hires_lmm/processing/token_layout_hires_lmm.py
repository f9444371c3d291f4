"""How many tokens an image becomes: from its plan and the layout of the model, without pixels."""

from dataclasses import asdict, dataclass, fields

from .planners_hires_lmm import GLOBAL_VIEW, View, ViewPlan


@dataclass(frozen=True)
class TokenLayout:
    """The order of an image's tokens and what the parts of the model leave of them; a small JSON dict.

    The tokens come in blocks: the global view is one; the crops are one (`crop_order="raster"`: their token maps are
    stitched by grid position and read row by row) or one each (`"views"`, in raster order). A block without tokens and
    marks does not exist. A mark is one token that belongs to no patch.

    Args:
        patch_grid (`tuple[int, int]`): Patches of a view (rows, columns), the unit of the plan's spans.
        global_grid, crop_grid (`tuple[int, int]`): Tokens of a view after the view ops; `(0, 0)` = none.
        global_position (`str`): `"first"` or `"last"`.
        crop_order (`str`): `"raster"` or `"views"`.
        between_views (`bool`): One mark between consecutive blocks.
        row_end (`bool`): One mark after each token row of a block of crops (stitched row for `"raster"`).
        view_end (`bool`): One mark after each block.
        fixed_tokens (`int`, *optional*): The image always has exactly that many tokens, whatever its size.
        later_tokens (`int`, *optional*): Tokens of the turns after the first, where a model uses fewer there.
        budget (`dict`, *optional*): `{"on": "all" | "crops" | "global" | "fixed"}`: which tokens `max_image_tokens`
            may drop; `None` = no part drops tokens.

    Raises:
        ValueError: If a value has the wrong type or is unknown.
    """

    patch_grid: tuple[int, int]
    global_grid: tuple[int, int]
    crop_grid: tuple[int, int]
    global_position: str = "first"
    crop_order: str = "raster"
    between_views: bool = False
    row_end: bool = False
    view_end: bool = False
    fixed_tokens: int | None = None
    later_tokens: int | None = None
    budget: dict | None = None

    def __post_init__(self) -> None:
        for name in ("patch_grid", "global_grid", "crop_grid"):
            object.__setattr__(self, name, _checked_grid(name, getattr(self, name), 1 if name == "patch_grid" else 0))
        _check_choice("global_position", self.global_position, ("first", "last"))
        _check_choice("crop_order", self.crop_order, ("raster", "views"))
        for name in ("between_views", "row_end", "view_end"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"token_layout: {name}={getattr(self, name)!r} must be true or false.")
        for name in ("fixed_tokens", "later_tokens"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"token_layout: {name}={value!r} must be null or an integer of at least 1.")
        self._check_budget()

    def _check_budget(self) -> None:
        if self.budget is None:
            return
        choices = ("all", "crops", "global") if self.fixed_tokens is None else ("fixed",)
        if not isinstance(self.budget, dict) or set(self.budget) != {"on"} or self.budget["on"] not in choices:
            allowed = " or ".join(repr({"on": choice}) for choice in choices)
            fixed = f"fixed_tokens={self.fixed_tokens}"
            raise ValueError(f"token_layout: budget={self.budget!r} must be null or {allowed} where {fixed}.")

    @classmethod
    def from_dict(cls, values: dict) -> "TokenLayout":
        """Read a layout from its JSON dict.

        Args:
            values (`dict`): As `HiResLmmConfig.token_layout()` gives it.

        Returns:
            The layout.

        Raises:
            ValueError: If a key is unknown or missing, or a value is wrong.
        """
        if not isinstance(values, dict):
            raise ValueError(f"token_layout={values!r} must be a dict; take it from config.token_layout().")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        missing = [name for name in ("patch_grid", "global_grid", "crop_grid") if name not in values]
        if unknown or missing:
            wrong = f"unknown keys {unknown}" if unknown else f"no {', '.join(missing)}"
            raise ValueError(f"token_layout has {wrong}; its keys are {', '.join(known)}.")
        return cls(**values)

    def to_dict(self) -> dict:
        """The layout as a dict of JSON types with all keys."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class TokenCount:
    """Tokens of one image before any budget: `total` = `global_tokens` + `crop_tokens` + `marks`; with `fixed_tokens`
    only `total` is set."""

    total: int
    global_tokens: int = 0
    crop_tokens: int = 0
    marks: int = 0


def count_tokens(plan: ViewPlan, layout: TokenLayout) -> TokenCount:
    """Count the tokens of one image.

    Args:
        plan (`ViewPlan`): How the image is cut.
        layout (`TokenLayout`): How its tokens are arranged.

    Returns:
        The full count, of which `apply_budget` may take some away.

    Raises:
        ValueError: If the patch grids of plan and layout differ.
    """
    if layout.patch_grid != (plan.patch_grid, plan.patch_grid):
        raise ValueError(
            f"view_size={plan.view_size} and patch_size={plan.patch_size} give {plan.patch_grid}x{plan.patch_grid} "
            f"patches, token_layout has {layout.patch_grid[0]}x{layout.patch_grid[1]}; change one of them."
        )
    if layout.fixed_tokens is not None:
        return TokenCount(layout.fixed_tokens)
    rows, cols = _mapped_size(plan.views[0], layout.global_grid, layout.patch_grid)
    global_tokens = rows * cols
    crop_tokens, row_marks, crop_blocks = _count_crops(plan, layout)
    blocks = crop_blocks + (global_tokens > 0)
    marks = row_marks + layout.view_end * blocks + layout.between_views * max(blocks - 1, 0)
    return TokenCount(global_tokens + crop_tokens + marks, global_tokens, crop_tokens, marks)


def min_budget(count: TokenCount, layout: TokenLayout) -> int:
    """The smallest `max_image_tokens` that an image allows: what no part drops, and one more.

    Args:
        count (`TokenCount`): The full count of the image.
        layout (`TokenLayout`): Says which tokens may be dropped.

    Returns:
        The number; the full count where nothing may be dropped.
    """
    return count.total - max(_droppable_tokens(count, layout) - 1, 0)


def apply_budget(count: TokenCount, layout: TokenLayout, max_image_tokens: int | None, image_index: int) -> int:
    """Tokens of one image under a budget: `min(max_image_tokens, count.total)`, exactly.

    Args:
        count (`TokenCount`): The full count of the image.
        layout (`TokenLayout`): Says which tokens may be dropped.
        max_image_tokens (`int`, *optional*): All placeholders of the image, marks included; `None` = no budget.
        image_index (`int`): Named in the error.

    Returns:
        The number of placeholders.

    Raises:
        ValueError: If the budget is below the smallest value the image allows, which the message names.
    """
    if max_image_tokens is None:
        return count.total
    if isinstance(max_image_tokens, bool) or not isinstance(max_image_tokens, int):
        raise ValueError(f"max_image_tokens={max_image_tokens!r} must be an integer number of tokens, or None.")
    least = min_budget(count, layout)
    if max_image_tokens < least and layout.fixed_tokens == least:
        raise ValueError(
            f"Image {image_index}: max_image_tokens={max_image_tokens} is too small; this model uses {least} tokens "
            f"for every image, whatever its size. Use {least} or more, or leave max_image_tokens out."
        )
    if max_image_tokens < least:
        reason = "marks and protected views stay" if layout.budget else "this model has no part that drops tokens"
        raise ValueError(
            f"Image {image_index}: max_image_tokens={max_image_tokens} is too small ({reason}); the smallest value "
            f"for this image is {least}, its full count is {count.total}. Raise max_image_tokens (min_image_tokens "
            f"tells the smallest), lower max_crops or leave views out."
        )
    return min(max_image_tokens, count.total)


def _droppable_tokens(count: TokenCount, layout: TokenLayout) -> int:
    if layout.budget is None:
        return 0
    droppable = {
        "all": count.global_tokens + count.crop_tokens,
        "crops": count.crop_tokens,
        "global": count.global_tokens,
        "fixed": count.total,
    }
    return droppable[layout.budget["on"]]


def _count_crops(plan: ViewPlan, layout: TokenLayout) -> tuple[int, int, int]:
    """Tokens, marks at row ends and blocks of the crops."""
    sizes = {}
    for view in plan.views:
        if view.kind != GLOBAL_VIEW:
            sizes[view.row, view.col] = _mapped_size(view, layout.crop_grid, layout.patch_grid)
    if layout.crop_order == "views":
        present = [(rows, cols) for rows, cols in sizes.values() if rows * cols]
        tokens = sum(rows * cols for rows, cols in present)
        return tokens, layout.row_end * sum(rows for rows, _ in present), len(present)
    rows = sum(rows for (_, col), (rows, _) in sizes.items() if col == 0)
    cols = sum(cols for (row, _), (_, cols) in sizes.items() if row == 0)
    row_marks = layout.row_end * rows
    return rows * cols, row_marks, int(rows * cols + row_marks > 0)


def _mapped_size(view: View, grid: tuple[int, int], patch_grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the token grid that a view's span touches."""
    top, bottom, left, right = view.span
    return _mapped_length(top, bottom, grid[0], patch_grid[0]), _mapped_length(left, right, grid[1], patch_grid[1])


def _mapped_length(start: int, end: int, tokens: int, patches: int) -> int:
    return -(-end * tokens // patches) - start * tokens // patches if end > start else 0


def _checked_grid(name: str, grid: tuple[int, int], least: int) -> tuple[int, int]:
    valid = isinstance(grid, (list, tuple)) and len(grid) == 2
    if not valid or any(isinstance(side, bool) or not isinstance(side, int) or side < least for side in grid):
        raise ValueError(f"token_layout: {name}={grid!r} must be [rows, columns], integers of at least {least}.")
    return grid[0], grid[1]


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"token_layout: {name}={value!r} is unknown; choose {' or '.join(map(repr, choices))}.")
