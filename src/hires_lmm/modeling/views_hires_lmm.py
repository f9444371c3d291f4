"""The carriers of the pipeline: view geometry, features of views, visual tokens, and the question."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedConfig


KIND_GLOBAL, KIND_CROP, KIND_MARK = 0, 1, 2
NUM_POSITION_FIELDS = 6


@dataclass(frozen=True)
class ImageGeometry:
    """Where the views of one image lie, as Python integers.

    Args:
        first_view (`int`): Row of the global view in `pixel_values`.
        kinds (`tuple[int]`): Kind of each view (0 global, 1 crop, 2 strided, 3 frame).
        crop_grid (`tuple[int, int]`): Rows and columns of the crop grid; `(0, 0)` without crops.
        cells (`tuple[tuple[int, int]]`): Row and column of each view in the crop grid.
        spans (`tuple[tuple[int, int, int, int]]`): First and past-last patch row and column of each view that enter
            the sequence.
        num_tokens (`int`): Placeholders of the image.
    """

    first_view: int
    kinds: tuple
    crop_grid: tuple
    cells: tuple
    spans: tuple
    num_tokens: int

    @property
    def num_crops(self) -> int:
        """Number of views besides the global one."""
        return len(self.kinds) - 1


def read_geometry(positions: list[list[int]], spans: list[list[int]]) -> list[ImageGeometry]:
    """Group the rows of `view_positions` and `view_spans` by image.

    Args:
        positions (`list[list[int]]` of shape `(V, 6)`): Kind, grid rows, grid columns, row, column, num_tokens.
        spans (`list[list[int]]` of shape `(V, 4)`): Patch rows and columns of each view that enter the sequence.

    Returns:
        One `ImageGeometry` an image, in batch order.

    Raises:
        ValueError: If the first row is no global view, or the two lists differ in length.
    """
    if len(positions) != len(spans):
        raise ValueError(
            f"view_positions has {len(positions)} rows and view_spans has {len(spans)}; pass both as the processor "
            "returned them, without slicing one alone."
        )
    if not positions:
        return []
    starts = [row for row, position in enumerate(positions) if position[0] == KIND_GLOBAL]
    if not starts or starts[0] != 0:
        raise ValueError(
            f"The first view has kind {positions[0][0]}, but every image opens with a global view (kind 0). Pass "
            "view_positions as the processor returned it."
        )
    images = []
    for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
        rows = positions[start:stop]
        images.append(
            ImageGeometry(
                first_view=start,
                kinds=tuple(row[0] for row in rows),
                crop_grid=(rows[0][1], rows[0][2]),
                cells=tuple((row[3], row[4]) for row in rows),
                spans=tuple(tuple(span) for span in spans[start:stop]),
                num_tokens=rows[0][5],
            )
        )
    return images


@dataclass(frozen=True)
class PartContext:
    """What a part may know about its surroundings when it is built.

    Args:
        config (`PreTrainedConfig`): Connector configuration; carries the attention implementation.
        width (`int`): Width of the features that enter.
        text_width (`int`): Width of the language model.
        global_grid (`tuple[int, int]`): Token rows and columns of a global view that enter.
        crop_grid (`tuple[int, int]`): Token rows and columns of a crop that enter.
    """

    config: PreTrainedConfig
    width: int
    text_width: int
    global_grid: tuple[int, int]
    crop_grid: tuple[int, int]


@dataclass
class ViewFeatures:
    """Features of all views of a batch before they become a token sequence.

    Args:
        global_features (`torch.Tensor` of shape `(I, L_global, C)`): Global views, one an image.
        crop_features (`torch.Tensor` of shape `(K, L_crop, C)`): Crops of all images in raster order; may be empty.
        global_grid (`tuple[int, int]`): Token rows and columns of a global view.
        crop_grid (`tuple[int, int]`): Token rows and columns of a crop; `(0, 0)` once an operation absorbed them.
        images (`list[ImageGeometry]`): The geometry of each image.
        aux (`dict[str, torch.Tensor]`): Tensors for losses and logs, by name.
    """

    global_features: torch.Tensor
    crop_features: torch.Tensor
    global_grid: tuple[int, int]
    crop_grid: tuple[int, int]
    images: list[ImageGeometry]
    aux: dict = field(default_factory=dict)


@dataclass
class VisualTokens:
    """The visual tokens of a batch, image after image, in sequence order.

    `view`, `cell` and `kind` live on the CPU: geometry is known there, so reading it never waits for a device.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): Token vectors.
        lengths (`list[int]`): Tokens of each image, summing to N.
        num_tokens (`list[int]`): Placeholders of each image; at most its length.
        view (`torch.Tensor` of shape `(N,)`): Row of the view in `pixel_values`; -1 for a mark.
        cell (`torch.Tensor` of shape `(N, 2)`): Row and column in the token grid of the view.
        kind (`torch.Tensor` of shape `(N,)`): 0 global, 1 crop, 2 mark.
        grids (`dict[int, tuple[int, int]]`): Token grid of a view by kind.
        kept (`torch.Tensor` of shape `(N,)`, *optional*): True where the token reaches the language model; None = all.
        scores (`dict[str, torch.Tensor]`): Scores `(N,)` by name, NaN where a token was not scored.
        aux (`dict[str, torch.Tensor]`): Tensors for losses and logs, by name.
    """

    features: torch.Tensor
    lengths: list[int]
    num_tokens: list[int]
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    grids: dict
    kept: torch.Tensor | None = None
    scores: dict = field(default_factory=dict)
    aux: dict = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.lengths)

    def per_image(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Split a tensor whose first dimension runs over the tokens into one tensor an image."""
        return list(tensor.split(self.lengths))

    def select_images(self, indices: list[int]) -> "VisualTokens":
        """Gather images by index, with repetition.

        Args:
            indices (`list[int]`): Images to gather, in the new order.

        Returns:
            New `VisualTokens`; this one is unchanged.
        """

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            parts = self.per_image(tensor)
            return torch.cat([parts[index] for index in indices]) if indices else tensor[:0]

        return replace(
            self,
            features=gather(self.features),
            lengths=[self.lengths[index] for index in indices],
            num_tokens=[self.num_tokens[index] for index in indices],
            view=gather(self.view),
            cell=gather(self.cell),
            kind=gather(self.kind),
            kept=None if self.kept is None else gather(self.kept),
            scores={name: gather(score) for name, score in self.scores.items()},
        )


