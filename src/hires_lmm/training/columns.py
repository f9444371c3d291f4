"""Columns of a batch that no model reads but an objective does."""

from typing import Any

import torch


class BatchColumn:
    """One more column of a batch, made from the messages of each sample.

    Args:
        name (`str`): Name in the batch; no input of the model may have it.
    """

    def __init__(self, name: str):
        self.name = name

    def encode(self, messages: list[dict]) -> Any | None:
        """The value of one sample, from its messages with the images in their places; None where it gives none."""
        raise NotImplementedError

    def join(self, values: list) -> Any:
        """The column of a batch, from the values of the samples that gave one, in their order; at least one."""
        return torch.cat(values)
