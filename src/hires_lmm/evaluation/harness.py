"""A checkpoint as harnesses need it: conversations in, answers out, each image encoded once, each answer kept."""

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from PIL import Image

from ..inference import load_model, load_processor
from ..processing.frame_sampling_hires_lmm import Sampling
from ..processing.geometry_hires_lmm import Column
from ..processing.video_input_hires_lmm import Video
from ..training.parameters import find_base
from .asking import encode_prompts, find_ends, read_answers, use_threshold
from .batching import Prompt, plan_batches
from .encoding import VIEWS_PER_PASS, EncodedImages, open_picture
from .settings import VIEWS
from .store import AnswerStore, HarnessAnswer, checkpoint_fingerprint


GENERATE_OPTIONS = ("max_new_tokens", "num_beams", "repetition_penalty")
SAMPLING_OPTIONS = ("temperature", "top_p", "top_k")
DEFAULT_NEW_TOKENS = 1024
LOADING = ("device", "device_map", "trust_remote_code")
TEXTS = ("revision", "system_prompt", "answers")
"""Harnesses turn what looks like a number into one."""

IMAGE_OPTIONS = ("max_image_tokens", "max_crops", "views", "num_frames", "fps", "frame_sampling")
NOT_THE_ANSWER = (*LOADING, "share_images", "cached_images", "answers", "vision_chunk_size")
"""Options that change no answer."""

Ask = Callable[[], list[dict]]
"""Gives a conversation, with `{"type": "image", "image": source}` for its images, and videos likewise."""

Media = Image.Image | Video
"""An opened image, or a video that is not opened; to the model both are images."""


