"""From the tokens of a model to the conditions of a diffusion model."""

from typing import Any

import torch
from torch import nn

from ...modeling.carriers_hires_lmm import ViewFeatures
from ...modeling.connector_hires_lmm import GLOBAL_TOKENS
from ...modeling.geometry_hires_lmm import MAIN_TOWER
from ...modeling.layout_hires_lmm import idle_image
from ...modeling.sa_perceiver_hires_lmm import GLOBAL_EMBEDDING
from ...modeling.towers_hires_lmm import blank_groups


class LowRank(nn.Module):
    """Two linear layers with a narrow middle and SiLU between them."""

    def __init__(self, width: int, rank: int, out_width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, rank), nn.Linear(rank, out_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., width)` -> `(..., out_width)`."""
        return self.linear_2(nn.functional.silu(self.linear_1(features.to(self.linear_1.weight.dtype))))


class Epigone(nn.Module):
    """From image tokens and global embedding to the conditions of Stable Diffusion 3.

    Args:
        width (`int`): Width of the image tokens, that of the language model.
        prompt_width (`int`): Width of the prompt that the denoiser reads (`joint_attention_dim`).
        pooled_width (`int`): Width of its pooled prompt (`pooled_projection_dim`).
        global_width (`int`, *optional*): Width of the global embedding; without one the mean of the image tokens
            takes its place.
        rank (`int`): Width of the middle.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S, which gives SiLU, the middle of 256 and "4086" (read as 4096,
    the width of an 8B language model and of the prompt of Stable Diffusion 3) on both sides. Ours: it reads the tokens
    behind the projector; a perceptron of its own for the pooled prompt, of which the paper says nothing.
    """

    def __init__(
        self, width: int, prompt_width: int, pooled_width: int, global_width: int | None = None, rank: int = 256
    ):
        super().__init__()
        self.width, self.prompt_width, self.pooled_width = width, prompt_width, pooled_width
        self.global_width, self.rank = global_width, rank
        self.prompt = LowRank(width, rank, prompt_width)
        self.pooled = LowRank(width if global_width is None else global_width, rank, pooled_width)

    def forward(self, tokens: torch.Tensor, embedding: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Make the conditions."""
        pooled = tokens.mean(dim=1) if self.global_width is None else embedding
        return self.prompt(tokens), self.pooled(pooled)

    def settings(self) -> dict:
        """The arguments that build it anew."""
        names = ("width", "prompt_width", "pooled_width", "global_width", "rank")
        return {name: getattr(self, name) for name in names}


def read_aux(aux: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What images are painted from: tokens of global views `(I, L, D)`, and global embeddings `(I, C)` or None."""
    if GLOBAL_TOKENS not in aux:
        raise ValueError("There is no low-resolution view to paint from; train in a stage whose views are 'all'.")
    return aux[GLOBAL_TOKENS], aux.get(GLOBAL_EMBEDDING)


def read_views(views: ViewFeatures) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same of adapted views, outside of training."""
    glob = views.group("global")
    return read_aux(views.aux if glob is None else {**views.aux, GLOBAL_TOKENS: glob.features})


def find_widths(model: Any) -> tuple[int, int | None]:
    """Widths of image tokens and global embedding (or None) that a model gives, from a blank image."""
    connector = model.connector
    was_training = connector.training
    connector.eval()  # whatever views the stage uses
    with torch.no_grad():
        groups = blank_groups(model, next(model.parameters()).device, use_tower=False)
        image = idle_image([group.kind for group in groups if group.tower == MAIN_TOWER], connector.patch_grid)
        views = connector.adapt(ViewFeatures(groups, [image]))
    connector.train(was_training)
    tokens, embedding = read_views(views)
    return tokens.shape[-1], None if embedding is None else embedding.shape[-1]
