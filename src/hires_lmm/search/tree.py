"""ZoomEye's tree of boxes, and the pictures that show some of them.

Source: ZoomEye (EMNLP 2025); the rules of its released code, told by numbers alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from PIL import Image, ImageDraw

from .base import Box


SPLITS = {4: ((2, 2), (1, 4)), 9: ((3, 3), (2, 4)), 16: ((4, 4), (2, 8))}
"""Columns and rows of a node's children by their number, and those of one twice as high as wide."""

NEAR = 50
"""Pixels by which boxes grow on all sides when it is asked whether they touch."""

FAR = 1000
"""Two boxes that together are longer stand side by side, where there is no global view."""

Corners = tuple[int, int, int, int]
"""Left, top, right, bottom."""


@dataclass(eq=False)
class Node:
    """A box of the tree; `children` are cut on demand, row after row, and `known` holds what was asked."""

    box: Box
    side: int
    split: int = 4
    depth: int = 0
    show: Callable[[list[Box]], list[Image.Image]] | None = None
    known: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def is_leaf(self) -> bool:
        """Whether the vision tower sees all of it at once."""
        return max(self.box[2:]) < self.side

    @cached_property
    def children(self) -> list["Node"]:
        """Equal parts, the last column and row with what is left over; none of a leaf."""
        if self.is_leaf:
            return []
        left, top, width, height = self.box
        square, high = SPLITS[self.split]
        cols, rows = high if height >= 2 * width else high[::-1] if width >= 2 * height else square
        xs = [left + col * (width // cols) for col in range(cols)] + [left + width]
        ys = [top + row * (height // rows) for row in range(rows)] + [top + height]
        boxes = [(x, y, right - x, bottom - y) for y, bottom in pairwise(ys) for x, right in pairwise(xs)]
        return [Node(box, self.side, self.split, self.depth + 1, self.show) for box in boxes]

    def levels(self, limit: int) -> int:
        """Levels below it, at most `limit`."""
        children = self.children if limit else []
        return 1 + max(child.levels(limit - 1) for child in children) if children else 0

    @cached_property
    def views(self) -> list[Image.Image]:
        """What an oracle is shown of it."""
        return self.show([self.box]) if self.show else []

    def walk(self, deepest: int) -> Iterator["Node"]:
        """Its nodes down to a depth, children before parents."""
        if self.depth < deepest:
            for child in self.children:
                yield from child.walk(deepest)
        yield self


@dataclass(frozen=True)
class Showing:
    """How boxes are shown.

    Args:
        side (`int`): Of the vision tower's view, pixels: the least side of what is cut out, and that of the whole.
        patch_scale (`float`): How much more than a box is cut out.
        crop_only (`bool`): Show what is cut out alone, without the whole image.
        background (`tuple`): Colour that makes an image square.
    """

    side: int
    patch_scale: float = 1.2
    crop_only: bool = False
    background: tuple[int, int, int] = (122, 116, 104)

    def patches(self, boxes: Sequence[Box], size: tuple[int, int]) -> list[Corners]:
        """What is cut out of an image of (width, height) for each box; not shifted where it meets the border."""
        return [_around(box, self.side, self.patch_scale, size) for box in boxes]

    def rectangles(self, merged: Sequence[Corners], size: tuple[int, int]) -> list[Corners]:
        """The frames around merged patches, in the image that was made square."""
        square, (right, down) = max(size), _offset(size)
        wider = 0 if self.crop_only else square // 120
        return [
            (
                max(0, left + right - wider),
                max(0, top + down - wider),
                min(square, x + right + wider),
                min(square, y + down + wider),
            )
            for left, top, x, y in merged
        ]

    def views(self, image: Image.Image, boxes: Sequence[Box]) -> list[Image.Image]:
        """The pictures that show boxes: the whole image with red frames, and a crop; no box or all of it: the image.

        The crop is cut out around all frames, in the image that was made square.
        """
        if not boxes or (0, 0, *image.size) in boxes:
            return [image]
        merged = merge(self.patches(boxes, image.size))
        frames = self.rectangles(merged, image.size)
        zoom = _union(frames)
        square = self._square(image)
        if not self.crop_only:
            draw = ImageDraw.Draw(square)
            for frame in frames:
                draw.rectangle(frame, outline=(255, 0, 0), width=square.width // 120)
            return [square.resize((self.side, self.side)), square.crop(zoom)]
        if len(frames) == 2 and max(zoom[2] - zoom[0], zoom[3] - zoom[1]) > FAR:
            return [self._side_by_side([square.crop(frame) for frame in frames])]
        return [square.crop(zoom)]

    def _square(self, image: Image.Image) -> Image.Image:
        square = Image.new("RGB", (max(image.size),) * 2, self.background)
        square.paste(image, _offset(image.size))
        return square

    def _side_by_side(self, crops: list[Image.Image]) -> Image.Image:
        canvas = Image.new("RGB", (2 * self.side,) * 2, self.background)
        for column, crop in enumerate(crops):
            canvas.paste(crop.resize((self.side, self.side)), (column * self.side, self.side // 2))
        return canvas


def merge(boxes: Sequence[Corners]) -> list[Corners]:
    """Join boxes with less than twice `NEAR` pixels between them, until none are left."""
    merged: list[Corners] = []
    for box in boxes:
        near = [index for index, other in enumerate(merged) if _touch(box, other)]
        place = near[0] if near else len(merged)
        box = _union([box, *(merged[index] for index in near)])
        merged = [other for index, other in enumerate(merged) if index not in near]
        merged.insert(place, box)
    return merged if len(merged) == len(boxes) else merge(merged)


def _touch(one: Corners, other: Corners) -> bool:
    return all(
        one[axis] - NEAR < other[axis + 2] + NEAR and other[axis] - NEAR < one[axis + 2] + NEAR for axis in (0, 1)
    )


def _around(box: Box, side: int, scale: float, size: tuple[int, int]) -> Corners:
    lows, highs = [], []
    for start, length, limit in zip(box[:2], box[2:], size, strict=True):
        wanted = int(max(length, side) * scale)
        lows.append(max(0, start + length // 2 - wanted // 2))
        highs.append(min(limit, lows[-1] + wanted))
    return lows[0], lows[1], highs[0], highs[1]


def _union(boxes: Sequence[Corners]) -> Corners:
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def _offset(size: tuple[int, int]) -> tuple[int, int]:
    return (max(size) - size[0]) // 2, (max(size) - size[1]) // 2
