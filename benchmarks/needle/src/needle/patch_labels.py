"""Views of needle scenes and what each of their patches shows."""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import COLOURS, Scene, SceneObject
from .sprites import KINDS, VALUES_BY_KIND


IGNORED = -100
NO_OBJECT = 0
COLOUR_INDEX = {colour: index for index, colour in enumerate(COLOURS)}
KIND_INDEX = {kind: index for index, kind in enumerate(KINDS, start=1)}
"""Kind -> class; class 0 is "no object"."""

VALUE_INDEX = {
    (kind, value): index
    for index, (kind, value) in enumerate((kind, value) for kind in KINDS for value in VALUES_BY_KIND[kind])
}
LABELLED_SHARE = 0.25
"""A patch is labelled where an object's box covers this share of it; the patch it covers most always is."""

NAMED_SHARE, SEEN_SHARE = 0.5, 0.3
"""Least visible share of an object that must tell its value, and its kind and colour."""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class PatchLabels:
    """Classes of the patches of one view, each `(patches,)` int64, `IGNORED` where there is none or it is unclear."""

    kind: np.ndarray
    value: np.ndarray
    colour: np.ndarray


def crop_boxes(scene: Scene) -> list[Box]:
    """The crops of a scene.

    Args:
        scene (`Scene`): The scene.

    Returns:
        Boxes (top, left, bottom, right), scene pixels, row by row.
    """
    side, grid = scene.options.crop_side, scene.options.grid
    return [
        (row * side, column * side, (row + 1) * side, (column + 1) * side)
        for row in range(grid)
        for column in range(grid)
    ]


def global_box(scene: Scene) -> Box:
    """The box of the global view.

    Args:
        scene (`Scene`): The scene.

    Returns:
        (top, left, bottom, right), scene pixels.
    """
    return (0, 0, scene.options.scene_size, scene.options.scene_size)


def cut_view(image: np.ndarray, box: Box, view_size: int) -> np.ndarray:
    """Cut a view and bring it to the size the tower sees, as the planners do.

    Args:
        image (`np.ndarray` (height, width, 3)): The scene, uint8.
        box (`tuple`): Top, left, bottom, right, scene pixels.
        view_size (`int`): Side of the view, pixels.

    Returns:
        `np.ndarray` (view_size, view_size, 3): uint8.
    """
    top, left, bottom, right = box
    if (bottom - top, right - left) == (view_size, view_size):
        return image[int(top) : int(bottom), int(left) : int(right)]
    resized = Image.fromarray(image).resize(
        (view_size, view_size), Image.Resampling.BICUBIC, box=(left, top, right, bottom), reducing_gap=None
    )
    return np.asarray(resized)


def patch_shares(item: SceneObject, box: Box, patches: int) -> np.ndarray:
    """How much of each patch of a view an object's box covers.

    Args:
        item (`SceneObject`): The object.
        box (`tuple`): The view, scene pixels.
        patches (`int`): Patches along a side of the view.

    Returns:
        `np.ndarray` (patches * patches,): Shares, 0 to 1.
    """
    axes = []
    for start, length, low, high in (
        (item.top, item.height, box[0], box[2]),
        (item.left, item.width, box[1], box[3]),
    ):
        side = (high - low) / patches
        edges = low + side * np.arange(patches)
        covered = np.minimum(edges + side, start + length) - np.maximum(edges, start)
        axes.append(np.clip(covered, 0, None) / side)
    return np.outer(*axes).reshape(-1)


def visible_share(item: SceneObject, box: Box) -> float:
    """The share of an object that a view shows.

    Args:
        item (`SceneObject`): The object.
        box (`tuple`): The view, scene pixels.

    Returns:
        0 to 1.
    """
    high = min(box[2], item.top + item.height) - max(box[0], item.top)
    wide = min(box[3], item.left + item.width) - max(box[1], item.left)
    return max(high, 0) * max(wide, 0) / (item.height * item.width)


def label_patches(scene: Scene, box: Box, patches: int) -> PatchLabels:
    """Label the patches of a view with the objects they show.

    Args:
        scene (`Scene`): The scene.
        box (`tuple`): The view, scene pixels.
        patches (`int`): Patches along a side of the view.

    Returns:
        The labels; patches that an object only touches, and objects of which too little is visible, are ignored.
    """
    kind = np.full(patches * patches, NO_OBJECT)
    value, colour = np.full_like(kind, IGNORED), np.full_like(kind, IGNORED)
    most = np.zeros(patches * patches)
    for item in scene.objects:
        seen = visible_share(item, box)
        if seen == 0:
            continue
        shares = patch_shares(item, box, patches)
        ours = shares > most
        labelled = ours & ((shares >= LABELLED_SHARE) | (shares == shares.max()))
        kind[ours], value[ours], colour[ours] = IGNORED, IGNORED, IGNORED
        if seen >= SEEN_SHARE:
            kind[labelled], colour[labelled] = KIND_INDEX[item.kind], COLOUR_INDEX[item.colour]
        if seen >= NAMED_SHARE:
            value[labelled] = VALUE_INDEX[item.kind, item.value]
        most = np.maximum(most, shares)
    return PatchLabels(kind, value, colour)
