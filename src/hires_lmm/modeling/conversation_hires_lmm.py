"""What generation remembers of a conversation: one object, an attribute of the cache that holds the conversation."""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, EncoderDecoderCache


class Record:
    """Base of what one part remembers; only the part writes to it, between two calls of `follow`."""

    def select(self, rows: list[int]) -> None:
        """Gather rows of the batch, with repetition: beams and return sequences follow their prompt."""
        raise NotImplementedError

    def follow(self, cache: Any, length: int) -> None:
        """Forget what the cache, of `length` positions and perhaps cropped, does not hold any more."""
        raise NotImplementedError

    def pack(self, expand: torch.Tensor, past: int) -> None:
        """Positions of this call, behind `past` others, move before they are cached: see `Packing.expand`."""


class Conversation:
    """What generation remembers beside keys and values; `cache.conversation` holds it.

    So whoever copies, crops, returns or passes a cache does so with the conversation, and `generate` knows of nothing
    else. A call without a cache has a loose one, which `attach` hangs on the cache that the language model makes.

    Attributes:
        records (`dict[str, Record]`): What parts remember, by their own names.
        batch_size (`int`): Rows of the last call.
        num_rows (`int`): Rows before any were repeated; all repetitions of one are the same and stand together.
        length (`int`): Positions that the cache held when the last call began.
        held (`int`): Positions that it held when the last call ended.
        is_foreign (`bool`): Whether others filled the cache, so that nobody knows what it holds.
    """

    def __init__(self) -> None:
        self.records: dict[str, Record] = {}
        self.batch_size = self.num_rows = self.length = self.held = 0
        self.is_foreign = False

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

    def follow(self, cache: Any, batch_size: int) -> "Conversation":
        """Bring it to the state of the cache; called at the start of each forward pass.

        Args:
            cache (`Cache`, *optional*): An empty one, or None, starts anew; a cropped one trims each record.
        """
        self.length = cached_length(cache)
        self.is_foreign = self.length > 0 and (self.is_foreign or not self.batch_size)
        if not self.length:
            self.records.clear()
        if not self.records:
            self.num_rows = batch_size
        elif batch_size != self.batch_size:
            self._regroup(batch_size)
        for record in self.records.values():
            record.follow(cache, self.length)
        self.batch_size = batch_size
        return self

    def pack(self, expand: torch.Tensor) -> None:
        """Tell all records that positions of this call move: packed position of each input position `(B, L)`."""
        for record in self.records.values():
            record.pack(expand, self.length)

    def select(self, rows: list[int]) -> None:
        """Gather rows, with repetition; for callers who gather rows of the cache themselves."""
        for record in self.records.values():
            record.select(rows)
        self.batch_size = self.num_rows = len(rows)

    def _regroup(self, batch_size: int) -> None:
        times, rest = divmod(batch_size, self.num_rows)
        if rest:
            raise ValueError(
                f"The cache remembers conversations of {self.num_rows} rows, and the call has {batch_size}. Where you "
                "choose rows of a cache, choose them of its conversation too: cache.conversation.select(rows)."
            )
        first = range(0, self.batch_size, self.batch_size // self.num_rows)
        for record in self.records.values():
            record.select([row for row in first for _ in range(times)])


def _holder(cache: Any) -> Any:
    """The cache that is asked: of an encoder and a decoder, that of the decoder's own text."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


def cached_length(cache: Any) -> int:
    """Positions that a cache holds; one of states alone does not know, so its conversation counts."""
    if cache is None:
        return 0
    own = _holder(cache)
    if not getattr(own, "layers", None) or not all(own.is_linear):
        return int(cache.get_seq_length())
    return Conversation.of(cache).held if cache.has_previous_state() else 0


class StateCache(DynamicCache):
    """A cache of states alone that knows its length, which `generate` asks for up to transformers 5.23."""

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions that it holds."""
        return cached_length(self)
