"""The carriers of the pipeline: view geometry, features of views, visual tokens, and the question."""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig


KIND_GLOBAL, KIND_CROP, KIND_MARK = 0, 1, 2
KINDS_ON = {"global": (KIND_GLOBAL,), "crops": (KIND_CROP,), "all": (KIND_GLOBAL, KIND_CROP)}
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


def copy_to_host(*tensors: torch.Tensor | None) -> list[Any]:
    """Copy integer tensors to the CPU in one transfer, however many there are.

    Args:
        tensors (`torch.Tensor`, *optional*): On one device or on the CPU.

    Returns:
        The same values as int64 on the CPU; None stays None.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    devices = [tensor.device for tensor in given if tensor.device.type != "cpu"]
    if not devices:
        return list(tensors)
    flat = torch.cat([tensor.detach().to(devices[0], torch.long).flatten() for tensor in given]).cpu()
    parts = iter(flat.split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(parts).view(tensor.shape) for tensor in tensors]


def padding_flags(attention_mask: Any) -> list[torch.Tensor]:
    """Whether a mask is all ones, and whether a row ends in padding; nothing where there is no two-dimensional mask.

    Args:
        attention_mask (`torch.Tensor` of shape `(B, S)`, *optional*): 0 at padding.

    Returns:
        Two bool tensors `()`, or none.
    """
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return []
    return [(attention_mask != 0).all(), (attention_mask[:, -1] == 0).any()]


def all_finite(source: torch.Tensor) -> torch.Tensor:
    """Whether no value is NaN or infinite: `torch.isfinite(source).all()` in one pass that writes nothing.

    Args:
        source (`torch.Tensor`): Any values.

    Returns:
        A bool tensor of shape `()` on the same device; nothing waits for it.
    """
    if not source.numel():
        return torch.ones((), dtype=torch.bool, device=source.device)
    lowest, highest = torch.aminmax(source.detach())  # NaN shows in both
    return torch.isfinite(lowest) & torch.isfinite(highest)


def check_finite(is_finite: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Refuse views that hold NaN or infinite values: one of them would spoil every answer about the image in silence.

    Args:
        is_finite (`torch.Tensor` of shape `()`): `all_finite(source)`, on the host.
        source (`torch.Tensor` of shape `(V, ...)`): Views or features.
        name (`str`): Their name, for the message.

    Raises:
        ValueError: If they do.
    """
    if not is_finite:
        views = torch.nonzero(~torch.isfinite(source).flatten(1).all(dim=1))[:, 0].tolist()
        raise ValueError(
            f"{name} holds values that are NaN or infinite, in the views {views} of {len(source)}; look at the images "
            "that they were made from, and make them anew."
        )


def check_views(
    source: torch.Tensor | None,
    name: str,
    shape: tuple,
    view_positions: torch.Tensor | None,
    view_spans: torch.Tensor | None,
) -> None:
    """Compare the shapes of views, or of their features, with the geometry that came with them.

    Args:
        source (`torch.Tensor` of shape `(V, ...)`): Views or features.
        name (`str`): Their name, for messages.
        shape (`tuple`): The shape of one view that the model reads.
        view_positions (`torch.Tensor` of shape `(V, 6)`): See `read_geometry`.
        view_spans (`torch.Tensor` of shape `(V, 4)`): See `read_geometry`.

    Raises:
        ValueError: If they do not belong together.
    """
    given = None if source is None else tuple(source.shape)
    if given is None or given[1:] != tuple(shape):
        raise ValueError(
            f"{name} has the shape {given}, but this model reads views of shape "
            f"(views, {', '.join(map(str, shape))}). Use the image processor that belongs to this checkpoint."
        )
    if view_positions is None or view_spans is None:
        raise ValueError(f"{name} came without view_positions and view_spans; pass all that the processor gives.")
    if view_positions.shape != (given[0], NUM_POSITION_FIELDS):
        raise ValueError(
            f"view_positions has the shape {tuple(view_positions.shape)}, expected "
            f"({given[0]}, {NUM_POSITION_FIELDS}): one row a view of {name}."
        )


