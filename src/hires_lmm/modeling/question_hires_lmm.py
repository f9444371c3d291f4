"""Which text an image may be routed by."""

import torch

from .views_hires_lmm import Question


def find_sequence(ids: torch.Tensor, sequence: list[int]) -> torch.Tensor:
    """Mark where a sequence of ids begins.

    Args:
        ids (`torch.Tensor` of shape `(B, S)`): Token ids.
        sequence (`list[int]`): Ids to look for; an empty list is found nowhere.

    Returns:
        `(B, S)` bool, True at each first id of an occurrence.
    """
    found = torch.zeros_like(ids, dtype=torch.bool)
    length = len(sequence)
    if not length or ids.shape[1] < length:
        return found
    windows = ids.unfold(1, length, 1)
    found[:, : windows.shape[1]] = (windows == torch.tensor(sequence, device=ids.device)).all(dim=-1)
    return found


def latest(marks: torch.Tensor) -> torch.Tensor:
    """Position of the latest mark at or before each position.

    Args:
        marks (`torch.Tensor` of shape `(B, S)`): True at marks.

    Returns:
        `(B, S)` int64; -1 before the first mark.
    """
    positions = torch.arange(marks.shape[1], device=marks.device)
    return torch.where(marks, positions, -1).cummax(dim=1).values


def number_turns(
    ids: torch.Tensor, placeholder: torch.Tensor, answer_prefix: list[int], question_prefix: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the user turns of a conversation.

    A turn runs from the end of `question_prefix` to the start of `answer_prefix`. A first turn without its prefix
    opens the sequence; where no turn has one, later turns open with their first placeholder.

    Args:
        ids (`torch.Tensor` of shape `(B, S)`): Token ids.
        placeholder (`torch.Tensor` of shape `(B, S)`): True at image placeholders.
        answer_prefix (`list[int]`): Ids that open an answer; empty = the whole sequence is one turn.
        question_prefix (`list[int]`): Ids that open a user turn; may be empty.

    Returns:
        Two `(B, S)` int64 tensors: the number of the user turn a token is part of, from 1 (0 outside user turns), and
        the number of the turn that is open or comes next.
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


def build_question(
    embeds: torch.Tensor,
    ids: torch.Tensor | None,
    placeholder: torch.Tensor,
    lengths: list[int],
    readable: torch.Tensor,
    prompt_mask: torch.Tensor | None,
    labels: torch.Tensor | None,
    scope: str,
    answer_prefix: list[int],
    question_prefix: list[int],
    training: bool,
) -> Question:
    """Collect the text that question-reading operations may see.

    Args:
        embeds (`torch.Tensor` of shape `(B, S, D)`): Token embeddings.
        ids (`torch.Tensor` of shape `(B, S)`, *optional*): Token ids; without them the whole row is one turn.
        placeholder (`torch.Tensor` of shape `(B, S)`): True at image placeholders.
        lengths (`list[int]`): Placeholders of each image, in reading order.
        readable (`torch.Tensor` of shape `(B, S)`): False at padding and beyond the prompt.
        prompt_mask (`torch.Tensor` of shape `(B, S)`, *optional*): The caller's own mask; goes before all else.
        labels (`torch.Tensor` of shape `(B, S)`, *optional*): Training labels; positions with a label are answers.
        scope (`str`): `"turn"` or `"prompt"` (see `HiResLmmConfig`).
        answer_prefix (`list[int]`): Ids that open an answer.
        question_prefix (`list[int]`): Ids that open a user turn.
        training (`bool`): Whether a missing source of the question is an error.

    Returns:
        The question of each image.

    Raises:
        ValueError: In training, if nothing tells question from answer.
    """
    readable = readable & ~placeholder
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
    rows, first = _image_positions(placeholder, lengths)
    return Question(embeds, ids, torch.where(readable, turn, 0), rows, next_turn[rows, first])


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


def _image_positions(placeholder: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the first placeholder of each image."""
    if not lengths:
        empty = torch.zeros(0, dtype=torch.long, device=placeholder.device)
        return empty, empty
    flat = placeholder.flatten().long()
    starts = torch.tensor([sum(lengths[:i]) for i in range(len(lengths))], device=placeholder.device)
    order = torch.argsort(flat, descending=True, stable=True)
    first = order[starts]
    return first // placeholder.shape[1], first % placeholder.shape[1]
