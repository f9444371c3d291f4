"""Codebook indices on disk, so that training runs no VQ model."""

import json
from collections.abc import Iterable, Iterator, Sized
from hashlib import blake2b
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import track

from ...files import replacing, write_text
from ...processing.image_input_hires_lmm import DEFAULT_PIXEL_LIMIT, flatten_images, open_image, to_rgb
from .cognition_codes import Quantiser, check_codes


INDEX, LOCK = "index.json", "lock"
SHARD_IMAGES = 4096


def pixel_key(image: Image.Image) -> str:
    """Name of an image in a cache: a hash of its pixels.

    Args:
        image (`Image.Image`): An upright RGB image.
    """
    digest = blake2b(np.array(image.size, dtype=np.int64).tobytes(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


class CachedCodes:
    """Reads what `cache_codes` wrote; a quantiser that runs no model.

    Args:
        folder (`str`): The folder.

    Raises:
        ValueError: If the folder holds no cache.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise ValueError(f"{str(folder)!r} holds no {INDEX}; write it with cache_codes.")
        self.index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.num_codes: int = self.index["num_codes"]
        self.grid: tuple[int, int] = tuple(self.index["grid"])
        self._shards: dict[int, np.ndarray] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_shards": {}}

    def __len__(self) -> int:
        return len(self.index["images"])

    def __call__(self, images: list[Image.Image]) -> np.ndarray:
        """Indices of images.

        Args:
            images (`list[Image.Image]`): n upright RGB images, as `to_rgb` gives them.

        Returns:
            `np.ndarray` (n, rows, cols) int64.

        Raises:
            ValueError: If an image is not in the cache.
        """
        return np.stack([self._get(pixel_key(image)) for image in images])

    def _get(self, key: str) -> np.ndarray:
        place = self.index["images"].get(key)
        if place is None:
            raise ValueError(
                f"The cache {str(self.folder)!r} does not hold the image {key}; run cache_codes over all images of "
                "the dataset (it goes on where it stopped), with the same background colour."
            )
        shard, row = place
        if shard not in self._shards:
            self._shards[shard] = np.load(self.folder / _shard_name(shard), mmap_mode="r")
        return np.asarray(self._shards[shard][row], dtype=np.int64)


def cache_codes(
    quantiser: Quantiser,
    images: Iterable,
    folder: str | Path,
    batch_size: int = 16,
    background: tuple[int, int, int] = (255, 255, 255),
    pixel_limit: int = DEFAULT_PIXEL_LIMIT,
    show_progress: bool = True,
) -> CachedCodes:
    """Write the codes of images to a folder, so that training runs no VQ model.

    Images that the folder already holds are skipped, so an interrupted run goes on where its last shard ended. One
    process writes at a time; others wait, and then find the images there.

    Args:
        quantiser (`Quantiser`): Makes the codes.
        images (`Iterable`): Images or sources, as the processor takes them; repetitions cost a hash.
        folder (`str`): Where to write.
        batch_size (`int`): Images that the quantiser sees at once.
        background (`tuple[int, int, int]`): Colour under transparent pixels, that of the processor.
        pixel_limit (`int`): Most pixels of an image, that of the processor.
        show_progress (`bool`): Draw a bar on the standard error stream.

    Returns:
        The cache.

    Raises:
        ValueError: If the folder holds codes of another quantiser, or the quantiser gives senseless ones; if an image
            cannot be read: the message names its number, counted from 0, and what was coded before it is kept.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    known = len(images) if isinstance(images, Sized) else None
    shown = track(images, "codes", total=known, console=Console(stderr=True), disable=not show_progress)
    with FileLock(folder / LOCK):
        index = _open_index(folder, quantiser)
        waiting: dict[str, np.ndarray] = {}
        pending: dict[str, Image.Image] = {}
        try:
            for image in _pictures(shown, background, pixel_limit):
                key = pixel_key(image)
                if key not in index["images"] and key not in waiting:
                    pending[key] = image
                if len(pending) >= batch_size:
                    _run(quantiser, pending, waiting)
                if len(waiting) >= SHARD_IMAGES:
                    _write_shard(folder, index, waiting)
        except ValueError:
            if waiting:
                _write_shard(folder, index, waiting)
            raise
        _run(quantiser, pending, waiting)
        _write_shard(folder, index, waiting)
    return CachedCodes(folder)


def _pictures(sources: Iterable, background: tuple[int, int, int], pixel_limit: int) -> Iterator[Image.Image]:
    flat = (single for source in sources for single in flatten_images(source))
    for number, single in enumerate(flat):
        yield to_rgb(open_image(single, number), number, background, pixel_limit)


def _open_index(folder: Path, quantiser: Quantiser) -> dict:
    """The index of a folder, or a new one."""
    fingerprint = getattr(quantiser, "fingerprint", type(quantiser).__name__)
    facts = {"quantiser": fingerprint, "num_codes": int(quantiser.num_codes), "grid": list(quantiser.grid)}
    if not (folder / INDEX).is_file():
        return {**facts, "shards": 0, "images": {}}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    changed = [name for name, value in facts.items() if index[name] != value]
    if changed:
        raise ValueError(
            f"The cache {str(folder)!r} was made with {changed[0]}={index[changed[0]]!r}, the quantiser has "
            f"{facts[changed[0]]!r}; choose another folder."
        )
    return index


def _run(quantiser: Quantiser, pending: dict[str, Image.Image], waiting: dict[str, np.ndarray]) -> None:
    if pending:
        codes = check_codes(quantiser(list(pending.values())), quantiser, len(pending))
        waiting.update(zip(pending, codes, strict=True))
        pending.clear()


def _write_shard(folder: Path, index: dict, waiting: dict[str, np.ndarray]) -> None:
    """Write a shard, then the index, so that a killed run leaves a whole cache."""
    if waiting:
        kind = np.min_scalar_type(index["num_codes"] - 1)
        with replacing(folder / _shard_name(index["shards"])) as partial, partial.open("wb") as stream:
            np.save(stream, np.stack(list(waiting.values())).astype(kind))
        index["images"].update({key: [index["shards"], row] for row, key in enumerate(waiting)})
        index["shards"] += 1
        waiting.clear()
    write_text(folder / INDEX, json.dumps(index))


def _shard_name(number: int) -> str:
    return f"codes-{number:05d}.npy"
