"""Several pictures shown as one question: in a row, in a grid with labels, one inside another (MIA-DPO)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ...processing.image_input_hires_lmm import to_rgb


GRIDS = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Number of pictures -> rows and columns."""
LABEL_SIZE, LABEL_INDENT = 36, 20

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Composite:
    """What is shown.

    Args:
        kind (`str`): `"sequence"`, `"grid"` or `"inner"`.
        images (`list[Image.Image]`): All pictures, or the one that was made of them.
        boxes (`list`): Of each picture: top, left, bottom, right in pixels of the one image; empty for a sequence.
        labels (`list`): Text of each label and its left and top edge in pixels.
    """

    kind: str
    images: list[Image.Image]
    boxes: list[Box]
    labels: list[tuple[str, int, int]]

    def message(self, question: str, asked: int) -> dict:
        """A user's message about the picture of that number, counted from 0, without pixels in it."""
        text = f"{self.name(asked)}, {question[:1].lower()}{question[1:]}"
        parts: list[dict] = []
        for index in range(len(self.images)):
            parts += [{"type": "text", "text": f"Image{index + 1}: "}] if self.kind == "sequence" else []
            parts += [{"type": "image", "text": None}]
        return {"role": "user", "content": [*parts, {"type": "text", "text": f"\n{text}"}]}

    def name(self, asked: int) -> str:
        """How a question names a picture."""
        return "In the picture in the middle" if self.kind == "inner" else f"In Image{asked + 1}"


def make_composite(kind: str, pictures: Sequence[Image.Image]) -> Composite:
    """Show pictures as `"sequence"`, `"grid"` or `"inner"` (the first inside the second).

    Args:
        kind (`str`): How.
        pictures (sequence of `Image.Image`): 1 or more; 2, 3, 4, 6 or 9 in a grid; two for `"inner"`.

    Raises:
        ValueError: If the kind is unknown or does not take that many pictures.
    """
    if kind == "sequence" and pictures:
        return Composite(kind, list(pictures), [], [])
    if kind == "grid":
        return grid_composite(pictures)
    if kind == "inner" and len(pictures) == 2:
        return inner_composite(pictures[0], pictures[1])
    raise ValueError(f"kind={kind!r} with {len(pictures)} pictures: use sequence, grid, or inner with two pictures.")


def grid_composite(pictures: Sequence[Image.Image], tile: tuple[int, int] = (448, 448), margin: int = 40) -> Composite:
    """Paste pictures into a white grid, each at the top left of its tile, under the label `Image<number>`.

    Args:
        pictures (sequence of `Image.Image`): 2, 3, 4, 6 or 9.
        tile (`tuple[int, int]`): Width and height of a tile in pixels; pictures are scaled to fit it.
        margin (`int`): Pixels between columns and above each row, where the labels stand.

    Raises:
        ValueError: If there is no grid for so many pictures.

    Source: MIA-DPO (released code); its labels are in Arial, these in the font of Pillow.
    """
    if len(pictures) not in GRIDS:
        raise ValueError(f"{len(pictures)} pictures make no grid; give {', '.join(map(str, GRIDS))}.")
    rows, columns = GRIDS[len(pictures)]
    size = (columns * (tile[0] + margin) - margin, rows * (tile[1] + margin))
    pictures = [to_rgb(picture, index) for index, picture in enumerate(pictures)]
    canvas, boxes, labels = Image.new("RGB", size, "white"), [], []
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(LABEL_SIZE)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        left, top = column * (tile[0] + margin), margin + row * (tile[1] + margin)
        scaled = picture.resize(fit_size(picture.size, tile), Image.Resampling.LANCZOS)
        labels.append((f"Image{index + 1}", left + LABEL_INDENT, top - margin))
        draw.text(labels[-1][1:], labels[-1][0], "black", font)
        canvas.paste(scaled, (left, top))
        boxes.append((top, left, top + scaled.height, left + scaled.width))
    return Composite("grid", [canvas], boxes, labels)


def inner_composite(inner: Image.Image, outer: Image.Image, share: float = 0.7) -> Composite:
    """Paste a picture into the middle of another.

    Args:
        inner (`Image.Image`): Is scaled to fit `share` of the other.
        outer (`Image.Image`): Keeps its size.
        share (`float`): Of width and height.

    Source: MIA-DPO (released code).
    """
    inner, outer = to_rgb(inner, 0), to_rgb(outer, 1)
    room = (int(outer.width * share), int(outer.height * share))
    scaled = inner.resize(fit_size(inner.size, room), Image.Resampling.BICUBIC)
    left, top = (outer.width - scaled.width) // 2, (outer.height - scaled.height) // 2
    canvas = outer.copy()
    canvas.paste(scaled, (left, top))
    box = (top, left, top + scaled.height, left + scaled.width)
    return Composite("inner", [canvas], [box, (0, 0, outer.height, outer.width)], [])


def fit_size(size: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """The largest width and height of the same shape within some room, rounded down, at least one pixel."""
    (width, height), (most_width, most_height) = size, room
    if width * most_height > height * most_width:
        return max(1, most_width), max(1, height * most_width // width)
    return max(1, width * most_height // height), max(1, most_height)


def add_noise(image: Image.Image, std: float, seed: int = 0) -> Image.Image:
    """Gaussian noise on the pixels, cut at black and white (the release of MIA-DPO lets them wrap around).

    Args:
        image (`Image.Image`): Any picture.
        std (`float`): Standard deviation; pixels are 0 to 255.
        seed (`int`): Of the noise.
    """
    pixels = np.asarray(to_rgb(image, 0), dtype=np.float64)
    noise = np.random.default_rng(seed).normal(0, std, pixels.shape)
    return Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8))
