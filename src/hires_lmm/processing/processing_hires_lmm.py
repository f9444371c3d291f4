"""Images, videos and texts to model inputs: every `<image>` and `<video>` becomes as many placeholders as its image or
video has tokens."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from os import getpid
from threading import Lock
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, TextKwargs
from transformers.utils import logging

from .chat_templates_hires_lmm import (
    CHAT_TEMPLATES,
    add_queries,
    answer_prefix_ids,
    find_template,
    question_prefix_ids,
)
from .coordinate_text_hires_lmm import check_coordinates, snap_coordinates
from .dense_layout_hires_lmm import choose_layout, count_samples, read_positions
from .geometry_hires_lmm import Column
from .image_input_hires_lmm import flatten_images
from .image_processing_hires_lmm import HiResLmmImageProcessor, HiResLmmImageProcessorKwargs
from .loading_names_hires_lmm import is_loading_name
from .messages_hires_lmm import (
    QUERY_TOKEN,
    clean_messages,
    drop_marks,
    holds_video,
    lacks_video,
    protect,
    protect_messages,
    show_as_images,
)
from .own_parts_hires_lmm import HiResLmmOwnPartsMixin
from .processor_options_hires_lmm import (
    image_options,
    known_token_id,
    pad_left,
    prepare_tokenizer,
    refuse_unknown,
)
from .template_choice_hires_lmm import choose_template
from .video_input_hires_lmm import count_videos, merge_videos


logger = logging.get_logger(__name__)

PART_NAMES = {"image_processor", "tokenizer"}
TOKENIZER_NAMES = """
add_bos_token add_eos_token additional_special_tokens chat_control_tokens clean_up_tokenization_spaces
extra_special_tokens fix_mistral_regex from_slow legacy max_len model_input_names model_max_length response_schema
response_template split_special_tokens tokenizer_file tokenizer_type truncation_side
"""
"""Options of all tokenizers that stand in no signature."""

SURROGATE = "[\ud800-\udfff]"
LOCKS: dict[int, Lock] = {}
"""One lock a process: a forked one would inherit a lock that another thread holds for ever."""


class HiResLmmProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Call-time options: those of the tokenizer and of `HiResLmmImageProcessorKwargs`, flat or in `text_kwargs` and
    `images_kwargs`."""

    images_kwargs: HiResLmmImageProcessorKwargs
    _defaults = {"text_kwargs": {"padding": False, "verbose": False}}


class HiResLmmProcessorBase(HiResLmmOwnPartsMixin, ProcessorMixin):
    """Both bases in one class: what a processor overrides is looked for in the first one alone."""


