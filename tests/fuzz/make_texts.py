"""Calls of the processor: options, texts and conversations that nobody should pass."""

import random
from typing import Any

from fuzz.harness import Place, Subject
from fuzz.wild import wild


OPTIONS = [
    "planner", "view_size", "patch_size", "max_crops", "pinpoints", "unpad", "global_view", "views", "token_layout",
    "max_image_tokens", "background", "pixel_limit", "resample", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "input_data_format", "size", "do_resize", "do_convert_rgb", "return_tensors", "device",
    "data_format", "crop_size", "unknown_option", "disable_grouping",
]  # fmt: skip
LAYOUT = {"patch_grid": [2, 2], "global_grid": [2, 2], "crop_grid": [2, 2], "budget": {"on": "all"}, "row_end": True}
PIECES = [
    "<image>",
    "<image>",
    "<query>",
    "a",
    " ",
    "\n",
    "\0",
    "\ud800",
    "<s>",
    "</s>",
    "<pad>",
    "<|im_start|>",
    "é",
    "🙂",
]
NUMBERS = [0, 1, 2, 3, 5, 27, 28, 29, 56, 1000, 20_000, 1 << 20, 1 << 40]


def _pinpoints(rng: random.Random) -> Any:
    sides = [0, 1, 27, 28, 56, 84, 28 * 100, 28 * 100_000, -28, 28.0, "28", None, True]
    return [[rng.choice(sides), rng.choice(sides)] for _ in range(rng.randrange(4))]


def _layout(rng: random.Random) -> Any:
    values = {**LAYOUT, "fixed_tokens": None}
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice([*values, "later_tokens", "view_end", "crop_order", "between_views", "unknown"])
        values[name] = rng.choice([wild(rng), rng.choice(NUMBERS), [rng.choice(NUMBERS), rng.choice(NUMBERS)]])
    return values


def options(rng: random.Random) -> dict[str, Any]:
    """One to three options with any values, those of a kind that could be meant among them."""
    found = {}
    for name in rng.sample(OPTIONS, rng.choice([1, 1, 2, 3])):
        likely = {"pinpoints": _pinpoints, "token_layout": _layout}.get(name, lambda rng: rng.choice(NUMBERS))
        found[name] = likely(rng) if rng.random() < 0.5 else wild(rng)
    return found


def text(rng: random.Random) -> str:
    """Special tokens, control characters and halves of characters."""
    return "".join(rng.choice(PIECES) for _ in range(rng.randrange(8)))


def make_call(rng: random.Random, number: int, place: Place) -> Subject:
    """Options of the image processor, or texts and images of the processor."""
    if number % 3:
        return Subject("options", options(rng))
    texts: Any = [text(rng) for _ in range(rng.randrange(4))]
    texts = rng.choice([texts, texts, text(rng), wild(rng), [texts], [*texts, wild(rng)]])
    images = rng.randrange(4)
    extra = rng.choice(
        [{}, {}, {"padding": True}, {"padding": wild(rng)}, {"max_length": wild(rng)}, {"truncation": True}]
    )
    return Subject("texts", texts, notes={"images": images, "options": extra})
