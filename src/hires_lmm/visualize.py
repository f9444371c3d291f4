"""Pictures of what the model looked at: crop grid, kept and dropped tokens, scores."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .modeling.outputs_hires_lmm import TokenMap
from .processing.geometry_hires_lmm import Kind
from .processing.image_input_hires_lmm import open_image, to_rgb


BACKGROUND, INK, MUTED = (250, 250, 248), (28, 33, 40), (106, 114, 124)
PADDING_LIGHT, PADDING_DARK = (214, 214, 210), (200, 200, 195)
DROPPED_TINT, DROPPED_SHARE, DROPPED_GREY = (24, 27, 38), 0.68, 0.75
GRID_COLOR, EDGE_COLOR = (255, 255, 255), (255, 196, 0)
HEAT_STOPS = ((38, 20, 84), (92, 31, 120), (166, 48, 107), (226, 93, 66), (249, 167, 45), (250, 240, 135))
HEAT_SHARE = 0.72

GAP, MARGIN, SMALL, TEXT = 28, 32, 17, 21
TEXT_OVERSAMPLING = 4
MAX_TITLE = 600
"""Characters of a title that are looked at; three lines never hold more."""


@dataclass(frozen=True)
class _Tokens:
    """Tokens of one image with a place in it: `box` (n, 4) source pixels, `score` (n,), `kept` (n,)."""

    kind: np.ndarray
    view: np.ndarray
    box: np.ndarray
    score: np.ndarray
    kept: np.ndarray

    def of_kind(self, kind: int) -> "_Tokens":
        """Only the tokens of one kind."""
        chosen = self.kind == kind
        return _Tokens(*(values[chosen] for values in (self.kind, self.view, self.box, self.score, self.kept)))


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


def draw_token_map(
    image: Any, token_map: TokenMap, image_index: int = 0, title: str | None = None, width: int = 1500
) -> Image.Image:
    """Draw which tokens of an image were kept, and how they were scored.

    Args:
        image: The source image, in any form the processor takes.
        token_map (`TokenMap`): From `model(..., output_token_map=True)`.
        image_index (`int`): Which image of the batch.
        title (`str`, *optional*): A line above the picture, for instance the question.
        width (`int`): Width of the picture, pixels, at least 600.

    Returns:
        An RGB picture: the source with the grid of crops, kept tokens bright and dropped ones dim; the same with the
        scores as heat, where tokens were scored; the global view as an inset; a legend. Hatched areas are padding.

    Raises:
        ValueError: If the image cannot be read, the index is out of range, or the picture is too narrow.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 600:
        raise ValueError(f"width={width!r} must be an integer of at least 600 pixels.")
    source = to_rgb(open_image(image, image_index), image_index)
    tokens, marks = _select_tokens(token_map, image_index)
    crops, inset = tokens.of_kind(Kind.CROP), tokens.of_kind(Kind.GLOBAL)
    main = crops if len(crops.kept) else inset
    extra = inset if len(crops.kept) and len(inset.kept) else None
    scored = bool(np.isfinite(main.score).any())
    panels = _panels(source, main, scored, extra, width - 2 * MARGIN)
    body = _arrange(panels, width - 2 * MARGIN)
    head = _head(title, tokens, marks, source, body.width)
    padded = any(_is_padded(group, source) for group in (main, extra) if group is not None)
    legend = _legend(main, extra, padded, body.width)
    return _stack([head, body, legend], body.width + 2 * MARGIN)


def heat_colors(values: np.ndarray) -> np.ndarray:
    """Map numbers to colours from dark violet (0) to light yellow (1).

    Args:
        values (`np.ndarray`): Any shape, in [0, 1].

    Returns:
        The shape of `values` with a last axis of RGB, float64 in [0, 255].
    """
    stops = np.linspace(0, 1, len(HEAT_STOPS))
    return np.stack([np.interp(values, stops, [stop[channel] for stop in HEAT_STOPS]) for channel in range(3)], -1)


def _select_tokens(token_map: TokenMap, image_index: int) -> tuple[_Tokens, int]:
    """Tokens of one image with a place, and the number of its marks."""
    owner = token_map.image.numpy()
    number = int(owner.max()) + 1 if len(owner) else 0
    if not 0 <= image_index < number:
        raise ValueError(f"image_index={image_index} is out of range: the token map holds {number} images.")
    own = owner == image_index
    kind = token_map.kind.numpy()
    marks = int((own & (kind == Kind.SEPARATOR)).sum())
    own &= kind != Kind.SEPARATOR
    fields = (token_map.kind, token_map.view, token_map.box, token_map.score, token_map.kept)
    return _Tokens(*(field.cpu().numpy()[own] for field in fields)), marks


