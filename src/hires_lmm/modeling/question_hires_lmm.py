"""Which text an image may be routed by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .carriers_hires_lmm import Question
from .conversation_hires_lmm import Conversation


def find_sequence(ids: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    """True in `(B, S)` at each first id of an occurrence of a sequence; an empty one is found nowhere."""
    found = torch.zeros_like(ids, dtype=torch.bool)
    length = len(sequence)
    if not length or ids.shape[1] < length:
        return found
    last = ids.shape[1] - length + 1
    matches = [ids[:, start : start + last] == wanted for start, wanted in enumerate(sequence)]
    found[:, :last] = torch.stack(matches).all(dim=0)
    return found


def latest(marks: torch.Tensor) -> torch.Tensor:
    """Position of the latest mark at or before each position of `(B, S)`; -1 before the first."""
    positions = torch.arange(marks.shape[1], device=marks.device)
    return torch.where(marks, positions, -1).cummax(dim=1).values


def number_turns(
    ids: torch.Tensor, placeholder: torch.Tensor, answer_prefix: list[int], question_prefix: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the user turns of a conversation.

    A turn runs from the end of `question_prefix` to the start of `answer_prefix`. A first turn without its prefix
    opens the sequence; where no turn has one, later turns open with their first placeholder.

    The first result says of which user turn a token is part, from 1 (0 outside user turns); the second, which one is
    open or comes next. Without an answer prefix the whole sequence is one turn.
    """
    positions = torch.arange(ids.shape[1], device=ids.device)
    answers, questions = find_sequence(ids, answer_prefix), find_sequence(ids, question_prefix)
    opened, closed = latest(questions | (placeholder & ~questions.any(dim=1, keepdim=True))), latest(answers)
    opens_itself = ~(questions & (closed < 0)).any(dim=1, keepdim=True)  # no question prefix before the first answer
    is_open = (opened > closed) | ((closed < 0) & opens_itself)
    prefix_start = latest(questions)
    in_prefix = (prefix_start >= 0) & (positions < prefix_start + len(question_prefix))
    next_turn = answers.long().cumsum(dim=1) + 1
    return torch.where(is_open & ~in_prefix, next_turn, 0), next_turn


class PromptText(NamedTuple):
    """The text of a call, and what says which of it may be read.

    Args:
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; without them the whole row is one turn.
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings.
        attention_mask (`torch.Tensor` of shape `(B, past + S)`, *optional*): 0 at padding.
        prompt_mask (`torch.Tensor` of shape `(B, S)`, *optional*): The caller's own mask; goes before all else.
        labels (`torch.Tensor` of shape `(B, S)`, *optional*): Training labels; positions with a label are answers.
        asked (`torch.Tensor` of shape `(B, turns, L)`, *optional*): The caller's own ids of the questions.
    """

    ids: torch.Tensor | None
    embeds: torch.Tensor
    attention_mask: Any = None
    prompt_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    asked: torch.Tensor | None = None


def recover_text(
    text: PromptText, placeholder: torch.Tensor, embed: Callable[[torch.Tensor], torch.Tensor], vocabulary: int
) -> PromptText:
    """Look up the ids of a call that passed embeddings alone, as PEFT does for its virtual tokens.

    An id is -1 where the embedding is none of the vocabulary, which nobody reads; all are None where none is known.
    A shorter prompt mask leaves out what stands in front.
    """
    prompt_mask = text.prompt_mask
    if prompt_mask is not None:
        front = max(placeholder.shape[1] - prompt_mask.shape[1], 0)
        prompt_mask = torch.nn.functional.pad(prompt_mask.bool(), (front, 0))
    table = embed(torch.arange(vocabulary, device=placeholder.device)).detach()
    given = text.embeds.detach()[~placeholder]
    distance = table.float().square().sum(dim=1) - 2 * given.float() @ table.float().T
    nearest = distance.argmin(dim=1)
    found = torch.where((table[nearest] == given).all(dim=1), nearest, -1)
    ids = torch.full_like(placeholder, -1, dtype=torch.long).masked_scatter(~placeholder, found)
    return text._replace(ids=ids if bool((found >= 0).any()) else None, prompt_mask=prompt_mask)


