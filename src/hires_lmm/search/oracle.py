"""A model of transformers as an oracle: questions in batches, every crop encoded once, prompts begun once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from ..modeling.compat_hires_lmm import CACHE
from ..processing.messages_hires_lmm import MARK
from ..training.parameters import find_base
from .base import Ask


ROW_TENSORS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
"""What a processor returns a position of the text; the rest is of the images."""


class CallLimitError(ValueError):
    """A policy asks more than `max_calls` allows."""


@dataclass
class _Conversation:
    """A conversation to go on with: the images it begins with, what the template makes of it, and its `tail`, the ids
    behind the last image; None where the prompt cannot be parted there."""

    images: list[Image.Image]
    messages: list[dict]
    tail: list[int] | None

    @property
    def key(self) -> tuple:
        """What conversations share that begin alike."""
        return tuple(map(id, self.images)), None if self.tail is not None else str(self.messages)


@dataclass
class _Begun:
    """Conversations up to their last image, encoded in one batch; `rows` says which is where.

    One that cannot be parted is begun up to its last token, which `lasts` has. `seen` is what the language model has
    of them: its cache of that beginning, or features where it reads the images with the question. The images are kept,
    so that no other gets their identity.
    """

    rows: dict[tuple, int]
    lasts: list[list[int]]
    head: dict[str, torch.Tensor]
    seen: Any
    images: list[list[Image.Image]]

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for the language model."""
        parts = [getattr(self.seen, name, None) for name in ("last_hidden_state", "pooler_output")]
        parts += [vars(layer) for layer in getattr(self.seen, "layers", [])]
        return sum(part.nbytes for part in tree_leaves(parts) if isinstance(part, torch.Tensor))


