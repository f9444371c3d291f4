"""Cognition alignment: questions about codes and colours of images, put into existing conversations.

    from hires_lmm.training.data.cognition import CognitionTransform, PixelTask, with_cognition

    transform = CognitionTransform({PixelTask(grid=(4, 4)): 0.5})
    dataset = with_cognition(load_conversations("chat.json"), transform)

It changes data only, so it needs no part of a model and goes with every preset. See docs/vlsa.md.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset

from ...processing.image_input_hires_lmm import DEFAULT_PIXEL_LIMIT, open_image, to_rgb
from ...processing.messages_hires_lmm import clean_messages
from ..collator import find_image, read_messages
from .cognition_codes import CachedCodes, Quantiser, VqQuantiser, cache_codes, load_quantiser
from .cognition_tasks import IMAGE_NAME, CodebookTask, CognitionQuery, PixelTask
from .conversations import IMAGE_MARK


__all__ = [
    "CachedCodes",
    "CodebookTask",
    "CognitionQuery",
    "CognitionTransform",
    "PixelTask",
    "VqQuantiser",
    "build_cognition",
    "cache_codes",
    "load_quantiser",
    "with_cognition",
]

PLACES = ("any", "after")


class CognitionTransform:
    """Puts questions with answers into a conversation; a row in, a row out.

    For each task, at its rate, one question about one image of the row is asked at a place drawn evenly from all
    places where a turn may begin: never inside a pair of question and answer, never before the image. Rows without
    an image, and rows in which no turn may begin, are returned as they are. The same row gets the same questions
    wherever and whenever it is read: they depend on seed, epoch, text and image alone.

    Args:
        rates (`dict`): Task -> probability, 0 to 1, that a row gets its question.
        seed (`int`): Another seed, other questions.
        places (`str`): `"any"`: also directly before the turn that holds the image, where the image opens it or ends
            it and is alone in it; the image then moves to the new turn. `"after"`: images stay where they are; use
            it where a router reads the question of the image's turn.
        processor (`HiResLmmProcessor`, *optional*): Its background colour and size limit are used.

    Raises:
        ValueError: If a rate, a task or `places` is senseless.

    Source: VLSA, OpenReview RLhEGWt94S. The paper inserts at random positions and gives no rates.
    """

    def __init__(self, rates: Mapping[Any, float], seed: int = 0, places: str = "any", processor: Any = None):
        for task, rate in rates.items():
            if isinstance(task, type) or not hasattr(task, "ask"):
                raise ValueError(
                    f"rates has the key {task!r}, which is no task; use PixelTask() or CodebookTask(...)."
                )
            if not 0 <= rate <= 1:
                raise ValueError(f"The rate {rate!r} of the task {task.name!r} must be a number from 0 to 1.")
        if places not in PLACES:
            raise ValueError(f"places={places!r} is unknown; use one of {', '.join(PLACES)}.")
        self.rates = dict(rates)
        self.seed, self.places, self.epoch = seed, places, 0
        options = None if processor is None else processor.image_processor
        self.background = (255, 255, 255) if options is None else tuple(options.background)
        self.pixel_limit = DEFAULT_PIXEL_LIMIT if options is None else options.pixel_limit

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass over the data, from 0: another one, other questions."""
        self.epoch = epoch

    def __call__(self, row: dict) -> dict:
        """Put questions into one conversation.

        Args:
            row (`dict`): `messages`, and `images` or `image` where the messages hold none themselves.

        Returns:
            A new row with new messages in the same form; everything else is passed on. The input is not changed.

        Raises:
            ValueError: If the row has no messages, images and places for them do not fit, or an image is unreadable.
        """
        whole = read_messages(row)
        images = [find_image(part) for message in whole for part in message["content"]]
        images = [image for image in images if image is not None]
        if not images:
            return row
        try:
            rng = Random(f"{self.seed}/{self.epoch}/{_row_key(whole, images)}")
        except OSError as error:
            raise ValueError(f"{_describe(row)}An image cannot be decoded ({error}); replace it.") from error
        messages = clean_messages(row["messages"])
        for task, rate in self.rates.items():
            if rng.random() < rate:
                messages = self._insert(task, messages, images, rng, _describe(row))
        return {**row, "messages": messages}

    def _insert(self, task: Any, messages: list, images: list, rng: Random, where: str) -> list:
        """Messages with one more pair, or the same where it has no place."""
        number = rng.randrange(len(images))
        places = find_places(messages, number, self.places == "any")
        if not places:
            return messages
        place = rng.choice(places)
        try:
            picture = to_rgb(open_image(images[number], number), number, self.background, self.pixel_limit)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from error
        called = IMAGE_NAME if len(images) == 1 else f"image {number + 1}"
        query = task.ask(picture, rng, called)
        return insert_pair(messages, place, query.prompt, query.answer)