# --- panels


def _panels(
    source: Image.Image, main: _Tokens, scored: bool, extra: _Tokens | None, width: int
) -> list[tuple[str, Image.Image]]:
    """Captioned pictures in reading order; all main panels have one size."""
    top, left, bottom, right = _window(main, source)
    aspect = (right - left) / (bottom - top)
    columns = 1 + scored if aspect < 2.4 else 1
    share = 0.19 if extra is not None and columns == 2 else 0.0
    room = (width * (1 - share) - GAP * (columns - 1 + (share > 0))) / columns
    scale = min(room / (right - left), 900 / (bottom - top))
    frame = _Frame((top, left, bottom, right), scale)
    kept = int(main.kept.sum())
    panels = [(f"Kept: {kept:,} of {len(main.kept):,} tokens", _draw_kept(source, frame, main))]
    if scored:
        panels.append(("Score of each token", _draw_heat(source, frame, main)))
    if extra is not None:
        side = round(width * 0.19) if columns == 2 else 280
        panels.append(
            (f"Global view: {int(extra.kept.sum()):,} of {len(extra.kept):,}", _draw_inset(source, extra, side))
        )
    return panels


def _window(tokens: _Tokens, source: Image.Image) -> tuple[float, float, float, float]:
    """The image and all tokens around it."""
    box = tokens.box
    return (
        min(0.0, float(box[:, 0].min())),
        min(0.0, float(box[:, 1].min())),
        max(float(source.height), float(box[:, 2].max())),
        max(float(source.width), float(box[:, 3].max())),
    )


def _is_padded(tokens: _Tokens, source: Image.Image) -> bool:
    """Whether tokens lie over the image's edge by more than a pixel."""
    top, left, bottom, right = _window(tokens, source)
    return top < -1 or left < -1 or bottom > source.height + 1 or right > source.width + 1


