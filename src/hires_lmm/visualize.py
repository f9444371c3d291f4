"""Pictures of what the model looked at: crop grid, kept and dropped tokens, scores."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from .modeling.outputs_hires_lmm import TokenMap
from .processing.geometry_hires_lmm import Kind
from .processing.image_input_hires_lmm import open_image, to_rgb


BACKGROUND, INK, MUTED, PADDING = (250, 250, 248), (28, 33, 40), (106, 114, 124), (207, 207, 203)
DROPPED_TINT, DROPPED_SHARE, DROPPED_GREY = (24, 27, 38), 0.68, 0.75
GRID_COLOR, EDGE_COLOR = (255, 255, 255), (255, 196, 0)
HEAT_STOPS = ((38, 20, 84), (92, 31, 120), (166, 48, 107), (226, 93, 66), (249, 167, 45), (250, 240, 135))
HEAT_SHARE = 0.72

GAP, MARGIN, TEXT, TITLE = 28, 32, 17, 23
SWATCH = (30, 22)
INSET_SHARE = 0.19
WIDE = 2.4
"""Images that are so many times wider than high are drawn one below the other."""
TITLE_LINES = 3
MOST_COLUMNS = 6
"""Frames of a video in one row of a strip."""

CAPTIONS = {"score": "Score of each token", "layer": "Layer behind which each token left"}


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one image with a place in it: `box` (n, 4) source pixels, `score` (n,) and what it is, `kept` (n,)."""

    view: np.ndarray
    box: np.ndarray
    score: np.ndarray
    kept: np.ndarray
    label: str = "score"

    @classmethod
    def select(cls, token_map: TokenMap, image_index: int, kind: int, layers: bool) -> "_Tokens":
        """The tokens of one kind of one image; with `layers`, the one behind which each left stands for its score."""
        own = ((token_map.image == image_index) & (token_map.kind == kind)).numpy()
        fields = (token_map.view, token_map.box, token_map.score, token_map.kept)
        view, box, score, kept = (field.cpu().numpy()[own] for field in fields)
        if not layers:
            return cls(view, box, score, kept)
        left_at = token_map.left_at.cpu().numpy()[own]
        return cls(view, box, np.where(left_at >= 0, left_at, np.nan), kept, "layer")

    def of(self, chosen: np.ndarray) -> "_Tokens":
        """Some of them."""
        return _Tokens(self.view[chosen], self.box[chosen], self.score[chosen], self.kept[chosen], self.label)

    def window(self, source: Image.Image) -> tuple[float, float, float, float]:
        """Top, left, bottom, right of the image and all tokens around it, source pixels."""
        low, high = self.box[:, :2].min(axis=0), self.box[:, 2:].max(axis=0)
        return min(0.0, low[0]), min(0.0, low[1]), max(source.height, high[0]), max(source.width, high[1])


@dataclass(frozen=True)
class _Frame:
    """A rectangle of the source (top, left, bottom, right in pixels; may reach over the image) and its scale."""

    window: tuple[float, float, float, float]
    scale: float

    @property
    def size(self) -> tuple[int, int]:
        """Width and height on the picture, pixels."""
        top, left, bottom, right = self.window
        return max(1, round((right - left) * self.scale)), max(1, round((bottom - top) * self.scale))

    def place(self, box: np.ndarray) -> np.ndarray:
        """Boxes `(n, 4)` of source pixels -> whole pixels of the frame, clipped to it."""
        top, left = self.window[:2]
        width, height = self.size
        moved = np.rint((np.asarray(box, dtype=np.float64) - [top, left, top, left]) * self.scale).astype(int)
        return np.clip(moved, 0, [height, width, height, width])


def count_kept(token_map: TokenMap, image_index: int = 0) -> tuple[int, int]:
    """How many visual tokens of an image were kept, and how many there were, those of no place in it included."""
    own = token_map.image == image_index
    if not own.any():
        number = len(token_map.image.unique())
        raise ValueError(f"image_index={image_index} is out of range: the token map holds {number} images.")
    return int(token_map.kept[own].sum()), int(own.sum())


