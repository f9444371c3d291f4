"""Seeded sizes and pictures for tests."""

import random

import numpy as np
from PIL import Image


def random_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """Seeded (height, width) from 1x1 to 10000x300, small and large ones alike, in both orientations."""
    generator = random.Random(seed)
    sizes = [(1, 1), (10000, 300), (300, 10000), (1, 10000), (10000, 1)]
    while len(sizes) < count:
        size = (int(10 ** generator.uniform(0, 4)), int(10 ** generator.uniform(0, 2.5)))
        sizes.append(size if generator.random() < 0.5 else size[::-1])
    return sizes


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture of seeded noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