def _base(source: Image.Image, frame: _Frame) -> np.ndarray:
    """The source on a hatched ground: `(height, width, 3)` float64."""
    width, height = frame.size
    rows, cols = np.mgrid[0:height, 0:width]
    hatch = ((rows + cols) // 7 % 2 == 0)[..., None]
    pixels = np.where(hatch, PADDING_LIGHT, PADDING_DARK).astype(np.float64)
    top, left, bottom, right = frame.place(np.array([[0, 0, source.height, source.width]]))[0]
    if bottom > top and right > left:
        small = source.resize((int(right - left), int(bottom - top)), Image.Resampling.LANCZOS)
        pixels[top:bottom, left:right] = np.asarray(small)
    return pixels


def _paint(frame: _Frame, tokens: _Tokens, values: np.ndarray, empty: float) -> np.ndarray:
    """A value for every pixel of a frame, from the token that covers it."""
    width, height = frame.size
    canvas = np.full((height, width), empty)
    for (top, left, bottom, right), value in zip(frame.place(tokens.box), values, strict=True):
        canvas[top:bottom, left:right] = value
    return canvas


def _draw_kept(source: Image.Image, frame: _Frame, tokens: _Tokens) -> Image.Image:
    pixels = _base(source, frame)
    kept = _paint(frame, tokens, tokens.kept.astype(np.float64), 0.0) > 0
    grey = pixels.mean(axis=-1, keepdims=True)
    dim = (1 - DROPPED_GREY) * pixels + DROPPED_GREY * grey
    dim = (1 - DROPPED_SHARE) * dim + DROPPED_SHARE * np.array(DROPPED_TINT)
    pixels = np.where(kept[..., None], pixels, dim)
    return _with_lines(pixels, frame, tokens, kept)


def _draw_heat(source: Image.Image, frame: _Frame, tokens: _Tokens) -> Image.Image:
    pixels = _base(source, frame)
    heat = _paint(frame, tokens, _relative(tokens.score), np.nan)
    scored = np.isfinite(heat)
    grey = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    mixed = (1 - HEAT_SHARE) * grey + HEAT_SHARE * heat_colors(np.nan_to_num(heat))
    kept = _paint(frame, tokens, tokens.kept.astype(np.float64), 0.0) > 0
    return _with_lines(np.where(scored[..., None], mixed, pixels), frame, tokens, kept)


def _draw_inset(source: Image.Image, tokens: _Tokens, side: int) -> Image.Image:
    window = _window(tokens, source)
    scale = min(side / (window[3] - window[1]), side * 1.4 / (window[2] - window[0]))
    return _draw_kept(source, _Frame(window, scale), tokens)


def _relative(scores: np.ndarray) -> np.ndarray:
    """Scores scaled to [0, 1] between the 1st and the 99th percentile; NaN stays."""
    if not np.isfinite(scores).any():
        return scores
    low, high = np.nanpercentile(scores, [1, 99])
    return np.clip((scores - low) / (high - low), 0, 1) if high > low else np.where(np.isfinite(scores), 0.5, np.nan)


def _with_lines(pixels: np.ndarray, frame: _Frame, tokens: _Tokens, kept: np.ndarray) -> Image.Image:
    """Outline what was kept and draw the borders of the views."""
    if not kept.all():
        edge = np.zeros_like(kept)
        edge[1:] |= kept[1:] != kept[:-1]
        edge[:, 1:] |= kept[:, 1:] != kept[:, :-1]
        pixels[edge] = EDGE_COLOR
    picture = Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    boxes = _view_boxes(tokens, frame)
    last_x, last_y = picture.width - 1, picture.height - 1
    for top, left, bottom, right in boxes:
        draw.rectangle((left - 1, top - 1, min(right, last_x) + 1, min(bottom, last_y) + 1), outline=INK, width=3)
    for top, left, bottom, right in boxes:
        draw.rectangle((left, top, min(right, last_x), min(bottom, last_y)), outline=GRID_COLOR, width=1)
    return picture


def _view_boxes(tokens: _Tokens, frame: _Frame) -> list[list[int]]:
    """The rectangle that the tokens of each view cover, in pixels of a frame."""
    boxes = []
    for view in np.unique(tokens.view):
        box = tokens.box[tokens.view == view]
        outer = np.concatenate([box[:, :2].min(axis=0), box[:, 2:].max(axis=0)])
        boxes.append(frame.place(outer[None])[0].tolist())
    return boxes


# --- composition


def _text_width(text: str, size: int) -> int:
    return round(ImageFont.load_default(size * TEXT_OVERSAMPLING).getlength(text) / TEXT_OVERSAMPLING) + 1


def _write(picture: Image.Image, left: int, middle: int, text: str, size: int, color: tuple[int, int, int]) -> None:
    """Write a line of text; drawn large and shrunk, since the built-in font is spaced unevenly at small sizes."""
    factor, height = TEXT_OVERSAMPLING, round(size * 1.5)
    width = _text_width(text, size) + 2
    large = Image.new("L", (width * factor, height * factor), 0)
    draw = ImageDraw.Draw(large)
    draw.text((0, height * factor // 2), text, font=ImageFont.load_default(size * factor), fill=255, anchor="lm")
    mask = large.resize((width, height), Image.Resampling.LANCZOS)
    picture.paste(Image.new("RGB", mask.size, color), (left, middle - height // 2), mask)


def _captioned(caption: str, picture: Image.Image) -> Image.Image:
    width = max(picture.width, _text_width(caption, SMALL) + 2)
    result = Image.new("RGB", (width, picture.height + 30), BACKGROUND)
    _write(result, 0, 13, caption, SMALL, INK)
    result.paste(picture, (0, 30))
    return result


def _arrange(panels: list[tuple[str, Image.Image]], width: int) -> Image.Image:
    """Panels from left to right, in as many rows as the width asks for."""
    rows: list[list[Image.Image]] = [[]]
    for caption, picture in panels:
        block = _captioned(caption, picture)
        used = sum(other.width + GAP for other in rows[-1])
        if rows[-1] and used + block.width > width + 2:
            rows.append([])
        rows[-1].append(block)
    heights = [max(block.height for block in row) for row in rows]
    width = max(width, *(sum(block.width + GAP for block in row) - GAP for row in rows))
    body = Image.new("RGB", (width, sum(heights) + GAP * (len(rows) - 1)), BACKGROUND)
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for block in row:
            body.paste(block, (x, y))
            x += block.width + GAP
        y += height + GAP
    return body


def _head(title: str | None, tokens: _Tokens, marks: int, source: Image.Image, width: int) -> Image.Image:
    """The title and one line with the account of tokens."""
    kept, total = int(tokens.kept.sum()), len(tokens.kept)
    account = f"{source.width:,} x {source.height:,} pixels: {total + marks:,} visual tokens, {kept + marks:,} kept"
    account += f" ({(kept + marks) / (total + marks):.0%})" + (f", {marks} of them marks" if marks else "")
    lines = [(line, TEXT + 3, INK) for line in _wrap(title, TEXT + 3, width)] if title else []
    lines += [(line, TEXT, MUTED) for line in _wrap(account, TEXT, width)]
    head = Image.new("RGB", (width, 34 * len(lines) + 6), BACKGROUND)
    for index, (line, size, color) in enumerate(lines):
        _write(head, 0, 18 + 34 * index, line, size, color)
    return head


def _wrap(text: str, size: int, width: int) -> list[str]:
    """Break a text into at most three lines of a width in pixels; what does not fit ends in dots."""
    lines = [""]
    for word in text[:MAX_TITLE].split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or _text_width(longer, size) <= width:
            lines[-1] = longer
        elif len(lines) < 3:
            lines.append(word)
        else:
            lines[-1] += " ..."
            break
    return [_shorten(line, size, width) for line in lines]


def _shorten(line: str, size: int, width: int) -> str:
    """The longest beginning that fits, with dots where something is missing."""
    if _text_width(line, size) <= width:
        return line
    fits = bisect_right(range(len(line)), width, key=lambda end: _text_width(line[:end] + "...", size)) - 1
    return line[: max(fits, 0)] + "..."


def _legend(main: _Tokens, extra: _Tokens | None, padded: bool, width: int) -> Image.Image:
    """What colours and lines mean, and the scale of the scores."""
    everything = [main] if extra is None else [main, extra]
    dropped = any(not tokens.kept.all() for tokens in everything)
    items = [("kept", "kept token")]
    if dropped:
        items += [("dropped", "dropped token"), ("edge", "border of what was kept")]
    items += [("grid", "border of a view")]
    if padded:
        items += [("padding", "padding around the image")]
    pieces = [_swatch_item(*item) for item in items]
    finite = main.score[np.isfinite(main.score)]
    if len(finite):
        low, high = np.percentile(finite, [1, 99])
        pieces.append(_heat_item(float(low), float(high)))
    return _arrange_pieces(pieces, width)


def _swatch_item(name: str, label: str) -> Image.Image:
    swatch = Image.new("RGB", (30, 22), BACKGROUND)
    draw = ImageDraw.Draw(swatch)
    sky = (120, 176, 214)
    if name == "kept":
        draw.rectangle((0, 0, 29, 21), fill=sky)
    elif name == "dropped":
        grey = sum(sky) / 3
        color = [(1 - DROPPED_GREY) * part + DROPPED_GREY * grey for part in sky]
        mixed = [
            (1 - DROPPED_SHARE) * part + DROPPED_SHARE * tint for part, tint in zip(color, DROPPED_TINT, strict=True)
        ]
        draw.rectangle((0, 0, 29, 21), fill=tuple(round(part) for part in mixed))
    elif name == "edge":
        draw.line((0, 11, 29, 11), fill=EDGE_COLOR, width=3)
    elif name == "grid":
        draw.line((0, 11, 29, 11), fill=INK, width=6)
        draw.line((0, 11, 29, 11), fill=GRID_COLOR, width=2)
    else:
        rows, cols = np.mgrid[0:22, 0:30]
        hatch = ((rows + cols) // 7 % 2 == 0)[..., None]
        swatch = Image.fromarray(np.where(hatch, PADDING_LIGHT, PADDING_DARK).astype(np.uint8))
    return _beside(swatch, label)


def _heat_item(low: float, high: float) -> Image.Image:
    ramp = np.broadcast_to(heat_colors(np.linspace(0, 1, 180)), (22, 180, 3))
    bar = Image.fromarray(ramp.round().astype(np.uint8))
    return _beside(bar, f"score, {low:.3g} to {high:.3g}")


def _beside(swatch: Image.Image, label: str) -> Image.Image:
    item = Image.new("RGB", (swatch.width + 14 + _text_width(label, SMALL), 30), BACKGROUND)
    item.paste(swatch, (0, 4))
    _write(item, swatch.width + 10, 15, label, SMALL, INK)
    return item


def _arrange_pieces(pieces: list[Image.Image], width: int) -> Image.Image:
    places, x, y = [], 0, 0
    for piece in pieces:
        if x and x + piece.width > width:
            x, y = 0, y + 34
        places.append((x, y))
        x += piece.width + GAP
    legend = Image.new("RGB", (width, y + 30), BACKGROUND)
    for piece, place in zip(pieces, places, strict=True):
        legend.paste(piece, place)
    return legend


def _stack(parts: list[Image.Image], width: int) -> Image.Image:
    height = sum(part.height for part in parts) + 16 * (len(parts) - 1) + 2 * MARGIN
    picture = Image.new("RGB", (width, height), BACKGROUND)
    y = MARGIN
    for part in parts:
        picture.paste(part, (MARGIN, y))
        y += part.height + 16
    return picture
