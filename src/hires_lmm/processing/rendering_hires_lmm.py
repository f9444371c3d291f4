"""From pictures and plans to pixels: squares, resizes, canvases, crops and normalisation.

What the functions take as `settings` are the checked options of a call of the image processor.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_utils import PILImageResampling

from .geometry_hires_lmm import Kind
from .image_input_hires_lmm import crop_to_square, mean_color, pad_to_square
from .reading_hires_lmm import in_threads
from .resizing_hires_lmm import Picture, as_image, resize_all, size_of
from .view_plans_hires_lmm import View, ViewPlan, square_paste


@dataclass(frozen=True)
class Drawn:
    """What is drawn of one image, before it is cut: the global view (float32 where it is interpolated), the canvas and
    the view of each extra tower, `(height, width, 3)`; None or no entry where the plan has none."""

    whole: np.ndarray | None
    canvas: np.ndarray | None
    towers: dict[str, np.ndarray]


def draw(picture: Picture, plan: ViewPlan, settings: Any, index: int) -> Drawn:
    """Draw all that a plan needs of a picture, each size once; `index` is named in errors."""
    picture = square(picture, plan, settings, index)
    filters = [settings.resample if settings.resample is not None else own for own in plan.resample]
    filters = [PILImageResampling.BICUBIC if own is None else own for own in filters]
    has_global = any(view.kind == Kind.GLOBAL for view in plan.views)
    is_interpolated = plan.global_square is not None and settings.resample is None
    has_canvas = any(plan.canvas)
    towers = {name: plan.whole(tower["size"]) for name, tower in (settings.extra_towers or {}).items() if has_global}
    wanted = [(resized, PILImageResampling.BICUBIC) for resized, _ in towers.values()]
    wanted += [(plan.resized, filters[1])] if has_canvas and not plan.transposed else []
    wanted += [(plan.global_size, filters[0])] if has_global and not is_interpolated else []
    resized = dict(zip(wanted, resize_all(picture, wanted, settings.resize_backend), strict=True))

    whole = canvas = None
    if has_global and is_interpolated:
        whole = _interpolated_square(picture, plan)
    elif has_global:
        side = plan.view_pixels(next(view for view in plan.views if view.kind == Kind.GLOBAL))
        whole = _paste(resized[plan.global_size, filters[0]], side, plan.global_paste, plan.global_fill)
    if has_canvas and plan.transposed:
        canvas = _transposed_canvas(picture, plan, filters[1])
    elif has_canvas:
        canvas = _paste(resized[plan.resized, filters[1]], plan.canvas, plan.paste, plan.fill)
    views = {
        name: _paste(resized[own, PILImageResampling.BICUBIC], (side, side), paste, plan.global_fill)
        for (name, (own, paste)), side in zip(towers.items(), _tower_sizes(settings), strict=False)
    }
    return Drawn(whole, canvas, views)


def square(picture: Picture, plan: ViewPlan, settings: Any, index: int) -> Picture:
    """What is drawn in place of a picture: itself, or a square, cut at the largest size at which it will be drawn."""
    if settings.limits.square == "pad":
        return pad_to_square(as_image(picture), mean_color(settings.image_mean), settings.pixel_limit, index)
    if settings.limits.square == "crop":
        largest = max(plan.view_size, *plan.canvas, *_tower_sizes(settings))
        return crop_to_square(as_image(picture), plan.global_square or largest, settings.resample)
    return picture


def _tower_sizes(settings: Any) -> list[int]:
    return [tower["size"] for tower in (settings.extra_towers or {}).values()]


def cut(drawn: list[Drawn], plans: list[ViewPlan], settings: Any) -> np.ndarray:
    """Cut all views from what was drawn; every pixel is normalised where it will stay."""
    sizes = [[plan.view_pixels(view) for view in plan.views] for plan in plans]
    largest = [max(size[axis] for own in sizes for size in own) for axis in (0, 1)]
    number = sum(map(len, sizes))
    make = np.empty if len({size for own in sizes for size in own}) == 1 else np.zeros
    pixels = make((number, 3, *largest), dtype=np.float32)
    ends = list(accumulate(map(len, sizes)))

    def fill(index: int) -> None:
        own = pixels[ends[index] - len(sizes[index]) : ends[index]]
        for view, size, room in zip(plans[index].views, sizes[index], own, strict=True):
            whole, canvas = (cast("np.ndarray", own) for own in (drawn[index].whole, drawn[index].canvas))
            source = whole if view.kind == Kind.GLOBAL else _cut(canvas, view, size)
            _normalise(source, room[:, : size[0], : size[1]], settings.scale, settings.shift)

    in_threads(fill, range(len(plans)), settings.num_threads)
    return pixels


def _cut(canvas: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """A crop of the canvas; of a strided view every n-th pixel, from its place in the grid on."""
    if view.kind == Kind.STRIDED:
        return canvas[view.row :: view.grid_rows, view.col :: view.grid_cols][: size[0], : size[1]]
    top, left = view.row * size[0], view.col * size[1]
    return canvas[top : top + size[0], left : left + size[1]]


def _normalise(drawn: np.ndarray, room: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> None:
    room[...] = drawn.transpose(2, 0, 1)
    room *= scale
    room += shift


def cut_towers(drawn: list[Drawn], settings: Any) -> dict[str, np.ndarray]:
    """What each extra tower sees of the images with a global view, with the numbers of that tower."""
    found = {}
    for name, tower in (settings.extra_towers or {}).items():
        numbers = scale_and_shift(settings.rescale_factor, tower["image_mean"], tower["image_std"])
        views = [own.towers[name] for own in drawn if name in own.towers]
        found[name] = np.empty((len(views), 3, tower["size"], tower["size"]), dtype=np.float32)
        for view, room in zip(views, found[name], strict=True):
            _normalise(view, room, *numbers)
    return found


def _paste(
    resized: np.ndarray, canvas: tuple[int, int], paste: tuple[int, int], fill: tuple[int, int, int]
) -> np.ndarray:
    """A resized picture on a filled canvas; `(height, width, 3)` uint8."""
    if resized.shape[:2] == canvas:
        return resized
    drawn = np.full((*canvas, 3), fill[0] if len(set(fill)) == 1 else fill, dtype=np.uint8)
    drawn[paste[0] : paste[0] + resized.shape[0], paste[1] : paste[1] + resized.shape[1]] = resized
    return drawn


def _interpolated_square(picture: Picture, plan: ViewPlan) -> np.ndarray:
    """The global view as float32, interpolated from a square on which the picture stands at its own size."""
    side = cast("int", plan.global_square)
    drawn = _paste(np.asarray(picture), (side, side), square_paste(size_of(picture), side), plan.global_fill)
    planes = torch.from_numpy(drawn.astype(np.float32)).permute(2, 0, 1)[None]
    size = (plan.view_size, plan.view_size)
    return interpolate(planes, size=size, mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()


def _transposed_canvas(picture: Picture, plan: ViewPlan, resample: int) -> np.ndarray:
    turned = as_image(picture).transpose(Image.Transpose.TRANSPOSE)
    (resized,) = resize_all(turned, [(plan.resized[::-1], resample)], "pillow")
    return _paste(resized, plan.canvas[::-1], plan.paste[::-1], plan.fill).transpose(1, 0, 2)


def scale_and_shift(factor: float, mean: Any, std: Any) -> tuple[np.ndarray, np.ndarray]:
    """Rescaling and normalisation as one multiplication and one addition per channel."""
    try:
        means, stds = (np.broadcast_to(np.asarray(value, dtype=np.float64), (3,)) for value in (mean, std))
        with np.errstate(all="ignore"):
            scale = (float(factor) / stds).astype(np.float32).reshape(3, 1, 1)
            shift = (-means / stds).astype(np.float32).reshape(3, 1, 1)
        if not (np.isfinite(scale * 255) & np.isfinite(shift)).all():
            raise ValueError("float32 cannot hold the pixels")
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"rescale_factor={factor!r}, image_mean={mean!r} and image_std={std!r} must be finite, one number or one "
            f"a channel, image_std not 0 ({error})."
        ) from error
    return scale, shift