@dataclass
class Question:
    """The text that a question-reading operation may see.

    Args:
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings of the batch.
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; None when the caller passed embeddings.
        turn (`torch.Tensor` of shape `(B, S)`): Number of the turn a token belongs to, from 1; 0 = must not be read.
        image_row (`torch.Tensor` of shape `(I,)`): Row of the batch that holds each image.
        image_turn (`torch.Tensor` of shape `(I,)`): Turn that holds each image.
    """

    embeds: torch.Tensor
    ids: torch.Tensor | None
    turn: torch.Tensor
    image_row: torch.Tensor
    image_turn: torch.Tensor

    def image_mask(self) -> torch.Tensor:
        """True where a token belongs to the question of an image: `(I, S)`."""
        return (self.turn[self.image_row] == self.image_turn[:, None]) & (self.image_turn[:, None] > 0)


def span_to_cells(span: tuple, patch_grid: tuple[int, int], token_grid: tuple[int, int]) -> tuple[int, int, int, int]:
    """Translate a span of patches into a span of token cells, rounding outwards.

    Args:
        span (`tuple`): First and past-last patch row and column.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view.
        token_grid (`tuple[int, int]`): Token rows and columns of the same view.

    Returns:
        First and past-last token row and column; `(0, 0)` along an axis where the span or the grid is empty.
    """
    cells: list[int] = []
    for start, end, size, patches in zip(span[::2], span[1::2], token_grid, patch_grid, strict=True):
        cells += [start * size // patches, -(-end * size // patches)] if end > start and size else [0, 0]
    return cells[0], cells[1], cells[2], cells[3]


def cell_boxes(tokens: VisualTokens, view_boxes: torch.Tensor) -> np.ndarray:
    """Boxes of all tokens in source pixels.

    Args:
        tokens (`VisualTokens`): Tokens of a batch.
        view_boxes (`torch.Tensor` of shape `(V, 4)`): Top, left, bottom, right of each view in 1/256 source pixel.

    Returns:
        `(N, 4)` float64: top, left, bottom, right in source pixels; NaN for marks.
    """
    views = tokens.view.numpy()
    kind = tokens.kind.numpy()
    grid = np.array([tokens.grids.get(int(k), (1, 1)) for k in (KIND_GLOBAL, KIND_CROP, KIND_MARK)], dtype=np.float64)
    grid = np.maximum(grid, 1)[kind]
    boxes = view_boxes.cpu().numpy().astype(np.float64)[np.maximum(views, 0)] / 256
    size = (boxes[:, 2:] - boxes[:, :2]) / grid
    start = boxes[:, :2] + tokens.cell.numpy() * size
    result = np.concatenate([start, start + size], axis=1)
    result[kind == KIND_MARK] = np.nan
    return result
