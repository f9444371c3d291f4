"""Positions of frames: a second index that all tokens of a frame share, and frames whose tokens see one another."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from huggingface_hub.dataclasses import strict

from .bases_hires_lmm import HiResLmmPositionPlan, RowTokens
from .geometry_hires_lmm import Kind
from .question_hires_lmm import latest


def number_frames(tokens: RowTokens) -> torch.Tensor:
    """Number of the frame of each token, unlike those of other images of the row, `(B, n)`; -1 at text.

    What was made of a frame belongs to it, a separator to the frame before it; other views are one frame an image.
    """
    is_separator = (tokens.kind == Kind.SEPARATOR) & (tokens.image >= 0)
    step = tokens.view.amax() + 1
    inside = torch.where((tokens.kind == Kind.FRAME) | (tokens.kind == Kind.DETAIL), tokens.view, 0)
    before = latest((tokens.image >= 0) & ~is_separator)
    at = before.clamp(min=0)
    follows = is_separator & (before >= 0) & (tokens.image.gather(1, at) == tokens.image)
    inside = torch.where(follows, inside.gather(1, at), inside)
    return torch.where(tokens.image >= 0, tokens.image * step + inside, -1)


def index_frames(frame: torch.Tensor, real: torch.Tensor, shares: bool) -> torch.Tensor:
    """The temporal index of each token, `(B, n)` from 0: one a frame and one a text token.

    Args:
        frame (`torch.Tensor` of shape `(B, n)`): See `number_frames`.
        real (`torch.Tensor` of shape `(B, n)`): False at padding.
        shares (`bool`): Whether the text token behind an image has the index of its last frame.
    """
    places, is_visual = torch.arange(frame.shape[1], device=frame.device).expand_as(frame), frame >= 0
    own = frame.clamp(min=0)
    first = torch.full((len(frame), int(own.amax()) + 1), frame.shape[1], device=frame.device)
    first = first.scatter_reduce(1, own, torch.where(is_visual, places, frame.shape[1]), "amin").gather(1, own)
    before = torch.nn.functional.pad(latest(real), (1, 0), value=-1)[:, :-1]
    is_behind = (before >= 0) & is_visual.gather(1, before.clamp(min=0)) & shares
    steps = torch.where(is_visual, first == places, ~is_behind) & real
    index = (steps.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(is_visual, index.gather(1, first.clamp(max=frame.shape[1] - 1)), index)


class HiResLmmTemporal(HiResLmmPositionPlan):
    """A token stands at its number plus `gamma` times the index of its frame, and sees all tokens of its frame.

    Source: TC-LLaVA (arXiv 2409.03206), which has no released code. Ours: the frame of each kept token in place of a
    division by the tokens of a frame, so frames may lose tokens; several videos and images, an image being one frame.
    """

    @strict
    @dataclass
    class Options:
        """Options of the plan.

        Args:
            gamma (`float`): Weight of the temporal index; 0 leaves positions as they are.
            mask (`str`): `"frames"`: tokens of a frame see one another; `"causal"`: as text does.
            text_after (`str`): The text token behind a video has the index of its last frame (`"shared"`, the paper's
                equation) or the next one (`"next"`, as in the code of VideoRoPE).
        """

        gamma: float | int = 1
        mask: Literal["frames", "causal"] = "frames"
        text_after: Literal["shared", "next"] = "shared"

        def __post_init__(self) -> None:
            if not 0 <= self.gamma < math.inf:
                raise ValueError(f"gamma={self.gamma} must be 0 or a positive number.")

    def forward(self, tokens: RowTokens) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `HiResLmmPositionPlan`."""
        frame = number_frames(tokens)
        index = index_frames(frame, tokens.real, self.options.text_after == "shared")
        gamma = int(self.options.gamma) if self.options.gamma == int(self.options.gamma) else self.options.gamma
        positions = tokens.number + gamma * index  # whole numbers where they can be
        if not tokens.has_images or self.options.mask == "causal":
            return positions, None
        places, own = torch.arange(frame.shape[1], device=frame.device), frame[:, tokens.num_cached :, None]
        seen = places <= places[tokens.num_cached :, None]
        return positions, seen | ((own == frame[:, None]) & (own >= 0))
