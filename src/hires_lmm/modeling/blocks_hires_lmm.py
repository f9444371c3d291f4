"""Blocks of queries: which ones a conversation asks for, and what was read of it before."""

from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .carriers_hires_lmm import Question
from .inputs_hires_lmm import copy_to_host


NO_TURN = -2
"""Stands in `question_ids` behind the last turn of a conversation."""


class Block(NamedTuple):
    """One block of queries: the ids of its question and its number of slots, the end slot included."""

    question: tuple[int, ...]
    num_slots: int


class Prefix(NamedTuple):
    """What the transformer has read of a conversation; never changed, so it may be shared.

    Args:
        blocks (`tuple[Block]`): The blocks, in order.
        states (`tuple[torch.Tensor]`): States `(n_t, C)` of the slots of each block.
        ends (`tuple[int]`): Positions read before the first block (the visual tokens) and at the end of each block.
        layers (`tuple[tuple[torch.Tensor, torch.Tensor]]`): Keys and values `(1, H, ends[-1], C / H)` a layer.
    """

    blocks: tuple[Block, ...]
    states: tuple[torch.Tensor, ...]
    ends: tuple[int, ...]
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def cut(self, number: int) -> "Prefix":
        """The visual tokens and the first `number` blocks."""
        if number == len(self.blocks):
            return self
        end = self.ends[number]
        layers = tuple((keys[:, :, :end], values[:, :, :end]) for keys, values in self.layers)
        return Prefix(self.blocks[:number], self.states[:number], self.ends[: number + 1], layers)

    def shared(self, blocks: tuple[Block, ...]) -> "Prefix":
        """What is common with another conversation on the same image; at least the visual tokens."""
        pairs = list(zip(self.blocks, blocks, strict=False))
        return self.cut(next((at for at, (own, other) in enumerate(pairs) if own != other), len(pairs)))

    def extended(self, blocks: tuple[Block, ...], hidden: torch.Tensor, known: int, layers: tuple) -> "Prefix":
        """The conversation with further blocks, whose states `hidden` holds from position `known` on."""
        ends, states = list(self.ends), list(self.states)
        for block in blocks:
            ends.append(ends[-1] + len(block.question) + block.num_slots)
            own = hidden[ends[-1] - block.num_slots - known : ends[-1] - known]
            states.append(own.clone() if layers else own)
        return Prefix((*self.blocks, *blocks), tuple(states), tuple(ends), layers)


class ImageMemory:
    """What was read on one image, kept with its features for later calls that pass them again.

    It holds the conversation that was read last, and every one that goes on in a language model cache which is still
    alive. Entries are replaced and never changed, so threads may share it. A copy (`copy.deepcopy`, pickle) is empty.

    Args:
        keeps (`bool`): Whether anything is kept; False for features that no caller can pass again.
    """

    def __init__(self, keeps: bool = True):
        self.keeps = keeps
        self.last: Prefix | None = None
        self._by_cache: WeakKeyDictionary = WeakKeyDictionary()

    def __getstate__(self) -> dict:
        return {"keeps": self.keeps}

    def __setstate__(self, state: dict) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def of_cache(self, cache: Any) -> Prefix | None:
        """The conversation that goes on in a language model cache."""
        return None if cache is None else self._by_cache.get(cache)

    def remember(self, cache: Any, prefix: Prefix) -> None:
        """Note which conversation a language model cache holds; without its states where these carry gradients."""
        if self.keeps and cache is not None:
            self._by_cache[cache] = prefix if prefix.layers else Prefix(prefix.blocks, (), (), ())

    def clear(self) -> None:
        """Forget all conversations, which frees their keys and values."""
        self.last = None
        self._by_cache = WeakKeyDictionary()


def find_runs(flags: list) -> list[tuple[int, int]]:
    """First and past-last position of each run of true values."""
    edges = [at for at, (before, now) in enumerate(pairwise([False, *map(bool, flags), False])) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


def read_blocks(question: Question, reads: bool) -> list[list[tuple[Block, int]]]:
    """The blocks of each image that a call shows, each with the position behind its run of placeholders."""
    if reads and question.ids is None and question.asked is None:
        raise ValueError("fusion reads questions as ids, and inputs_embeds has none; pass input_ids.")
    wanted = [question.ids, question.turn, question.next_turn] if reads and question.asked is None else []
    asked = question.asked if reads else None
    rows, placeholder, asked, *texts = copy_to_host(question.image_row, question.placeholder, asked, *wanted)
    found = []
    for row in rows.tolist():
        runs = find_runs(placeholder[row].tolist())
        if asked is not None:
            questions = _foreign_questions(asked[row].tolist(), len(runs), row, question.continues)
        elif texts:
            ids, turn, next_turn = (text[row].tolist() for text in texts)
            questions = _own_questions(ids, turn, next_turn, runs)
        else:
            questions = [()] * len(runs)
        found.append([(Block(ids, stop - at), stop) for ids, (at, stop) in zip(questions, runs, strict=True)])
    return found


def _own_questions(ids: list, turn: list, next_turn: list, runs: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    """The ids of the readable text behind each run, up to the next one, of the turn that holds the run."""
    limits = [start for start, _ in runs[1:]] + [len(ids)]
    return [
        tuple(ids[at] for at in range(stop, limit) if turn[at] == next_turn[start])
        for (start, stop), limit in zip(runs, limits, strict=True)
    ]


def _foreign_questions(asked: list, num_runs: int, row: int, continues: bool) -> list[tuple[int, ...]]:
    """The caller's own ids of the questions; those of the last turns where the call shows the end only."""
    turns = [own for own in asked if own and own[0] != NO_TURN]
    if len(turns) < num_runs or (len(turns) > num_runs and not continues):
        raise ValueError(
            f"question_ids holds {len(turns)} questions of conversation {row}, which has {num_runs} turns with image "
            "tokens; pass what processor.question_ids gives for the same conversation."
        )
    return [tuple(token for token in own if token >= 0) for own in turns[len(turns) - num_runs :]]


def stack_prefixes(prefixes: list[Prefix | None]) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], list[int]]:
    """Keys and values a layer of several conversations, padded in front to the longest, and their lengths."""
    lengths = [prefix.ends[-1] if prefix else 0 for prefix in prefixes]
    longest, layers = max(lengths), []
    for number, pair in enumerate(next(prefix for prefix in prefixes if prefix).layers):
        stacked = []
        for which, example in enumerate(pair):
            rows = [prefix.layers[number][which] if prefix else example[:, :, :0] for prefix in prefixes]
            pads = [(0, 0, longest - length, 0) for length in lengths]
            stacked.append(torch.cat([torch.nn.functional.pad(row, pad) for row, pad in zip(rows, pads, strict=True)]))
        layers.append((stacked[0], stacked[1]))
    return layers, lengths


def cut_cache(cache: Any, row: int, start: int, stop: int) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Copy keys and values of some positions of one row, so that the rest of the batch is not held."""
    return tuple(
        (layer.keys[row : row + 1, :, start:stop].clone(), layer.values[row : row + 1, :, start:stop].clone())
        for layer in cache.layers
    )
