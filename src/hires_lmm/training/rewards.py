"""Reward models: pairs of answers for TRL's `RewardTrainer`, facts in the prompt, and rewards as functions.

A reward model is a `HiResLmmForSequenceClassification` with `num_labels=1`.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..processing.messages_hires_lmm import clean_messages
from .data.conversations import IMAGE_MARK, attach_images


REQUEST = (
    "How good is the last answer? Judge whether it agrees with the picture, whether it helps with what was asked, "
    "whether it is well written, and whether it is as short as it can be."
)
FACTS = "These facts about the picture are certain:"
COLUMNS = ("images", "image", "facts")


def rating_request(facts: Sequence[str] = (), seed: int | None = None) -> str:
    """Write the request to rate the last answer, with facts about the picture that only the reward model sees.

    Args:
        facts (`Sequence[str]`): Captions, boxes as text, the right option: what is known about the picture.
        seed (`int`, *optional*): Shuffles the facts, so that their order says nothing; None keeps it.

    Source: factually augmented RLHF (LLaVA-RLHF); the wording is ours.
    """
    if isinstance(facts, str):
        raise ValueError(f"facts={facts!r} is one text; write a list: [{facts!r}].")
    facts = list(facts)
    if seed is not None:
        random.Random(seed).shuffle(facts)
    return "\n".join([REQUEST, *([FACTS, *(f"- {fact}" for fact in facts)] if facts else [])])


def rated_conversation(messages: list[dict], images: Any = None, facts: Any = None, seed: int | None = None) -> list:
    """A conversation with its images in place and, where facts are not None, the request to rate its last answer.

    Images without a place in the text stand before the text of the first user turn, as in TRL; those that the messages
    hold already are not placed again.
    """
    if not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(
            f"{messages!s:.80} is no conversation; write [{{'role': 'assistant', 'content': ...}}] for a text."
        )
    messages = [dict(message) for message in clean_messages(messages)]
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    places = [part for part in parts if part["type"] == "image"]
    images = [] if any(set(part) & {"image", "url", "path", "base64"} for part in places) else images or []
    if images and not places and not any(IMAGE_MARK in str(message["content"]) for message in messages):
        first = next(message for message in messages if message["role"] == "user")
        text = [{"type": "text", "text": first["content"]}] if isinstance(first["content"], str) else first["content"]
        first["content"] = [{"type": "image"}] * len(images) + list(text)
    messages = attach_images(messages, images)
    if facts is not None:
        messages.append({"role": "user", "content": [{"type": "text", "text": rating_request(facts, seed)}]})
    return messages


class RewardCollator:
    """Turns pairs of answers into batches of `RewardTrainer`: chosen rows first, then the rejected ones.

    Rows hold `chosen` and `rejected` (messages, behind those of `prompt` if there is one) and may hold `images` or
    `image`, `facts` (a list of texts, see `rating_request`) and `margin`. Pass `remove_unused_columns=False` and
    `max_length=None` to `RewardConfig`, and `processor.tokenizer` as `processing_class`.

    Args:
        processor (`HiResLmmProcessor`): Of the model.
        facts (`bool`): Whether every answer is followed by the request to rate it, with the facts of its row.
        shuffle (`bool`): Whether facts are shuffled, anew for every row and batch.
    """

    def __init__(self, processor: Any, facts: bool = True, shuffle: bool = True):
        self.processor = processor
        self.facts = facts
        self.shuffle = shuffle

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Encode a batch of B pairs as 2 B rows."""
        seeds = [random.getrandbits(32) if self.shuffle else None for _ in examples]
        chats = [
            self._chat(*pair, name) for name in ("chosen", "rejected") for pair in zip(examples, seeds, strict=True)
        ]
        batch = dict(encode_chats(self.processor, chats))
        if any(example.get("margin") is not None for example in examples):
            without = [number for number, example in enumerate(examples) if example.get("margin") is None]
            if without:
                raise ValueError(f"Row {without[0]} of the batch has no margin, and others have; give all rows one.")
            batch["margin"] = torch.tensor([float(example["margin"]) for example in examples])
        return batch

    def _chat(self, example: dict, seed: int | None, name: str) -> list[dict]:
        prompt, answer = list(example.get("prompt") or []), list(example[name])
        if answer[: len(prompt)] != prompt:  # `RewardTrainer` may have joined them
            answer = prompt + answer
        facts = (example.get("facts") or []) if self.facts else None
        return rated_conversation(answer, images_of(example), facts, seed)


def images_of(example: dict) -> list:
    """The images of a row, from `images` or `image`."""
    images = example.get("images")
    images = [example.get("image")] if images is None else images
    return [image for image in images if image is not None]


def encode_chats(processor: Any, chats: list[list[dict]]) -> Any:
    """Tensors of whole conversations, padded on the right."""
    options = {"padding": True, "padding_side": "right"}
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
    )


def model_reward(model: Any, processor: Any, facts: bool = True, batch_size: int = 8) -> Callable[..., list[float]]:
    """Make the score of a reward model a function for `reward_funcs` of `GRPOTrainer` and `RLOOTrainer`.

    Args:
        model (`HiResLmmForSequenceClassification`): With one label.
        processor (`HiResLmmProcessor`): Of that model.
        facts (`bool`): Whether it was trained with the request to rate answers; a column `facts` goes into that.
        batch_size (`int`): Answers that are scored at once.

    Returns:
        A function of `prompts`, `completions` and the columns of the data set, among them `images` or `image`.

    Raises:
        ValueError: If the model has more than one label, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if model.config.num_labels != 1:
        raise ValueError(
            f"A reward is one number, but the model has num_labels={model.config.num_labels}; load it with "
            "num_labels=1."
        )

    @torch.no_grad()
    def reward_model(prompts: list, completions: list, **columns: Any) -> list[float]:
        rows = [
            {name: values[row] for name, values in columns.items() if name in COLUMNS} for row in range(len(prompts))
        ]
        chats = [
            rated_conversation([*prompt, *completion], images_of(row), (row.get("facts") or []) if facts else None)
            for prompt, completion, row in zip(prompts, completions, rows, strict=True)
        ]
        model.eval()
        scores: list[float] = []
        for start in range(0, len(chats), batch_size):
            inputs = encode_chats(processor, chats[start : start + batch_size]).to(model.device)
            scores += model(**inputs).logits[:, 0].float().tolist()
        return scores

    return reward_model


def text_of(completion: Any) -> str:
    """The text of a completion, which TRL gives as messages."""
    if isinstance(completion, str):
        return completion
    content = completion[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def right_answer(completions: list, answer: list[str], **columns: Any) -> list[float]:
    """Reward 1 where an answer is the one in the column `answer`, letter case and outer spaces aside, else 0."""
    pairs = zip(completions, answer, strict=True)
    return [float(text_of(own).strip().lower() == wanted.strip().lower()) for own, wanted in pairs]


def length_penalty(most: int, weight: float = 1.0) -> Callable[..., list[float]]:
    """Make a reward of minus `weight` times the share of `most` tokens that an answer uses.

    Source: the length term of LLaVA-RLHF's reward, which weighs 10 for 896 tokens.
    """

    def length(completion_ids: list, **columns: Any) -> list[float]:
        return [-weight * len(ids) / most for ids in completion_ids]

    return length
