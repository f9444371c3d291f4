"""Needle scenes as training data: numbered scenes, and their tower features in one file that all runs share."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm.auto import tqdm

from ...files import write_text
from ..data.needle import NeedleOptions, Question, ask_questions, needle_scene, render_scene
from ..data.scenes import Scene
from ..data.text_scenes import pick_questions
from ..features import evaluating, planner_key, tower_key
from ..stages import find_base


FEATURES, INDEX = "features.f16", "index.json"


@dataclass(frozen=True)
class SceneSet:
    """A numbered set of scenes.

    Args:
        split (`str`): `train`, `validation` or `test`.
        count (`int`): How many.
        seed (`int`): Another seed, other scenes.
        options (`NeedleOptions`): How scenes are drawn.
    """

    split: str
    count: int
    seed: int = 0
    options: NeedleOptions = field(default_factory=NeedleOptions)

    def picture(self, index: int) -> Image.Image:
        """The picture of a scene.

        Args:
            index (`int`): Number of the scene.
        """
        return Image.fromarray(render_scene(self.scene(index)))

    def scene(self, index: int) -> Scene:
        """A scene without its pixels.

        Args:
            index (`int`): Number of the scene.
        """
        return needle_scene(index, self.split, self.seed, self.options)

    def questions(self, index: int, kinds: Sequence[str], most: int, visit: int = 0) -> list[Question]:
        """Questions about a scene, of all kinds alike.

        Args:
            index (`int`): Number of the scene.
            kinds (sequence of `str`): Kinds that may be asked.
            most (`int`): Most questions.
            visit (`int`): Another visit, another choice.

        Returns:
            At most `most` questions.
        """
        asked = _all_questions(self.split, self.seed, _text(self.options), index)
        return pick_questions(asked, kinds, most, random.Random(f"visit/{self.split}/{self.seed}/{index}/{visit}"))


def near_options(options: NeedleOptions) -> NeedleOptions:
    """Scenes of one view that show objects at the size they have in the crops of other scenes.

    Args:
        options (`NeedleOptions`): Of the other scenes.

    Returns:
        Options of scenes with up to four objects, for which the global view is enough.
    """
    low, high = (height * options.grid for height in options.object_height)
    return replace(
        options, scene_size=options.view_size, grid=1, object_height=(low, high), num_objects=(1, 4), placement="free"
    )


def _text(options: NeedleOptions) -> str:
    return json.dumps(asdict(options), sort_keys=True)


@lru_cache(maxsize=16)
def _read_options(text: str) -> NeedleOptions:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in json.loads(text).items()
    }
    return NeedleOptions(**{**values, "kinds": tuple(tuple(pair) for pair in values["kinds"])})


@lru_cache(maxsize=100_000)
def _all_questions(split: str, seed: int, options: str, index: int) -> list[Question]:
    return ask_questions(needle_scene(index, split, seed, _read_options(options)))


class SceneFeatures:
    """Tower features of a scene set, memory-mapped.

    Args:
        folder (`Path`): What `cache_scenes` wrote.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.shape = tuple(self.index["shape"])
        self._map: Any = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}

    def __len__(self) -> int:
        return (self.folder / FEATURES).stat().st_size // _bytes(self.shape)

    def get(self, scenes: Sequence[int], num_views: int) -> torch.Tensor:
        """Features of the first views of some scenes.

        Args:
            scenes (sequence of `int`): Numbers of the scenes.
            num_views (`int`): Views of each; the global view is the first.

        Returns:
            `(scenes * num_views, L, C)` float32.

        Raises:
            ValueError: If a scene is not in the file.
        """
        self._open(max(scenes))
        rows = np.stack([self._map[scene, :num_views] for scene in scenes])
        return torch.from_numpy(rows).flatten(0, 1).float()

    def pick(self, scene: int, views: Sequence[int]) -> torch.Tensor:
        """Features of some views of a scene.

        Args:
            scene (`int`): Number of the scene.
            views (sequence of `int`): Numbers of the views; 0 is the global one.

        Returns:
            `(len(views), L, C)` float32.

        Raises:
            ValueError: If the scene is not in the file.
        """
        self._open(scene)
        return torch.from_numpy(self._map[scene, list(views)]).float()

    def _open(self, scene: int) -> None:
        """Map the file, and refuse scenes that it does not hold."""
        if self._map is None:
            self._map = np.memmap(self.folder / FEATURES, np.float16, "r", shape=(len(self), *self.shape))
        if scene >= len(self._map):
            raise ValueError(f"{self.folder} holds {len(self._map)} scenes, not scene {scene}; run cache_scenes.")


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * int(np.prod(shape))


def _cached(folder: Path) -> int:
    """How many scenes a cache holds."""
    return len(SceneFeatures(folder)) if (folder / INDEX).is_file() else 0


@torch.no_grad()
def cache_scenes(model: Any, processor: Any, scenes: SceneSet, folder: str | Path) -> SceneFeatures:
    """Write the tower features of a scene set in half precision.

    All runs with the same tower, planner and scenes share one file; it grows where more scenes are wanted, goes on
    after an interruption, and other runs wait while one writes.

    Args:
        model (`nn.Module`): Its tower is run, in evaluation mode.
        processor (`HiResLmmProcessor`): Cuts the pictures, all views.
        scenes (`SceneSet`): The scenes.
        folder (`str` or `Path`): Parent of all caches.

    Returns:
        The features of at least `scenes.count` scenes.
    """
    base = find_base(model)
    made_from = {
        "tower": tower_key(model),
        "planner": planner_key(processor),
        "scenes": [scenes.split, scenes.seed, json.loads(_text(scenes.options))],
    }
    name = blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=8).hexdigest()
    target = Path(folder) / f"{scenes.split}-{name}"
    target.mkdir(parents=True, exist_ok=True)
    if _cached(target) >= scenes.count:
        return SceneFeatures(target)
    with FileLock(target / "lock"), evaluating(base.vision_tower):
        done = _cached(target)
        device = base.vision_tower.device
        with (target / FEATURES).open("ab") as stream:
            for index in tqdm(range(done, scenes.count), f"tower features, {scenes.split}", disable=None):
                pixels = processor.image_processor(scenes.picture(index), views="all", return_tensors="pt")
                features = base.encode_pixels(pixels["pixel_values"].to(device), base.config.vision_feature_layer)
                features = features.to("cpu", torch.float16).contiguous().numpy()
                if not (target / INDEX).is_file():
                    index_text = json.dumps({**made_from, "shape": list(features.shape)})
                    write_text(target / INDEX, index_text)
                if index == done:
                    stream.truncate(done * _bytes(features.shape))
                stream.write(features.tobytes())
    return SceneFeatures(target)
