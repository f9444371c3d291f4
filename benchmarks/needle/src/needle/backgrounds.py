"""Backgrounds of needle scenes: plain ones and procedural ones that look a little like photographs.

All lie in the middle of the brightness range, so each of the eight object colours stands out on each of them.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image


NOISE_SIDE = 257
"""A prime, so that repetitions of the noise tile fall on different places of every row of crops."""


def fractal_noise(generator: np.random.Generator, height: int, width: int, cell: float, octaves: int) -> np.ndarray:
    """Smooth noise with detail on several scales.

    Args:
        generator (`np.random.Generator`): Source of numbers.
        height (`int`): Rows, pixels.
        width (`int`): Columns, pixels.
        cell (`float`): Size of the coarsest spots, pixels.
        octaves (`int`): Number of scales, each half as coarse and half as strong as the one before.

    Returns:
        `np.ndarray` (height, width): float32, about -1 to 1.
    """
    total = np.zeros((height, width), dtype=np.float32)
    for octave in range(octaves):
        side = max(cell / 2**octave, 1.0)
        shape = (max(2, round(height / side) + 1), max(2, round(width / side) + 1))
        spots = Image.fromarray(generator.uniform(-1, 1, shape).astype(np.float32))
        total += np.asarray(spots.resize((width, height), Image.Resampling.BILINEAR)) / 2**octave
    return total * 0.6


def _plain(generator: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    tint = generator.uniform(-12, 12, 3).astype(np.float32)
    return np.broadcast_to(generator.uniform(110, 145) + tint, (height, width, 3)).astype(np.float32)


def _sky(generator: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    clouds = np.clip(fractal_noise(generator, height, width, 20 * unit, 3) + 0.2, 0, 1)[..., None]
    fall = np.linspace(-14, 14, height, dtype=np.float32)[:, None, None]
    blue = np.array([92, 122, 166], dtype=np.float32) + fall
    return blue * (1 - clouds) + np.array([158, 162, 170], dtype=np.float32) * clouds


def _grass(generator: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    blades = fractal_noise(generator, max(2, height // 4), width, 0.8 * unit, 2)
    blades = np.asarray(Image.fromarray(blades).resize((width, height), Image.Resampling.BILINEAR))
    light = fractal_noise(generator, height, width, 16 * unit, 2)
    return np.array([96, 128, 82], dtype=np.float32) + (16 * blades + 14 * light)[..., None]


def _sand(generator: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    warp = fractal_noise(generator, height, width, 14 * unit, 2)
    rows = np.arange(height, dtype=np.float32)[:, None] / unit
    ripples = np.sin(1.1 * rows + generator.uniform(0, 6) + 3 * warp)
    return np.array([160, 138, 104], dtype=np.float32) + (8 * ripples + 10 * warp)[..., None]


def _brick(generator: np.random.Generator, height: int, width: int, unit: float) -> np.ndarray:
    tall, wide = max(2.0, 2.5 * unit), max(4.0, 6 * unit)
    rows, columns = np.arange(height) + generator.uniform(0, tall), np.arange(width) + generator.uniform(0, wide)
    row = (rows / tall).astype(int)
    shifted = columns[None] + (row % 2)[:, None] * (wide / 2)
    column = (shifted / wide).astype(int)
    shade = generator.uniform(-16, 16, (row.max() + 1, column.max() + 1)).astype(np.float32)[row[:, None], column]
    joint = ((rows % tall) < 0.35 * unit)[:, None] | ((shifted % wide) < 0.35 * unit)
    wall = np.array([146, 98, 84], dtype=np.float32) + shade[..., None]
    wall[joint] = (138, 134, 128)
    return wall


BACKGROUNDS: dict[str, Callable[[np.random.Generator, int, int, float], np.ndarray]] = {
    "plain": _plain,
    "sky": _sky,
    "grass": _grass,
    "sand": _sand,
    "brick": _brick,
}


def paint_background(name: str, seed: int, height: int, width: int, unit: float) -> np.ndarray:
    """Paint a background with sensor noise.

    Args:
        name (`str`): A name in `BACKGROUNDS`.
        seed (`int`): Decides every detail.
        height (`int`): Rows, pixels.
        width (`int`): Columns, pixels.
        unit (`float`): Scale of the texture: scene pixels to one pixel of the global view.

    Returns:
        `np.ndarray` (height, width, 3): float32, 0 to 255.

    Raises:
        ValueError: If the background is unknown.
    """
    if name not in BACKGROUNDS:
        raise ValueError(f"Unknown background {name!r}: backgrounds are {', '.join(BACKGROUNDS)}.")
    generator = np.random.default_rng(seed)
    image = BACKGROUNDS[name](generator, height, width, unit)
    tile = generator.standard_normal((min(NOISE_SIDE, height), min(NOISE_SIDE, width), 3), dtype=np.float32)
    image += 5 * np.tile(tile, (-(-height // len(tile)), -(-width // tile.shape[1]), 1))[:height, :width]
    return image
