"""What generation remembers of a conversation: one object, an attribute of the cache that holds the conversation."""

from typing import Any

import torch
from transformers.cache_utils import EncoderDecoderCache


class Record:
    """Base of what one part remembers; only the part writes to it, between two calls of `follow`."""

    def select(self, rows: list[int]) -> None:
        """Gather rows of the batch, with repetition: beams and return sequences follow their prompt."""
        raise NotImplementedError

    def follow(self, cache: Any, length: int) -> None:
        """Forget what the cache, of `length` positions and perhaps cropped, does not hold any more."""
        raise NotImplementedError

    def pack(self, expand: torch.Tensor) -> None:
        """Positions of this call move before the language model sees them: input `(B, L)` to packed position."""


class Conversation:
    """What generation remembers beside keys and values; `cache.conversation` holds it.

    So whoever copies, crops, returns or passes a cache does so with the conversation, and `generate` knows of nothing
    else. A call without a cache has a loose one, which `attach` hangs on the cache that the language model makes.

    Attributes:
        records (`dict[str, Record]`): What parts remember, by their own names.
        batch_size (`int`): Rows of the last call.
        length (`int`): Positions that the cache held when the last call began.
    """

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.batch_size = self.length = 0

    @classmethod
    def of(cls, cache: Any) -> "Conversation":
        """The conversation of a cache, a new one where it has none; without a cache a loose one."""
        found = getattr(_holder(cache), "conversation", None)
        return found if isinstance(found, cls) else cls().attach(cache)

    def attach(self, cache: Any) -> "Conversation":
        """Hang it on a cache; None leaves it loose."""
        if cache is not None:
            _holder(cache).conversation = self
        return self

    def follow(self, cache: Any, batch_size: int) -> None:
        """Bring it to the state of the cache; called at the start of each forward pass.

        Args:
            cache (`Cache`, *optional*): An empty one, or None, starts anew; a cropped one trims each record.
            batch_size (`int`): Rows of the call; a multiple repeats each row, as beams are laid out.

        Raises:
            ValueError: If the rows of the call are no multiple of those that are remembered.
        """
        self.length = 0 if cache is None else int(cache.get_seq_length())
        if not self.length:
            self.records.clear()
        elif batch_size != self.batch_size and self.records:
            self._repeat(batch_size)
        for record in self.records.values():
            record.follow(cache, self.length)
        self.batch_size = batch_size

    def pack(self, expand: torch.Tensor) -> None:
        """Tell all records that positions of this call move: `(B, L)`, see `Packing`."""
        for record in self.records.values():
            record.pack(expand)

    def select(self, rows: list[int]) -> None:
        """Gather rows, with repetition; for callers who gather rows of the cache themselves.

        Args:
            rows (`list[int]`): Rows of the batch, in the new order.
        """
        for record in self.records.values():
            record.select(rows)
        self.batch_size = len(rows)

    def _repeat(self, batch_size: int) -> None:
        times, rest = divmod(batch_size, self.batch_size)
        if rest:
            raise ValueError(
                f"The cache remembers a conversation of {self.batch_size} rows, and the call has {batch_size}. Where "
                "you choose rows of a cache, choose them of cache.conversation too: cache.conversation.select(rows)."
            )
        self.select([row for row in range(self.batch_size) for _ in range(times)])


def _holder(cache: Any) -> Any:
    """The cache that is asked: of an encoder and a decoder, that of the decoder's own text."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
