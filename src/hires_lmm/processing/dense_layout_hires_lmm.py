"""The dense layout: image tensors with one row a sample, for trainers that cut and repeat batches by sample."""

from typing import Any

import numpy as np

from .geometry_hires_lmm import DENSE_PARTS, WHOLE_KINDS, Column
from .image_input_hires_lmm import flatten_images


CROP_TO_PATCHES = (
    "crop_to_patches is asked by trainers that cut image tensors by sample (GRPO, RLOO, distillation) where they meet "
    'the flat layout, which they would cut wrongly: set image_layout="dense", as in '
    'AutoProcessor.from_pretrained(..., image_layout="dense").'
)


def count_samples(images: Any) -> list[int] | None:
    """Images of each sample where they come as one list a sample, else None."""
    if not isinstance(images, (list, tuple)):
        return None
    if not all(entry is None or isinstance(entry, (list, tuple)) for entry in images):
        return None
    return [len(flatten_images(entry)) for entry in images]


def require_samples(images: Any) -> list[int]:
    """Images of each sample; refused where they do not say whose they are, or trainers would cut them wrongly."""
    counts = count_samples(images)
    if counts is None:
        raise ValueError(
            f'image_layout="dense" needs images as one list a sample, not {type(images).__name__} of images; nest '
            'them, or pass image_layout="flat".'
        )
    check_cuts(counts)
    return counts


def check_cuts(counts: list[int]) -> None:
    """Refuse a batch with as many images as samples, but not one each: trainers would take its rows for images."""
    if sum(counts) == len(counts) and set(counts) != {1}:
        raise ValueError(
            f"The {len(counts)} samples have {counts} images, as many as samples but not one each: trainers that cut "
            'batches by sample would take the rows of image_layout="dense" for images. Give all samples of a batch '
            'the same number of images, or set image_layout="flat".'
        )


def refuse_boxes(boxes: Any) -> None:
    """Refuse objects in the dense layout: what cuts batches by sample would leave their boxes behind."""
    if any(map(len, boxes)):
        raise ValueError(
            'image_boxes do not go with image_layout="dense": trainers that cut batches by sample would lose them. '
            'Pass image_layout="flat", or leave image_boxes out.'
        )


def nest_images(images: Any, placeholders: list[int]) -> list[list]:
    """Images in reading order as one list a sample."""
    flat, nested = flatten_images(images), []
    for count in placeholders:
        nested.append(flat[:count])
        flat = flat[count:]
    return [*nested, *([flat] if flat else [])]


def choose_layout(processor: Any, images: Any, text: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The images of a call of a processor, as one list a text where the layout is dense, and its options with that
    layout.

    Trainers that cut batches by sample leave the layout open and ask for one tensor of padded texts, with one list of
    images for each; where these are equally long, no other layout could be meant to be cut.
    """
    texts = [text] if isinstance(text, str) else text
    if images is None or not isinstance(texts, (list, tuple)) or not all(isinstance(own, str) for own in texts):
        return images, options
    group = options.get("images_kwargs")
    given = {**options, **(group if isinstance(group, dict) else {})}
    layout = given.get("image_layout") or processor.image_processor.image_layout
    counts = count_samples(images)
    is_nested = counts is not None and len(counts) == len(texts)
    if layout is None:
        is_even = is_nested and counts is not None and len(set(counts)) == 1 and counts[0] > 0
        is_tensor = options.get("padding") is True and options.get("return_tensors") is not None
        layout = "dense" if is_even and is_tensor and given.get("image_boxes") is None else "flat"
    elif layout == "dense" and not is_nested:
        images = nest_images(images, [sample.count(processor.image_token) for sample in texts])
    return images, {**options, "image_layout": layout}


def pack_samples(data: dict[str, np.ndarray], counts: list[int]) -> dict[str, np.ndarray]:
    """Put the views of each sample into a row of their own.

    Args:
        data (`dict[str, np.ndarray]`): One row a view, image after image, as the image processor gives.
        counts (`list[int]`): Images of each sample.

    Returns:
        `pixel_values` float32 `(B, Vmax, 3, H, W)`, those of extra towers behind those of the main one, all padded at
        bottom and right to the largest; int64 `pixel_attention_mask` `(B, Vmax, 18)`: 0 where there is no view, else 1
        and the number of the extra tower from 1 on; then positions, boxes and spans, which extra towers have not.
    """
    names = [name for name in data if name.startswith("pixel_values")]
    geometry = np.concatenate([data[name] for name, _ in DENSE_PARTS], axis=1)
    starts = np.cumsum(data["view_positions"][:, Column.STARTS_IMAGE])
    is_whole = np.isin(data["view_positions"][:, Column.KIND], WHOLE_KINDS)
    sample_of = np.repeat(np.arange(len(counts)), counts)
    samples = dict.fromkeys(names[1:], sample_of[starts[is_whole] - 1])
    samples["pixel_values"] = sample_of[starts - 1]
    rows = [
        [(name, row) for name in names for row in np.flatnonzero(samples[name] == own)] for own in range(len(counts))
    ]
    size = [max(data[name].shape[axis] for name in names) for axis in (2, 3)]
    longest = max(map(len, rows))
    pixels = np.zeros((len(rows), longest, 3, *size), dtype=np.float32)
    mask = np.zeros((len(rows), longest, 1 + geometry.shape[1]), dtype=np.int64)
    for sample, own in enumerate(rows):
        for place, (name, row) in enumerate(own):
            view = data[name][row]
            pixels[sample, place, :, : view.shape[1], : view.shape[2]] = view
            mask[sample, place, 0] = 1 + names.index(name)
            if name == "pixel_values":
                mask[sample, place, 1:] = geometry[row]
    return {"pixel_values": pixels, "pixel_attention_mask": mask}


def read_positions(inputs: Any) -> np.ndarray:
    """The rows of `view_positions` of either layout, `(V, 9)`."""
    if "pixel_attention_mask" not in inputs:
        return np.asarray(inputs["view_positions"])
    mask = np.asarray(inputs["pixel_attention_mask"])
    return mask[mask[..., 0] == 1][:, 1 : 1 + len(Column)]