class CognitionDataset(Dataset):
    """A map-style dataset whose rows pass through a transform when they are read."""

    def __init__(self, dataset: Any, transform: CognitionTransform):
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        return self.transform(self.dataset[index])

    def set_epoch(self, epoch: int) -> None:
        """Other questions; the Trainer calls it at the start of each pass."""
        _pass_on_epoch(self, epoch)


class CognitionStream(IterableDataset):
    """A streamed dataset whose rows pass through a transform when they are read."""

    def __init__(self, dataset: Any, transform: CognitionTransform):
        super().__init__()
        self.dataset, self.transform = dataset, transform

    def __iter__(self) -> Iterator[dict]:
        return map(self.transform, self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Other questions; the Trainer calls it at the start of each pass."""
        _pass_on_epoch(self, epoch)


def with_cognition(dataset: Any, transform: CognitionTransform) -> Any:
    """A dataset with questions put into its conversations while it is read, in each pass other ones.

    Returns:
        A dataset of the same style for the Trainer.

    Raises:
        ValueError: If it is no dataset.
    """
    if isinstance(dataset, dict) or (not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__")):
        raise ValueError(f"{type(dataset).__name__} is no dataset; pass one split of rows, a list or a stream.")
    is_mapped = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return (CognitionDataset if is_mapped else CognitionStream)(dataset, transform)


def _pass_on_epoch(wrapper: Any, epoch: int) -> None:
    wrapper.transform.set_epoch(epoch)
    if hasattr(wrapper.dataset, "set_epoch"):
        wrapper.dataset.set_epoch(epoch)


def _describe(row: dict) -> str:
    """The beginning of an error about a row."""
    return f"Sample {row['id']!r}: " if row.get("id") is not None else ""


def _row_key(messages: list[dict], images: list) -> str:
    """Hash of what a row holds: texts, pixels in memory, and the file names of other images, without their folder."""
    digest = blake2b(digest_size=16)
    for message in messages:
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        digest.update(repr((message["role"], texts)).encode())
    for image in images:
        digest.update(_image_bytes(image))
    return digest.hexdigest()


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, Image.Image):
        return repr((image.size, image.mode)).encode() + image.tobytes()
    if isinstance(image, str | PathLike):
        return str(image).replace("\\", "/").rpartition("/")[2].encode()
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().float().numpy()
    if isinstance(image, np.ndarray):
        return repr(image.shape).encode() + np.ascontiguousarray(image).tobytes()
    return bytes(image) if isinstance(image, bytes | bytearray | memoryview) else b""


TASK_KEYS = {
    "pixels": ("rate", "grid", "templates"),
    "codebook": ("rate", "block", "templates", "model", "image_size", "subfolder", "cache"),
}
TRANSFORM_KEYS = ("seed", "places")


def build_cognition(
    settings: dict[str, Any], processor: Any = None, rates: dict[str, float] | None = None
) -> CognitionTransform:
    """Build a transform from the `cognition` section of a recipe.

    Args:
        settings (`dict`): `pixels`: `rate` and the options of `PixelTask`; `codebook`: `rate`, the options of
            `CodebookTask`, and `cache`, a folder that `cache_codes` wrote, or `model` with `image_size` and
            `subfolder`, a VQ model of diffusers; `seed` and `places` of `CognitionTransform`.
        processor (`HiResLmmProcessor`, *optional*): Its background colour and size limit are used.
        rates (`dict[str, float]`, *optional*): Task -> rate in place of those of the settings: `stage.cognition`.
            Only its tasks are asked.

    Returns:
        The transform.

    Raises:
        ValueError: If a key is unknown or missing, or a value senseless.
    """
    _check_keys("cognition", settings, (*TASK_KEYS, *TRANSFORM_KEYS))
    for name in TASK_KEYS:
        _check_keys(f"cognition.{name}", settings.get(name, {}), TASK_KEYS[name])
    if rates is None:
        rates = {name: settings[name].get("rate") for name in TASK_KEYS if name in settings}
    _check_keys("The rates of cognition", rates, tuple(TASK_KEYS))
    if not rates or None in rates.values():
        raise ValueError(f"cognition={settings!r} must name a rate for pixels or codebook, such as rate: 0.5.")
    makers: dict[str, Callable] = {"pixels": PixelTask, "codebook": _codebook}
    tasks = {}
    for name, rate in rates.items():
        values = {key: value for key, value in settings.get(name, {}).items() if key != "rate"}
        tasks[makers[name](**values)] = rate
    options = {key: settings[key] for key in TRANSFORM_KEYS if key in settings}
    return CognitionTransform(tasks, processor=processor, **options)


def _codebook(cache: str | None = None, model: str | None = None, **options: Any) -> CodebookTask:
    """The task with its quantiser, from a cache or from a model."""
    loading = {key: options.pop(key) for key in ("image_size", "subfolder") if key in options}
    if (cache is None) == (model is None) or (cache is not None and loading):
        raise ValueError(
            f"cognition.codebook has cache={cache!r} and model={model!r}; name either cache, a folder of cache_codes, "
            "or model, a VQ model of diffusers, with image_size and subfolder where needed."
        )
    quantiser: Quantiser = load_quantiser(model, **loading) if model is not None else CachedCodes(str(cache))
    return CodebookTask(quantiser, **options)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> None:
    """A mapping with no other keys."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}={values!r} must be a mapping with the keys {', '.join(known)}.")
    unknown = [key for key in values if key not in known]
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; keys are {', '.join(known)}.")


