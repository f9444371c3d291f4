"""The contrastive loss of CG-VLM: the patches of an image should resemble the words of its own caption."""

import math
from typing import Any, ClassVar

import torch
from torch.nn import functional

from ...modeling.geometry_hires_lmm import Kind
from .base import Objective, StepValues
from .contrastive_math import contrast


def image_vectors(patches: torch.Tensor, grid: tuple[int, int], pool: int = 1, pooled: bool = False) -> torch.Tensor:
    """One vector an image `(I, D)` float32 of its tokens `(I, rows * cols, D)`: the mean of unit vectors.

    Args:
        grid (`tuple[int, int]`): Token rows and columns.
        pool (`int`): Side of the squares whose tokens are averaged before; those at right and bottom may be cut.
        pooled (`bool`): The unit vector of the mean instead, whatever `pool` is.
    """
    patches = patches.float()
    if pooled:
        return functional.normalize(patches.mean(dim=1), dim=-1)
    planes = patches.transpose(1, 2).unflatten(2, grid)
    squares = functional.avg_pool2d(planes, pool, ceil_mode=True, count_include_pad=False).flatten(2)
    return functional.normalize(squares, dim=1).mean(dim=2)


def text_vectors(words: torch.Tensor, mask: torch.Tensor, pooled: bool = False) -> torch.Tensor:
    """One vector a caption `(T, D)` float32 of its word embeddings `(T, N, D)`, as `image_vectors`; 0 in the mask is
    not counted, and a caption without words gives zeros."""
    words, mask = words.float(), mask[..., None].float()
    counts = mask.sum(dim=1).clamp(min=1)
    if pooled:
        return functional.normalize((words * mask).sum(dim=1) / counts, dim=-1)
    return (functional.normalize(words, dim=-1) * mask).sum(dim=1) / counts


class CgVlm(Objective):
    """Symmetric cross-entropy of similarities between images and captions of a batch, beside the language loss.

    The similarity of an image and a caption is the mean cosine between the pooled tokens of the global view, as they
    reach the language model, and the word embeddings of the answers. The images of a row count as one; rows without
    image or answer are left out. Only the batch of one process is contrasted.

    Args:
        pool (`int`): Side of the squares of tokens that are averaged first.
        temperature (`float`): Similarities are divided by it.
        pooled (`bool`): One unit vector an image and a caption, as CLIP has, in place of the mean over tokens.

    Raises:
        ValueError: If an option is out of range.

    Source: CG-VLM, huggingface.co/papers/2311.17945. Ours, since the paper leaves them open: temperature, pooling, the
    symmetric loss.
    """

    is_automatic: ClassVar[bool] = True

    def __init__(self, pool: int = 1, temperature: float = 0.07, pooled: bool = False):
        super().__init__()
        if pool < 1 or temperature <= 0:
            raise ValueError(f"pool={pool} must be at least 1, and temperature={temperature} above 0.")
        self.pool, self.temperature, self.pooled = pool, temperature, pooled

    def settings(self) -> dict:
        """The arguments that build it anew."""
        return {"pool": self.pool, "temperature": self.temperature, "pooled": self.pooled}

    def check(self, stage: Any, model: Any) -> None:
        """Refuse models whose global tokens do not reach the language model, and stages without them."""
        grids = model.connector.layout.grids
        if Kind.GLOBAL not in grids or stage.views == "crops" or model.connector.makes_tokens:
            raise ValueError(
                f"Stage {stage.name!r} weighs 'cg_vlm', which reads the global tokens that reach the language model, "
                "but there are none; use a preset and views with a global view, or take the weight away."
            )
        if max(grids[Kind.GLOBAL].size) < self.pool:
            raise ValueError(f"pool={self.pool} is more than the token grid {grids[Kind.GLOBAL].size}; lower it.")

    def forward(self, step: StepValues) -> torch.Tensor:
        """A scalar for the batch."""
        tokens, ids, labels = step.aux["global_tokens"], step.inputs["input_ids"], step.inputs["labels"]
        grid = step.model.connector.layout.grids[Kind.GLOBAL].size
        mask = labels != -100
        rows, of_row = step.image_rows().to(tokens.device).unique(return_inverse=True)
        has_text = mask[rows].any(dim=1)
        if not has_text.any():
            return 0.0 * tokens.float().sum()
        images = image_vectors(tokens, grid, self.pool, self.pooled)
        sums = images.new_zeros(len(rows), images.shape[1]).index_add(0, of_row, images)
        images = sums / torch.bincount(of_row)[:, None]
        words = step.model.get_input_embeddings()(ids[rows[has_text]])
        texts = text_vectors(words, mask[rows[has_text]], self.pooled)
        return contrast(images[has_text], texts, images.new_tensor(-math.log(self.temperature)))
