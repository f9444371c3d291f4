"""Cognition alignment: questions about codes and colours of images, put into existing conversations.

    from hires_lmm.training.data.cognition import CognitionTransform, PixelTask, with_cognition

    transform = CognitionTransform({PixelTask(grid=(4, 4)): 0.5})
    dataset = with_cognition(load_conversations("chat.json"), transform)

It changes data only, so it needs no part of a model and goes with every preset. See docs/vlsa.md.
"""

from collections.abc import Iterator, Mapping
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
from .cognition_cache import CachedCodes, cache_codes
from .cognition_codes import VqQuantiser, load_quantiser
from .cognition_places import find_places, insert_pair
from .cognition_tasks import IMAGE_NAME, CodebookTask, CognitionQuery, PixelTask


__all__ = [
    "CachedCodes",
    "CodebookTask",
    "CognitionQuery",
    "CognitionTransform",
    "PixelTask",
    "VqQuantiser",
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

    Args:
        dataset: Map-style or streamed, of torch, `datasets` or this package; its rows are those of the collator.
        transform (`CognitionTransform`): The transform.

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
