"""Images of a few questions: opened once, seen by the vision tower once, cut and counted as each setting asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ..modeling.bases_hires_lmm import Needs
from ..modeling.layer_ops_hires_lmm import ops_of
from ..modeling.outputs_hires_lmm import HiResLmmImageFeatures
from ..processing.image_input_hires_lmm import open_image, to_rgb
from .rows import source_key
from .settings import SweepSetting


VIEWS_PER_PASS = 64


def open_picture(processor: Any, source: Any, index: int) -> Image.Image:
    """An image as the image processor reads it: upright, in RGB."""
    options = processor.image_processor
    return to_rgb(open_image(source, index), index, tuple(options.background), options.pixel_limit)


@dataclass(frozen=True)
class EncodedImages:
    """Features of some images under one setting, numbers by `source_key`, and the texts that stand for them."""

    features: HiResLmmImageFeatures
    order: dict
    placeholders: list


class ImageEncoder:
    """Encodes the images of a few questions; what the tower gave is shared by all settings that see the same views."""

    def __init__(self, base: Any, processor: Any, sources: list):
        self.base, self.processor, self.sources = base, processor, sources
        self._pictures: dict[int | None, list[Image.Image]] = {}
        self._seen: dict[tuple, torch.Tensor] = {}

    def check_budgets(self, settings: Sequence[SweepSetting]) -> None:
        """Refuse budgets too small for one of the images, all by name, with the smallest that is large enough."""
        refused = {}
        for setting in settings:
            if setting.tokens is None or setting.views == "none":
                continue
            sizes = [(picture.height, picture.width) for picture in self._resized(setting.image_size)]
            options = {"views": setting.views, "max_image_tokens": setting.tokens, "max_crops": setting.max_crops}
            try:
                self.processor.image_processor.count_images(sizes, **options)
            except ValueError as error:
                refused[setting.tokens] = error
        if refused:
            raise ValueError(f"Leave out tokens={','.join(map(str, sorted(refused)))}. {refused[max(refused)]}")

    @torch.inference_mode()
    def encode(self, setting: SweepSetting) -> EncodedImages:
        """Encode all images with the views, budget, crops and size of a setting."""
        options = {"views": setting.views, "max_image_tokens": setting.tokens, "max_crops": setting.max_crops}
        pictures = self._resized(setting.image_size)
        inputs = self.processor.image_processor(pictures, return_tensors="pt", **options)
        device = self.base.device
        features = self.base.get_image_features(
            view_positions=inputs["view_positions"].to(device),
            view_spans=inputs["view_spans"].to(device),
            view_boxes=inputs["view_boxes"].to(device),
            **self._sources(setting, inputs),
            return_dict=True,
        )
        placeholders = [
            self.processor.replace_image_token(inputs, image_idx=index) for index in range(len(self.sources))
        ]
        order = {source_key(source): index for index, source in enumerate(self.sources)}
        return EncodedImages(features, order, placeholders)

    def _resized(self, image_size: int | None) -> list[Image.Image]:
        """The pictures with a longest side of `image_size`."""
        if None not in self._pictures:
            self._pictures[None] = [
                open_picture(self.processor, source() if callable(source) else source, index)
                for index, source in enumerate(self.sources)
            ]
        if image_size not in self._pictures:
            self._pictures[image_size] = [_resize(picture, image_size) for picture in self._pictures[None]]
        return self._pictures[image_size]

    def _sources(self, setting: SweepSetting, inputs: Any) -> dict[str, torch.Tensor]:
        """What the towers gave, kept for other settings; pixels, where parts read more of the towers than that."""
        pixels = {name: inputs[name].to(self.base.device) for name in inputs if name.startswith("pixel_values")}
        if len(pixels) > 1 or self.base.connector.needs != Needs() or ops_of(self.base, "vision_tower"):
            return pixels
        return {"vision_features": self._tower(setting, pixels["pixel_values"])}

    def _tower(self, setting: SweepSetting, pixels: torch.Tensor) -> torch.Tensor:
        """Patch features `(V, L, C)` of all views; the views do not depend on the budget."""
        has_crops = setting.views != "global"
        key = (setting.max_crops, setting.image_size, has_crops)
        if key not in self._seen:
            parts = [self.base.encode_pixels(part, None) for part in pixels.split(VIEWS_PER_PASS)]
            self._seen[key] = torch.cat(parts)
        return self._seen[key]


def _resize(picture: Image.Image, image_size: int | None) -> Image.Image:
    if image_size is None or max(picture.size) == image_size:
        return picture
    scale = image_size / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
