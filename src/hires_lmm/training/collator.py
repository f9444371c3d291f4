"""From conversations with images to batches for training."""

import logging
import random
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch.utils.data import get_worker_info

from ..processing.chat_templates_hires_lmm import marks_answers
from ..processing.dense_layout_hires_lmm import pack_samples, refuse_boxes
from ..processing.geometry_hires_lmm import Column
from .columns import BatchColumn
from .data.conversations import attach_images
from .features import VisionFeatureStore
from .parameters import VIEWS


logger = logging.getLogger(__name__)

IGNORED = -100
TOO_LONG = ("error", "lower_budget", "drop")
GEOMETRY = ("view_positions", "view_boxes", "view_spans")
BROKEN = ("error", "drop")
COUNTERS = ("dropped_samples", "lowered_budgets", "broken_samples")
WORKER_SLOTS = 128


class HiResLmmCollator:
    """Turns chat messages with images into a batch: labels on answers only, padding on the right.

    Args:
        processor (`HiResLmmProcessor`): Its chat template must mark answers with `{% generation %}`.
        views (`str`): Views that are made: `"all"` of the checkpoint, `"global"` or `"crops"`; that of the stage.
        max_length (`int`, *optional*): Most tokens of a sample, placeholders included.
        too_long (`str`): What happens to longer samples. `"error"`: stop and name the sample. `"lower_budget"`: give
            its images the largest common `max_image_tokens` that fits, and count it. `"drop"`: leave it out and count
            it; a batch that loses all its samples becomes one row of two end tokens, so that every process has one.
        max_image_tokens (`int` or `list[int]`, *optional*): Budget of every image; from a list, one is drawn for each
            optimizer step, the same on all processes, for models whose number of tokens is to stay a choice.
        features (`VisionFeatureStore`, *optional*): Cached features of all towers that replace the pixels; not in the
            dense layout.
        pad_to_multiple_of (`int`, *optional*): Round the length of the batch up.
        images_kwargs (`dict`, *optional*): More options for the images, such as `max_crops`.
        seed (`int`): Of the draws from a list of budgets.
        columns (`list[BatchColumn]`, *optional*): More columns of the batch, which the objectives of a stage read.
        broken (`str`): What happens to samples that cannot be read: a damaged, missing or oversized image, a wrong
            type, no answer. `"error"`: stop; the message names the sample. `"drop"`: leave it out as `too_long` does,
            log its name as a warning and count it.

    Raises:
        ValueError: If an option is unknown, a list of budgets is empty, or the chat template has no generation marks.
    """

    def __init__(
        self,
        processor: Any,
        views: str = "all",
        max_length: int | None = None,
        too_long: str = "error",
        max_image_tokens: int | list[int] | None = None,
        features: VisionFeatureStore | None = None,
        pad_to_multiple_of: int | None = None,
        images_kwargs: dict | None = None,
        seed: int = 0,
        columns: list[BatchColumn] | None = None,
        broken: str = "error",
    ):
        if views not in VIEWS:
            raise ValueError(f"views={views!r} is unknown; use one of {', '.join(VIEWS)}.")
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long={too_long!r} is unknown; use one of {', '.join(TOO_LONG)}.")
        if broken not in BROKEN:
            raise ValueError(f"broken={broken!r} is unknown; use one of {', '.join(BROKEN)}.")
        if not marks_answers(processor.chat_template):
            raise ValueError(
                "The chat template of the processor does not mark answers with {% generation %}, so labels cannot be "
                "made; pass chat_template='llama3', 'vicuna', 'chatml' or 'plain' to HiResLmmProcessor.from_config."
            )
        if features is not None and processor.image_processor.image_layout == "dense":
            raise ValueError('Cached features come one row a view; set image_layout="flat" beside features.')
        if features is not None:
            features.check_processor(processor)
        if isinstance(max_image_tokens, (list, tuple)) and not max_image_tokens:
            raise ValueError("max_image_tokens=[] holds no budget to draw; pass numbers, or None for no budget.")
        self.processor = processor
        self.views = views
        self.max_length = max_length
        self.too_long = too_long
        self.max_image_tokens = max_image_tokens
        self.features = features
        self.pad_to_multiple_of = pad_to_multiple_of
        self.images_kwargs = {**(images_kwargs or {}), **({} if views == "all" else {"views": views})}
        kind = "pixel_values" if features is None else "vision_features"
        self._sources = [kind, *(f"{kind}_{name}" for name in processor.image_processor.extra_towers or {})]
        self.columns = columns or []
        self.seed = seed
        self.broken = broken
        self._counts = torch.zeros(len(COUNTERS), WORKER_SLOTS, dtype=torch.long).share_memory_()
        self._batches = torch.zeros(WORKER_SLOTS, dtype=torch.long).share_memory_()
        self._origin = torch.tensor([0, 1]).share_memory_()

    def start(self, step: int = 0, batches_per_step: int = 1) -> None:
        """Number the coming batches, from which the draws of budgets follow; `StageCallback` calls this."""
        self._batches.zero_()
        self._origin.copy_(torch.tensor([step * batches_per_step, batches_per_step]))

    def _next_budget(self) -> int | None:
        """The budget of the next batch; workers take turns, as the data loader hands batches out."""
        if not isinstance(self.max_image_tokens, (list, tuple)):
            return self.max_image_tokens
        worker = get_worker_info()
        slot, number, workers = (0, 0, 1) if worker is None else (_slot(worker), worker.id, worker.num_workers)
        done = int(self._batches[slot])
        self._batches[slot] += 1
        first, per_step = self._origin.tolist()
        return draw_budget(self.max_image_tokens, (first + done * workers + number) // per_step, self.seed)

    def counts(self) -> dict[str, int]:
        """Samples that were dropped as too long, got a smaller budget, or were dropped as broken, over all workers."""
        return dict(zip(COUNTERS, self._counts.sum(dim=1).tolist(), strict=True))

    def encode(
        self, example: dict, max_image_tokens: int | list | None = None, position: int | None = None
    ) -> dict[str, torch.Tensor] | None:
        """Encode one conversation.

        Args:
            example (`dict`): `messages`, and `images` or `image`, `videos` or `video` where the messages hold none
                themselves (frames of a video as a list in the list of videos); its own
                `max_image_tokens` (one number, or one an image) goes before all others; `image_boxes`: for each image
                the objects that become tokens, as the processor takes them.
            max_image_tokens (`int` or `list`, *optional*): Budget of every image of it, or one an image; by default
                that of the collator, the largest of a list.
            position (`int`, *optional*): Its place in the batch, for errors about samples without an id.

        Returns:
            Tensors of one sample without batch dimension, or None where it is too long and `too_long="drop"`.

        Raises:
            ValueError: If the sample cannot be read, is too long and may not be changed, or has no answer; the message
                names it.
        """
        try:
            return self._encode_example(example, max_image_tokens)
        except MemoryError:
            raise
        except Exception as error:  # what broken data raises is anybody's guess
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"{name_sample(example, position)}: {reason}") from error

    def _encode_example(self, example: dict, max_image_tokens: int | list | None) -> dict[str, torch.Tensor] | None:
        """What `encode` does, without the name of the sample in errors."""
        messages = read_messages(example)
        if example.get("max_image_tokens") is not None:
            max_image_tokens = example["max_image_tokens"]
        if max_image_tokens is None:
            own = self.max_image_tokens
            max_image_tokens = max(own) if isinstance(own, (list, tuple)) else own
        boxes = example.get("image_boxes")
        sample = self._encode(messages, max_image_tokens, boxes)
        length = len(sample["input_ids"])
        if self.max_length is None or length <= self.max_length:
            return sample
        if self.too_long == "drop":
            return None
        if self.too_long == "lower_budget" and "view_positions" in sample:
            budgets = self._smaller_budgets(sample, length - self.max_length)
            if budgets is not None:
                sample = self._encode(messages, budgets, boxes)
                self._count("lowered_budgets")
                return sample
        raise ValueError(
            f"It has {length} tokens, {int(sample['is_image'].sum())} of them for images, more than "
            f"max_length={self.max_length}; raise max_length, lower max_image_tokens, or pass too_long='lower_budget' "
            "(needs room for the text) or 'drop'."
        )

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Encode and pad a batch.

        Args:
            examples (`list[dict]`): Conversations, see `encode`.

        Returns:
            `input_ids`, `attention_mask`, `labels`, `prompt_mask` (all `(B, S)`), and for batches with images
            `pixel_values` (or `vision_features` from a cache, for all batches), the same for each extra tower, and the
            geometry of the views; and the `columns` for which a sample gave a value.
        """
        samples, budget = [], self._next_budget()
        for position, example in enumerate(examples):
            try:
                sample = self.encode(example, budget, position)
            except ValueError as error:
                if self.broken == "error":
                    raise
                logger.warning("A broken sample is left out. %s", error)
                self._count("broken_samples")
                continue
            if sample is None:
                self._count("dropped_samples")
            else:
                samples.append(sample)
        return self._join(samples or [self._end_row()])

    def _encode(
        self, messages: list[dict], max_image_tokens: int | list | None, image_boxes: Any = None
    ) -> dict[str, torch.Tensor]:
        """Run the processor on one conversation."""
        images_kwargs = {**self.images_kwargs, "max_image_tokens": max_image_tokens, "image_boxes": image_boxes}
        kinds = {part["type"] for message in messages for part in message["content"]}
        has_images = bool({"image", "video"} & kinds)
        if self.features is not None and "video" in kinds:
            raise ValueError("Cached features hold images alone; leave features out to train on videos.")
        encoded = self.processor.apply_chat_template(
            [messages],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            processor_kwargs={"images_kwargs": images_kwargs, "image_layout": "flat"} if has_images else {},
        )
        ids = torch.as_tensor(encoded["input_ids"][0], dtype=torch.long)
        answer = torch.as_tensor(encoded["assistant_masks"][0], dtype=torch.bool)
        is_image = ids == self.processor.image_token_id
        answer = answer & ~is_image
        if not answer.any():
            raise ValueError(f"There is no answer to learn in {str(messages)[:160]!r}; end it with an assistant turn.")
        sample = {
            "input_ids": ids,
            "labels": torch.where(answer, ids, IGNORED),
            "prompt_mask": ~answer & ~is_image,
            "is_image": is_image,
        }
        for name in GEOMETRY if has_images else ():
            sample[name] = torch.as_tensor(encoded[name])
        if has_images and "image_boxes" in encoded:
            sample["image_boxes"] = torch.as_tensor(encoded["image_boxes"])
        if has_images and self.features is None:
            sample |= {name: torch.as_tensor(encoded[name]) for name in self._sources if name in encoded}
        elif has_images and self.features is not None:
            images = [find_image(part) for message in messages for part in message["content"]]
            images = [image for image in images if image is not None]
            sample |= self.features.rows(self.processor, images, sample["view_positions"])
        for column in self.columns:
            value = column.encode(messages)
            if value is not None:
                sample[column.name] = value
        return sample

    def _smaller_budgets(self, sample: dict[str, torch.Tensor], surplus: int) -> list[int] | None:
        """A budget for each image, with the largest common limit that saves `surplus` tokens, if there is one."""
        positions = sample["view_positions"]
        counts = positions[positions[:, Column.STARTS_IMAGE] != 0, Column.NUM_TOKENS].tolist()
        for budget in range(max(counts) - 1, 0, -1):
            if sum(max(count - budget, 0) for count in counts) >= surplus:
                return [min(budget, count) for count in counts]
        return None

    def _count(self, name: str) -> None:
        worker = get_worker_info()
        self._counts[COUNTERS.index(name), 0 if worker is None else _slot(worker)] += 1

    def _end_row(self) -> dict[str, torch.Tensor]:
        """A row that teaches next to nothing: an end token after an end token."""
        ids = torch.full((2,), self.processor.tokenizer.eos_token_id, dtype=torch.long)
        silence = [{"role": role, "content": [{"type": "text", "text": ""}]} for role in ("user", "assistant")]
        values = {column.name: column.encode(silence) for column in self.columns}
        return {
            **{name: value for name, value in values.items() if value is not None},
            "input_ids": ids,
            "labels": torch.tensor([IGNORED, ids[1].item()]),
            "prompt_mask": torch.tensor([True, False]),
        }

    def _join(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Pad the rows on the right and put the views of all samples one after another."""
        length = max(len(sample["input_ids"]) for sample in samples)
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

        def padded(name: str, value: int) -> torch.Tensor:
            rows = [sample[name] for sample in samples]
            return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=value) for row in rows])

        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        batch = {
            "input_ids": padded("input_ids", pad),
            "attention_mask": (torch.arange(length) < lengths[:, None]).long(),
            "labels": padded("labels", IGNORED),
            "prompt_mask": padded("prompt_mask", 0),
        }
        for name in (*self._sources, *GEOMETRY):
            parts = [sample[name] for sample in samples if name in sample]
            if parts:
                batch[name] = torch.cat(pad_views(parts) if name == "pixel_values" else parts)
        if any("image_boxes" in sample for sample in samples):
            batch["image_boxes"] = join_boxes(samples)
        if self.processor.image_processor.image_layout == "dense" and "pixel_values" in batch:
            refuse_boxes(batch.get("image_boxes", ()))
            batch |= pack_batch(batch, samples)
        if self.features is not None and "vision_features" not in batch:
            batch |= self.features.empty()
        for column in self.columns:
            values = [sample[column.name] for sample in samples if column.name in sample]
            if values:
                batch[column.name] = column.join(values)
        return batch