class HiResLmmProcessor(HiResLmmProcessorBase):
    """Tokenizer and image processor in one: expands `<image>` and `<video>`, counts tokens, applies chat templates.

    `<video>`, or what the tokenizer calls its video token, is a mark in texts alone: to the model a video is an image
    whose views are frames, so image tokens stand in its place.

    Args:
        image_processor (`HiResLmmImageProcessor`): Cuts and counts.
        tokenizer: A tokenizer that knows the image token as one token. One that names no padding side is set to pad on
            the left, as generation needs; `padding_side="right"` may be passed per call.
        chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; default the tokenizer's own.
        image_token (`str`): The placeholder in texts; a tokenizer's own `image_token` goes first.

    Raises:
        ValueError: If the tokenizer does not know the image token.
    """

    valid_processor_kwargs = HiResLmmProcessorKwargs
    on_saved: Any = None  # called with processor and folder after saving; the package writes the card there
    hears_question = False  # set by the plugin of an engine that shows prompts to the image branch

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """See `ProcessorMixin.save_pretrained`."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        if self.on_saved is not None:
            self.on_saved(save_directory)
        return files

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | dict | None = None,
        image_token: str = "<image>",
    ) -> None:
        self.image_token = tokenizer.image_token if hasattr(tokenizer, "image_token") else image_token
        self.image_token_id = known_token_id(tokenizer, self.image_token)
        self.video_token = tokenizer.video_token if hasattr(tokenizer, "video_token") else "<video>"
        if "padding_side" not in tokenizer.init_kwargs:
            pad_left(tokenizer)
        template = tokenizer.chat_template if chat_template is None else chat_template
        has_later = (
            image_processor is not None and (image_processor.token_layout or {}).get("later_tokens") is not None
        )
        if isinstance(template, str) and template in CHAT_TEMPLATES:
            template = add_queries(CHAT_TEMPLATES[template]) if has_later else CHAT_TEMPLATES[template]
        super().__init__(image_processor, tokenizer, chat_template=template)
        self._has_warned = False

    def part_names(self) -> list[Any]:
        """The name of the planner."""
        return [] if self.image_processor is None else self.image_processor.part_names()

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list:
        """Load both parts, each with its own options; what neither knows is refused."""
        returns_unused = kwargs.pop("return_unused_kwargs", False)
        loading = {name: value for name, value in kwargs.items() if is_loading_name(name)}
        image_names = set(HiResLmmImageProcessorKwargs.__annotations__)
        for_images = {name: value for name, value in kwargs.items() if name in image_names}
        for_text = {name: value for name, value in kwargs.items() if name not in {*loading, *for_images, *PART_NAMES}}
        for_images["_trust_planner"] = loading.get("trust_remote_code")
        image_processor = AutoImageProcessor.from_pretrained(path, **loading, **for_images)
        tokenizer = AutoTokenizer.from_pretrained(path, **loading, **for_text)
        tokens = {name for name, value in for_text.items() if name.endswith("_token") and not isinstance(value, int)}
        own = set(signature(type(tokenizer)).parameters) - {"args", "kwargs"}
        known = {*own, *TextKwargs.__annotations__, *TOKENIZER_NAMES.split(), *image_names, *signature(cls).parameters}
        if not returns_unused:
            refuse_unknown(set(for_text) - tokens, known, "options")
        return [image_processor, tokenizer]

    @classmethod
    def from_config(
        cls, config: Any, tokenizer: Any, image_stats: Any = None, chat_template: str | None = None, **changes: Any
    ) -> "HiResLmmProcessor":
        """Build the processor that fits a model.

        Args:
            config (`HiResLmmConfig`): Its planner, vision tower, token layout and image token id are read. Where it
                does not know how the chat template opens answers and questions, that is written into it
                (`answer_prefix_ids`, `question_prefix_ids`): the router reads questions by them.
            tokenizer: The language model's tokenizer; it is changed: an unknown image token is added as a special
                token, padding goes to the left, the chat template is set, and `model_max_length` becomes the context
                length of the language model, beyond which a call warns.
            image_stats (*optional*): The tower's image processor, or a dict of `image_mean`, `image_std`, `resample`;
                default by tower family.
            chat_template (`str`, *optional*): A name in `CHAT_TEMPLATES` or a Jinja text; default the tokenizer's own,
                widened to images, see `choose_template`.
            changes: Options of `HiResLmmImageProcessor` that replace those of the config (`max_crops=6`).

        Raises:
            ValueError: If the tokenizer's image token is not `config.image_token_id`, an option is unknown, or the
                tower's numbers are not known.
        """
        options = image_options(config, image_stats, changes)
        image_token = prepare_tokenizer(tokenizer, config.image_token_id)
        check_coordinates(config, tokenizer)
        has_later = options["token_layout"].get("later_tokens") is not None
        if chat_template is None:
            chat_template, note, is_changed = choose_template(tokenizer, has_later)
            (logger.warning_once if is_changed else logger.info)(f"Chat template: {note}.")
        template = find_template(chat_template)
        if has_later:
            template = add_queries(template)
        tokenizer.chat_template = template
        context = getattr(config.text_config, "max_position_embeddings", None)
        tokenizer.model_max_length = context or tokenizer.model_max_length
        image_processor = HiResLmmImageProcessor(**options)
        processor = cls(image_processor, tokenizer, chat_template=tokenizer.chat_template, image_token=image_token)
        for name, read in (("answer_prefix_ids", answer_prefix_ids), ("question_prefix_ids", question_prefix_ids)):
            if getattr(config, name) is None:
                try:
                    setattr(config, name, read(processor))
                except ValueError as error:
                    logger.warning_once(f"config.{name} stays None: {error}")
        return processor

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; several threads may share the processor. Empty lists of videos or `audios` mean none.

        Images and videos come in the order in which `<image>` and `<video>` stand in the texts, and so do all that
        speaks of each (a list of `max_image_tokens`). Without videos, `<video>` is a text like any other.

        Tokenizers keep padding and truncation of a call as a state of their own. So one thread tokenises at a time,
        while others may cut images, and the state is put back.
        """
        if kwargs.get("return_text_replacement_offsets") and not self.hears_question:
            self._refuse_unheard(text, kwargs)
        audio = kwargs.pop("audios", None) if audio is None else audio  # the name that harnesses use
        if kwargs.get("do_sample_frames") is not False:  # num_frames and fps say it; without samples is refused
            kwargs.pop("do_sample_frames", None)
        if not _is_empty(videos):
            images, videos = self._with_videos(images, text, videos), None
        images, kwargs = choose_layout(self, images, text, kwargs)
        text = snap_coordinates(text, self.tokenizer)
        with _tokenizer_alone(self.tokenizer):
            inputs = super().__call__(images=images, text=text, videos=videos, audio=audio, **kwargs)
        if text is not None and not self._has_warned:
            self._warn_beyond_context(inputs)
        return inputs

    def _refuse_unheard(self, text: Any, options: dict[str, Any]) -> None:
        """Refuse a budget that the question decides, for an engine that shows no more than the image tokens."""
        layout = self.image_processor.token_layout or {}
        given = {**options, **options.get("images_kwargs", {})}.get("max_image_tokens")
        given = self.image_processor.max_image_tokens if given is None else given
        samples = [text] if isinstance(text, str) else text or []
        marks = re.compile(f"{re.escape(self.image_token)}|{re.escape(self.video_token)}")
        is_shown = any(marks.sub("", str(sample)).strip() for sample in samples)
        if given is not None and not is_shown and (layout.get("budget") or {}).get("reads_question"):
            raise ValueError(
                f"max_image_tokens={given!r} keeps what the question asks about, and this engine does not show the "
                "question: pip install 'hires-lmm[vllm]' and leave model_impl at 'auto', or leave the budget out."
            )

    def _warn_beyond_context(self, inputs: Any) -> None:
        """Say once that a text is longer than the language model reads."""
        limit = self.tokenizer.model_max_length
        length = max(len(row) for row in inputs["input_ids"])
        if length > limit and "attention_mask" in inputs:
            length = max(int(sum(row)) for row in inputs["attention_mask"])
        if length > limit:
            self._has_warned = True
            logger.warning(
                f"A text has {length} tokens, those of its images among them, more than the {limit} that the language "
                "model reads (model_max_length of the tokenizer); lower max_image_tokens or max_crops, or shorten it."
            )

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, with any template; None means absent, and what stands in a text part stays text.

        A text holds an invisible mark within the image and video tokens that a user quoted; `__call__` takes it out.
        """
        chats = conversation if _is_batch(conversation) else [conversation]
        chats = [getattr(chat, "messages", chat) for chat in chats]
        tokens: tuple[str, ...] = () if kwargs.get("sanitize_control_tokens") else (self.image_token,)
        tokens += (self.video_token,) if any(map(holds_video, chats)) else ()
        if kwargs.get("tokenize") and any(map(lacks_video, chats)):
            raise ValueError('A part {"type": "video"} holds no video; give it one as "video", "url" or "path".')
        for name in ("tools", "documents"):
            if kwargs.get(name):
                kwargs[name] = protect(kwargs[name], tokens)
        layout = {"image_layout": self.image_processor.image_layout or "flat"}
        kwargs["processor_kwargs"] = {**layout, **(kwargs.get("processor_kwargs") or {})}
        chats = [protect_messages(chat, tokens) for chat in chats]
        template = self.chat_template if chat_template is None else chat_template
        if isinstance(template, str) and "video" not in template:  # it would leave video parts out
            chats = [show_as_images(chat) for chat in chats]
        conversation = chats if _is_batch(conversation) else chats[0]
        return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)

    def image_tokens(self, height: int, width: int, **images_kwargs: Any) -> int:
        """Count the placeholders of an image without its pixels, as the image processor does."""
        return self.image_processor.image_tokens(height, width, **images_kwargs)

    def min_image_tokens(self, height: int, width: int, **images_kwargs: Any) -> int:
        """Tell the smallest `max_image_tokens` that an image allows. Args and errors as in `image_tokens`."""
        return self.image_processor.min_image_tokens(height, width, **images_kwargs)

    def video_tokens(self, frames: int, height: int, width: int, **images_kwargs: Any) -> int:
        """Count the placeholders of a video without its pixels, as the image processor does."""
        return self.image_processor.video_tokens(frames, height, width, **images_kwargs)

    def min_video_tokens(self, frames: int, height: int, width: int, **images_kwargs: Any) -> int:
        """Tell the smallest `max_image_tokens` that a video allows. Args and errors as in `video_tokens`."""
        return self.image_processor.min_video_tokens(frames, height, width, **images_kwargs)

    def _with_videos(self, images: Any, text: Any, videos: Any) -> Any:
        """Images and videos in one list, as `merge_videos` orders them, once their numbers are right."""
        texts = [text] if isinstance(text, str) else text
        if texts is not None and not all(isinstance(sample, str) for sample in texts):
            return images  # refused where texts are checked
        tokens = (self.image_token, self.video_token)
        merged, num_images, num_videos = merge_videos(images, texts, videos, tokens)
        if texts is None:
            return merged
        is_nested = False
        for token, number, counts, kind in (
            (self.image_token, num_images, count_samples(images), "image"),
            (self.video_token, num_videos, count_videos(videos), "video"),
        ):
            found = [sample.count(token) for sample in texts]
            if counts is not None and len(counts) == len(texts):
                is_nested = True
                for index, (placeholders, own) in enumerate(zip(found, counts, strict=True)):
                    self._compare_counts(placeholders, own, f"Sample {index}", kind)
            self._compare_counts(sum(found), number, "The text", kind)
        return merged if is_nested else flatten_images(merged)

    def prepare_inputs_layout(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> tuple:
        """As in transformers; audio is refused, and an empty list of it or of images means none. Videos are among the
        images by then."""
        if not _is_empty(audio):
            raise ValueError(
                f"audio={type(audio).__name__} was passed, but this processor reads images, videos and text."
            )
        if text is not None and not isinstance(text, (str, list, tuple)):
            raise ValueError(f"text must be a string or a non-empty list of strings, not {text!r}.")
        if images is not None and not flatten_images(images):
            images = None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def validate_inputs(
        self, images: Any = None, text: Any = None, videos: Any = None, audio: Any = None, **kwargs: Any
    ) -> None:
        """Compare placeholders and images, sample by sample where images are nested; nothing to process is refused."""
        if images is None and text is None:
            raise ValueError("There is nothing to process: pass text, images or both.")
        if text is None:
            return
        if not text or not all(isinstance(sample, str) for sample in text):
            raise ValueError(f"text must be a string or a non-empty list of strings, not {text!r}.")
        for number, sample in enumerate(text):
            broken = re.search(SURROGATE, sample)
            if broken:
                raise ValueError(
                    f"Sample {number} holds {broken[0]!r}, half of a character; decode its bytes as UTF-8 with "
                    "errors='replace'."
                )
        given = [] if images is None else images
        marks = self.marks(text, len(flatten_images(given)))
        placeholders = [sum(map(sample.count, marks)) for sample in text]
        if self._later_tokens is not None and max(placeholders) > 1:
            number = placeholders.index(max(placeholders))
            raise ValueError(
                f"Sample {number} has {max(placeholders)} images, but this model reads one image a conversation; put "
                "each image into a conversation of its own."
            )
        nested = isinstance(given, list) and all(entry is None or isinstance(entry, (list, tuple)) for entry in given)
        if images is not None and nested and len(given) == len(text):
            for index, (found, own) in enumerate(zip(placeholders, given, strict=True)):
                self._compare_counts(found, len(flatten_images(own)), f"Sample {index}")
        self._compare_counts(sum(placeholders), len(flatten_images(given)), "The text")

    def replace_image_token(self, image_inputs: Any, image_idx: int, **kwargs: Any) -> str:
        """The placeholders of one image, from the counts its views carry."""
        positions = read_positions(image_inputs)
        first_rows = np.flatnonzero(positions[:, Column.STARTS_IMAGE])
        return self.image_token * int(positions[first_rows[image_idx], Column.NUM_TOKENS])

    def get_text_with_replacements(
        self,
        text: list[str],
        images_replacements: Sequence[str] = (),
        videos_replacements: Sequence[str] = (),
        audio_replacements: Sequence[str] = (),
    ) -> tuple[list[str], list[dict[str, Any]]]:
        """As in transformers; a `QUERY_TOKEN` behind the image becomes the tokens of its turn, if any.

        Placeholders of videos come among those of the images, in the order of the texts.
        """
        later, replacements = self._later_tokens, list(images_replacements)
        marks = self.marks(text, len(replacements))
        alone = [sample for sample in text if QUERY_TOKEN in sample and not any(mark in sample for mark in marks)]
        if later is not None and alone:
            raise ValueError(
                f"{QUERY_TOKEN} stands in a text without an image: {alone[0]!r}. Pass the whole conversation with its "
                f"image (generate takes what the cache holds from there), or leave {QUERY_TOKEN} out."
            )
        if later is not None and replacements:
            text, replacements = self._with_queries(text, replacements, later, marks)
        videos = list(videos_replacements)
        if len(marks) > 1:
            found = re.findall("|".join(map(re.escape, marks)), "\n".join(text))
            pairs = list(zip(found, replacements, strict=True))
            videos = [own for token, own in pairs if token == self.video_token]
            replacements = [own for token, own in pairs if token == self.image_token]
        return super().get_text_with_replacements(text, replacements, videos, list(audio_replacements))

    def marks(self, text: list[str], number: int) -> tuple[str, ...]:
        """What stands for `number` images and videos in texts: the image token, and the video token where both do."""
        tokens = (self.image_token, self.video_token)
        images, videos = (sum(sample.count(token) for sample in text) for token in tokens)
        is_both = images != number and images + videos == number
        return tokens if is_both else tokens[:1]

    @property
    def _later_tokens(self) -> int | None:
        """Tokens of later turns, where the model has some."""
        return (self.image_processor.token_layout or {}).get("later_tokens")

    def _with_queries(
        self, text: list[str], images: list[str], later: int, marks: tuple[str, ...]
    ) -> tuple[list[str], list[str]]:
        """Texts with an image token for each `QUERY_TOKEN`, and the placeholders of all of them in order."""
        replacements, remaining = [], iter(images)
        pattern = re.compile("|".join(map(re.escape, (*marks, QUERY_TOKEN))))
        for sample in text:
            own = ""
            for found in pattern.findall(sample):
                if found in marks:
                    own = next(remaining)
                    replacements.append(own)
                elif not own:
                    raise ValueError(f"{QUERY_TOKEN} stands before the image in {sample!r}; write the image first.")
                else:
                    replacements.append(own[: later * len(self.image_token)])
        return [sample.replace(QUERY_TOKEN, self.image_token) for sample in text], replacements

    def question_ids(self, conversations: list, tokenizer: Any) -> torch.Tensor:
        """Write the questions of conversations in the vocabulary of another tokenizer, as released fusion models do.

        Args:
            conversations (`list`): Messages of one conversation, or a list of them; each user turn from that which
                holds the image has tokens of its own.
            tokenizer: The other tokenizer, such as CLIP's.

        Returns:
            `torch.Tensor` (B, turns, L) for `question_ids` of the model; -1 behind a question, -2 behind the last
            turn.
        """
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        asked = [
            [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _questions(messages, self.image_token)]
            for messages in conversations
        ]
        turns = max((len(own) for own in asked), default=0)
        length = max((len(ids) for own in asked for ids in own), default=0)
        table = torch.full((len(asked), turns, max(length, 1)), -2)
        for row, own in enumerate(asked):
            for turn, ids in enumerate(own):
                table[row, turn] = torch.tensor([*ids, *[-1] * (table.shape[2] - len(ids))])
        return table

    def _process_images(self, images: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        lock = LOCKS[getpid()]  # `__call__` holds it; nothing is tokenised yet, so another thread may
        lock.release()
        try:
            inputs = self.image_processor(images, **kwargs)
        finally:
            lock.acquire()
        number = len(flatten_images(images))
        return inputs, [self.replace_image_token(inputs, index, **kwargs) for index in range(number)]

    def _get_num_multimodal_tokens(
        self,
        image_sizes: list[tuple[int, int]] | None = None,
        video_sizes: list[tuple[int, int, int]] | None = None,
        **kwargs: Any,
    ) -> MultiModalData:
        merged = self._merge_kwargs(
            self.valid_processor_kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        counts: dict[str, list[int]] = {}
        if image_sizes is not None:
            tokens, views = self.image_processor.count_images(image_sizes, **merged["images_kwargs"])
            counts = {"num_image_tokens": tokens, "num_image_patches": views}
        if video_sizes is not None:
            counts["num_video_tokens"] = self.image_processor.count_videos(video_sizes, **merged["images_kwargs"])[0]
        return MultiModalData(**counts)

    def _compare_counts(self, placeholders: int, images: int, where: str, kind: str = "image") -> None:
        if placeholders != images:
            token = self.image_token if kind == "image" else self.video_token
            raise ValueError(
                f"The number of {token} tokens in the prompts should be the same as the number of {kind}s. "
                f"{where} has {placeholders} {token} placeholders, but {images} {kind}s were passed; write "
                f"one {token} for each {kind} (apply_chat_template does it for {kind} parts, and leaves a "
                f"{token} in a text part a text), or change the {kind}s."
            )

    def _merge_kwargs(
        self, ModelProcessorKwargs: Any = None, tokenizer_init_kwargs: dict | None = None, **kwargs: Any
    ) -> dict[str, dict]:
        text_names = set(TextKwargs.__annotations__)
        image_names = set(self.image_processor.valid_kwargs.__annotations__)
        flat_names = text_names | image_names | set(ProcessingKwargs.__annotations__)
        refuse_unknown(set(kwargs) - {"common_kwargs", "return_metadata"}, flat_names, "options")
        groups = {
            "text_kwargs": text_names,
            "images_kwargs": image_names,
            "videos_kwargs": set(),
            "audio_kwargs": set(),
        }
        for group, names in groups.items():
            if not isinstance(kwargs.get(group, {}), dict):
                raise ValueError(f"{group}={kwargs[group]!r} must be a dict of options.")
            refuse_unknown(set(kwargs.get(group, {})), names, group)
        saved = {name: value for name, value in (tokenizer_init_kwargs or {}).items() if name in text_names}
        try:
            merged = super()._merge_kwargs(ModelProcessorKwargs or self.valid_processor_kwargs, saved, **kwargs)
            validate_typed_dict(TextKwargs, merged["text_kwargs"])
        except StrictDataclassError as error:
            raise ValueError(f"Wrong option. {str(error)[:1000]}") from error
        if merged["text_kwargs"].get("is_split_into_words"):
            raise ValueError("is_split_into_words=True is not supported: pass whole texts.")
        for name, least in (("max_length", 0), ("stride", 0), ("pad_to_multiple_of", 1)):
            value = merged["text_kwargs"].get(name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        return merged

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        drop_marks(text, text_inputs, (self.image_token, self.video_token), self.tokenizer)
        if "overflow_to_sample_mapping" in text_inputs:
            if any(self.image_token in sample for sample in text):
                raise ValueError(
                    "return_overflowing_tokens=True cuts texts into several rows, which would part an image from its "
                    "question; use it for texts without images."
                )
            return
        try:
            super()._check_special_mm_tokens(text, text_inputs, modalities)
        except ValueError as error:
            for index, (sample, ids) in enumerate(zip(text, text_inputs["input_ids"], strict=True)):
                found, expected = list(ids).count(self.image_token_id), sample.count(self.image_token)
                needed = len(self.tokenizer(sample)["input_ids"])
                if found < expected and needed > len(ids):
                    raise ValueError(
                        f"Truncation to {len(ids)} tokens would leave {found} of {expected} image tokens of sample "
                        f"{index}, which needs max_length={needed}; raise max_length, turn truncation off, or lower "
                        f"max_image_tokens."
                    ) from error
            raise


@contextmanager
def _tokenizer_alone(tokenizer: Any) -> Iterator[None]:
    """Keep other threads from tokenising, and give the tokenizer back the padding and truncation that it keeps."""
    backend = tokenizer.backend_tokenizer if hasattr(tokenizer, "backend_tokenizer") else None
    with LOCKS.setdefault(getpid(), Lock()):
        padding, truncation = (None, None) if backend is None else (backend.padding, backend.truncation)
        try:
            yield
        finally:
            if backend is not None and backend.padding != padding:
                backend.no_padding() if padding is None else backend.enable_padding(**padding)
            if backend is not None and backend.truncation != truncation:
                backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)


def _is_empty(values: Any) -> bool:
    return values is None or (isinstance(values, (list, tuple)) and not values)


def _is_batch(conversation: Any) -> bool:
    """Whether it is a list of conversations, as transformers tells it."""
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    return isinstance(first, (list, tuple)) or hasattr(first, "messages")


def _questions(messages: list[dict], image_token: str) -> list[str]:
    """The text of each user turn from the one that holds the image; in a content that is one string, an image token
    stands for the image."""
    texts, has_image = [], False
    for message in clean_messages(messages):
        content = message.get("content", "")
        if message["role"] != "user":
            continue
        if isinstance(content, str):
            has_image, text = has_image or image_token in content, content.replace(image_token, "")
        else:
            has_image = has_image or any(part["type"] in ("image", "video") for part in content)
            text = "".join(part["text"] for part in content if part["type"] == "text")
        if has_image:
            texts.append(text.strip())
    return texts


__all__ = ["HiResLmmProcessor"]
