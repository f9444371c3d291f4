"""Values of images on disk: shards of tensors and an index, whole at any time, one writer at a time."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import replacing, write_text
from ..processing.image_input_hires_lmm import flatten_images, open_image, to_rgb


INDEX, LOCK = "index.json", "lock"
SHARD_BYTES = 1 << 30


def pixel_key(picture: Image.Image) -> str:
    """Name of an upright RGB image in a store: a hash of its pixels."""
    digest = blake2b(np.array(picture.size, dtype=np.int64).tobytes(), digest_size=16)
    digest.update(picture.tobytes())
    return digest.hexdigest()


def read_pictures(
    sources: Iterable, background: tuple[int, int, int], pixel_limit: int
) -> Iterator[tuple[str, Image.Image]]:
    """Key and upright RGB image of each source, or list of sources; one that cannot be read is named by its number."""
    flat = (single for source in sources for single in flatten_images(source))
    for number, single in enumerate(flat):
        picture = to_rgb(open_image(single, number), number, background, pixel_limit)
        yield pixel_key(picture), picture


class ImageStore:
    """Tensors by key in a folder: it grows, goes on after an interruption, and any number of processes may read it.

    Args:
        made_from (`dict`, *optional*): JSON values that decide over the tensors; the folder need not exist then. None
            takes the folder as it is.

    Raises:
        ValueError: If the folder was made from something else, or holds no store and `made_from` is None.
    """

    written_by: ClassVar[str] = "fill"
    """The function that writes such a store, for messages."""

    def __init__(self, folder: str | Path, made_from: dict[str, Any] | None = None):
        self.folder = Path(folder)
        self.made_from: dict[str, Any] = json.loads(json.dumps(made_from or {}))
        self.shards: dict[str, str] = {}
        self._files: dict[str, Any] = {}
        if not self._read() and made_from is None:
            raise ValueError(f"{str(folder)!r} holds no {INDEX}; write it with {self.written_by}.")
        self.check(made_from or {})

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, key: str) -> bool:
        return key in self.shards

    def check(self, made_from: dict[str, Any]) -> None:
        """Compare what decides over the tensors now with what did when they were written."""
        for name, now in json.loads(json.dumps(made_from)).items():
            then = self.made_from.get(name)
            if now != then:
                raise ValueError(
                    f"The cache {str(self.folder)!r} was made with {name}={then!r}, now it is {now!r}; write it anew "
                    f"in another folder with {self.written_by}, or change it back."
                )

    def get(self, key: str, rows: int | None = None) -> torch.Tensor:
        """The tensor of an image."""
        if key not in self.shards:
            raise ValueError(
                f"The cache {str(self.folder)!r} does not hold the image {key}; run {self.written_by} over all images "
                "of the dataset (it goes on where it stopped)."
            )
        shard = self.shards[key]
        try:
            if shard not in self._files:
                self._files[shard] = safe_open(self.folder / shard, framework="pt")
            return self._files[shard].get_tensor(key) if rows is None else self._files[shard].get_slice(key)[:rows]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"The cache file {str(self.folder / shard)!r} is missing or damaged ({error}); delete "
                f"{str(self.folder)!r} and run {self.written_by} again."
            ) from error

    def fill(
        self,
        items: Iterable[tuple[str, Any]],
        make: Callable[[list], Sequence[torch.Tensor]],
        batch_size: int = 1,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Write the tensors of items that are not there; other writers wait, and then find them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / LOCK):
            self._read()
            waiting: dict[str, Any] = {}
            made: dict[str, torch.Tensor] = {}

            def run() -> None:
                made.update(zip(waiting, make(list(waiting.values())) if waiting else (), strict=True))
                waiting.clear()

            try:
                for key, item in items:
                    if key not in self.shards and key not in made:
                        waiting[key] = item
                    if len(waiting) >= batch_size:
                        run()
                        if sum(tensor.nbytes for tensor in made.values()) >= shard_bytes:
                            self._write(made)
                run()
            except ValueError:
                if made:
                    self._write(made)
                raise
            self._write(made)

    def _read(self) -> bool:
        """Take over the index of the folder, if it has one."""
        if not (self.folder / INDEX).is_file():
            return False
        index = json.loads((self.folder / INDEX).read_text(encoding="utf-8"))
        self.made_from, self.shards = index["made_from"], index["shards"]
        return True

    def _write(self, made: dict[str, torch.Tensor]) -> None:
        """Write a shard, then the index, so that a killed run leaves a whole store."""
        if made:
            name = f"shard-{len(set(self.shards.values())):05d}.safetensors"
            with replacing(self.folder / name) as partial:
                save_file(made, partial)
            self.shards.update(dict.fromkeys(made, name))
            made.clear()
        write_text(self.folder / INDEX, json.dumps({"made_from": self.made_from, "shards": self.shards}))
