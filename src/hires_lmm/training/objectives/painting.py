"""Paint an image from what a model sees of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...modeling.carriers_hires_lmm import ViewFeatures
from ...modeling.inputs_hires_lmm import read_images, take_images
from ...modeling.towers_hires_lmm import run_towers
from ..parameters import find_base
from .epigone import read_views
from .files import find_folder, load_objectives
from .reconstruction import Reconstruction


@torch.no_grad()
def paint(
    model: Any,
    processor: Any,
    objective: Reconstruction,
    image: Any,
    steps: int = 28,
    seed: int = 0,
    images_kwargs: dict | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> torch.Tensor:
    """Paint one image from the tokens that a model makes of it.

    Args:
        model (`nn.Module`): The model, in evaluation mode.
        objective (`Reconstruction`): What training left in `objectives`.
        image: An image or a source, as the processor takes it.
        steps (`int`): Steps of the sampler.
        seed (`int`): Of the noise that it starts from.
        images_kwargs (`dict`, *optional*): Options of the image processor, such as `max_crops`.
        progress (`Callable`, *optional*): Called with `(done, total, description)`.

    Returns:
        `(3, S, S)` uint8.
    """
    base = find_base(model)
    objective.check_model(base)
    tokens, embedding = look(model, processor, image, images_kwargs)
    return objective.to(base.device).eval().sample(tokens, embedding, steps, seed, progress)[0]


@torch.no_grad()
def look(
    model: Any, processor: Any, image: Any, images_kwargs: dict | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a model makes of an image, up to where painting starts."""
    base = find_base(model)
    inputs = dict(processor.image_processor(image, return_tensors="pt", **(images_kwargs or {})).to(base.device))
    images: Any = read_images(base, take_images(base.config, inputs))
    views = base.connector.adapt(ViewFeatures(run_towers(base, images)[0], images.images))
    return read_views(views)


def find_reconstruction(checkpoint: str, folder: str | Path | None = None) -> Reconstruction:
    """The objective that belongs to a checkpoint."""
    place = find_folder(checkpoint) if folder is None else Path(folder)
    found = load_objectives(place).get("reconstruction") if place is not None else None
    if not isinstance(found, Reconstruction):
        raise ValueError(
            f"{checkpoint} has no folder 'objectives' with 'reconstruction' in or beside it; name the one that "
            "training with this objective left in its output folder: --objectives FOLDER."
        )
    return found


def write_png(pixels: torch.Tensor, path: str | Path) -> None:
    """Write an image."""
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(path, format="PNG")
