"""What an image costs: views and visual tokens, with and without a budget, and LLaVA-NeXT's count; without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .processing.planners_hires_lmm import find_planner
from .processing.token_layout_hires_lmm import TokenLayout, apply_budget, count_tokens


PRESET_SETTINGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("preset_settings.json").read_text(encoding="utf-8")
)
"""Preset -> settings of its image processor over CLIP ViT-L/14 at 336 pixels, by `scripts/preset_settings.py`."""


@dataclass(frozen=True)
class ImageAccount:
    """What one image costs.

    `patches` are those of all views that enter the sequence, before any compression and without separators;
    `visual_tokens` what the parts make of them before any is dropped; `kept_tokens` those under the budget;
    `llava_next` the tokens of the same image in LLaVA-NeXT with its released settings.
    """

    height: int
    width: int
    views: int
    crop_rows: int
    crop_cols: int
    patches: int
    visual_tokens: int
    kept_tokens: int | None
    llava_next: int

    def to_dict(self) -> dict[str, int | None]:
        """The fields as JSON values."""
        return asdict(self)


def account_image(
    settings: dict[str, Any], height: int, width: int, max_image_tokens: int | None = None, **limits: Any
) -> ImageAccount:
    """Count views and tokens of an image from its size.

    Args:
        settings (`dict`): Of an image processor, as it saves them; see `PRESET_SETTINGS` and `read_image_settings`.
        height, width (`int`): The upright image, pixels.
        max_image_tokens (`int`, *optional*): The budget; by default the saved one, if any.
        limits: Fields of `PlannerLimits` that replace the saved ones: `max_crops`, `views`, ...

    Raises:
        ValueError: If a size or setting is wrong, or the budget too small; the message names the smallest.
    """
    plan, layout = _plan(settings, height, width, limits)
    count = count_tokens(plan, layout)
    budget = settings.get("max_image_tokens") if max_image_tokens is None else max_image_tokens
    next_plan, next_layout = _plan(PRESET_SETTINGS["llava_next"], height, width, {})
    return ImageAccount(
        height=height,
        width=width,
        views=len(plan.views),
        crop_rows=plan.grid[0],
        crop_cols=plan.grid[1],
        patches=count_tokens(plan, TokenLayout.plain(plan.patch_grid)).total,
        visual_tokens=count.total,
        kept_tokens=None if budget is None else apply_budget(count, layout, budget, 0),
        llava_next=count_tokens(next_plan, next_layout).total,
    )


def _plan(settings: dict[str, Any], height: int, width: int, changes: dict[str, Any]) -> tuple[Any, TokenLayout]:
    """The views of an image and the order of its tokens."""
    name, planner, own = find_planner(settings["planner"])
    given = {**settings, **changes}
    known = ("view_size", "patch_size", "max_crops", "pinpoints", "unpad", "global_view", "views", "enlarge")
    limits = planner.build_options(name, {**{each: given[each] for each in known if each in given}, **own})
    layout = settings.get("token_layout")
    return (
        planner(height, width, limits),
        TokenLayout.plain(limits.patch_grid) if layout is None else TokenLayout.from_dict(layout),
    )


def build_token_table(accounts: list[ImageAccount]) -> Table:
    """A table of accounts, one image a row."""
    table = Table(title_justify="left")
    has_budget = accounts[0].kept_tokens is not None
    columns = ["height x width", "views", "crops", "patches", "visual tokens", *(["kept"] if has_budget else [])]
    for column in [*columns, "LLaVA-NeXT"]:
        table.add_column(column, justify="right", no_wrap=True)
    for account in accounts:
        cells = [
            f"{account.height} x {account.width}",
            str(account.views),
            f"{account.crop_rows} x {account.crop_cols}",
            str(account.patches),
            str(account.visual_tokens),
            *([str(account.kept_tokens)] if has_budget else []),
        ]
        table.add_row(*cells, str(account.llava_next))
    return table
