"""From pictures and plans to pixels: squares, resizes, canvases, crops and normalisation.

What the functions take as `settings` are the checked options of a call of the image processor.
"""

from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_utils import PILImageResampling

from .geometry_hires_lmm import WHOLE_KINDS, Kind, spread_evenly
from .image_input_hires_lmm import DEFAULT_PIXEL_LIMIT, crop_to_square, mean_color, pad_to_square
from .video_input_hires_lmm import Frames
from .video_planners_hires_lmm import collage_grid
from .view_plans_hires_lmm import View, ViewPlan, square_paste


def square(picture: Image.Image, plan: ViewPlan, settings: Any, index: int) -> Image.Image:
    """What is drawn in place of a picture: itself, or a square, cut at the largest size at which it will be drawn."""
    if plan.square == "pad":
        return pad_to_square(picture, mean_color(settings.image_mean), settings.pixel_limit, index)
    if plan.square == "crop":
        towers = [tower["size"] for tower in (settings.extra_towers or {}).values()]
        largest = max(plan.view_size, *plan.canvas, *towers)
        return crop_to_square(picture, plan.global_square or largest, settings.resample)
    return picture


def squared(source: Any, plan: ViewPlan, settings: Any, index: int) -> Any:
    """`square` for the picture of an image, or for each frame of a video."""
    if plan.square is None:
        return source
    if isinstance(source, Frames):
        return source.map(lambda picture: square(picture, plan, settings, index))
    return [square(source[0], plan, settings, index)]


def render(sources: list[Any], plans: list[ViewPlan], settings: Any) -> np.ndarray:
    """Draw all views: two resizes of each picture at most, and every pixel is normalised where it will stay.

    A source is a list of one picture, or the frames of a video, which are asked for one by one.
    """
    sizes = [plan.view_pixels(view) for plan in plans for view in plan.views]
    largest = [max(size[axis] for size in sizes) for axis in (0, 1)]
    make = np.empty if len(set(sizes)) == 1 else np.zeros
    pixels, row = make((len(sizes), 3, *largest), dtype=np.float32), 0
    for source, plan in zip(sources, plans, strict=True):
        given = [chosen if settings.resample is None else settings.resample for chosen in plan.resample]
        filters = [PILImageResampling.BICUBIC if chosen is None else chosen for chosen in given]
        first, frame, drawn = row, -1, np.empty(0)
        for view in plan.views:
            height, width = sizes[row]
            if view.frame != frame:
                frame, picture = view.frame, source[view.frame]
                canvas = _draw_canvas(picture, plan, filters[1]) if any(plan.canvas) else None
                is_drawn = False
            if view.kind in WHOLE_KINDS and not is_drawn:
                drawn = _draw_global(picture, plan, sizes[row], settings.resample, filters[0])
                is_drawn = True
            shown = drawn if view.kind in WHOLE_KINDS else _cut(cast("np.ndarray", canvas), view, sizes[row])
            own = pixels[row, :, :height, :width]
            own[...] = shown.transpose(2, 0, 1)
            own *= settings.scale
            own += settings.shift
            row += 1
        if plan.collage:
            height, width = sizes[first]
            frames = pixels[first + 1 : row, :, :height, :width]
            pixels[first, :, :height, :width] = draw_collage(frames, plan.collage, sizes[first])
    return pixels


def draw_collage(frames: np.ndarray, number: int, size: tuple[int, int]) -> np.ndarray:
    """Some of the normalised frames (T, 3, height, width), equidistant, side by side in a view of a size.

    A side that does not divide leaves zeros at bottom or right.
    """
    chosen = frames[spread_evenly(len(frames), number)]
    rows, cols = collage_grid(number)
    high, wide = size[0] // rows, size[1] // cols
    shrinks = high < frames.shape[2] or wide < frames.shape[3]
    options: dict[str, Any] = {"mode": "area"} if shrinks else {"mode": "bilinear", "align_corners": False}
    small = interpolate(torch.from_numpy(chosen), size=(high, wide), **options).numpy()
    collage = np.zeros((3, *size), dtype=np.float32)
    for place, tile in enumerate(small):
        top, left = place // cols * high, place % cols * wide
        collage[:, top : top + high, left : left + wide] = tile
    return collage


