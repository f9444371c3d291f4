"""From pictures and plans to pixels: squares, resizes, canvases, crops and normalisation.

What the functions take as `settings` are the checked options of a call of the image processor.
"""

from dataclasses import dataclass
from itertools import accumulate
from threading import Lock
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.image_utils import PILImageResampling

from .geometry_hires_lmm import WHOLE_KINDS, Kind, spread_evenly
from .image_input_hires_lmm import DEFAULT_PIXEL_LIMIT, crop_to_square, mean_color, pad_to_square
from .reading_hires_lmm import in_threads, locks_of, read_picture
from .resizing_hires_lmm import Picture, as_image, empty_planes, resize_all, size_of
from .video_input_hires_lmm import Frames, is_video, open_video
from .video_planners_hires_lmm import collage_grid
from .view_plans_hires_lmm import View, ViewPlan, square_paste


@dataclass(frozen=True)
class Drawn:
    """What is drawn of an image or frame, before it is cut, `(height, width, 3)`: the whole view (float32 where it is
    interpolated), the canvas, and the view of each extra tower; None or no entry where the plan has none."""

    whole: np.ndarray | None
    canvas: np.ndarray | None
    towers: dict[str, np.ndarray]


def draw_sources(sources: list[Any], settings: Any) -> tuple[list[ViewPlan], list[dict[int, Drawn]]]:
    """Read, plan and draw images and videos, a few pictures at once: plans, and what is drawn of each by frame."""
    locks = locks_of(sources)

    def read(index: int) -> tuple[ViewPlan, Any]:
        source = sources[index]
        with locks[id(source)]:
            if is_video(source):
                frames = open_video(source, index, settings.sampling, settings)
                height, width = frames.size
                plan = settings.video_planner(height, width, settings.video_limits, len(frames))
            else:
                picture, plan = read_picture(source, index, settings)
        check_views(plan, index)
        return plan, frames if is_video(source) else {0: draw(picture, plan, settings, index)}

    found = in_threads(read, range(len(sources)), settings.num_threads)
    plans = [plan for plan, _ in found]
    drawn = [
        own if isinstance(own, dict) else _draw_frames(own, plan, settings, index)
        for index, (plan, own) in enumerate(found)
    ]
    return plans, drawn


def _draw_frames(frames: Frames, plan: ViewPlan, settings: Any, index: int) -> dict[int, Drawn]:
    lock = Lock()

    def draw_frame(number: int) -> Drawn:
        with lock:  # the same image may stand there twice
            picture = frames[number]
        return draw(picture, plan, settings, index)

    numbers = sorted({view.frame for view in plan.views})
    return dict(zip(numbers, in_threads(draw_frame, numbers, settings.num_threads), strict=True))


def draw(picture: Picture, plan: ViewPlan, settings: Any, index: int) -> Drawn:
    """Draw all that a plan needs of a picture, each size once; `index` is named in errors."""
    picture = square(picture, plan, settings, index)
    asked = [own if settings.resample is None else settings.resample for own in plan.resample]
    filters: list[int] = [PILImageResampling.BICUBIC if own is None else own for own in asked]
    side = next((plan.view_pixels(view) for view in plan.views if view.kind in WHOLE_KINDS), None)
    is_interpolated = plan.global_square is not None and settings.resample is None
    has_canvas = any(plan.canvas)
    sides = {name: tower["size"] for name, tower in (settings.extra_towers or {}).items() if side is not None}
    towers = {name: plan.whole(own) for name, own in sides.items()}
    wanted = [(resized, PILImageResampling.BICUBIC) for resized, _ in towers.values()]
    wanted += [(plan.resized, filters[1])] if has_canvas and not plan.transposed else []
    wanted += [(plan.global_size, filters[0])] if side is not None and not is_interpolated else []
    resized = dict(zip(wanted, resize_all(picture, wanted, settings.resize_backend), strict=True))

    whole = canvas = None
    if side is not None and is_interpolated:
        whole = _interpolated_square(picture, plan)
    elif side is not None:
        whole = _paste(resized[plan.global_size, filters[0]], side, plan.global_paste, plan.global_fill)
    if has_canvas and plan.transposed:
        canvas = _transposed_canvas(picture, plan, filters[1])
    elif has_canvas:
        canvas = _paste(resized[plan.resized, filters[1]], plan.canvas, plan.paste, plan.fill)
    views = {
        name: _paste(resized[own, PILImageResampling.BICUBIC], (sides[name],) * 2, paste, plan.global_fill)
        for name, (own, paste) in towers.items()
    }
    return Drawn(whole, canvas, views)


