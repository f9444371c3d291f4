"""The language half: a small Llama that answers questions about scenes written as text (`text_scenes`).

Several questions are packed behind one scene: each sees the scene and itself, so the scene is read once.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..questions import QUESTION_KINDS, Question, ask_questions
from ..scenes import NeedleOptions, sample_scene
from ..text_scenes import (
    MOST_WORDS,
    PLACE_KINDS,
    Slot,
    TextStyle,
    answerable_kinds,
    pick_questions,
    sample_style,
    write_slots,
)
from .loop import Clock, LoopOptions, run_loop
from .tokenizer import build_tokenizer


SCENES = NeedleOptions()
FOCUS_SCENES = NeedleOptions(
    num_objects=(2, 4),
    kinds=(("digit", 0.2), ("number", 0.3), ("word", 0.2), ("shape", 0.2), ("chart", 0.1)),
)
FOCUS_KINDS = ("read_digit", "read_number", "read_word", "shape", "chart", "colour_of_value")
PLACE_FOCUS_KINDS = (*PLACE_KINDS, "read_digit")
LATE_KINDS = ("place_of_value", "digit_at_place", "place_of_colour", "read_number", "larger_digit", "chart")

LONGEST_IMAGE = 700
"""Positions over which the slots of a scene may be spread, so that any number of visual tokens will do."""

NO_WORD = -1
OPENING = ("<|im_start|>", "user")
MIDDLE = ("<|im_end|>", "<|im_start|>", "assistant")


@dataclass(frozen=True)
class TextPlan:
    """Length and curriculum.

    Args:
        steps (`int`): Optimizer steps.
        few (`int`): First steps, with at most three objects a scene, more scenes written word by word, and no gaps.
        spread (`int`): Steps after those, over which the gaps between slots grow to their full length.
        focus (`tuple` of two `int`): First and past-last step of a phase that asks for values and their colours only,
            in scenes of at most four objects: what is read there is copied for every kind, or for none.
        restarts (`tuple` of `int`): Steps at which the learning rate, having fallen, starts again at its peak.
        places (`tuple` of two `int`): First and past-last step of a phase that mostly asks for places.
        polish (`int`): Step from which few scenes are written word by word and every second one asks only for what
            is learnt last.
        scenes (`int`): Scenes a step.
        questions (`int`): Most questions a scene.
        peak_rate (`float`): Learning rate.
    """

    steps: int = 8600
    few: int = 1000
    spread: int = 1500
    focus: tuple[int, int] = (1700, 2500)
    restarts: tuple[int, ...] = (3500, 4600)
    places: tuple[int, int] = (3500, 3900)
    polish: int = 4600
    scenes: int = 16
    questions: int = 8
    peak_rate: float = 2e-3


@dataclass(frozen=True)
class TextRow:
    """One scene as slots, the position of each slot, and the questions asked about it."""

    slots: list[Slot]
    positions: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class TextBatch:
    """words (B, L, 5) int64, `NO_WORD` where unused; positions (B, L); mask (B, 1, L, L) bool, who sees whom; labels
    (B, L), the id that follows where it belongs to an answer, else -100; question (B, L), number of the question, 0 in
    the scene, -1 in padding."""

    words: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    question: torch.Tensor


def text_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The size of the language model: 4 layers of 128, word embeddings shared with the output.

    Args:
        tokenizer: Its vocabulary and special tokens are taken over.

    Returns:
        The configuration, with eager attention.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "eager"
    return config


def sample_row(
    key: str,
    split: str,
    options: NeedleOptions,
    most: int,
    style: TextStyle | None = None,
    longest: int = LONGEST_IMAGE,
    kinds: Sequence[str] = QUESTION_KINDS,
) -> TextRow:
    """Sample a scene, write it and ask about it.

    Args:
        key (`str`): Decides everything.
        split (`str`): Split of the scene.
        options (`NeedleOptions`): Of the scene.
        most (`int`): Most questions.
        style (`TextStyle`, *optional*): How the scene is written; sampled by default.
        longest (`int`): Positions over which the slots may be spread.
        kinds (sequence of `str`): Question kinds that may be asked.

    Returns:
        The row.
    """
    scene = sample_scene(options, split, key)
    rng = random.Random(f"text/{split}/{key}")
    style = sample_style(rng) if style is None else style
    slots = write_slots(scene, style, rng)
    positions = list(range(len(slots)))
    asked = [kind for kind in answerable_kinds(style) if kind in kinds]
    if not style.listed and rng.random() < 0.6:
        length = rng.randint(len(slots), max(len(slots), rng.randint(1, longest)))
        positions = sorted(rng.sample(range(length), len(slots)))
    return TextRow(slots, positions, pick_questions(ask_questions(scene), asked, most, rng))


def training_rows(seed: int, step: int, plan: TextPlan) -> list[TextRow]:
    """The rows of a training step.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): From 0; the rows depend on nothing else.
        plan (`TextPlan`): Curriculum.

    Returns:
        One row a scene.
    """
    few = step < plan.few
    longest = 1 + int((LONGEST_IMAGE - 1) * min(1.0, max(0, step - plan.few) / plan.spread))
    options = replace(SCENES, num_objects=(2, 3)) if few else SCENES
    rows = []
    for index in range(plan.scenes):
        key = f"{seed}/{step}/{index}"
        listed_share = 0.4 if few else 0.15 if step < plan.polish else 0.04
        style = sample_style(random.Random(f"style/{key}"), listed_share)
        if plan.focus[0] <= step < plan.focus[1]:
            style = replace(style, listed=False, views="local" if style.views == "local" else "both")
            rows.append(sample_row(key, "train", FOCUS_SCENES, plan.questions, style, longest, FOCUS_KINDS))
            continue
        if plan.places[0] <= step < plan.places[1]:
            style = replace(style, listed=False, views="local" if style.views == "local" and style.joined else "both")
            rows.append(sample_row(key, "train", SCENES, plan.questions, style, longest, PLACE_FOCUS_KINDS))
            continue
        kinds = LATE_KINDS if step >= plan.polish and index % 2 else QUESTION_KINDS
        rows.append(sample_row(key, "train", options, plan.questions, style, longest, kinds))
    return rows


def build_batch(rows: Sequence[TextRow], tokenizer: Any) -> TextBatch:
    """Lay out rows as the chat template does: `<|im_start|> user` scene question `<|im_end|> <|im_start|> assistant`.

    Args:
        rows (sequence of `TextRow`): The rows.
        tokenizer: The tokenizer.

    Returns:
        The batch.
    """
    ids = tokenizer.get_vocab()
    laid_out = [_lay_out(row) for row in rows]
    length = max(len(tokens) for tokens in laid_out)
    words = torch.full((len(rows), length, MOST_WORDS), NO_WORD)
    positions, numbers = torch.zeros(len(rows), length).long(), torch.full((len(rows), length), -1)
    labels = torch.full((len(rows), length), -100)
    for index, tokens in enumerate(laid_out):
        count = len(tokens)
        padded = [[ids[word] for word in token.slot] + [NO_WORD] * (MOST_WORDS - len(token.slot)) for token in tokens]
        words[index, :count] = torch.tensor(padded)
        positions[index, :count] = torch.tensor([token.position for token in tokens])
        numbers[index, :count] = torch.tensor([token.question for token in tokens])
        labels[index, :count] = torch.tensor([-100 if token.next is None else ids[token.next] for token in tokens])
    return TextBatch(words, positions, _visible(numbers), labels, numbers)


class _Token(NamedTuple):
    slot: Slot
    position: int
    question: int
    next: str | None


def _lay_out(row: TextRow) -> list[_Token]:
    tokens = [_Token((word,), position, 0, None) for position, word in enumerate(OPENING)]
    tokens += [
        _Token(slot, len(OPENING) + position, 0, None) for slot, position in zip(row.slots, row.positions, strict=True)
    ]
    start = tokens[-1].position + 1
    for number, question in enumerate(row.questions, start=1):
        prompt = [*question.text.split(), *MIDDLE]
        answer = [*question.answer.split(), "<|im_end|>"]
        following = [*[None] * (len(prompt) - 1), *answer]
        text = [*prompt, *answer[:-1]]
        tokens += [_Token((word,), start + at, number, following[at]) for at, word in enumerate(text)]
    return tokens


def _visible(question: torch.Tensor) -> torch.Tensor:
    length = question.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    related = (question[:, None, :] == 0) | (question[:, None, :] == question[:, :, None])
    seen = causal & related & (question[:, None, :] >= 0)
    return (seen | torch.eye(length, dtype=torch.bool))[:, None]


def embed_words(model: LlamaForCausalLM, words: torch.Tensor) -> torch.Tensor:
    """Sum the embeddings of the words of each slot.

    Args:
        model (`LlamaForCausalLM`): The language model.
        words (`torch.Tensor` (B, L, 5)): Ids, `NO_WORD` where unused.

    Returns:
        `torch.Tensor` (B, L, D).
    """
    embeds = model.get_input_embeddings()(words.clamp(min=0))
    return (embeds * (words != NO_WORD)[..., None]).sum(2)


def answer_logits(model: LlamaForCausalLM, batch: TextBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions at the places of answers.

    Args:
        model (`LlamaForCausalLM`): The model.
        batch (`TextBatch`): The batch.

    Returns:
        Logits (N, vocabulary) and the N right ids.
    """
    bias = torch.zeros(batch.mask.shape).masked_fill(~batch.mask, torch.finfo(torch.float32).min)
    embeds = embed_words(model, batch.words)
    output = model.model(inputs_embeds=embeds, attention_mask=bias, position_ids=batch.positions, use_cache=False)
    hidden = output.last_hidden_state
    known = batch.labels != -100
    return model.lm_head(hidden[known]), batch.labels[known]


def train_text(seed: int, plan: TextPlan, folder: Path) -> tuple[LlamaForCausalLM, Clock]:
    """Pretrain the language half.

    Args:
        seed (`int`): Decides weights and data.
        plan (`TextPlan`): Length and curriculum.
        folder (`Path`): For checkpoints and log.

    Returns:
        The model and the time spent.
    """
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM(text_config(tokenizer))

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        logits, labels = answer_logits(model, build_batch(training_rows(seed, step, plan), tokenizer))
        accuracy = (logits.argmax(-1) == labels).float().mean().item()
        return F.cross_entropy(logits, labels), {"token_accuracy": accuracy}

    options = LoopOptions(plan.steps, plan.peak_rate, decay_share=0.15, restarts=plan.restarts)
    return model, run_loop("language half", model, step_loss, options, folder)
