"""The door of the model: all checks of a call's tensors, and the one copy of them to the host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .carriers_hires_lmm import ImageGeometry, read_geometry
from .geometry_hires_lmm import BOX_SIDE, DENSE_PARTS, KINDS, WHOLE_KINDS, Column
from .outputs_hires_lmm import HiResLmmImageFeatures
from .question_hires_lmm import PromptText
from .tower_table_hires_lmm import tower_grid, tower_width, view_side


OPTIONS_ELSEWHERE = {"max_image_tokens", "max_crops", "views", "planner", "pinpoints", "gamma", "vision_chunk_size"}
"""What `forward` takes no notice of, so that it must not be passed there."""

NUM_COLUMNS = 9
"""Of `view_positions`: one a member of `Column`."""

IMAGE_ARGUMENTS = (
    "pixel_values",
    "pixel_attention_mask",
    "vision_features",
    "view_positions",
    "view_spans",
    "view_boxes",
    "image_boxes",
    "image_geometry",
    "mm_encoder_outputs",
)
"""Arguments of a call that speak of its images; those of extra towers, see `extra_arguments`, come beside them."""

TEXT_ARGUMENTS = ("prompt_mask", "question_labels", "question_ids")
"""Keyword arguments that say which of the text may be read, in the order of `PromptText`."""


@dataclass
class ImageArguments:
    """What a call says of its images, not yet checked; the names are explained at `HiResLmmModel.forward`."""

    pixel_values: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    view_positions: torch.Tensor | None = None
    view_spans: torch.Tensor | None = None
    view_boxes: torch.Tensor | None = None
    image_boxes: torch.Tensor | None = None
    image_geometry: list[ImageGeometry] | None = None
    features: HiResLmmImageFeatures | None = None
    extra: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ImageInputs:
    """The images of a call, checked, with their geometry on the host.

    Args:
        source (`torch.Tensor` of shape `(V, ...)`): Views, or their features where the tower ran before.
        images (`list[ImageGeometry]`): The geometry of each image.
        extra (`dict[str, torch.Tensor]`): Views `(R, 3, H, W)` of extra towers, or their features, by argument.
        is_encoded (`bool`): Whether `source` holds features.
        view_boxes (`torch.Tensor` of shape `(V, 4)`, *optional*): For token maps.
        boxes (`torch.Tensor` of shape `(I, N, 4)`, *optional*): Objects of each image, on the device of `source`.
        is_unpadded, is_right_padded (`bool`, *optional*): Whether the attention mask is all ones, and whether a row
            ends in padding, where that is known.
    """

    source: torch.Tensor
    images: list[ImageGeometry]
    extra: dict[str, torch.Tensor]
    is_encoded: bool = False
    view_boxes: torch.Tensor | None = None
    is_unpadded: bool | None = None
    is_right_padded: bool | None = None
    boxes: torch.Tensor | None = None


def copy_to_host(*tensors: torch.Tensor | None) -> list[Any]:
    """Copy integer tensors to the CPU in one transfer, however many there are; None stays None."""
    given = [tensor for tensor in tensors if tensor is not None]
    devices = [tensor.device for tensor in given if tensor.device.type != "cpu"]
    if not devices:
        return list(tensors)
    flat = torch.cat([tensor.detach().to(devices[0], torch.long).flatten() for tensor in given]).cpu()
    parts = iter(flat.split([tensor.numel() for tensor in given]))
    return [None if tensor is None else next(parts).view(tensor.shape) for tensor in tensors]


def padding_flags(attention_mask: Any) -> list[torch.Tensor]:
    """Whether a two-dimensional mask is all ones, and whether a row ends in padding; nothing without such a mask."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return []
    return [(attention_mask != 0).all(), (attention_mask[:, -1] == 0).any()]