def _cut(canvas: np.ndarray, view: View, size: tuple[int, int]) -> np.ndarray:
    """A crop of the canvas; of a strided view every n-th pixel, from its place in the grid on."""
    if view.kind == Kind.STRIDED:
        return canvas[view.row :: view.grid_rows, view.col :: view.grid_cols][: size[0], : size[1]]
    top, left = view.row * size[0], view.col * size[1]
    return canvas[top : top + size[0], left : left + size[1]]


def draw_extra(sources: list[Any], plans: list[ViewPlan], tower: dict[str, Any], settings: Any) -> np.ndarray:
    """What global views and frames show on the square of an extra tower, `(n, 3, size, size)`."""
    whole = [
        (source, plan, view.frame)
        for source, plan in zip(sources, plans, strict=True)
        for view in plan.views
        if view.kind in WHOLE_KINDS
    ]
    if any(plan.collage for _, plan, _ in whole):
        raise ValueError("video_planner='thumbnail' makes no collage for an extra tower; use 'frames'.")
    views = np.empty((len(whole), 3, tower["size"], tower["size"]), dtype=np.float32)
    for own, (source, plan, frame) in zip(views, whole, strict=True):
        own[...] = draw_whole(source[frame], plan, tower, settings)
    return views


def draw_whole(picture: Image.Image, plan: ViewPlan, tower: dict[str, Any], settings: Any) -> np.ndarray:
    """What a whole view shows on the square of an extra tower, with the numbers of that tower."""
    side = tower["size"]
    factor = settings.rescale_factor
    scale, shift = scale_and_shift(factor, tower["image_mean"], tower["image_std"])
    resized, paste = plan.whole(side)
    drawn = _draw(picture, resized, (side, side), paste, plan.global_fill, PILImageResampling.BICUBIC)
    return drawn.transpose(2, 0, 1).astype(np.float32) * scale + shift


def _draw(
    picture: Image.Image,
    resized: tuple[int, int],
    canvas: tuple[int, int],
    paste: tuple[int, int],
    fill: tuple[int, int, int],
    resample: int,
) -> np.ndarray:
    """Resize a picture and paste it on a filled canvas; `(height, width, 3)` uint8."""
    if resized != (picture.height, picture.width):
        if resized[1] * picture.height > DEFAULT_PIXEL_LIMIT:  # Pillow widens all rows first; here that is too much
            picture = picture.resize((picture.width, resized[0]), resample)
        picture = picture.resize((resized[1], resized[0]), resample)
    if resized == canvas:
        return np.asarray(picture)
    drawn = np.full((*canvas, 3), fill[0] if len(set(fill)) == 1 else fill, dtype=np.uint8)
    drawn[paste[0] : paste[0] + resized[0], paste[1] : paste[1] + resized[1]] = np.asarray(picture)
    return drawn


def _draw_global(
    picture: Image.Image, plan: ViewPlan, size: tuple[int, int], asked: int | None, resample: int
) -> np.ndarray:
    """The global view as uint8, or as float32 where it is interpolated; a filter that was asked for goes first."""
    side, square = plan.view_size, plan.global_square
    if square is None or asked is not None:
        return _draw(picture, plan.global_size, size, plan.global_paste, plan.global_fill, resample)
    own = (picture.height, picture.width)
    drawn = _draw(picture, own, (square, square), square_paste(own, square), plan.global_fill, resample)
    planes = torch.tensor(drawn).permute(2, 0, 1)[None].float()
    return interpolate(planes, size=(side, side), mode="bicubic", align_corners=False)[0].permute(1, 2, 0).numpy()


def _draw_canvas(picture: Image.Image, plan: ViewPlan, resample: int) -> np.ndarray:
    if not plan.transposed:
        return _draw(picture, plan.resized, plan.canvas, plan.paste, plan.fill, resample)
    turned = picture.transpose(Image.Transpose.TRANSPOSE)
    drawn = _draw(turned, plan.resized[::-1], plan.canvas[::-1], plan.paste[::-1], plan.fill, resample)
    return drawn.transpose(1, 0, 2)


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
