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
        """The value of one sample.

        Args:
            messages (`list[dict]`): Its messages with the images in their places, see `read_messages`.

        Returns:
            The value, or None where the sample gives none.
        """
        raise NotImplementedError

    def join(self, values: list) -> Any:
        """The column of a batch, from the values of the samples that gave one, in their order.

        Args:
            values (`list`): At least one value.
        """
        return torch.cat(values)