def all_finite(source: torch.Tensor) -> torch.Tensor:
    """`torch.isfinite(source).all()` in one pass that writes nothing; nothing waits for the answer."""
    if not source.numel():
        return torch.ones((), dtype=torch.bool, device=source.device)
    lowest, highest = torch.aminmax(source.detach())  # NaN shows in both
    return torch.isfinite(lowest) & torch.isfinite(highest)


def check_finite(is_finite: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Refuse views with NaN or infinite values: one of them would spoil every answer about the image in silence."""
    if not is_finite:
        views = torch.nonzero(~torch.isfinite(source).flatten(1).all(dim=1))[:, 0].tolist()
        raise ValueError(
            f"{name} holds values that are NaN or infinite, in the views {views} of {len(source)}; look at the images "
            "that they were made from, and make them anew."
        )


def check_views(model: Any, source: torch.Tensor, is_encoded: bool, positions: Any) -> None:
    """Compare the shapes of views, or of their features, with the geometry that came with them and with the model."""
    config = model.config
    rows, cols = config.patch_grid
    name: str = "pixel_values"
    wanted: tuple[int, ...] = (config.vision_config.num_channels, config.view_size, config.view_size)
    given = tuple(source.shape)
    fits = given[1:] == wanted
    if is_encoded:
        name, wanted = "vision_features", (rows * cols, config.vision_width)
        fits = given[1:] == wanted
    elif config.unequal_views:
        side = config.patch_size
        fits = len(given) == 4 and given[1] == wanted[0] and not given[2] % side and not given[3] % side
    if not fits:
        raise ValueError(
            f"{name} has the shape {given}, but this model reads views of shape "
            f"(views, {', '.join(map(str, wanted))}). Use the image processor that belongs to this checkpoint."
        )
    if tuple(positions.shape) != (given[0], NUM_COLUMNS):
        raise ValueError(
            f"view_positions has the shape {tuple(positions.shape)}, expected ({given[0]}, {NUM_COLUMNS}): one row a "
            f"view of {name}."
        )


def check_kinds(model: Any, images: list[ImageGeometry]) -> None:
    """Refuse views that no part of the model reads: their tokens would be missing without a word."""
    known = {kind for kind, _ in model.connector.entering}
    strange = {view[0] for image in images for view in image.views} - known
    if strange:
        names = {int(kind): name for name, kind in KINDS.items()}
        raise ValueError(
            f"The images have views of the kinds {[names.get(kind, kind) for kind in sorted(strange)]}, but this "
            f"model reads {[names[kind] for kind in sorted(known)]}; use its own image processor, or name them in "
            "layout.order."
        )


def read_encoder_outputs(outputs: Any) -> HiResLmmImageFeatures | None:
    """The features that `mm_encoder_outputs` holds: None, or a dict with the one key `"image"`."""
    if outputs is None:
        return None
    if not isinstance(outputs, dict) or set(outputs) - {"image"}:
        given = sorted(outputs) if isinstance(outputs, dict) else type(outputs).__name__
        raise ValueError(
            f'mm_encoder_outputs is {given}, expected {{"image": features}} with what get_image_features returned.'
        )
    image = outputs.get("image")
    if image is not None and not hasattr(image, "pooler_output"):
        raise ValueError(
            f'mm_encoder_outputs["image"] is a {type(image).__name__}; pass what get_image_features returned.'
        )
    return image if image is None or isinstance(image, HiResLmmImageFeatures) else HiResLmmImageFeatures.of(image)


def compare_counts(num_placeholders: int, num_tokens: int) -> None:
    """Compare the placeholders of a batch with the tokens that its images take."""
    if num_placeholders != num_tokens:
        raise ValueError(
            f"Image features and image tokens do not match, tokens: {num_placeholders}, features: {num_tokens}. Pass "
            "input_ids and the view tensors of one processor call, without truncation; a changed max_image_tokens, "
            "max_crops or views needs a new call for the text as well."
        )


def check_placeholders(num_placeholders: Any, positions: Any, has_turns: bool = False) -> None:
    """Compare placeholders with the tokens that `view_positions` promises; later turns may have more of their own."""
    if positions.ndim != 2 or positions.shape[1] != NUM_COLUMNS:
        raise ValueError(f"view_positions has the shape {tuple(positions.shape)}, expected (views, {NUM_COLUMNS}).")
    promised = int((positions[:, Column.NUM_TOKENS] * (positions[:, Column.STARTS_IMAGE] != 0)).sum())
    if not has_turns or int(num_placeholders) < promised:
        compare_counts(int(num_placeholders), promised)


def placeholders_per_image(features: BaseModelOutputWithPooling) -> list[int]:
    """Placeholders that each image of some features takes."""
    tokens = getattr(features, "tokens", None)
    return [len(part) for part in features.pooler_output] if tokens is None else list(tokens.num_tokens)


def check_text(text: PromptText, cache: Any, options: Mapping[str, Any], layer: int) -> None:
    """Refuse what would be ignored or fail deep inside: wrong lengths of mask and labels, options of the processor."""
    shape, mask, labels = tuple(text.embeds.shape[:2]), text.attention_mask, text.labels
    if cache is None and isinstance(mask, torch.Tensor) and mask.ndim == 2 and tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask has the shape {tuple(mask.shape)}, expected {shape}.")
    if labels is not None and tuple(labels.shape) != shape:
        raise ValueError(f"labels have the shape {tuple(labels.shape)}, expected {shape}.")
    found = sorted(OPTIONS_ELSEWHERE & options.keys())
    if options.get("vision_feature_layer", layer) != layer:  # the library fills in that of the configuration
        found.append("vision_feature_layer")
    if found:
        raise ValueError(
            f"{found[0]}={options[found[0]]!r} is no argument of the model: limits of images go to the processor, "
            "with images and text, options of parts into connector_config, vision_chunk_size and vision_feature_layer "
            "into the configuration or to get_image_features."
        )


def take_text(
    model: Any, ids: Any, embeds: Any, attention_mask: Any, cache: Any, options: dict[str, Any]
) -> PromptText:
    """Embed and check the text of a call, and take what says of it out of the keyword arguments."""
    if (ids is None) == (embeds is None):
        raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
    embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
    text = PromptText(ids, embeds, attention_mask, *(options.pop(name, None) for name in TEXT_ARGUMENTS))
    check_text(text, cache, options, model.config.vision_feature_layer)
    return text


def extra_arguments(config: Any) -> list[str]:
    """The arguments of a call that belong to extra towers: their views, or in place of these their features."""
    return [f"{what}_{name}" for name in config.tower_names for what in ("pixel_values", "vision_features")]


def check_extra(model: Any, extra: dict[str, torch.Tensor], images: list[ImageGeometry], prefix: str) -> None:
    """Compare the views of extra towers, or their features, with the images and with the towers."""
    count = sum(len(image.rows(kind)) for image in images for kind in WHOLE_KINDS)
    for name, tower in model.extra_towers.items():
        argument, config = f"{prefix}_{name}", tower.config
        if argument not in extra or len(extra) != len(model.config.tower_names):
            raise ValueError(
                f"{prefix} came without {argument}, or with more: {', '.join(extra) or 'nothing'} was passed for the "
                "extra towers. Pass all that the processor gives, or cached features of every tower."
            )
        side, (rows, cols) = view_side(config), tower_grid(config)
        one = (config.num_channels, side, side) if prefix == "pixel_values" else (rows * cols, tower_width(config))
        if tuple(extra[argument].shape) != (count, *one):
            raise ValueError(
                f"{argument} has the shape {tuple(extra[argument].shape)}, but these images need {(count, *one)}: one "
                "row a global view or frame. Use the processor that belongs to this checkpoint."
            )


def unpack_samples(config: Any, mask: torch.Tensor, given: dict[str, Any], extra: dict[str, Any]) -> None:
    """Put the rows of the dense layout, see `pack_samples` of the processor, into the arguments of the flat one."""
    pixels, width = given["pixel_values"], 1 + sum(columns for _, columns in DENSE_PARTS)
    if pixels is None or pixels.ndim != 5 or tuple(mask.shape) != (*pixels.shape[:2], width):
        raise ValueError(
            f"pixel_attention_mask has the shape {tuple(mask.shape)} and pixel_values "
            f"{None if pixels is None else tuple(pixels.shape)}; expected (samples, views, {width}) and (samples, "
            "views, 3, height, width), as the processor gives them in the dense layout."
        )
    if given["view_positions"] is not None or any(views is not None for views in extra.values()):
        raise ValueError("pixel_attention_mask holds the geometry of all views; pass no view_positions beside it.")
    pixels, mask, (shown,) = pixels.flatten(0, 1), mask.flatten(0, 1), copy_to_host(mask.flatten(0, 1))
    for number, name in enumerate(config.tower_names, 2):
        side = view_side(config.extra_tower_configs()[name])
        rows = (shown[:, 0] == number).nonzero()[:, 0].to(mask.device)
        extra[f"pixel_values_{name}"] = pixels[rows.to(pixels.device), :, :side, :side]
    is_view = shown[:, 0] == 1
    sides = [config.view_size] * 2
    if config.unequal_views and is_view.any():
        patches = shown[is_view][:, 1 + Column.PATCH_ROWS : 2 + Column.PATCH_COLS].amax(dim=0)
        sides = (patches * config.patch_size).tolist()
    rows = is_view.nonzero()[:, 0]
    given["pixel_values"] = pixels[rows.to(pixels.device), :, : sides[0], : sides[1]]
    parts = mask[rows.to(mask.device), 1:].split([columns for _, columns in DENSE_PARTS], dim=1)
    given.update({name: part for (name, _), part in zip(DENSE_PARTS, parts, strict=True)})


def count_objects(boxes: torch.Tensor | None) -> list[int] | None:
    """Objects of each image of `image_boxes` `(I, N, 4)`, which is checked."""
    if boxes is None:
        return None
    if boxes.ndim != 3 or boxes.shape[2] != 4 or boxes.is_floating_point():
        raise ValueError(
            f"image_boxes has the shape {tuple(boxes.shape)} in {boxes.dtype}, expected integers (images, objects, "
            "4); the processor makes them of boxes in pixels."
        )
    is_box = (boxes[..., :2] < boxes[..., 2:]).all(dim=-1) & (boxes >= 0).all(dim=-1) & (boxes <= BOX_SIDE).all(dim=-1)
    counts = is_box.sum(dim=1)
    is_first = torch.arange(boxes.shape[1]) < counts[:, None]
    wrong = (is_box != is_first) | (~is_first & (boxes != 0).any(dim=-1))
    if wrong.any():
        image, number = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"image_boxes[{image}, {number}] is {boxes[image, number].tolist()}, but must be top < bottom and left < "
            f"right from 0 to {BOX_SIDE}, and only zeros may follow the last object; pass what the processor returned."
        )
    return counts.tolist()


def check_objects(model: Any, given: ImageArguments) -> None:
    """Refuse boxes that no part reads."""
    if given.image_boxes is not None and not model.connector.reads_objects:
        raise ValueError("image_boxes were passed, but no part of this model makes tokens of objects; leave them out.")


def take_images(config: Any, options: dict[str, Any], **named: Any) -> ImageArguments:
    """Take what a call says of its images out of its keyword arguments."""
    given = {name: named[name] if name in named else options.pop(name, None) for name in IMAGE_ARGUMENTS}
    found = {argument: options.pop(argument, None) for argument in extra_arguments(config)}
    mask = given.pop("pixel_attention_mask")
    if mask is not None:
        unpack_samples(config, mask, given, found)
    features = read_encoder_outputs(given.pop("mm_encoder_outputs"))
    extra = {argument: views for argument, views in found.items() if views is not None}
    images = ImageArguments(**given, features=features, extra=extra)
    if sum(source is not None for source in (images.pixel_values, images.vision_features, images.features)) > 1:
        raise ValueError(
            "Pass one of pixel_values, vision_features and mm_encoder_outputs: they stand for the same images."
        )
    return images


def read_features(
    model: Any, features: HiResLmmImageFeatures, attention_mask: Any, placeholder: torch.Tensor
) -> list[bool]:
    """Compare features that were encoded before with the placeholders `(B, S)` of a call."""
    count, *flags = copy_to_host(placeholder.sum(), *padding_flags(attention_mask))
    if not model.connector.has_turns:
        compare_counts(int(count), sum(placeholders_per_image(features)))
    return [bool(flag) for flag in flags]


def read_images(
    model: Any, given: ImageArguments, attention_mask: Any = None, placeholder: torch.Tensor | None = None
) -> ImageInputs | None:
    """Check the images of a call and copy their geometry to the host, once; None without any."""
    is_encoded = given.vision_features is not None
    source = given.vision_features if is_encoded else given.pixel_values
    view_positions = given.view_positions
    if source is None and view_positions is not None and view_positions.shape[0]:
        raise ValueError(
            f"view_positions describes {view_positions.shape[0]} views, but pixel_values is missing; pass all that "
            "the processor returned."
        )
    for name, other in (("image_geometry", given.image_geometry), ("image_boxes", given.image_boxes)):
        if source is None and other is not None and len(other):
            raise ValueError(f"{name} came without pixel_values; pass both.")
    if source is None or not source.shape[0]:
        return None
    check_objects(model, given)
    boxes = None if given.image_boxes is None else given.image_boxes.to(source.device)
    name = "vision_features" if is_encoded else "pixel_values"
    if given.image_geometry is not None:
        check_extra(model, given.extra, given.image_geometry, name)
        return ImageInputs(source, given.image_geometry, given.extra, is_encoded, given.view_boxes, boxes=boxes)
    if view_positions is None or given.view_spans is None:
        raise ValueError(
            f"{name} came without view_positions and view_spans; pass all that the processor gives. Trainers that cut "
            'batches by sample drop them: give their processor image_layout="dense".'
        )
    is_here = placeholder is not None or view_positions.device == source.device
    sources = {name: source, **given.extra} if is_here else {}  # elsewhere looking would wait for it once more
    flags = [all_finite(each) for each in sources.values()]
    count = None if placeholder is None else placeholder.sum()
    positions, spans, objects, count, *flags = copy_to_host(
        view_positions, given.view_spans, given.image_boxes, count, *flags, *padding_flags(attention_mask)
    )
    if placeholder is not None:
        check_placeholders(count, positions, model.connector.has_turns)
    check_views(model, source, is_encoded, positions)
    for argument, each in sources.items():
        check_finite(flags.pop(0), each, argument)
    images = read_geometry(positions.tolist(), spans.tolist(), count_objects(objects))
    check_kinds(model, images)
    check_extra(model, given.extra, images, name)
    known = dict(zip(("is_unpadded", "is_right_padded"), map(bool, flags), strict=False))
    return ImageInputs(source, images, given.extra, is_encoded, given.view_boxes, **known, boxes=boxes)


def check_context(length: int, attention_mask: torch.Tensor | None, num_drafted: int, text_config: Any) -> None:
    """Refuse a prompt of `generate` that is longer than the language model reads."""
    limit = text_config.max_position_embeddings if hasattr(text_config, "max_position_embeddings") else None
    if limit is None or length <= limit:
        return
    if attention_mask is not None:
        length = int(attention_mask.sum(dim=1).max()) - num_drafted
    if length > limit:
        raise ValueError(
            f"The prompt has {length} tokens, more than the {limit} positions of the language model "
            "(max_position_embeddings); lower max_image_tokens or max_crops, or pass fewer images."
        )
