"""From a checkpoint to an answer: load it, pose a question about images, stream the answer, see what was kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    TextIteratorStreamer,
)

from .conversion.errors import is_panic
from .conversion.tensors import JSON_LIMIT, TEXTS
from .modeling.outputs_hires_lmm import HiResLmmImageFeatures, TokenMap
from .processing.geometry_hires_lmm import Column
from .processing.image_input_hires_lmm import open_image, to_rgb


IMAGE_INPUTS = ("pixel_values", "view_positions", "view_boxes", "view_spans")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Prepared:
    """A question about images, ready for the model.

    Args:
        inputs (`BatchFeature`): Tensors of one row.
        images (`list[PIL.Image.Image]`): The images, upright, RGB.
        num_tokens (`list[int]`): Placeholders of each image.
        full_tokens (`list[int]`): Tokens of each image without a budget.
    """

    inputs: BatchFeature
    images: list[Image.Image]
    num_tokens: list[int]
    full_tokens: list[int]


def load_processor(checkpoint: str, trust_remote_code: bool = False) -> Any:
    """Load the processor of a checkpoint through `AutoProcessor`.

    Args:
        checkpoint (`str`): Folder or Hub id.
        trust_remote_code (`bool`): Whether code that comes with the checkpoint may run.

    Returns:
        The processor.

    Raises:
        ValueError: If the checkpoint is of another kind of model.
        OSError: If it does not exist.
    """
    with _clear_errors(checkpoint):
        _check_kind(checkpoint, trust_remote_code)
        return AutoProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


def load_image_processor(checkpoint: str, trust_remote_code: bool = False) -> Any:
    """Load the image processor of a checkpoint, which may have no tokenizer. Args and errors as in `load_processor`.

    Args:
        checkpoint (`str`): Folder or Hub id.
        trust_remote_code (`bool`): Whether code that comes with the checkpoint may run.
    """
    with _clear_errors(checkpoint):
        _check_kind(checkpoint, trust_remote_code)
        return AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)


@contextmanager
def _clear_errors(checkpoint: str) -> Iterator[None]:
    """Readers of files raise errors of many types over a damaged checkpoint; say which one it is."""
    read = (path for pattern in ("*", "additional_chat_templates/*") for path in Path(checkpoint).glob(pattern))
    texts = [path for path in read if path.suffix in TEXTS and path.is_file()]
    large = [path for path in texts if path.stat().st_size > JSON_LIMIT]
    if large:
        raise ValueError(f"{large[0]} has {large[0].stat().st_size} bytes, more than {JSON_LIMIT}; replace it.")
    try:
        yield
    except (ValueError, OSError, ImportError):
        raise
    except BaseException as error:
        known = isinstance(error, Exception) or is_panic(error)
        if not known or "out of memory" in str(error):
            raise
        text = " ".join(str(error).split())[:1000]
        raise ValueError(
            f"{checkpoint} cannot be loaded ({type(error).__name__}: {text}); it is damaged or of another make."
        ) from error


def _check_kind(checkpoint: str, trust_remote_code: bool) -> None:
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    if config.model_type != "hires_lmm":
        raise ValueError(
            f"{checkpoint} holds a {config.model_type!r} model; this command needs a 'hires_lmm' checkpoint."
        )


def load_model(
    checkpoint: str, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> torch.nn.Module:
    """Load a model through `AutoModelForImageTextToText`, in evaluation mode.

    Args:
        checkpoint (`str`): Folder or Hub id.
        dtype (`str`): One of `DTYPES`; `"auto"` = as saved.
        device (`str`, *optional*): `"cpu"`, `"cuda"`, `"cuda:1"`, ...; default CUDA where there is one.
        trust_remote_code (`bool`): Whether code that comes with the checkpoint may run.

    Returns:
        The model.

    Raises:
        ValueError: If dtype or device is unknown or not there, or the checkpoint is damaged.
        OSError: If it does not exist or lacks a file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}.")
    target = _checked_device(device)
    kind = dtype if dtype == "auto" else getattr(torch, dtype)
    with _clear_errors(checkpoint):
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=kind, trust_remote_code=trust_remote_code
        )
    return model.to(target).eval()


