"""Blocks of queries: which ones a conversation asks for, and what was read of it before."""

from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch

from .carriers_hires_lmm import Question
from .conversation_hires_lmm import Conversation, Record
from .inputs_hires_lmm import copy_to_host


NO_TURN = -2
"""Stands in `question_ids` behind the last turn of a conversation."""


class Block(NamedTuple):
    """One block of queries: the ids of its question and its number of slots, the end slot included."""

    question: tuple[int, ...]
    num_slots: int


class Prefix(NamedTuple):
    """What the transformer has read of a conversation; never changed, so copies share it.

    Args:
        visual (`torch.Tensor` of shape `(n, C)`): The visual tokens.
        blocks (`tuple[Block]`): The blocks behind them, in order.
        layers (`tuple[tuple[torch.Tensor, torch.Tensor]]`): Keys and values `(1, H, length, C / H)` a layer; empty
            where they were not kept, as in training.
    """

    visual: torch.Tensor
    blocks: tuple[Block, ...] = ()
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    def __deepcopy__(self, memo: dict) -> "Prefix":
        return self

    @property
    def length(self) -> int:
        """Positions that the transformer has read."""
        return len(self.visual) + sum(len(block.question) + block.num_slots for block in self.blocks)

    def cut(self, number: int) -> "Prefix":
        """The visual tokens and the first `number` blocks."""
        cut = self._replace(blocks=self.blocks[:number])
        layers = tuple((keys[:, :, : cut.length], values[:, :, : cut.length]) for keys, values in self.layers)
        return cut._replace(layers=layers)


class Reading(Record):
    """What fusion has read of the conversation of each row of the batch."""

    def __init__(self, batch_size: int):
        self.rows: list[Prefix | None] = [None] * batch_size
        self.stops: list[list[int]] = [[] for _ in range(batch_size)]  # behind each block, as the cache counts

    @classmethod
    def of(cls, conversation: Conversation) -> "Reading":
        """The record of a conversation, made where it has none."""
        return cast("Reading", conversation.records.setdefault("fusion", cls(conversation.batch_size)))

    def select(self, rows: list[int]) -> None:
        """Gather rows of the batch."""
        self.rows, self.stops = [self.rows[row] for row in rows], [self.stops[row] for row in rows]

    def follow(self, cache: Any, length: int) -> None:
        """Forget blocks that were cropped from the cache; what was read of the image stays."""
        for row, stops in enumerate(self.stops):
            if stops and stops[-1] > length:
                self.stops[row] = [stop for stop in stops if stop <= length]
                self.rows[row] = cast("Prefix", self.rows[row]).cut(len(self.stops[row]))

    def pack(self, expand: torch.Tensor, past: int) -> None:
        """Move the blocks of this call to their packed positions."""
        self.stops = [
            [stop if stop <= past else past + own[stop - past - 1] + 1 for stop in stops]
            for own, stops in zip(expand.tolist(), self.stops, strict=True)
        ]

    def note(self, row: int, prefix: Prefix, stops: list[int]) -> None:
        """Write down what a row has read now, and where the blocks that are new stop."""
        self.rows[row], self.stops[row] = prefix, [*self.stops[row], *stops]


class Asked(NamedTuple):
    """What a call shows of the conversation about one image.

    Args:
        row (`int`): Row of the batch.
        blocks (`tuple[Block]`): The blocks that it shows.
        stops (`list[int]`): Positions of the call behind the placeholders of each.
        known (`Prefix`, *optional*): What was read before, where the conversation goes on.
    """

    row: int
    blocks: tuple[Block, ...]
    stops: list[int]
    known: Prefix | None = None

    @property
    def earlier(self) -> tuple[Block, ...]:
        """The blocks before those shown."""
        return () if self.known is None else self.known.blocks


def find_runs(flags: list) -> list[tuple[int, int]]:
    """First and past-last position of each run of true values."""
    edges = [at for at, (before, now) in enumerate(pairwise([False, *map(bool, flags), False])) if before != now]
    return list(zip(edges[::2], edges[1::2], strict=True))


def read_blocks(question: Question, reads: bool) -> list[Asked]:
    """The blocks of each image that a call shows."""
    if reads and question.ids is None and question.asked is None:
        raise ValueError("fusion reads questions as ids, and inputs_embeds has none; pass input_ids.")
    wanted = [question.ids, question.turn, question.next_turn] if reads and question.asked is None else []
    asked = question.asked if reads else None
    rows, placeholder, asked, *texts = copy_to_host(question.image_row, question.placeholder, asked, *wanted)
    reading = None if question.conversation is None else Reading.of(question.conversation)
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
        blocks = tuple(Block(ids, stop - at) for ids, (at, stop) in zip(questions, runs, strict=True))
        known = None if reading is None else reading.rows[row]
        found.append(Asked(row, blocks, [stop for _, stop in runs], known))
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
    lengths = [prefix.length if prefix else 0 for prefix in prefixes]
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
    """Keys and values of some positions of one row; copied, so that the rest of the batch is not held."""

    def cut(states: torch.Tensor) -> torch.Tensor:
        own = states[row : row + 1, :, start:stop]
        return own if own.shape == states.shape else own.clone()

    return tuple((cut(layer.keys), cut(layer.values)) for layer in cache.layers)


def block_states(hidden: torch.Tensor, blocks: tuple[Block, ...]) -> torch.Tensor:
    """States `(n, C)` of the slots of the last blocks that were read, out of all states `(L, C)`."""
    sizes = [size for block in blocks for size in (len(block.question), block.num_slots)]
    return torch.cat(hidden[len(hidden) - sum(sizes) :].split(sizes)[1::2])
