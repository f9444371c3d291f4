"""Coordinate tokens: time, height and width as words of the language model that also mark where a feature lies."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .bases_hires_lmm import HiResLmmViewOp, PartContext, Traits
from .carriers_hires_lmm import ViewFeatures, ViewGroup
from .geometry_hires_lmm import Kind, kinds_on
from .logits_hires_lmm import scale_logits


AXES = ("time", "height", "width")
NEVER = -1e4
"""Logit of a token that is never an answer; finite in half precision."""


def propagate(rows: torch.Tensor) -> torch.Tensor:
    """Rows `(..., n, C)` as they are, whose gradient g becomes g + M'g with M = 2^-|i - j|: neighbours learn too."""
    places = torch.arange(rows.shape[-2], device=rows.device, dtype=rows.dtype)
    spread = (0.5 ** (places[:, None] - places).abs()) @ rows
    return rows + (spread - spread.detach())


def resize_rows(rows: torch.Tensor, number: int) -> torch.Tensor:
    """Another number of rows, by linear resizing: `(n, C)` -> `(number, C)`."""
    resized = nn.functional.interpolate(rows.T[None].float(), size=number, mode="linear", align_corners=False)
    return resized[0].T.to(rows.dtype)


class HiResLmmRows(nn.Module):
    """A table of rows for each axis, `(3, n, C)`, whose neighbours learn together."""

    def __init__(self, num_rows: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(len(AXES), num_rows, width))

    def init_weights(self) -> None:
        """Initialise like token embeddings of unit expected norm."""
        init.normal_(self.weight, mean=0.0, std=self.weight.shape[-1] ** -0.5)

    def forward(self) -> torch.Tensor:
        """The table."""
        return propagate(self.weight)


class HiResLmmCoordinates(HiResLmmViewOp):
    """Three vocabularies of coordinates, whose vectors are added to the features at their places.

    A token says a number from 0 to 1 on one axis. In text it has the mix of the two rows around it in the input
    table; the head scores the rows of the output table, so answers hold rows alone. What a frame, row and column of
    features gets is the mean of both tables, resized to their number; views that are no frames have the first time.

    Source: LLaVA-ST (huggingface.co/papers/2501.08282) and its released code (appletea233/LLaVA-ST at bacf6d6).
    Ours: a coordinate is one token of its own, `steps` of them from row to row, where the released code
    passes a number beside a shared token; and any number of frames.

    Args:
        context (`PartContext`): Widths and vocabulary around the part.
        options (`Options`): Where the tokens stand in the vocabulary.
    """

    has_vocabulary = True

    @strict
    @dataclass
    class Options:
        """Options of `coordinates`.

        Args:
            first_token_id (`int`): Id of the first of the tokens that `coordinate_tokens` names, which follow it.
            on (`str` or `list[str]`): Kinds of views whose features get coordinates.
            num_rows (`int`): Rows of a table.
            steps (`int`): Tokens from one row to the next.
        """

        first_token_id: int
        on: str | list = "all"
        num_rows: int = 100
        steps: int = 10

        def __post_init__(self) -> None:
            kinds_on(self.on)
            for name, least in (("first_token_id", 0), ("num_rows", 2), ("steps", 1)):
                if getattr(self, name) < least:
                    raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")

    def __init__(self, context: PartContext, options: Options):
        super().__init__(context, options)
        self.length = (options.num_rows - 1) * options.steps + 1  # tokens of an axis
        self.input_rows, self.output_rows = (HiResLmmRows(options.num_rows, context.width) for _ in range(2))

    @classmethod
    def describe(cls, options: Any, context: PartContext) -> Traits:
        """Nothing changes its shape; the tokens must exist."""
        last = options.first_token_id + len(AXES) * ((options.num_rows - 1) * options.steps + 1)
        if last > context.vocab_size or context.width != context.text_width:
            raise ValueError(
                f"coordinates has tokens up to id {last - 1} and features of width {context.width}, but the language "
                f"model has {context.vocab_size} tokens of width {context.text_width}: add the tokens of "
                "coordinate_tokens() and resize its embeddings first, and put the part into map_ops."
            )
        return super().describe(options, context)

    def forward(self, views: ViewFeatures) -> ViewFeatures:
        """Add to features `(V, L, C)` the coordinates of their places."""
        time, height, width = (self.input_rows() + self.output_rows()) / 2

        def inject(group: ViewGroup) -> ViewGroup:
            place = resize_rows(height, group.grid[0])[:, None] + resize_rows(width, group.grid[1])
            place = (place.flatten(0, 1) + times(group)[:, None]).to(group.features)
            return replace(group, features=group.features + place)

        def times(group: ViewGroup) -> torch.Tensor:
            counts = views.counts(group) if group.kind == Kind.FRAME else [0, len(group.features)]
            parts = [resize_rows(time, count) for count in counts[:-1] if count]
            return torch.cat([*parts, time[:1].expand(counts[-1], -1)])

        return views.map(self.options.on, inject)

    def read(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which ids are coordinates; their row in the tables, one behind the other, and their steps above it."""
        offset = ids - self.options.first_token_id
        mine = (offset >= 0) & (offset < len(AXES) * self.length)
        offset = offset.where(mine, 0)
        place = offset % self.length
        row = offset // self.length * self.options.num_rows + place // self.options.steps
        return mine, row, place % self.options.steps

    def embed(self, ids: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
        """Put the rows of coordinates into the embeddings `(B, S, D)` of a text."""
        mine, row, step = self.read(ids)
        rows = self.input_rows().flatten(0, 1).to(embeds)
        share = step.to(rows.dtype) / self.options.steps
        own = torch.lerp(rows[row], rows[row + (step > 0)], share[..., None])
        return torch.where(mine[..., None], own, embeds)

    def score(self, hidden: torch.Tensor, logits: torch.Tensor, text_config: Any) -> torch.Tensor:
        """Put the scores of rows into logits `(..., V)`; tokens between two rows are never an answer."""
        first, steps = self.options.first_token_id, self.options.steps
        rows = self.output_rows().to(hidden)
        scores = scale_logits(hidden @ rows.flatten(0, 1).T, text_config).unflatten(-1, rows.shape[:2])
        spaced = nn.functional.pad(scores[..., None], (0, steps - 1), value=NEVER).flatten(-2)[..., : self.length]
        own = spaced.flatten(-2).to(logits)
        return torch.cat([logits[..., :first], own, logits[..., first + own.shape[-1] :]], dim=-1)

    def soften(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Targets `(...)` rounded down to rows, and what their cross-entropy lacks, summed.

        Between two rows the target is both, weighed: a share of it moves from the lower to the upper.
        """
        _, _, step = self.read(targets)
        ids = torch.stack([targets - step, targets - step + self.options.steps * (step > 0)], dim=-1)
        low, high = logits.float().gather(-1, ids.clamp(min=0)).unbind(-1)
        return ids[..., 0], (step.float() / self.options.steps * (low - high)).sum()