def check_views(plan: ViewPlan, index: int, padded: tuple[int, int] = (0, 0)) -> None:
    """Refuse an image whose views, perhaps padded, hold more pixels than any source may have."""
    sizes = [*map(plan.view_pixels, plan.views), padded]
    high, wide = (max(size[axis] for size in sizes) for axis in (0, 1))
    pixels = len(plan.views) * high * wide
    if pixels > DEFAULT_PIXEL_LIMIT:
        raise ValueError(
            f"Image {index} would become {len(plan.views)} views of {high}x{wide} = {pixels} pixels, more than "
            f"{DEFAULT_PIXEL_LIMIT}; lower max_crops, num_frames or view_size, or leave out images of very "
            "different aspect."
        )


def square(picture: Picture, plan: ViewPlan, settings: Any, index: int) -> Picture:
    """What is drawn in place of a picture: itself, or a square, cut at the largest size at which it will be drawn."""
    if plan.square == "pad":
        return pad_to_square(as_image(picture), mean_color(settings.image_mean), settings.pixel_limit, index)
    if plan.square == "crop":
        towers = [tower["size"] for tower in (settings.extra_towers or {}).values()]
        largest = max(plan.view_size, *plan.canvas, *towers)
        return crop_to_square(as_image(picture), plan.global_square or largest, settings.resample)
    return picture


def cut(drawn: list[dict[int, Drawn]], plans: list[ViewPlan], settings: Any) -> np.ndarray:
    """Cut all views from what was drawn of each source, by frame; every pixel is normalised where it will stay."""
    sizes = [[plan.view_pixels(view) for view in plan.views] for plan in plans]
    largest = [max(size[axis] for own in sizes for size in own) for axis in (0, 1)]
    number = sum(map(len, sizes))
    make = np.empty if len({size for own in sizes for size in own}) == 1 else np.zeros
    pixels = make((number, 3, *largest), dtype=np.float32)
    ends = list(accumulate(map(len, sizes)))

    def fill(index: int) -> None:
        plan, own = plans[index], pixels[ends[index] - len(sizes[index]) : ends[index]]
        for view, size, room in zip(plan.views, sizes[index], own, strict=True):
            shown = drawn[index][view.frame]
            whole, canvas = cast("np.ndarray", shown.whole), cast("np.ndarray", shown.canvas)
            source = whole if view.kind in WHOLE_KINDS else _cut(canvas, view, size)
            _normalise(source, room[:, : size[0], : size[1]], settings.scale, settings.shift)
        if plan.collage:
            high, wide = sizes[index][0]
            own[0, :, :high, :wide] = draw_collage(own[1:, :, :high, :wide], plan.collage, (high, wide))

    in_threads(fill, range(len(plans)), settings.num_threads)
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


def _normalise(drawn: np.ndarray, room: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> None:
    room[...] = drawn.transpose(2, 0, 1)
    room *= scale
    room += shift


def cut_towers(drawn: list[dict[int, Drawn]], plans: list[ViewPlan], settings: Any) -> dict[str, np.ndarray]:
    """What each extra tower sees of global views and frames, with its own numbers, `(n, 3, size, size)` each."""
    towers = settings.extra_towers or {}
    if towers and any(plan.collage for plan in plans):
        raise ValueError("video_planner='thumbnail' makes no collage for an extra tower; use 'frames'.")
    found = {}
    for name, tower in towers.items():
        numbers = scale_and_shift(settings.rescale_factor, tower["image_mean"], tower["image_std"])
        of_views = zip(drawn, plans, strict=True)
        views = [
            own[view.frame].towers[name] for own, plan in of_views for view in plan.views if view.kind in WHOLE_KINDS
        ]
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
    drawn = empty_planes(canvas)
    drawn[...] = fill
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