class ModelOracle:
    """Ask a model of transformers' image-text-to-text family.

    Images are encoded once, and so is what prompts about the same images begin with: the language model's cache of it
    is kept and copied for every question. Where a model of ours reads the images with the question (a router, layer
    ops), the features before that are kept instead. A conversation that cannot be parted behind its last image (its
    text holds an image token, a later turn has visual tokens of its own) is encoded by itself.

    Args:
        model, processor: A model with `generate` and its processor, which knows a chat template.
        max_calls (`int`, *optional*): Most questions and answers together.
        batch_size (`int`): Most questions at once, and most images encoded at once.
        max_new_tokens (`int`): Of an answer.
        cache_bytes (`int`): Bytes of begun prompts that are kept; the oldest go first, and are made anew when needed.
        progress (`bool`): Show a bar; transformers' `disable_progress_bar` holds for it.
        images_kwargs: Call-time options of the processor: `max_image_tokens`, `max_crops`, ...

    Attributes:
        calls (`int`): Questions and answers so far.
        encoded (`int`): Image sets encoded so far.

    Raises:
        ValueError: If the model is in training mode or a number is below 1.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_calls: int | None = None,
        batch_size: int = 16,
        max_new_tokens: int = 128,
        cache_bytes: int = 4 << 30,
        progress: bool = True,
        **images_kwargs: Any,
    ):
        if model.training:
            raise ValueError("The model is in training mode, where answers are noisy; call model.eval() first.")
        for name, value in (("max_calls", max_calls), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.model, self.processor, self.tokenizer = model, processor, processor.tokenizer
        self.max_calls, self.batch_size, self.cache_bytes = max_calls, batch_size, cache_bytes
        self.max_new_tokens, self.images_kwargs = max_new_tokens, images_kwargs
        self.calls = self.encoded = 0
        self._reads_question = _reads_question(model)
        self._begun: list[_Begun] = []
        self._parts = True  # until a processor writes otherwise than its template
        self._bar = logging.tqdm(desc="questions", total=max_calls, disable=None if progress else True)

    @property
    def side(self) -> int:
        """Pixels of a view along a side, as the image processor says.

        Raises:
            ValueError: If it does not say.
        """
        image_processor = self.processor.image_processor
        own = getattr(image_processor, "view_size", None)
        size = dict(getattr(image_processor, "size", None) or {}) if own is None else {"height": own}
        sides = [size[name] for name in ("height", "shortest_edge") if size.get(name)]
        if not sides:
            raise ValueError(f"{type(image_processor).__name__} names no size of a view; pass ZoomEye(side=...).")
        return int(sides[0])

    def confidences(self, asks: Sequence[Ask]) -> list[float]:
        """See `Oracle.confidences`: 2 p(yes) / (p(yes) + p(no)) - 1, from the logits of the first token.

        Raises:
            CallLimitError: If these are more than `max_calls` leaves.
            ValueError: If the tokenizer does not know a word, or an image or option is wrong.
        """
        self._count(len(asks))
        words = [tell_apart(self.tokenizer, *ask.words) for ask in asks]
        conversations = [self._converse(list(ask.views()), [ask.text]) for ask in asks]
        values: dict[int, float] = {}
        for numbers, output in self._go_on(conversations, max_new_tokens=1, output_logits=True):
            for number, logits in zip(numbers, output.logits[0].float(), strict=True):
                values[number] = confidence_of(logits, *words[number])
        self._bar.update(len(asks))
        return [values[number] for number in range(len(asks))]

    def answer(self, images: Sequence[Image.Image], turns: Sequence[str], **options: Any) -> str:
        """See `Oracle.answer`; greedy. `options` go to `generate`: `num_beams`, `max_new_tokens`, ...

        Raises:
            CallLimitError: If `max_calls` is reached.
            ValueError: If an image or option is wrong.
        """
        self._count(1)
        conversation = self._converse(list(images), turns)
        ((_, output),) = self._go_on([conversation], **{"max_new_tokens": self.max_new_tokens, **options})
        self._bar.update(1)
        return str(self.tokenizer.decode(output.sequences[0], skip_special_tokens=True)).strip()

    def _count(self, number: int) -> None:
        if self.max_calls is not None and self.calls + number > self.max_calls:
            raise CallLimitError(
                f"max_calls={self.max_calls}, {self.calls} were made and {number} more are asked for; allow more, or "
                "have the policy ask less (ZoomEye: a smaller depth_limit or patience)."
            )
        self.calls += number

    # --- conversations

    def _converse(self, images: list[Image.Image], turns: Sequence[str]) -> _Conversation:
        messages: list[dict[str, Any]] = []
        for number, text in enumerate(turns):
            role = "assistant" if number % 2 else "user"
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
        messages[0]["content"][:0] = [{"type": "image", "image": image} for image in images]
        return _Conversation(images, messages, self._tail(messages, turns) if images and self._parts else None)

    def _tail(self, messages: list[dict], turns: Sequence[str]) -> list[int] | None:
        token = getattr(self.processor, "image_token", None)
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if token is None or MARK in text or any(token in turn for turn in turns):
            return None
        _, found, rest = text.rpartition(token)
        ids = self.tokenizer(found + rest, add_special_tokens=False)["input_ids"]
        image_id = self.tokenizer.convert_tokens_to_ids(token)
        return ids[ids.index(image_id) + 1 :] if image_id in ids else None

    def _go_on(self, conversations: list[_Conversation], **options: Any) -> Iterator[tuple[list[int], Any]]:
        """Generate after conversations, in batches: numbers of a batch, and what `generate` returned."""
        self._begin(conversations)
        for begun in list(self._begun):
            alike: dict[int, list[int]] = {}  # whole prompts of one length need no padding, which is slow to mask
            for number, each in enumerate(conversations):
                if each.key in begun.rows:
                    row = begun.rows[each.key]
                    width = int(begun.head["attention_mask"][row].sum()) + len(each.tail or begun.lasts[row])
                    alike.setdefault(width if self._reads_question else 0, []).append(number)
            for mine in alike.values():
                for start in range(0, len(mine), self.batch_size):
                    numbers = mine[start : start + self.batch_size]
                    yield numbers, self._generate(begun, [conversations[number] for number in numbers], options)
        while len(self._begun) > 1 and sum(begun.nbytes for begun in self._begun) > self.cache_bytes:
            self._begun.pop(0)

    def _begin(self, conversations: list[_Conversation]) -> None:
        """Encode what is new; a conversation that turns out to be whole has another key then."""
        while True:
            known = {key for begun in self._begun for key in begun.rows}
            new = {each.key: each for each in conversations if each.key not in known}
            if not new:
                return
            batch = list(new.values())[: self.batch_size]
            self._begun.append(self._encode(batch))
            self.encoded += len(batch)

    @torch.inference_mode()
    def _encode(self, batch: list[_Conversation]) -> _Begun:
        inputs = self.processor.apply_chat_template(
            [each.messages for each in batch],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", **self.images_kwargs},
        ).to(self.model.device, dtype=self.model.dtype)
        head = {name: inputs[name] for name in ROW_TENSORS if name in inputs}
        rest = {name: value for name, value in inputs.items() if name not in head}
        reads_text = any(name.endswith(("_input_ids", "_attention_mask")) for name in rest)
        ids = head["input_ids"].tolist()
        for each, row in zip(batch, ids, strict=True):
            if each.tail is not None and (reads_text or row[-len(each.tail) :] != each.tail):
                each.tail, self._parts = None, False
        lasts = [row[-1:] for row in ids]
        _cut(head, [len(last if each.tail is None else each.tail) for each, last in zip(batch, lasts, strict=True)])
        rows = {each.key: row for row, each in enumerate(batch)}
        if self._reads_question:
            seen = self.model.get_image_features(**rest) if rest else None
        else:
            options = {"max_new_tokens": 1, "do_sample": False, "num_beams": 1, "return_dict_in_generate": True}
            seen = self.model.generate(**head, **rest, **options)[CACHE]
        return _Begun(rows, lasts, head, seen, [each.images for each in batch])

    @torch.inference_mode()
    def _generate(self, begun: _Begun, conversations: list[_Conversation], options: dict[str, Any]) -> Any:
        rows = [begun.rows[each.key] for each in conversations]
        tails = [each.tail or begun.lasts[row] for each, row in zip(conversations, rows, strict=True)]
        index = torch.tensor(rows, device=self.model.device)
        inputs: dict[str, Any] = _append({name: value[index] for name, value in begun.head.items()}, tails)
        if not self._reads_question:
            inputs[CACHE] = copy.deepcopy(begun.seen)
            inputs[CACHE].batch_select_indices(index.repeat_interleave(options.get("num_beams", 1)))
        else:
            order = inputs["attention_mask"].argsort(dim=1, stable=True)
            longest = int(inputs["attention_mask"].sum(dim=1).max())
            inputs = {name: value.gather(1, order)[:, -longest:] for name, value in inputs.items()}
            if begun.seen is not None:
                starts = [sum(map(len, begun.images[:row])) for row in rows]
                chosen = [
                    start + n for start, row in zip(starts, rows, strict=True) for n in range(len(begun.images[row]))
                ]
                inputs["mm_encoder_outputs"] = {"image": begun.seen.select_images(chosen)}
        settings = {"do_sample": False, "num_beams": 1, "return_dict_in_generate": True, **options}
        output = self.model.generate(**inputs, **settings)
        output.sequences = output.sequences[:, inputs["input_ids"].shape[1] :]
        return output


def first_ids(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """Ids that an answer of one of the words begins with, with a space before it and without."""
    ids: set[int] = set()
    for word in words:
        first = {tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in (word, f" {word}")}
        if first == {tokenizer.unk_token_id}:
            raise ValueError(f"The tokenizer does not know {word!r}; give the prompt words that it knows.")
        ids |= first
    return sorted(ids - {tokenizer.unk_token_id})


def tell_apart(tokenizer: Any, yes: Sequence[str], no: Sequence[str]) -> tuple[list[int], list[int]]:
    """First ids of words for and of words against; those that both begin with, such as a space, say nothing."""
    ids = [set(first_ids(tokenizer, words)) for words in (yes, no)]
    shared = ids[0] & ids[1]
    if yes and (ids[0] == shared or ids[1] == shared):
        raise ValueError(f"The tokenizer begins {list(yes)} and {list(no)} with the same tokens; choose other words.")
    return sorted(ids[0] - shared), sorted(ids[1] - shared)


def _reads_question(model: Any) -> bool:
    """Whether what the language model has of the images depends on the text behind them."""
    if model.config.model_type != "hires_lmm":
        return False
    parts = find_base(model).connector
    return bool(parts.reads_question or parts.has_turns or parts.layer_ops or not parts.is_count_static)


def _cut(head: dict[str, torch.Tensor], lengths: list[int]) -> None:
    """Take so many positions off the end of each row, in place; rows stay padded on the left."""
    width = head["input_ids"].shape[1]
    shift = torch.tensor(lengths, device=head["input_ids"].device) - min(lengths)
    index = torch.arange(width - min(lengths), device=shift.device) - shift[:, None]
    for name, value in head.items():
        head[name] = value.gather(1, index.clamp(min=0))
    head["attention_mask"] = head["attention_mask"] * (index >= 0)
    empty = int((head["attention_mask"].sum(dim=0) == 0).sum())
    for name, value in head.items():
        head[name] = value[:, empty:]


def _append(head: dict[str, torch.Tensor], tails: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows with their tails behind them; shorter tails are padded between the two."""
    width, ids = max(map(len, tails)), head["input_ids"]
    longer = {name: torch.nn.functional.pad(value, (0, width)) for name, value in head.items()}
    for row, tail in enumerate(tails):
        longer["input_ids"][row, ids.shape[1] :] = ids.new_tensor([tail[0]] * (width - len(tail)) + tail)
        longer["attention_mask"][row, ids.shape[1] + width - len(tail) :] = 1
    return longer


def confidence_of(logits: torch.Tensor, yes: list[int], no: list[int]) -> float:
    """2 p(yes) / (p(yes) + p(no)) - 1 from logits `(V,)`; without ids, of the likeliest token against all others."""
    if not yes and not no:
        return float(2 * logits.softmax(dim=-1).max() - 1)
    return float((logits[yes].logsumexp(dim=0) - logits[no].logsumexp(dim=0)).div(2).tanh())
