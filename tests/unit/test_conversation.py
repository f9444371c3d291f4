"""The conversation on a cache follows what happens to the cache: crops, copies, repeated rows, a new start."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, StaticCache

from hires_lmm.modeling.blocks_hires_lmm import Block, Prefix, Reading, block_states
from hires_lmm.modeling.conversation_hires_lmm import Conversation


BLOCKS = (Block((1, 2), 3), Block((4,), 2))
STOPS = [6, 20]


def fill(cache, length: int, batch_size: int = 1) -> None:
    """Put positions into the one layer of a cache."""
    cache.update(*torch.zeros(2, batch_size, 1, length, 2), 0)


def prefix_of(seed: int) -> Prefix:
    """What was read of two blocks behind four visual tokens: 4 + (2 + 3) + (1 + 2) positions."""
    keys, values = torch.randn(2, 1, 1, 12, 2, generator=torch.Generator().manual_seed(seed))
    return Prefix(torch.full((4, 2), float(seed)), BLOCKS, ((keys, values),))


def begun(batch_size: int, cache=None, length: int = 24):
    """A cache of some rows, each of which has read two blocks, and its conversation."""
    cache = DynamicCache() if cache is None else cache
    conversation = Conversation.of(cache).follow(cache, batch_size)
    for row in range(batch_size):
        Reading.of(conversation).note(row, prefix_of(row), list(STOPS))
    fill(cache, length, batch_size)
    return cache, conversation


def rows_of(conversation: Conversation) -> list:
    """Which prefix each row holds, by the first value of its image, and how many blocks of it."""
    return [row and (int(row.visual[0, 0]), len(row.blocks)) for row in Reading.of(conversation).rows]


class OwnCache(DynamicCache):
    """A cache of the user's own."""


@pytest.mark.parametrize("make", [DynamicCache, OwnCache], ids=["dynamic", "own"])
def test_a_cache_has_one_conversation(make):
    cache = make()
    conversation = Conversation.of(cache)
    assert Conversation.of(cache) is conversation is cache.conversation
    assert Conversation.of(make()) is not conversation
    both = EncoderDecoderCache(cache, DynamicCache())
    assert Conversation.of(both) is conversation


def test_a_call_without_a_cache_has_a_loose_one():
    loose = Conversation.of(None)
    cache = DynamicCache()
    assert Conversation.of(None) is not loose
    assert loose.attach(None) is loose
    loose.attach(cache)
    assert Conversation.of(cache) is loose


@pytest.mark.parametrize(
    ("left", "blocks", "positions"),
    [(24, 2, 12), (20, 2, 12), (19, 1, 9), (6, 1, 9), (5, 0, 4), (1, 0, 4)],
)
def test_blocks_that_were_cropped_from_the_cache_are_forgotten(left, blocks, positions):
    cache, conversation = begun(2)
    if left < 24:
        cache.crop(left - 24)
    conversation.follow(cache, 2)
    assert rows_of(conversation) == [(0, blocks), (1, blocks)]
    for row, prefix in enumerate(Reading.of(conversation).rows):
        assert prefix.blocks == BLOCKS[:blocks] and prefix.length == positions
        whole = prefix_of(row).layers[0]
        assert all(torch.equal(a, b[:, :, :positions]) for a, b in zip(prefix.layers[0], whole, strict=True))
    fill(cache, 24 - left, 2)  # what comes in its place is no block that was read before
    conversation.follow(cache, 2)
    assert rows_of(conversation) == [(0, blocks), (1, blocks)]


def test_rows_repeat_like_beams_and_repeated_ones_leave_again():
    cache, conversation = begun(2)
    conversation.follow(cache, 6)
    assert rows_of(conversation) == [(0, 2)] * 3 + [(1, 2)] * 3
    conversation.follow(cache, 2)
    assert rows_of(conversation) == [(0, 2), (1, 2)]
    conversation.follow(cache, 4)
    conversation.follow(cache, 6)
    assert rows_of(conversation) == [(0, 2)] * 3 + [(1, 2)] * 3


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_rows_that_were_chosen_must_be_chosen_here_too(batch_size):
    cache, conversation = begun(3)
    with pytest.raises(ValueError, match=rf"conversations of 3 rows, and the call has {batch_size}.*select\(rows\)"):
        conversation.follow(cache, batch_size)
    cache.batch_select_indices(torch.tensor([2, 0]))
    conversation.select([2, 0])
    conversation.follow(cache, 2)
    assert rows_of(conversation) == [(2, 2), (0, 2)]


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
def test_an_empty_cache_starts_anew(kind):
    config = LlamaConfig(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    cache, conversation = begun(2, StaticCache(config, max_cache_len=32) if kind == "static" else None)
    conversation.follow(cache, 2)
    assert conversation.length == 24 and len(rows_of(conversation)) == 2
    cache.reset()
    conversation.follow(None if kind == "none" else cache, 3)
    assert (conversation.length, conversation.records, conversation.batch_size) == (0, {}, 3)
    assert rows_of(conversation) == [None] * 3


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["deep", "pickle"]
)
def test_a_copy_of_the_cache_goes_its_own_way(copied):
    cache, conversation = begun(1)
    twin = copied(cache)
    assert Conversation.of(twin) is not conversation and rows_of(Conversation.of(twin)) == [(0, 2)]
    twin.crop(10 - 24)
    Conversation.of(twin).follow(twin, 1)
    Reading.of(conversation).note(0, prefix_of(5), [23])
    assert rows_of(Conversation.of(twin)) == [(0, 1)] and rows_of(conversation) == [(5, 2)]
    assert Reading.of(Conversation.of(twin)).stops == [[6]] and Reading.of(conversation).stops == [[6, 20, 23]]


def test_a_cache_that_others_filled_is_foreign_until_it_is_empty():
    cache = DynamicCache()
    fill(cache, 3)
    conversation = Conversation.of(cache)
    assert conversation.follow(cache, 1).is_foreign and conversation.follow(cache, 1).is_foreign
    cache.reset()
    assert not conversation.follow(cache, 1).is_foreign
    fill(cache, 3)
    assert not conversation.follow(cache, 1).is_foreign


def test_blocks_of_this_call_move_when_their_rows_are_packed():
    """Two rows behind five cached positions; the second one loses two positions of padding in front of its block."""
    cache = DynamicCache()
    fill(cache, 5, 2)
    conversation = Conversation.of(cache).follow(cache, 2)
    for row, stops in enumerate(([3, 5 + 2], [5 + 4])):
        Reading.of(conversation).note(row, prefix_of(row), stops)
    conversation.pack(torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 3]]))
    assert Reading.of(conversation).stops == [[3, 7], [5 + 2]]


def test_states_of_the_last_blocks():
    hidden = torch.arange(12.0)[:, None]
    assert block_states(hidden, BLOCKS)[:, 0].tolist() == [6, 7, 8, 10, 11]
    assert block_states(hidden, BLOCKS[1:])[:, 0].tolist() == [10, 11]
