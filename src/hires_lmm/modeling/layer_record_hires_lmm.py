"""What generation remembers of layer ops."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .conversation_hires_lmm import Record


@dataclass(eq=False)
class Keys:
    """The keys that layers hold which hold the same ones.

    Args:
        slots (`torch.Tensor` of shape `(B, K)`): Slot of each; -1 for padding, and where masks hide what has left.
        is_plain (`bool`): Known to hold no -1, so that order alone says what is seen.
        is_whole (`bool`): Nothing has left.
    """

    slots: torch.Tensor
    is_plain: bool = True
    is_whole: bool = True


class LayerRecord(Record):
    """What generation remembers of layer ops: the keys of each layer, and which slots `(B, total)` are visual."""

    def __init__(self, keys: list[Keys], total: int, visual: torch.Tensor):
        self.keys, self.total, self.decided, self.visual = keys, total, 0, visual

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Change the slots of all layers; those that share keys go on sharing."""
        new = {id(keys): Keys(change(keys.slots), keys.is_plain, keys.is_whole) for keys in self.keys}
        self.keys = [new[id(keys)] for keys in self.keys]

    def select(self, rows: list[int]) -> None:
        """Gather rows of the batch."""
        self._change(lambda slots: slots[torch.tensor(rows, device=slots.device)])
        self.visual = self.visual[torch.tensor(rows, device=self.visual.device)]

    def follow(self, cache: Any, length: int) -> None:
        """Forget what was cropped; the last tokens are in every layer.

        Raises:
            ValueError: If the cache was cropped to before tokens that left, or filled by another model.
        """
        if not self.decided <= length <= self.total:
            raise ValueError(
                f"The cache holds {length} positions, but visual tokens left the language model within the first "
                f"{self.decided} of {self.total}; crop it to no less than {self.decided}, or start without cache."
            )
        if length < self.total:
            cut = self.total - length
            self._change(lambda slots: slots[:, :-cut])
            self.visual = self.visual[:, :length]
            self.total = length
