"""The whole images of a batch, for losses on pixels."""

from typing import Any

import numpy as np
import torch
from PIL import Image

from ...processing.image_input_hires_lmm import open_image, to_rgb
from ..collator import find_image
from .base import BatchColumn


SOURCE_IMAGES = "source_images"
WHITE = (255, 255, 255)


class SourceImages(BatchColumn):
    """The whole images of a batch, squeezed to `(I, 3, size, size)` uint8, which no cast of the batch can change."""

    def __init__(self, size: int):
        super().__init__(SOURCE_IMAGES)
        self.size = size

    def encode(self, messages: list[dict]) -> torch.Tensor | None:
        """The images of a sample."""
        found = [find_image(part) for message in messages for part in message["content"]]
        images = [read_pixels(image, self.size) for image in found if image is not None]
        return torch.stack(images) if images else None


def read_pixels(image: Any, size: int) -> torch.Tensor:
    """An image as `(3, size, size)` uint8."""
    rgb = to_rgb(open_image(image, 0), 0, WHITE)
    return torch.from_numpy(np.array(rgb.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
