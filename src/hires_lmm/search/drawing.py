"""A picture of the walk through an image: where a policy looked, and what it found."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from ..processing.image_input_hires_lmm import open_image, to_rgb
from ..visualize import (
    BACKGROUND,
    EDGE_COLOR,
    GRID_COLOR,
    INK,
    MARGIN,
    MUTED,
    SWATCH,
    TEXT,
    TITLE,
    beside,
    check_width,
    flow,
    heat_colors,
    text_line,
    wrap_text,
)
from .base import Box, Step


def draw_walk(
    image: Any, steps: Sequence[Step], boxes: Sequence[Box], title: str | None = None, width: int = 1500
) -> Image.Image:
    """Draw where a search looked and what it found.

    Args:
        image: The source image, in any form the processor takes.
        steps (sequence of `Step`): What was asked, in order, as in `SearchResult`.
        boxes (sequence of `tuple`): What was found: left, top, width, height in source pixels.
        title (`str`, *optional*): A line above the picture.
        width (`int`): Width of the picture, pixels, at least 600.

    Returns:
        An RGB picture: what was considered with thin white borders; what was visited in the colour of its confidence,
        with the number of the visit; what was found with thick borders; a legend.

    Raises:
        ValueError: If no step has a place, the image cannot be read, or the picture is too narrow.
    """
    check_width(width)
    placed = [(step, step.box) for step in steps if step.box is not None]
    if not placed:
        raise ValueError("No step of the search has a place, so there is no walk to draw; zoom_eye has places.")
    source, room = to_rgb(open_image(image, 0), 0), width - 2 * MARGIN
    scale = room / max(source.size)
    picture = source.resize((max(1, round(source.width * scale)), max(1, round(source.height * scale))))
    draw = ImageDraw.Draw(picture)
    visits = [(step, box) for step, box in placed if step.kind == "answering"]
    for _, box in placed:
        draw.rectangle(_corners(box, scale), outline=GRID_COLOR)
    for number, (step, box) in enumerate(visits, start=1):
        left, top, *_ = corners = _corners(box, scale)
        red, green, blue = heat_colors(np.array(((step.confidence or 0.0) + 1) / 2)).astype(int).tolist()
        draw.rectangle(corners, outline=(red, green, blue), width=3)
        label = ImageOps.expand(text_line(f" {number} ", TEXT, INK), 2, (red, green, blue))
        picture.paste(label, (round(left) + 4 + step.depth * 48, round(top) + 4))  # beside those of larger boxes
    for box in boxes:
        draw.rectangle(_corners(box, scale), outline=EDGE_COLOR, width=6)
    ramp = np.broadcast_to(heat_colors(np.linspace(0, 1, 180)), (SWATCH[1], 180, 3)).round().astype(np.uint8)
    legend = [beside(Image.fromarray(ramp), "visited, in this order; confidence from -1 to 1")]
    legend += [beside(Image.new("RGB", SWATCH, EDGE_COLOR), "found")] if boxes else []
    account = f"{len(placed)} questions about places, visits: {len(visits)}, boxes found: {len(boxes)}"
    pieces = [wrap_text(title, room, TITLE, INK)] if title else []
    pieces += [wrap_text(account, room, TITLE - 2, MUTED), picture, flow(legend, room)]
    return ImageOps.expand(flow(pieces, 0, gap=16), MARGIN, BACKGROUND)


def _corners(box: Box, scale: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom on the picture."""
    left, top, width, height = (part * scale for part in box)
    return left, top, left + width - 1, top + height - 1
