"""From a checkpoint to an answer: load it, ask about images and videos, stream the answer, see what was kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from PIL import Image
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature, TextIteratorStreamer

from .decoding import DECODINGS
from .folders import check_tokenizer
from .modeling.outputs_hires_lmm import TokenMap
from .processing.image_input_hires_lmm import open_image, to_rgb


DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Prepared:
    """A question about images and videos, ready for the model, with each upright RGB image or the frames of each
    video, in their order; see `find_unknown_words`."""

    inputs: BatchFeature
    images: list[Any]
    unknown_words: list[str]


def load_processor(checkpoint: str, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the processor of a checkpoint through `AutoProcessor`.

    Args:
        trust_remote_code (`bool`): Whether code that comes with the checkpoint may run.
        revision (`str`, *optional*): Branch, tag or commit of a Hub id.

    Raises:
        ValueError: If the checkpoint is of another kind of model, damaged, or has no tokenizer.
        OSError: If it does not exist.
    """
    with _clear_errors(checkpoint):
        _check_kind(checkpoint, trust_remote_code, revision)
        check_tokenizer(checkpoint)
        return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, revision=revision)


@contextmanager
def _clear_errors(checkpoint: str) -> Iterator[None]:
    """Readers of files raise errors of many types over a damaged checkpoint; say which one it is."""
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        text = " ".join(str(error).split())[:1000]
        raise ValueError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {text}); it is damaged or of another make."
        ) from error


def _check_kind(checkpoint: str, trust_remote_code: bool, revision: str | None) -> None:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code, revision=revision)
    if config.model_type != "hires_lmm":
        raise ValueError(
            f"{checkpoint} holds a {config.model_type!r} model; this command needs a 'hires_lmm' checkpoint."
        )


def load_model(
    checkpoint: str,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    device_map: str | None = None,
    **options: Any,
) -> torch.nn.Module:
    """Load a model through `AutoModelForImageTextToText`, in evaluation mode.

    Args:
        dtype (`str`): One of `DTYPES`; `"auto"` = as saved.
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`, ...; default CUDA where there is one.
        trust_remote_code (`bool`): Whether code that comes with the checkpoint may run.
        device_map (`str`, *optional*): Spreads the model over devices, in place of `device`.
        options: Others of `from_pretrained`: `revision`, `attn_implementation`.

    Raises:
        ValueError: If dtype or device is unknown or not there, or the checkpoint is damaged.
        OSError: If it does not exist or lacks a file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    if device is not None and device_map is not None:
        raise ValueError(f"device={device!r} and device_map={device_map!r} exclude each other; pass one.")
    target = _checked_device(device)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with _clear_errors(checkpoint):
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=kind, trust_remote_code=trust_remote_code, device_map=device_map, **options
        )
    return model.eval() if device_map is not None else model.to(target).eval()


def open_images(sources: list[Any]) -> list[Image.Image]:
    """Open images the way the processor does."""
    return [to_rgb(open_image(source, index), index) for index, source in enumerate(sources)]


def prepare(
    processor: Any, sources: list[Any], question: str, videos: Sequence[Any] = (), **images_kwargs: Any
) -> Prepared:
    """Build the inputs of one question about images, videos, or both, the images first.

    Args:
        sources (`list`): Images, as `open_images` takes them.
        videos (`list`): Videos: files, URLs, lists of frames, arrays.
        images_kwargs: Call-time options: `max_image_tokens`, `max_crops`, `views`, `num_frames`, ...

    Returns:
        Inputs, images, and the words of the question that the tokenizer does not know.

    Raises:
        ValueError: If an image, a video or an option is wrong.
        ImportError: If a video is a file and no decoder is installed.
    """
    images = open_images(sources)
    clips = processor.image_processor.open_videos(list(videos), **images_kwargs) if videos else []
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    content += [{"type": "video", "video": clip} for clip in clips]
    content.append({"type": "text", "text": question})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(images_kwargs),
    )
    return Prepared(inputs, [*images, *clips], find_unknown_words(processor.tokenizer, question))


def find_unknown_words(tokenizer: Any, text: str) -> list[str]:
    """The words of a text for which a word-level tokenizer has no id but that of an unknown word."""
    backend = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is None or not isinstance(backend.model, WordLevel):
        return []
    text = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
    words = (
        [text] if backend.pre_tokenizer is None else [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )
    vocabulary = tokenizer.get_vocab()
    return list(dict.fromkeys(word for word in words if word not in vocabulary))


def describe_unknown(words: list[str]) -> str:
    """What the tokenizer does not know, as a sentence; empty if it knows all."""
    if not words:
        return ""
    return f"The tokenizer does not know {', '.join(map(repr, words))}: the model is asked without these words."


@torch.inference_mode()
def map_tokens(model: Any, prepared: Prepared) -> TokenMap:
    """Find out which visual tokens reach the language model, without an answer: one record a token."""
    return model(**_on_device(model, prepared), output_token_map=True, logits_to_keep=1).token_map


class AnswerStream:
    """A greedy answer while it is generated: an iterator over its pieces of text, once.

    Args:
        decoding (`str`, *optional*): A key of `decoding.DECODINGS`.
    """

    def __init__(
        self, model: Any, processor: Any, prepared: Prepared, max_new_tokens: int = 128, decoding: str | None = None
    ):
        self._token_map: TokenMap | None = None
        self._error: BaseException | None = None
        self._pieces = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        inputs = _on_device(model, prepared)
        options = {
            **inputs,
            "logits_processor": [] if decoding is None else [DECODINGS[decoding](model, inputs)],
            "max_new_tokens": max_new_tokens,
            "do_sample": False,
            "streamer": self._pieces,
            "output_token_map": True,
            "return_dict_in_generate": True,
        }
        self._worker = Thread(target=self._generate, args=(model.generate, options), daemon=True)

    def __iter__(self) -> Iterator[str]:
        self._worker.start()
        yield from (piece for piece in self._pieces if piece)
        self._worker.join()
        if self._error is not None:
            raise self._error

    @property
    def token_map(self) -> TokenMap:
        """Which visual tokens were kept, once all pieces were read."""
        if self._token_map is None:
            raise ValueError("The answer is not complete; read its pieces to the end first.")
        return self._token_map

    def _generate(self, generate: Callable, options: dict) -> None:
        try:
            self._token_map = generate(**options).token_map
        except BaseException as error:  # raised again where the pieces are read
            self._error = error
        finally:  # not end(), which decodes first and may fail as well
            self._pieces.on_finalized_text("", stream_end=True)


def _on_device(model: Any, prepared: Prepared) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in prepared.inputs.items()}


def _checked_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={device!r} cannot be used ({reason}); name another, such as cpu.") from error
    return target