@dataclass(frozen=True)
class Place:
    """The message that a pair is put before, or the end, and whether the image of that message moves to the pair."""

    index: int
    moves: bool = False


def find_places(messages: list[dict], image: int, before: bool = True) -> list[Place]:
    """Places, in order, for a question about an image; `before`: also the one where the image would have to move."""
    counts = [_count_images(message["content"]) for message in messages]
    holder = next(index for index in range(len(messages)) if sum(counts[: index + 1]) > image)
    roles = [message["role"] for message in messages]
    places = [Place(index) for index in range(holder + 1, len(roles) + 1) if _may_begin(roles, index)]
    alone = counts[holder] == 1 and _split_image(messages[holder]["content"]) is not None
    if before and alone and _may_begin(roles, holder):
        places.insert(0, Place(holder, moves=True))
    return places


def insert_pair(messages: list[dict], place: Place, prompt: str, answer: str) -> list[dict]:
    """New messages with a question and its answer, in the form of those beside it; the others are the same objects."""
    neighbour = messages[place.index if place.moves else place.index - 1]
    as_parts = not isinstance(neighbour["content"], str)
    rest = list(messages[place.index :])
    question: Any = [{"type": "text", "text": prompt}] if as_parts else prompt
    if place.moves:
        head, question_rest = _split_image(neighbour["content"])  # type: ignore[misc]
        question = [head, {"type": "text", "text": f"\n{prompt}"}] if as_parts else f"{head}\n{prompt}"
        rest[0] = {**neighbour, "content": question_rest}
    reply: Any = [{"type": "text", "text": answer}] if as_parts else answer
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return [*messages[: place.index], *pair, *rest]


def _may_begin(roles: list[str], index: int) -> bool:
    """Whether a question may stand before the message `index`: outside of pairs, after the system text."""
    starts = index == len(roles) or roles[index] == "user"
    return starts and (roles[index - 1] == "assistant" or all(role == "system" for role in roles[:index]))


def _count_images(content: Any) -> int:
    if isinstance(content, str):
        return content.count(IMAGE_MARK)
    return sum(part["type"] == "image" for part in content)


def _split_image(content: Any) -> tuple[Any, Any] | None:
    """The image that opens or ends a content, and the rest without it; None where it does neither or is all."""
    if isinstance(content, str):
        text = content.strip()
        if text.startswith(IMAGE_MARK):
            rest = text.removeprefix(IMAGE_MARK).lstrip()
        else:
            rest = text.removesuffix(IMAGE_MARK).rstrip() if text.endswith(IMAGE_MARK) else ""
        return (IMAGE_MARK, rest) if rest else None
    parts: list[dict] = list(content)
    if parts[0]["type"] == "image":
        image, others, side, strip = parts[0], parts[1:], 0, str.lstrip
    elif parts[-1]["type"] == "image":
        image, others, side, strip = parts[-1], parts[:-1], -1, str.rstrip
    else:
        return None
    if not any(part["type"] == "text" and part["text"].strip() for part in others):
        return None
    if others[side]["type"] == "text":
        others[side] = {**others[side], "text": strip(others[side]["text"])}
    return image, others
