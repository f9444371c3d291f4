"""Needle scenes as training data: numbered scenes, and their tower features, which all runs share."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from hires_lmm.training.features import encode_picture, evaluating, planner_key, tower_key
from hires_lmm.training.image_store import ImageStore
from hires_lmm.training.parameters import find_base

from ..dataset import draw, needle_scene
from ..questions import Question, ask_questions
from ..scenes import NeedleOptions, Scene
from ..text_scenes import pick_questions


SHARD_BYTES = 1 << 26
VIEWS_PER_PASS = 64


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
        return draw(self.scene(index))

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


class SceneFeatures(ImageStore):
    """Tower features of a scene set, in half precision.

    Args:
        folder (`Path`): What `cache_scenes` wrote.
        made_from (`dict`, *optional*): See `ImageStore`.
    """

    written_by = "cache_scenes"

    def first_views(self, scenes: Sequence[int], num_views: int) -> torch.Tensor:
        """Features of the first views of some scenes.

        Args:
            scenes (sequence of `int`): Numbers of the scenes.
            num_views (`int`): Views of each; the global view is the first.

        Returns:
            `(scenes * num_views, L, C)` float32.

        Raises:
            ValueError: If a scene is not in the store.
        """
        return torch.cat([self.get(str(scene), num_views) for scene in scenes]).float()

    def pick(self, scene: int, views: Sequence[int]) -> torch.Tensor:
        """Features of some views of a scene.

        Args:
            scene (`int`): Number of the scene.
            views (sequence of `int`): Numbers of the views; 0 is the global one.

        Returns:
            `(len(views), L, C)` float32.

        Raises:
            ValueError: If the scene is not in the store.
        """
        return self.get(str(scene), max(views) + 1)[list(views)].float()


def cache_scenes(model: Any, processor: Any, scenes: SceneSet, folder: str | Path) -> SceneFeatures:
    """Write the tower features of a scene set.

    All runs with the same tower, planner and scenes share one store; it grows where more scenes are wanted, goes on
    after an interruption, and other runs wait while one writes.

    Args:
        model (`nn.Module`): Its tower is run, in evaluation mode.
        processor (`HiResLmmProcessor`): Cuts the pictures, all views.
        scenes (`SceneSet`): The scenes.
        folder (`str` or `Path`): Parent of all stores.

    Returns:
        The features of at least `scenes.count` scenes.
    """
    base = find_base(model)
    made_from = {
        "tower": tower_key(model),
        **planner_key(processor),
        "scenes": [scenes.split, scenes.seed, json.loads(_text(scenes.options))],
    }
    name = blake2b(json.dumps(made_from, sort_keys=True).encode(), digest_size=8).hexdigest()
    store = SceneFeatures(Path(folder) / f"{scenes.split}-{name}", made_from)
    if len(store) >= scenes.count:
        return store

    def make(numbers: list[int]) -> list[torch.Tensor]:
        pictures = (scenes.picture(number) for number in numbers)
        return [encode_picture(base, processor, picture, VIEWS_PER_PASS, torch.float16) for picture in pictures]

    shown = tqdm(range(scenes.count), f"tower features, {scenes.split}", disable=None)
    with evaluating(base.vision_tower):
        store.fill(((str(number), number) for number in shown), make, shard_bytes=SHARD_BYTES)
    return store