def find_readable(
    text: PromptText, placeholder: torch.Tensor, prompt_length: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Positions that are neither padding, placeholders nor generated, and the caller's prompt mask at that length."""
    readable, length = ~placeholder, placeholder.shape[1]
    mask, prompt_mask = text.attention_mask, text.prompt_mask
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        readable = readable & mask[:, -length:].bool()
    if text.ids is not None:
        readable = readable & (text.ids >= 0)
    if prompt_length is not None:
        readable = readable & (torch.arange(length, device=placeholder.device) < prompt_length)
        if prompt_mask is not None:  # `generate` does not lengthen it
            prompt_mask = torch.nn.functional.pad(prompt_mask.bool(), (0, max(length - prompt_mask.shape[1], 0)))
    if prompt_mask is not None and prompt_mask.shape != placeholder.shape:
        raise ValueError(
            f"prompt_mask has the shape {tuple(prompt_mask.shape)}, expected that of input_ids: "
            f"{tuple(placeholder.shape)}."
        )
    return readable, prompt_mask


def build_question(
    text: PromptText,
    placeholder: torch.Tensor,
    lengths: list[int],
    prompt_length: int | None,
    scope: str,
    answer_prefix: list[int],
    question_prefix: list[int],
    training: bool,
    has_later: bool = False,
    conversation: Conversation | None = None,
) -> Question:
    """Collect the text that question-reading operations may see.

    `training` makes a missing source of the question an error; `has_later` says that later turns have placeholders of
    their own, so that a row holds one image.
    """
    readable, prompt_mask = find_readable(text, placeholder, prompt_length)
    ids, labels = text.ids, text.labels
    if training and prompt_mask is None and labels is None and (ids is None or not answer_prefix):
        raise ValueError(
            "Routing by the question needs to know where the answer begins, or it would read the answer in training: "
            "pass prompt_mask or labels, or set config.answer_prefix_ids."
        )
    if ids is None and answer_prefix and scope == "turn" and prompt_mask is None:
        raise ValueError(
            "The question of an image is found by token ids, and inputs_embeds has none. Pass prompt_mask (True where "
            'the question stands), or use question_scope="prompt".'
        )
    found = torch.zeros_like(placeholder[:, :1])
    turn = next_turn = torch.ones_like(placeholder, dtype=torch.long)
    if ids is not None and answer_prefix:
        found = find_sequence(ids, answer_prefix).any(dim=1, keepdim=True)
        if scope == "turn":
            turn, next_turn = number_turns(ids, placeholder, answer_prefix, question_prefix)
        else:
            turn = (~_after_last(ids, answer_prefix)).long()
            if training or labels is not None:  # earlier answers are targets here, at inference part of the prompt
                turn = torch.where(_in_answer(ids, answer_prefix, question_prefix), 0, turn)
    if prompt_mask is not None:
        readable = readable & prompt_mask.bool()
    elif labels is not None:
        readable = readable & ((labels == -100) | found)
    rows, first = (_first_runs if has_later else _image_positions)(placeholder, lengths)
    turn = torch.where(readable, turn, 0)
    return Question(
        text.embeds, ids, turn, rows, next_turn[rows, first], placeholder, next_turn, text.asked, conversation
    )


def read_question(
    model: Any,
    text: PromptText,
    placeholder: torch.Tensor,
    lengths: list[int],
    prompt_length: int | None,
    conversation: Conversation | None = None,
) -> Question:
    """Collect the readable text of each image of a call."""
    config, connector = model.config, model.connector
    if text.ids is None and connector.reads_question:
        vocabulary = model.get_input_embeddings().num_embeddings
        text = recover_text(text, placeholder, model.embed_token, vocabulary)
    return build_question(
        text,
        placeholder,
        lengths,
        prompt_length,
        scope=config.question_scope,
        answer_prefix=config.answer_prefix_ids or [],
        question_prefix=config.question_prefix_ids or [],
        training=model.training and prompt_length is None and connector.reads_question,  # or no answer is read
        has_later=connector.has_turns,
        conversation=conversation,
    )


def _after_last(ids: torch.Tensor, answer_prefix: list[int]) -> torch.Tensor:
    """True after the end of the last answer prefix of each row; False everywhere without one."""
    last = latest(find_sequence(ids, answer_prefix))[:, -1:]
    positions = torch.arange(ids.shape[1], device=ids.device)
    return (last >= 0) & (positions >= last + len(answer_prefix))


def _in_answer(ids: torch.Tensor, answer_prefix: list[int], question_prefix: list[int]) -> torch.Tensor:
    """True from the end of an answer prefix to the next question prefix (to the end of the row without one)."""
    opened, closed = latest(find_sequence(ids, answer_prefix)), latest(find_sequence(ids, question_prefix))
    positions = torch.arange(ids.shape[1], device=ids.device)
    return (opened > closed) & (positions >= opened + len(answer_prefix))


def _first_runs(placeholder: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first placeholder of each row that has some: one row an image."""
    rows = placeholder.any(dim=1).nonzero()[:, 0]
    if len(rows) != len(lengths):
        raise ValueError(
            f"{len(lengths)} images came with {len(rows)} conversations that have image tokens; this model reads one "
            "image a conversation."
        )
    return rows, placeholder[rows].long().argmax(dim=1)


def _image_positions(placeholder: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first placeholder of each image."""
    if not lengths:
        empty = torch.zeros(0, dtype=torch.long, device=placeholder.device)
        return empty, empty
    flat = placeholder.flatten().long()
    order = torch.argsort(flat, descending=True, stable=True)
    first = torch.stack([order[sum(lengths[:image])] for image in range(len(lengths))])
    return first // placeholder.shape[1], first % placeholder.shape[1]
