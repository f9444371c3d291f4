"""Seeded sizes and pictures for tests."""

import random
import struct

import numpy as np
import PIL
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_STD


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


PILLOW = int(PIL.__version__.split(".")[0])
BACKENDS = ("pillow", "torch")


def assert_same_views(found, wanted, backend: str, deviation=OPENAI_CLIP_STD) -> None:
    """Normalised views that two libraries drew: equal by Pillow, by torch at most 2 of 255 levels apart.

    Pillow before 13 resizes the axes in another order, and rounds another way where that matters.
    """
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape and found.dtype == wanted.dtype == np.float32
    levels = np.abs(found - wanted) * 255 * np.reshape(deviation, (3, 1, 1))
    most, mean = (1e-2, 1e-3) if backend == "pillow" else (2.01 if PILLOW >= 13 else 40, 0.25 if PILLOW >= 13 else 5)
    assert levels.max() <= most and levels.mean() <= mean, (levels.max(), levels.mean())


def psd(array: np.ndarray, layers: int, depth: int = 8, mode: int = 3) -> bytes:
    """A layered file: raw channels of the whole picture, and layers of one pixel each."""
    height, width = array.shape[:2]
    records, data = b"", b""
    for _ in range(layers):
        channels = b"".join(struct.pack(">hI", channel, 3) for channel in range(3))
        records += struct.pack(">iiiiH", 0, 0, 1, 1, 3) + channels + b"8BIMnorm\xff\0\0\0" + struct.pack(">I", 12)
        records += struct.pack(">II", 0, 0) + b"\3abc"
        data += (b"\0\0" + b"\x80") * 3
    info = struct.pack(">h", layers) + records + data
    info += b"\0" * (len(info) % 2)
    section = struct.pack(">I", len(info)) + info + struct.pack(">I", 0) if layers else b""
    header = b"8BPS\0\1" + b"\0" * 6 + struct.pack(">HIIHH", 3, height, width, depth, mode)
    body = b"\0\0" + b"".join(array[:, :, channel].tobytes() for channel in range(3))
    return header + struct.pack(">II", 0, 0) + struct.pack(">I", len(section)) + section + body
