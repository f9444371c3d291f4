"""What an image or a video costs: views and visual tokens, with and without a budget, and LLaVA-NeXT's count of an
image; without torch."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from .processing.frame_sampling_hires_lmm import Sampling
from .processing.planners_hires_lmm import find_planner, find_video_planner
from .processing.token_layout_hires_lmm import TokenLayout, apply_budget, check_frames, count_tokens


PRESET_SETTINGS: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("preset_settings.json").read_text(encoding="utf-8")
)
"""Preset -> settings of its image processor over CLIP ViT-L/14 at 336 pixels, by `scripts/preset_settings.py`."""


@dataclass(frozen=True)
class ImageAccount:
    """What one image, or one video of `frames` frames, costs.

    `patches` are those of all views that enter the sequence, before any compression and without separators;
    `visual_tokens` what the parts make of them before any is dropped; `kept_tokens` those under the budget;
    `llava_next` the tokens of the same image in LLaVA-NeXT with its released settings. The crops of a video are its
    frames.
    """

    height: int
    width: int
    views: int
    crop_rows: int
    crop_cols: int
    patches: int
    visual_tokens: int
    kept_tokens: int | None
    llava_next: int | None
    frames: int | None = None

    def to_dict(self) -> dict[str, int | None]:
        """The fields as JSON values; what an image or a video has not is left out."""
        names = {"llava_next", "frames"}
        return {name: value for name, value in asdict(self).items() if value is not None or name not in names}


def account_image(
    settings: dict[str, Any],
    height: int,
    width: int,
    max_image_tokens: int | None = None,
    frames: int | None = None,
    **limits: Any,
) -> ImageAccount:
    """Count views and tokens of an image or a video from its size.

    Args:
        settings (`dict`): Of an image processor, as it saves them; see `PRESET_SETTINGS` and `read_image_settings`.
        height, width (`int`): The upright image, pixels.
        max_image_tokens (`int`, *optional*): The budget; by default the saved one, if any.
        frames (`int`, *optional*): Frames of a video, of which the saved `num_frames` at most are taken.
        limits: Fields of `PlannerLimits` that replace the saved ones: `max_crops`, `views`, ...

    Raises:
        ValueError: If a size or setting is wrong, or the budget too small; the message names the smallest.
    """
    plan, layout = _plan(settings, height, width, limits, frames)
    check_frames(plan, layout, 0)
    count = count_tokens(plan, layout)
    budget = settings.get("max_image_tokens") if max_image_tokens is None else max_image_tokens
    next_plan, next_layout = _plan(PRESET_SETTINGS["llava_next"], height, width, {}, None)
    return ImageAccount(
        height=height,
        width=width,
        views=len(plan.views),
        crop_rows=plan.grid[0],
        crop_cols=plan.grid[1],
        patches=count_tokens(plan, TokenLayout.plain(plan.patch_grid)).total,
        visual_tokens=count.total,
        kept_tokens=None if budget is None else apply_budget(count, layout, budget, 0),
        llava_next=None if plan.is_video else count_tokens(next_plan, next_layout).total,
        frames=frames,
    )


def _plan(
    settings: dict[str, Any], height: int, width: int, changes: dict[str, Any], frames: int | None
) -> tuple[Any, TokenLayout]:
    """The views of an image or a video and the order of its tokens."""
    given, number = {**settings, **changes}, 1
    known: tuple[str, ...] = ("view_size", "patch_size")
    if frames is None:
        name, planner, own = find_planner(settings["planner"])
        known += ("max_crops", "pinpoints", "unpad", "global_view", "views")
    else:
        name, planner, own = find_video_planner(settings.get("video_planner", "frames"))
        number = Sampling(given.get("num_frames")).count(frames)
    limits = planner.build_options(name, {**{each: given[each] for each in known if each in given}, **own})
    layout = settings.get("token_layout")
    return (
        planner(height, width, limits, number),
        TokenLayout.plain(limits.patch_grid) if layout is None else TokenLayout.from_dict(layout),
    )


def build_token_table(accounts: list[ImageAccount]) -> Table:
    """A table of accounts, one image a row."""
    table = Table(title_justify="left")
    has_budget = accounts[0].kept_tokens is not None
    is_video = accounts[0].frames is not None
    columns = ["height x width", "views", "crops", "patches", "visual tokens", *(["kept"] if has_budget else [])]
    if is_video:
        columns = ["frames", *(column for column in columns if column != "crops")]
    for column in [*columns, *([] if is_video else ["LLaVA-NeXT"])]:
        table.add_column(column, justify="right", no_wrap=True)
    for account in accounts:
        cells = [
            *([str(account.frames)] if is_video else []),
            f"{account.height} x {account.width}",
            str(account.views),
            *([] if is_video else [f"{account.crop_rows} x {account.crop_cols}"]),
            str(account.patches),
            str(account.visual_tokens),
            *([str(account.kept_tokens)] if has_budget else []),
            *([] if is_video else [str(account.llava_next)]),
        ]
        table.add_row(*cells)
    return table