@dataclass(frozen=True)
class HarnessOptions:
    """Options of a checkpoint in a harness. `None` leaves a choice to the checkpoint, or to the task.

    Args:
        revision, dtype, device, device_map, attn_implementation, trust_remote_code: See `load_model`.
        max_image_tokens (`int`, *optional*): Budget: visual tokens kept of one image or video.
        max_crops (`int`, *optional*): Most crops of one image.
        views (`str`, *optional*): `"all"`, `"global"` or `"crops"`.
        num_frames (`int`, *optional*): Most frames of one video.
        fps (`float`, *optional*): In place of it, frames a second of a video.
        frame_sampling (`str`, *optional*): How they are chosen: `"uniform"`, `"segments"` or `"linspace"`.
        gamma (`float`, *optional*): Softmax mass that the router's threshold rule keeps.
        vision_chunk_size (`int`, *optional*): Most views that pass the tower at once; 64 by default.
        max_new_tokens (`int`, *optional*): Most tokens of an answer, whatever the task says.
        system_prompt (`str`, *optional*): The text of a system turn.
        share_images (`bool`): Encode an image once for all questions about it.
        cached_images (`int`): Images, or sets of images, whose features are remembered.
        answers (`str`, *optional*): Folder where answers are kept; those it holds are not asked again.

    Raises:
        ValueError: If a value is out of range or two exclude each other.
    """

    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    max_image_tokens: int | None = None
    max_crops: int | None = None
    views: str | None = None
    num_frames: int | None = None
    fps: float | None = None
    frame_sampling: str | None = None
    gamma: float | None = None
    vision_chunk_size: int | None = None
    max_new_tokens: int | None = None
    system_prompt: str | None = None
    share_images: bool = True
    cached_images: int = 1
    answers: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def read(cls, given: dict[str, Any]) -> "HarnessOptions":
        """Options as a harness passes them; one that is unknown is an error, and None means that it is left out."""
        known = [entry.name for entry in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(f"hires_lmm has no option {unknown[0]!r}; its options are {', '.join(known)}.")
        chosen = {name: value for name, value in given.items() if value is not None}
        texts = {name: str(chosen[name]) for name in TEXTS if name in chosen}
        return cls(**{**chosen, **texts})

    def __post_init__(self) -> None:
        for name, declared in get_type_hints(type(self)).items():
            _check_option(name, declared, getattr(self, name))
        if self.views is not None and self.views not in VIEWS[:3]:
            raise ValueError(f"views={self.views!r} is unknown; choose one of {', '.join(VIEWS[:3])}.")
        Sampling(self.num_frames, self.fps, self.frame_sampling or Sampling.sampler)
        if self.gamma is not None and not 0 < self.gamma <= 1:
            raise ValueError(f"gamma={self.gamma!r} must lie in (0, 1].")
        if self.gamma is not None and self.max_image_tokens is not None:
            raise ValueError(
                f"max_image_tokens={self.max_image_tokens} and gamma={self.gamma} exclude each other: under a budget "
                "the router keeps an exact number and reads no gamma. Pass one."
            )

    def images_kwargs(self) -> dict[str, Any]:
        """Those of the image processor."""
        chosen = {name: getattr(self, name) for name in IMAGE_OPTIONS}
        return {name: value for name, value in chosen.items() if value is not None}


def _check_option(name: str, declared: Any, value: Any) -> None:
    kinds = get_args(declared) or (declared,)
    if type(value) not in (*kinds, *([int] if float in kinds else [])):
        shown = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        raise ValueError(f"{name}={value!r} is of type {type(value).__name__}; it must be of type {shown}.")
    if int in kinds and value is not None and value < 1:
        raise ValueError(f"{name}={value} must be at least 1.")


def generation_options(given: dict[str, Any], max_new_tokens: int | None = None) -> dict[str, Any]:
    """Options of `generate` from those of a task: greedy unless it samples at a temperature above 0.

    Harnesses add keys for other models (`until`, `image_aspect_ratio`, ...), which are left out: an answer ends with
    its end token alone. `max_new_tokens` goes before the task's own.
    """
    options = {name: given[name] for name in GENERATE_OPTIONS if given.get(name) is not None}
    options["max_new_tokens"] = int(max_new_tokens or options.get("max_new_tokens", DEFAULT_NEW_TOKENS))
    options["num_beams"] = int(options.get("num_beams", 1))
    options["do_sample"] = given.get("do_sample") is not False and float(given.get("temperature") or 0) > 0
    if options["do_sample"]:
        options |= {name: given[name] for name in SAMPLING_OPTIONS if given.get(name) is not None}
    return options


class HarnessAsker:
    """A loaded checkpoint that answers conversations.

    Args:
        checkpoint (`str`): Folder or Hub id.
        options (`HarnessOptions`): How to load and to ask it.
        rank (`int`): Number of this process; each writes a file of answers of its own and reads those of all.

    Attributes:
        counts (`Counter`): `model_calls`, `encoded_images`, and `known_answers`, which were not asked again.
    """

    def __init__(self, checkpoint: str, options: HarnessOptions, rank: int = 0):
        self.options, self.counts = options, Counter[str]()
        loading: dict[str, Any] = {name: getattr(options, name) for name in (*LOADING, "revision")}
        if options.attn_implementation is not None:
            loading["attn_implementation"] = options.attn_implementation
        self.processor = load_processor(checkpoint, options.trust_remote_code, options.revision)
        self.model: Any = load_model(checkpoint, options.dtype, **loading)
        with use_threshold(self.model, options.gamma):
            self.ends = find_ends(self.model, self.processor.tokenizer)
        self.known: dict[str, HarnessAnswer] = {}
        self.store: AnswerStore | None = None
        self._encoded: OrderedDict[tuple[str, ...], EncodedImages] = OrderedDict()
        self._video_tokens: dict[str, int] = {}
        if options.answers is not None:
            self._open_answers(Path(options.answers), checkpoint, rank)

    def _open_answers(self, folder: Path, checkpoint: str, rank: int) -> None:
        """Read what all processes of all runs with the same weights and options have answered."""
        chosen = {name: value for name, value in asdict(self.options).items() if name not in NOT_THE_ANSWER}
        settings = (self.processor.image_processor.to_json_string(), self.model.generation_config.to_json_string())
        identity = {
            "checkpoint": checkpoint_fingerprint(checkpoint),
            "settings": blake2b("".join(settings).encode(), digest_size=16).hexdigest(),
            **chosen,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }
        name = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.store = AnswerStore(folder / f"{name}-{rank}.jsonl", identity, HarnessAnswer)
        answers = self.store.begin()
        for file in folder.glob(f"{name}-*.jsonl"):
            answers += AnswerStore(file, identity, HarnessAnswer).read()
        self.known = {answer.key: answer for answer in answers}

    def read(self, conversation: list[dict], options: dict[str, Any]) -> tuple[Prompt, list[Media]]:
        """A conversation as a prompt, and its images and videos."""
        turns: list[dict] = []
        if self.options.system_prompt is not None:
            turns.append({"role": "system", "content": [{"type": "text", "text": self.options.system_prompt}]})
        pictures: list[Media] = []
        for message in conversation:
            for part in message["content"]:
                if part["type"] == "image":
                    pictures.append(open_picture(self.processor, part["image"], len(pictures)))
                elif part["type"] == "video":
                    pictures.append(Video(part["video"]))
            turns.append({**message, "content": [_bare(part) for part in message["content"]]})
        text = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        images = tuple(map(_fingerprint, pictures))
        placeholders = [self._placeholders(*each) for each in zip(pictures, images, strict=True)]
        num_tokens = encode_prompts(self.processor, [text], placeholders)["input_ids"].shape[1]
        return Prompt(text, images, num_tokens, json.dumps(options, sort_keys=True)), pictures

    def _placeholders(self, picture: Media, name: str) -> str:
        """What stands for an image or video in a text; a video is decoded for it, once."""
        kwargs = self.options.images_kwargs()
        if isinstance(picture, Image.Image):
            return self.processor.image_token * self.processor.image_tokens(picture.height, picture.width, **kwargs)
        if name not in self._video_tokens:
            inputs = self.processor.image_processor([picture], **kwargs)
            self._video_tokens[name] = int(inputs["view_positions"][0][Column.NUM_TOKENS])
        return self.processor.image_token * self._video_tokens[name]

    def answer(
        self,
        questions: Sequence[Ask],
        options: Sequence[dict[str, Any]],
        batch_size: int = 1,
        progress: Callable[[int], Any] | None = None,
    ) -> list[HarnessAnswer]:
        """Answer conversations.

        Args:
            questions (sequence of `Ask`): Each is called when it is planned and again when it is asked, so that not
                all images are in memory.
            options (sequence of `dict`): Of generation, one a question, see `generation_options`.
            batch_size (`int`): Questions that are answered at once.
            progress (`Callable`, *optional*): Called with the number of questions that were answered.

        Returns:
            `list[HarnessAnswer]`, one a question; equal questions are asked once.

        Raises:
            ValueError: If a conversation, an image or an option is wrong; nothing is answered with an empty text.
        """
        keeps = len(questions) <= batch_size
        asked = [self._plan(ask, chosen, keeps) for ask, chosen in zip(questions, options, strict=True)]
        waiting = list({each.prompt.key: each for each in asked if each.prompt.key not in self.known}.values())
        self.counts["known_answers"] += len(asked) - len(waiting)
        if progress is not None:
            progress(len(asked) - len(waiting))
        with use_threshold(self.model, self.options.gamma):
            for chunk in plan_batches([each.prompt for each in waiting], batch_size, self.options.share_images):
                batches = [[waiting[index] for index in batch] for batch in chunk]
                encoded = self._encode([each for batch in batches for each in batch])
                for batch in batches:
                    self._ask(batch, encoded)
                    if progress is not None:
                        progress(len(batch))
        return [self.known[each.prompt.key] for each in asked]

    def _plan(self, ask: Ask, options: dict[str, Any], keeps_pictures: bool) -> "_Question":
        prompt, pictures = self.read(ask(), options)
        names = prompt.images
        if not self.options.share_images:
            names = tuple(f"{prompt.key} {place}" for place in range(len(names)))
        return _Question(ask, options, prompt, names, pictures if keeps_pictures else None)

    @torch.inference_mode()
    def _encode(self, questions: list["_Question"]) -> EncodedImages | None:
        """Features of the images of some questions, which may be those of an earlier call."""
        names = tuple(dict.fromkeys(name for each in questions for name in each.names))
        if not names:
            return None
        if names not in self._encoded:
            while len(self._encoded) >= self.options.cached_images:
                self._encoded.popitem(last=False)
            self._encoded[names] = self._run_towers(names, questions)
        self._encoded.move_to_end(names)
        return self._encoded[names]

    def _run_towers(self, names: tuple[str, ...], questions: list["_Question"]) -> EncodedImages:
        pictures: dict[str, Media] = {}
        for each in questions:
            if not set(each.names) <= set(pictures):
                own = self.read(each.ask(), each.options)[1] if each.pictures is None else each.pictures
                pictures.update(zip(each.names, own, strict=True))
        kwargs = self.options.images_kwargs()
        inputs = self.processor.image_processor([pictures[name] for name in names], return_tensors="pt", **kwargs)
        base = find_base(self.model)
        tensors = {name: tensor.to(base.device) for name, tensor in inputs.items()}
        chunk_size = self.options.vision_chunk_size or VIEWS_PER_PASS
        features = base.get_image_features(**tensors, vision_chunk_size=chunk_size, return_dict=True)
        self.counts["encoded_images"] += len(names)
        placeholders = [self.processor.replace_image_token(inputs, image_idx=index) for index in range(len(names))]
        return EncodedImages(features, {name: index for index, name in enumerate(names)}, placeholders)

    @torch.inference_mode()
    def _ask(self, batch: list["_Question"], encoded: EncodedImages | None) -> None:
        """Answer a batch, and keep the answers."""
        chosen = [encoded.order[name] for each in batch for name in each.names] if encoded is not None else []
        placeholders = [encoded.placeholders[index] for index in chosen] if encoded is not None else []
        inputs: dict[str, Any] = encode_prompts(self.processor, [each.prompt.text for each in batch], placeholders)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        length = inputs["input_ids"].shape[1]
        if encoded is not None and chosen:
            inputs["mm_encoder_outputs"] = {"image": encoded.features.select_images(chosen)}
        generated = self.model.generate(**inputs, **batch[0].options)
        self.counts["model_calls"] += 1
        texts, _, lengths = read_answers(self.processor.tokenizer, generated[:, length:], self.ends)
        answers = [
            HarnessAnswer(each.prompt.key, text, count)
            for each, text, count in zip(batch, texts, lengths, strict=True)
        ]
        self.known.update({answer.key: answer for answer in answers})
        if self.store is not None:
            self.store.append(answers)


@dataclass(frozen=True)
class _Question:
    """A conversation with its prompt, names of its images, and their pictures where they are kept."""

    ask: Ask
    options: dict[str, Any]
    prompt: Prompt
    names: tuple[str, ...]
    pictures: list[Media] | None


def _bare(part: dict) -> dict:
    """A part without its image or video."""
    if part["type"] not in ("image", "video", "text"):
        raise ValueError(f"A conversation holds a {part['type']}, but this model reads images, videos and text.")
    return part if part["type"] == "text" else {"type": part["type"]}


def _fingerprint(picture: Media) -> str:
    """A hash of the pixels of an image, or of the bytes or frames of a video."""
    if isinstance(picture, Image.Image):
        digest = blake2b(picture.tobytes(), digest_size=16)
        digest.update(str(picture.size).encode())
        return digest.hexdigest()
    source = picture.source
    if isinstance(source, (str, PathLike)):
        file = Path(source)
        return _hash_file(file, file.stat().st_mtime_ns) if file.is_file() else str(source)
    digest = blake2b(digest_size=16)
    for frame in map(np.asarray, source):
        digest.update(str((frame.shape, frame.dtype)).encode() + frame.tobytes())
    return digest.hexdigest()


@cache
def _hash_file(file: Path, changed: int) -> str:
    digest = blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
