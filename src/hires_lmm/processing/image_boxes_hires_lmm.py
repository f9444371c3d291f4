"""Boxes or masks of objects that a caller gives, as the boxes that the model reads."""

from typing import Any

import numpy as np
import torch

from .geometry_hires_lmm import BOX_SIDE
from .view_plans_hires_lmm import BOX_UNIT, ViewPlan


def read_objects(image_boxes: Any, plans: list[ViewPlan]) -> list[np.ndarray]:
    """Check the objects of a call.

    Args:
        image_boxes (`list`, *optional*): For each image boxes `(n, 4)`, top, left, bottom, right in pixels of the
            upright image; or masks `(n, height, width)`, of which the box around each counts; or None.
        plans (`list[ViewPlan]`): How each image is cut.

    Returns:
        Boxes `(n, 4)` of each image, float64.

    Raises:
        ValueError: If they have the wrong form, leave their image, or lie in none of its views.
    """
    if image_boxes is None:
        return [np.zeros((0, 4))] * len(plans)
    if not isinstance(image_boxes, (list, tuple, np.ndarray, torch.Tensor)) or len(image_boxes) != len(plans):
        number = f"{len(image_boxes)} entries" if hasattr(image_boxes, "__len__") else repr(image_boxes)
        raise ValueError(
            f"image_boxes holds {number} for {len(plans)} images; pass a list with the boxes of each image, in the "
            "order of the images, [] where it has none."
        )
    return [_read_boxes(own, plan, index) for index, (own, plan) in enumerate(zip(image_boxes, plans, strict=True))]


def _read_boxes(given: Any, plan: ViewPlan, index: int) -> np.ndarray:
    size = plan.size
    form = f"image_boxes of image {index}: pass (objects, 4), top, left, bottom, right in pixels, or masks (objects, "
    form += f"{size[0]}, {size[1]})"
    try:
        if isinstance(given, torch.Tensor):
            given = given.detach().cpu()
            given = given.float().numpy() if given.dtype == torch.bfloat16 else given.numpy()  # numpy has no bfloat16
        array = np.zeros((0, 4)) if given is None else np.asarray(given)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"of the type {array.dtype}")
        array = array.astype(np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{form}, not what is no array of numbers ({error}).") from error
    if array.ndim and not len(array):
        return np.zeros((0, 4))
    if plan.is_video:
        raise ValueError(f"image_boxes of image {index}, which is a video: objects of frames are not read; pass None.")
    if array.ndim == 3 and array.shape[1:] == size:
        array = np.stack([_box_around(mask, index, number) for number, mask in enumerate(array)])
    if array.ndim != 2 or array.shape[1] != 4:
        raise ValueError(f"{form}, not an array of the shape {array.shape}.")
    seen = np.array(plan.views[0].box) / BOX_UNIT
    for number, (top, left, bottom, right) in enumerate(array):
        if not (0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]):
            raise ValueError(
                f"image_boxes of image {index}: box {number} is (top {top:g}, left {left:g}, bottom {bottom:g}, right "
                f"{right:g}), but must have an area and lie in the image of {size[0]} x {size[1]} pixels (height x "
                "width). Clip it; of detectors that give (left, top, right, bottom) pass boxes[:, [1, 0, 3, 2]]."
            )
        if bottom <= seen[0] or top >= seen[2] or right <= seen[1] or left >= seen[3]:
            raise ValueError(
                f"image_boxes of image {index}: box {number} is (top {top:g}, left {left:g}, bottom {bottom:g}, right "
                f"{right:g}), but the model sees (top {seen[0]:g}, left {seen[1]:g}, bottom {seen[2]:g}, right "
                f'{seen[3]:g}) alone. Leave the box out, or take square="pad" in place of "crop".'
            )
    return array


def check_objects(num_objects: list[int], are_read: bool) -> None:
    """Refuse numbers of objects that cannot be, or that the model makes no tokens of."""
    for index, number in enumerate(num_objects):
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"num_objects={number!r} of image {index} must be an integer of at least 0.")
    if any(num_objects) and not are_read:
        raise ValueError("image_boxes were passed, but no part of this model makes tokens of objects; leave them out.")


def _box_around(mask: np.ndarray, index: int, number: int) -> np.ndarray:
    """The smallest box around all that is not zero in a mask."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if np.isnan(mask).any() or not len(rows):
        raise ValueError(f"image_boxes of image {index}: mask {number} is empty or not a number; leave it out.")
    return np.array([rows[0], cols[0], rows[-1] + 1, cols[-1] + 1], dtype=np.float64)


def write_objects(boxes: list[np.ndarray], plans: list[ViewPlan]) -> np.ndarray:
    """Boxes in the unit of `image_boxes`: int64 `(images, most objects, 4)`, zeros behind the objects of an image."""
    table = np.zeros((len(plans), max(map(len, boxes), default=0), 4), dtype=np.int64)
    for row, own, plan in zip(table, boxes, plans, strict=True):
        shown = np.array(plan.views[0].box) / BOX_UNIT
        places = (own - np.tile(shown[:2], 2)) / np.tile(shown[2:] - shown[:2], 2) * BOX_SIDE
        start = np.clip(np.round(places[:, :2]), 0, BOX_SIDE - 1)
        row[: len(own), :2], row[: len(own), 2:] = start, np.clip(np.round(places[:, 2:]), start + 1, BOX_SIDE)
    return table
