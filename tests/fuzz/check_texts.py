"""What the processor must make of any call: as many placeholders as tokens, or an error that names what is wrong."""

import functools
import warnings
from typing import Any

import numpy as np

from builders.images import picture
from builders.text import tiny_tokenizer
from fuzz.harness import Fault, Place, Subject, expect_clear
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


SMALL: dict[str, Any] = {"planner": "llava_next", "view_size": 28, "patch_size": 14}


@functools.cache
def processor() -> HiResLmmProcessor:
    """Views of 28 pixels and the tiny tokenizer."""
    return HiResLmmProcessor(HiResLmmImageProcessor(**SMALL), tiny_tokenizer())


def check_call(subject: Subject, place: Place) -> str:
    """Options at construction and per call, or texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _check_options(subject.value) if subject.kind == "options" else _check_texts(subject)


def _check_options(options: dict[str, Any]) -> str:
    image, outcomes = picture(60, 40), []
    calls = [
        lambda: HiResLmmImageProcessor(**{**SMALL, **options})(image),
        lambda: processor().image_processor(image, **options),
        lambda: processor()(text="<image>", images=image, images_kwargs=options),
        lambda: processor().image_tokens(60, 40, **options),
    ]
    for call in calls:
        try:
            outcomes.append(call())
        except Exception as error:
            expect_clear(error)
            outcomes.append(None)
    for batch in outcomes[:2]:
        if batch is not None:
            _check_batch(batch)
    return "error" if outcomes[1] is None else "result"


def _check_batch(batch: Any) -> None:
    pixels, positions = np.asarray(batch["pixel_values"]), np.asarray(batch["view_positions"])
    if len(pixels) != len(positions) or not np.isfinite(pixels).all() or positions[0, 5] < 1:
        raise Fault(f"pixel_values {pixels.shape}, view_positions {positions[:3].tolist()}")


def _check_texts(subject: Subject) -> str:
    images = [picture(30 + 10 * number, 40) for number in range(subject.notes["images"])]
    try:
        batch = processor()(text=subject.value, images=images or None, **subject.notes["options"])
    except Exception as error:
        expect_clear(error)
        return "error"
    rows = batch["input_ids"] if subject.value is not None else []
    found = sum(list(row).count(processor().image_token_id) for row in rows)
    wanted = 0
    if images and subject.value is not None:
        positions = np.asarray(batch["view_positions"])
        wanted = int(positions[positions[:, 0] == 0, 5].sum())
    if found != wanted:
        raise Fault(f"{found} placeholders for {wanted} tokens")
    return "result"