def draw_token_map(
    image: Any,
    token_map: TokenMap,
    image_index: int = 0,
    title: str | None = None,
    width: int = 1500,
    layers: bool = False,
) -> Image.Image:
    """Draw which tokens of an image or a video were kept, and how they were scored.

    Args:
        image: The source image, in any form the processor takes; or the frames of a video that the model saw, as a
            list or as `open_videos` of the image processor gives them.
        image_index (`int`): Which image of the batch.
        title (`str`, *optional*): A line above the picture, for instance the question.
        width (`int`): Width of the picture, pixels, at least 600.
        layers (`bool`): In place of scores, the layer of the language model behind which each token left; tokens that
            stayed to the end keep their colours.

    Returns:
        An RGB picture: the source with the grid of crops, kept tokens bright and dropped ones dim; the same with the
        scores as heat, where tokens were scored; the global view as an inset; a legend of what there is. Of a video a
        strip of its frames, without a global view. Grey areas around the image are padding. Tokens of no place in it
        (marks, queries that read all of it) are counted only.

    Raises:
        ValueError: If the image cannot be read, the index is out of range, or the picture is too narrow.
    """
    check_width(width)
    kept, total = count_kept(token_map, image_index)
    is_video = isinstance(image, Sequence) and not isinstance(image, (str, bytes, bytearray))
    sources = [image[number] for number in range(len(image))] if is_video else [image]
    sources = [to_rgb(open_image(each, image_index), image_index) for each in sources]
    source = sources[0]
    kinds = (Kind.FRAME,) if is_video else (Kind.CROP, Kind.GLOBAL)
    found = [_Tokens.select(token_map, image_index, kind, layers) for kind in kinds]
    marks = int(((token_map.image == image_index) & (token_map.kind == Kind.SEPARATOR)).sum())
    account = f"{len(sources)} frames of " if is_video else ""
    account += f"{source.width} x {source.height} pixels: {kept} of {total} visual tokens kept"
    account += f", {marks} of them of no place in the image" if marks else ""
    room = width - 2 * MARGIN
    pieces = [wrap_text(title, room, TITLE, INK)] if title else []
    pieces.append(wrap_text(account, room, TITLE - 2, MUTED))
    shown = list(zip(("Crops", "Global view"), found, strict=False))
    shown = [(name, tokens) for name, tokens in shown if len(tokens.kept)]
    if shown:
        panels, legend = _strip(sources, found[0], room) if is_video else _panels(source, shown, room)
        pieces += [flow(panels, room), flow(legend, room)]
    pieces.append(Image.new("RGB", (room, 1), BACKGROUND))
    return ImageOps.expand(flow(pieces, 0, gap=16), MARGIN, BACKGROUND)


def check_width(width: int) -> None:
    """Refuse the width of a picture that is too narrow for its words."""
    if isinstance(width, bool) or not isinstance(width, int) or width < 600:
        raise ValueError(f"width={width!r} must be an integer of at least 600 pixels.")


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1] as RGB from dark violet to light yellow, float64 in [0, 255] on a last axis."""
    stops = np.linspace(0, 1, len(HEAT_STOPS))
    return np.stack([np.interp(values, stops, [stop[channel] for stop in HEAT_STOPS]) for channel in range(3)], -1)


# --- panels


def _panels(
    source: Image.Image, shown: list[tuple[str, _Tokens]], room: int
) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures with captions in reading order, and the pieces of their legend."""
    main = shown[0][1]
    scored = bool(np.isfinite(main.score).any())
    top, left, bottom, right = main.window(source)
    columns = 1 + scored if right - left < WIDE * (bottom - top) else 1
    side = round(room * INSET_SHARE) if len(shown) > 1 and columns == 2 else 280
    used = GAP * (columns - 1) + (side + GAP if len(shown) > 1 and columns == 2 else 0)
    panels, legend, padded = [], [], False
    for name, tokens in shown:
        top, left, bottom, right = window = tokens.window(source)
        widest, highest = ((room - used) / columns, 900) if tokens is main else (side, 1.4 * side)
        frame = _Frame(window, min(widest / (right - left), highest / (bottom - top)))
        picture = _draw(source, frame, tokens)
        panels.append(_captioned(f"{name}: {int(tokens.kept.sum())} of {len(tokens.kept)} kept", picture))
        if tokens is main:
            legend = _legend(frame, main, picture, main.score)
            heat = _draw(source, frame, main, _relative(main.score)) if scored else None
            panels += [] if heat is None else [_captioned(CAPTIONS[main.label], heat)]
        padded |= bool(min(top, left) < -1 or bottom > source.height + 1 or right > source.width + 1)
    if padded:
        legend.append(beside(Image.new("RGB", SWATCH, PADDING), "padding around the image"))
    return panels, legend