@torch.compiler.assume_constant_result
def group_rows(kinds: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of global views and rows of all other views; the same tensors for the same kinds.

    Args:
        kinds (`tuple[int]`): Kind of each view of a batch.
        device (`str`): Where the index tensors are wanted.

    Returns:
        Two int64 tensors.
    """
    rows = _cached_rows(kinds, device)
    if type(rows[0]) is not torch.Tensor:  # made while tensors were faked
        _cached_rows.cache_clear()
        rows = _cached_rows(kinds, device)
    return rows


@lru_cache(maxsize=256)
def _cached_rows(kinds: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    rows: tuple[list, list] = ([], [])
    for row, kind in enumerate(kinds):
        rows[kind != KIND_GLOBAL].append(row)
    return index_tensor(rows[0], device), index_tensor(rows[1], device)


def index_tensor(index: Any, device: str) -> torch.Tensor:
    """An int64 tensor that may be kept and used with and without gradients.

    Args:
        index (`list[int]` or `np.ndarray`): The numbers.
        device (`str`): Where they are wanted.
    """
    with torch.inference_mode(False):
        return torch.from_numpy(np.asarray(index, dtype=np.int64)).to(device)


@dataclass(frozen=True)
class PartContext:
    """What a part may know about its surroundings when it is built.

    Args:
        config (`PreTrainedConfig`): Connector configuration; carries the attention implementation.
        width (`int`): Width of the features that enter.
        text_width (`int`): Width of the language model.
        global_grid (`tuple[int, int]`): Token rows and columns of a global view that enter.
        crop_grid (`tuple[int, int]`): Token rows and columns of a crop that enter.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view, the unit of the spans.
        vocab_size (`int`): Token ids of the language model.
    """

    config: PreTrainedConfig
    width: int
    text_width: int
    global_grid: tuple[int, int]
    crop_grid: tuple[int, int]
    patch_grid: tuple[int, int]
    vocab_size: int = 0


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


def idle_views(features: torch.Tensor, patch_grid: tuple[int, int], used: str) -> ViewFeatures:
    """Dress up the features of one blank view as an image, for batches without any.

    Args:
        features (`torch.Tensor` of shape `(1, L, C)`): What the tower gives for a blank view.
        patch_grid (`tuple[int, int]`): Patch rows and columns of a view.
        used (`str`): Views that the training stage uses: `"all"`, `"global"` or `"crops"`.

    Returns:
        An image with a global view and a crop, or with the one that is used.
    """
    rows, cols = patch_grid
    span = (0, rows, 0, cols)
    spans = ((0, 0, 0, 0) if used == "crops" else span, span)
    image = ImageGeometry(0, (KIND_GLOBAL, 1), (1, 1), ((0, 0), (0, 0)), spans, 0)
    if used == "global":
        image = ImageGeometry(0, (KIND_GLOBAL,), (0, 0), ((0, 0),), (span,), 0)
    return ViewFeatures(features[: used != "crops"], features[: used != "global"], patch_grid, patch_grid, [image])


@dataclass(frozen=True)
class TokenPlan:
    """Which token stands where, for a batch: known from its geometry alone, kept for batches of the same one.

    Args:
        index (`torch.Tensor` of shape `(N,)`): Row of each token in `[global tokens, crop tokens, marks]`.
        lengths (`tuple[int]`): Tokens of each image, summing to N.
        view, cell, kind (`torch.Tensor`): See `VisualTokens`.
        groups (`dict[str, tuple[torch.Tensor]]`): `find_groups` of them.
    """

    index: torch.Tensor
    lengths: tuple
    view: torch.Tensor
    cell: torch.Tensor
    kind: torch.Tensor
    groups: dict


def find_groups(kind: torch.Tensor, lengths: Any, device: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """Find the tokens that come from global views, from crops and from either.

    Args:
        kind (`torch.Tensor` of shape `(N,)`): Kind of each token, on the CPU.
        lengths (`list[int]`): Tokens of each image.
        device (`str`): Where the index tensors are wanted.

    Returns:
        By the names in `KINDS_ON`: one index tensor an image, rising.
    """
    kinds, starts = kind.numpy(), np.cumsum([0, *lengths])
    groups = {}
    for on, wanted in KINDS_ON.items():
        found = [
            start + np.flatnonzero(np.isin(kinds[start : start + length], wanted))
            for start, length in zip(starts, lengths, strict=False)
        ]
        groups[on] = tuple(index_tensor(index, device) for index in found)
    return groups


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
        plan (`TokenPlan`, *optional*): The plan they came from; not read once `kind` is another tensor.
        memory (`list[ImageMemory]`, *optional*): What an operation keeps of each image for later calls on the same
            features; shared by all copies of these tokens.
        read (`list[tuple]`, *optional*): Memory and conversation of each image, as this call read them.
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
    plan: TokenPlan | None = None
    memory: list | None = None
    read: list | None = None

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.lengths)

    def rows(self, on: str) -> tuple[torch.Tensor, ...]:
        """Index of the tokens of each image that come from the views named by `on`, on the device of the features."""
        if self.plan is not None and self.plan.kind is self.kind:
            return self.plan.groups[on]
        return find_groups(self.kind, self.lengths, str(self.features.device))[on]

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
            memory=None if self.memory is None else [self.memory[index] for index in indices],
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
        placeholder (`torch.Tensor` of shape `(B, S)`, *optional*): True at placeholders.
        next_turn (`torch.Tensor` of shape `(B, S)`, *optional*): Turn that is open or comes next.
        continues (`bool`): Whether earlier positions of the conversation are in a cache and not shown.
        cache (`Cache`, *optional*): That cache.
        earlier (`list[tuple]`, *optional*): The blocks of each image before those shown, where they are known.
        asked (`torch.Tensor` of shape `(B, turns, L)`, *optional*): Ids of the questions in another vocabulary; -1
            behind a question, -2 behind the last turn.
    """

    embeds: torch.Tensor
    ids: torch.Tensor | None
    turn: torch.Tensor
    image_row: torch.Tensor
    image_turn: torch.Tensor
    placeholder: torch.Tensor | None = None
    next_turn: torch.Tensor | None = None
    continues: bool = False
    asked: torch.Tensor | None = None
    cache: Any = None
    earlier: list | None = None

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