def open_images(sources: list[Any]) -> list[Image.Image]:
    """Open images the way the processor does.

    Args:
        sources (`list`): Paths, URLs, PIL images, arrays, ...

    Returns:
        Upright RGB images.

    Raises:
        ValueError: If one cannot be read; the message names its index.
    """
    return [to_rgb(open_image(source, index), index) for index, source in enumerate(sources)]


def prepare(processor: Any, sources: list[Any], question: str, **images_kwargs: Any) -> Prepared:
    """Build the inputs of one question about one or more images.

    Args:
        processor (`HiResLmmProcessor`): Of the checkpoint.
        sources (`list`): Images, as `open_images` takes them.
        question (`str`): The user's text.
        images_kwargs: Call-time options: `max_image_tokens`, `max_crops`, `views`, ...

    Returns:
        Inputs, images and token counts.

    Raises:
        ValueError: If an image or option is wrong, or the question contains the token that stands for an image.
    """
    if processor.image_token in question:
        raise ValueError(
            f"The question contains {processor.image_token!r}, which stands for an image; write it another way, such "
            f"as {' '.join((processor.image_token[0], processor.image_token[1:]))!r}."
        )
    images = open_images(sources)
    content: list[dict] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": question})
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=dict(images_kwargs),
    )
    unlimited = {**images_kwargs, "max_image_tokens": None}
    positions = inputs["view_positions"]
    return Prepared(
        inputs=inputs,
        images=images,
        num_tokens=positions[positions[:, Column.STARTS_IMAGE] != 0, Column.NUM_TOKENS].tolist(),
        full_tokens=[processor.image_tokens(image.height, image.width, **unlimited) for image in images],
    )


@torch.inference_mode()
def encode_images(model: Any, prepared: Prepared) -> HiResLmmImageFeatures:
    """Run the vision tower and what follows it up to the question, once for `map_tokens` and `stream_answer`.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
        prepared (`Prepared`): From `prepare`.

    Returns:
        The features of the images.
    """
    tensors = {name: prepared.inputs[name].to(model.device) for name in IMAGE_INPUTS}
    return model.get_image_features(**tensors, return_dict=True)


@torch.inference_mode()
def map_tokens(model: Any, prepared: Prepared, features: HiResLmmImageFeatures | None = None) -> TokenMap:
    """Find out which visual tokens reach the language model.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
        prepared (`Prepared`): From `prepare`.
        features (`HiResLmmImageFeatures`, *optional*): From `encode_images`; computed where missing.

    Returns:
        One record a visual token.
    """
    features = encode_images(model, prepared) if features is None else features
    output = model(
        **_text_inputs(model, prepared),
        mm_encoder_outputs={"image": features},
        output_token_map=True,
        logits_to_keep=1,
    )
    return output.token_map


def stream_answer(
    model: Any,
    processor: Any,
    prepared: Prepared,
    max_new_tokens: int = 128,
    features: HiResLmmImageFeatures | None = None,
) -> Iterator[str]:
    """Generate an answer greedily, piece by piece.

    Args:
        model (`HiResLmmForConditionalGeneration`): The model.
        processor (`HiResLmmProcessor`): Of the checkpoint.
        prepared (`Prepared`): From `prepare`.
        max_new_tokens (`int`): Most tokens of the answer.
        features (`HiResLmmImageFeatures`, *optional*): From `encode_images`; computed where missing.

    Returns:
        An iterator over pieces of text.

    Raises:
        ValueError: What `generate` raises, in the caller's thread.
    """
    features = encode_images(model, prepared) if features is None else features
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {
        **_text_inputs(model, prepared),
        "mm_encoder_outputs": {"image": features},
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "streamer": streamer,
    }
    errors: list[BaseException] = []
    worker = Thread(target=_generate, args=(model.generate, options, streamer, errors), daemon=True)
    worker.start()
    yield from (piece for piece in streamer if piece)
    worker.join()
    if errors:
        raise errors[0]


def _generate(generate: Callable, options: dict, streamer: TextIteratorStreamer, errors: list[BaseException]) -> None:
    try:
        generate(**options)
    except BaseException as error:  # raised again where the pieces are read
        errors.append(error)
    finally:  # not end(), which decodes first and may fail as well
        streamer.on_finalized_text("", stream_end=True)


def _text_inputs(model: Any, prepared: Prepared) -> dict[str, torch.Tensor]:
    return {name: prepared.inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}


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