def pack_batch(batch: dict[str, torch.Tensor], samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Take the views out of a batch and give them as the dense layout, one row a sample."""
    names = [name for name in batch if name.startswith("pixel_values")]
    views = {name: batch.pop(name).numpy() for name in (*names, *GEOMETRY)}
    counts = [
        int(own["view_positions"][:, Column.STARTS_IMAGE].sum()) if "view_positions" in own else 0 for own in samples
    ]
    return {name: torch.from_numpy(values) for name, values in pack_samples(views, counts).items()}


def pad_views(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Views `(V, 3, H, W)` of several samples, padded at bottom and right to the largest, as the processor does."""
    high, wide = (max(views.shape[axis] for views in parts) for axis in (2, 3))
    return [torch.nn.functional.pad(views, (0, wide - views.shape[3], 0, high - views.shape[2])) for views in parts]


def join_boxes(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """The objects of all images of a batch, `(I, most objects, 4)`; zeros where an image has fewer."""
    pieces = []
    for sample in samples:
        starts = sample["view_positions"][:, Column.STARTS_IMAGE] if "view_positions" in sample else torch.zeros(0)
        pieces.append(sample.get("image_boxes", torch.zeros(int((starts != 0).sum()), 0, 4, dtype=torch.long)))
    most = max(boxes.shape[1] for boxes in pieces)
    return torch.cat([torch.nn.functional.pad(boxes, (0, 0, 0, most - boxes.shape[1])) for boxes in pieces])


def _slot(worker: Any) -> int:
    """Place of a worker process in the shared counters; the first is that of the main process."""
    return 1 + worker.id % (WORKER_SLOTS - 1)


def draw_budget(budgets: list[int], step: int, seed: int = 0) -> int:
    """Draw the budget of an optimizer step, evenly and without a state."""
    return random.Random(f"{seed} {step}").choice(budgets)


def name_sample(example: Any, position: int | None = None) -> str:
    """Words by which a sample is found again: its id or its place, and the files that it names."""
    values = example if isinstance(example, dict) else {}
    name = "A sample" if position is None else f"Sample {position} of its batch"
    if values.get("id") not in (None, ""):
        name = f"Sample {values['id']!r}"
    files = [str(source) for source in _sources(values) if isinstance(source, (str, PathLike))]
    if files:
        shown = ", ".join(file if len(file) <= 200 else file[:197] + "..." for file in files[:3])
        return f"{name} ({shown})"
    return name if "id" in values else f"{name}, {str(example)[:100]!r}"


def _sources(values: dict) -> list:
    """The images that a sample names, as far as it has the usual form."""
    found: list = []
    for name in ("images", "image"):
        found += values[name] if isinstance(values.get(name), (list, tuple)) else [values.get(name)]
    messages = values.get("messages")
    for message in messages if isinstance(messages, (list, tuple)) else []:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                found.append(find_image(part))
    return found


def read_messages(example: dict) -> list[dict]:
    """The messages of an example with its images and videos in their places."""
    if not isinstance(example, Mapping):
        raise ValueError(f"An example is a {type(example).__name__}; it must be a dict with messages.")
    if not example.get("messages"):
        raise ValueError(
            f"An example has the keys {', '.join(example)}, but no messages; see load_conversations. Where the "
            "Trainer drops them, set remove_unused_columns=False."
        )
    sources = {}
    for kind in ("image", "video"):
        many = example.get(f"{kind}s")
        sources[f"{kind}s"] = example.get(kind) if many is None else many
    return attach_images(example["messages"], **sources)


def find_image(part: dict) -> Any:
    """The image or source of a content part, or None for a text."""
    keys = ("image", "url", "path", "base64")
    return next((part[key] for key in keys if part.get(key) is not None), None) if part["type"] == "image" else None