def _strip(sources: list[Image.Image], tokens: _Tokens, room: int) -> tuple[list[Image.Image], list[Image.Image]]:
    """A picture of each frame with captions, below them the same as heat where tokens were scored, and a legend."""
    columns = min(len(sources), MOST_COLUMNS)
    side, heats = (room - GAP * (columns - 1)) // columns, _relative(tokens.score)
    panels, scored, best = [], [], None
    for view in np.unique(tokens.view):
        own = tokens.of(tokens.view == view)
        number = min(int(view - tokens.view.min()), len(sources) - 1)
        source, (top, left, bottom, right) = sources[number], own.window(sources[number])
        frame = _Frame((top, left, bottom, right), min(side / (right - left), 900 / (bottom - top)))
        picture = _draw(source, frame, own)
        panels.append(_captioned(f"{number}: {int(own.kept.sum())} of {len(own.kept)}", picture))
        if np.isfinite(own.score).any():
            heat = _draw(source, frame, own, heats[tokens.view == view])
            scored.append(_captioned(f"{number}: {tokens.label}", heat))
        if best is None or own.kept.any() != own.kept.all():
            best = (frame, own, picture)
    return [*panels, *scored], [] if best is None else _legend(*best, tokens.score)


def _draw(source: Image.Image, frame: _Frame, tokens: _Tokens, heat: np.ndarray | None = None) -> Image.Image:
    """The source with dropped tokens dim, or with scores as heat; the borders of what was kept and of the views."""
    width, height = frame.size
    pixels = np.full((height, width, 3), PADDING, dtype=np.float64)
    top, left, bottom, right = frame.place(np.array([[0, 0, source.height, source.width]]))[0]
    if bottom > top and right > left:
        small = source.resize((int(right - left), int(bottom - top)), Image.Resampling.LANCZOS)
        pixels[top:bottom, left:right] = np.asarray(small)
    grey = pixels.mean(axis=-1, keepdims=True)
    kept = _spread(frame, tokens, tokens.kept) > 0
    if heat is not None:
        scores = _spread(frame, tokens, heat, np.nan)[..., None]
        mixed = (1 - HEAT_SHARE) * grey + HEAT_SHARE * heat_colors(np.nan_to_num(scores[..., 0]))
        pixels = np.where(np.isfinite(scores), mixed, pixels)
    else:
        dim = (1 - DROPPED_GREY) * pixels + DROPPED_GREY * grey
        pixels = np.where(kept[..., None], pixels, (1 - DROPPED_SHARE) * dim + DROPPED_SHARE * np.array(DROPPED_TINT))
    if not kept.all():
        edge = np.zeros_like(kept)
        edge[1:] |= kept[1:] != kept[:-1]
        edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
        pixels[edge] = EDGE_COLOR
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for color, line in ((INK, 3), (GRID_COLOR, 1)):
        for view in np.unique(tokens.view):
            box = tokens.box[tokens.view == view]
            outer = np.concatenate([box[:, :2].min(axis=0), box[:, 2:].max(axis=0)])
            top, left, bottom, right = (int(edge) for edge in frame.place(outer[None])[0])
            corner, side = (left - line // 2, top - line // 2), line // 2
            draw.rectangle((*corner, min(right, width - 1) + side, min(bottom, height - 1) + side), None, color, line)
    return picture


def _spread(frame: _Frame, tokens: _Tokens, values: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """A value for every pixel of a frame, from the token that covers it."""
    width, height = frame.size
    canvas = np.full((height, width), empty)
    for (top, left, bottom, right), value in zip(frame.place(tokens.box), values, strict=True):
        canvas[top:bottom, left:right] = value
    return canvas


def _relative(scores: np.ndarray) -> np.ndarray:
    """Scores scaled to [0, 1] between the 1st and the 99th percentile; NaN stays."""
    low, high = np.nanpercentile(scores, [1, 99])
    return np.clip((scores - low) / (high - low), 0, 1) if high > low else np.where(np.isfinite(scores), 0.5, np.nan)


# --- words and places


def _legend(frame: _Frame, tokens: _Tokens, picture: Image.Image, scores: np.ndarray) -> list[Image.Image]:
    """What colours and lines mean: only what there is, kept and dropped tokens as they look in this picture."""
    pieces = []
    offset = np.abs(tokens.box - tokens.box.mean(axis=0)).sum(axis=1)
    for name, chosen in (("kept", tokens.kept), ("dropped", ~tokens.kept)):
        if chosen.any():
            middle = tokens.box[chosen][offset[chosen].argmin()]  # not the padding
            top, left, bottom, right = (int(edge) for edge in frame.place(middle[None])[0])
            part = picture.crop((left + 2, top + 2, max(right - 2, left + 3), max(bottom - 2, top + 3)))
            pieces.append(beside(part.resize(SWATCH), f"{name} token"))
    lines = [("border of a view", GRID_COLOR, INK)]
    if tokens.kept.any() and not tokens.kept.all():
        lines.insert(0, ("border of what was kept", EDGE_COLOR, BACKGROUND))
    for name, color, ground in lines:
        swatch = Image.new("RGB", SWATCH, ground)
        ImageDraw.Draw(swatch).line((0, SWATCH[1] // 2, SWATCH[0], SWATCH[1] // 2), fill=color, width=3)
        pieces.append(beside(swatch, name))
    finite = scores[np.isfinite(scores)]
    if len(finite):
        low, high = np.percentile(finite, [1, 99])
        ramp = np.broadcast_to(heat_colors(np.linspace(0, 1, 180)), (SWATCH[1], 180, 3))
        pieces.append(
            beside(Image.fromarray(ramp.round().astype(np.uint8)), f"{tokens.label}, {low:.3g} to {high:.3g}")
        )
    return pieces


def beside(swatch: Image.Image, label: str) -> Image.Image:
    """A swatch and its words."""
    return flow([swatch, text_line(label, TEXT, INK)], 10**6, gap=10)


def _captioned(caption: str, picture: Image.Image) -> Image.Image:
    return flow([text_line(caption, TEXT, INK), picture], 0, gap=4)


def wrap_text(text: str, width: int, size: int, color: tuple[int, int, int]) -> Image.Image:
    """A text in a few lines; what does not fit ends in dots."""
    lines = textwrap.wrap(text, round(2 * width / size), max_lines=TITLE_LINES, placeholder=" ...")
    return flow([text_line(line, size, color) for line in lines], 0, gap=4)


def text_line(text: str, size: int, color: tuple[int, int, int]) -> Image.Image:
    """One line of words."""
    font = ImageFont.load_default(size)
    line = Image.new("RGB", (round(font.getlength(text)) + 2, round(size * 1.4)), BACKGROUND)
    ImageDraw.Draw(line).text((0, line.height // 2), text, font=font, fill=color, anchor="lm")
    return line


def flow(pieces: list[Image.Image], width: int, gap: int = GAP) -> Image.Image:
    """Pieces from left to right, in as many rows as the width asks for."""
    places: list[tuple[int, int]] = []
    x = y = bottom = 0
    for piece in pieces:
        if x and x + piece.width > width + 2:
            x, y = 0, bottom + gap
        places.append((x, y))
        x, bottom = x + piece.width + gap, max(bottom, y + piece.height)
    right = max((x + piece.width for (x, _), piece in zip(places, pieces, strict=True)), default=1)
    result = Image.new("RGB", (right, max(bottom, 1)), BACKGROUND)
    for place, piece in zip(places, pieces, strict=True):
        result.paste(piece, place)
    return result
