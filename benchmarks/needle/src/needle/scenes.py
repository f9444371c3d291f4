"""Needle scenes: what stands where. A scene is data; `render_scene` makes its picture.

Pixels of a scene are called scene pixels. A scene is cut into `grid` crops and shrunk into one global view, both of
`view_size` pixels; one pixel of the global view is `scene_size / view_size` scene pixels.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from . import sprites
from .backgrounds import BACKGROUNDS, paint_background


COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 25),
    "green": (25, 215, 25),
    "blue": (30, 30, 225),
    "yellow": (235, 230, 25),
    "cyan": (25, 225, 225),
    "pink": (225, 30, 225),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
"""Object colours: the corners of the colour cube, nearly."""

COLOUR_NOISE = 10
PLACEMENTS = ("free", "jitter", "aligned")
PLACES = ("top left", "top right", "bottom left", "bottom right")
ATTEMPTS = 40


@dataclass(frozen=True)
class NeedleOptions:
    """How scenes are drawn.

    Args:
        scene_size (`int`): Side of the square scene, scene pixels.
        view_size (`int`): Side of a view, pixels.
        patch_size (`int`): Side of a patch of the vision tower, view pixels; the lattice of the aligned mode.
        grid (`int`): Crops along each side.
        object_height (`tuple` of two `float`): Least and greatest height of an object, pixels of the *global* view.
            At 2.25 a reader of the isolated digit gets 41 %.
        num_objects (`tuple` of two `int`): Fewest and most objects.
        kinds (`tuple` of pairs): Kinds and their weights.
        backgrounds (sequence of `str`): Names in `BACKGROUNDS`.
        fonts (sequence of `str`): Names in `FONTS`; all but `pillow` need matplotlib.
        placement (`str`): `free`: anywhere, objects may be cut by crop borders; `aligned`: on the patch lattice, never
            cut, one object a crop at most; `jitter`: aligned, then moved right and down by up to `jitter` pixels.
        jitter (`int`): See `placement`, view pixels.
        distinct (`bool`): Whether colours and values are unique in a scene, as questions need.
        crowded (`bool`): Whether aligned and jittered scenes may hold several objects in a crop.

    Raises:
        ValueError: If a value is out of range.
    """

    scene_size: int = 384
    view_size: int = 64
    patch_size: int = 8
    grid: int = 6
    object_height: tuple[float, float] = (2.0, 2.25)
    num_objects: tuple[int, int] = (2, 6)
    kinds: tuple[tuple[str, float], ...] = (
        ("digit", 0.4),
        ("number", 0.15),
        ("word", 0.15),
        ("shape", 0.15),
        ("chart", 0.15),
    )
    backgrounds: Sequence[str] = tuple(BACKGROUNDS)
    fonts: Sequence[str] = sprites.FONTS
    placement: str = "free"
    jitter: int = 3
    distinct: bool = True
    crowded: bool = False

    def __post_init__(self) -> None:
        if self.placement not in PLACEMENTS:
            raise ValueError(f"placement={self.placement!r} must be one of {', '.join(PLACEMENTS)}.")
        if not 1 <= self.num_objects[0] <= self.num_objects[1]:
            raise ValueError(f"num_objects={self.num_objects} must be two rising numbers from 1.")
        if self.distinct and self.num_objects[1] > len(COLOURS):
            raise ValueError(f"num_objects={self.num_objects}: distinct colours allow at most {len(COLOURS)}.")
        low, high = self.heights
        if low > high or low < 4:
            raise ValueError(
                f"object_height={self.object_height} gives objects of {low} to {high} scene pixels: "
                "enlarge scene_size or the range."
            )
        if self.crop_side < 3 * high:
            raise ValueError(
                f"Crops of {self.crop_side:g} scene pixels are too small for objects of {high}; lower grid."
            )

    @property
    def unit(self) -> float:
        """Scene pixels to one pixel of the global view."""
        return self.scene_size / self.view_size

    @property
    def crop_side(self) -> float:
        """Side of a crop, scene pixels."""
        return self.scene_size / self.grid

    @property
    def lattice(self) -> float:
        """Side of a patch of a crop, scene pixels."""
        return self.crop_side * self.patch_size / self.view_size

    @property
    def heights(self) -> tuple[int, int]:
        """Least and greatest height of an object, scene pixels."""
        return int(np.ceil(self.object_height[0] * self.unit)), int(self.object_height[1] * self.unit)


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, where its box lies (scene pixels), and the number that fixes its looks."""

    kind: str
    value: str
    colour: str
    top: int
    left: int
    height: int
    width: int
    look: int
    cut: bool
    place: str
    clear_place: bool


@dataclass(frozen=True)
class Scene:
    """A scene without its pixels: objects, background, options, split and the seed of the background."""

    objects: tuple[SceneObject, ...]
    background: str
    split: str
    seed: int
    options: NeedleOptions


def object_sprite(item: SceneObject, split: str, options: NeedleOptions) -> np.ndarray:
    """Draw an object.

    Args:
        item (`SceneObject`): The object.
        split (`str`): Split whose digit images are used.
        options (`NeedleOptions`): Fonts.

    Returns:
        `np.ndarray` (height, width): Coverage.
    """
    looks = random.Random(item.look)
    if item.kind == "digit":
        row = looks.choice(sprites.digit_rows(split)[item.value])
        return sprites.handwritten_digit(row, item.height, looks.uniform(-0.15, 0.15), item.width / item.height)
    if item.kind == "shape":
        return sprites.drawn_shape(item.value, item.height)
    if item.kind == "chart":
        return sprites.bar_chart(item.value, item.height, item.look)
    text = item.value.upper() if item.kind == "word" else item.value
    return sprites.rendered_text(text, item.height, looks.choice(options.fonts))


def _sample_object(rng: random.Random, options: NeedleOptions, split: str, taken: set[str]) -> SceneObject:
    kinds, weights = zip(*options.kinds, strict=True)
    kind = rng.choices(kinds, weights)[0]
    free_values = [value for value in sprites.VALUES_BY_KIND[kind] if kind == "chart" or value not in taken]
    free_colours = [colour for colour in COLOURS if colour not in taken]
    height = rng.randint(*options.heights)
    look = rng.getrandbits(30)
    width = round(height * rng.uniform(0.85, 1.1)) if kind == "digit" else height
    value = rng.choice(free_values)
    item = SceneObject(kind, value, rng.choice(free_colours), 0, 0, height, width, look, False, "", False)
    if kind in ("word", "number"):
        item = replace(item, width=object_sprite(item, split, options).shape[1])
    return item


def _position(rng: random.Random, item: SceneObject, options: NeedleOptions) -> tuple[int, int]:
    if options.placement == "free":
        high = options.scene_size
        return rng.randint(0, high - item.height), rng.randint(0, high - item.width)
    offset = options.jitter if options.placement == "jitter" else 0
    offset = round(offset * options.lattice / options.patch_size)
    corner = []
    for length in (item.height, item.width):
        room = int((options.crop_side - length - offset) // options.lattice)
        start = rng.randrange(options.grid) * options.crop_side + rng.randint(0, room) * options.lattice
        corner.append(round(start) + rng.randint(0, offset))
    return corner[0], corner[1]


def _is_free(item: SceneObject, others: list[SceneObject], options: NeedleOptions) -> bool:
    gap = item.height // 4
    alone = options.placement != "free" and not options.crowded
    for other in others:
        if alone and _crop(item, options) == _crop(other, options):
            return False
        below = item.top >= other.top + other.height + gap or other.top >= item.top + item.height + gap
        beside = item.left >= other.left + other.width + gap or other.left >= item.left + item.width + gap
        if not (below or beside):
            return False
    return True


def _crop(item: SceneObject, options: NeedleOptions) -> tuple[int, int]:
    return int(item.top // options.crop_side), int(item.left // options.crop_side)


def _placed(item: SceneObject, top: int, left: int, options: NeedleOptions) -> SceneObject:
    centre = (top + item.height / 2) / options.scene_size, (left + item.width / 2) / options.scene_size
    last = (top + item.height - 1) // options.crop_side, (left + item.width - 1) // options.crop_side
    place = f"{'top' if centre[0] < 0.5 else 'bottom'} {'left' if centre[1] < 0.5 else 'right'}"
    clear = min(abs(centre[0] - 0.5), abs(centre[1] - 0.5)) > 0.03
    cut = last != (top // options.crop_side, left // options.crop_side)
    return replace(item, top=top, left=left, cut=cut, place=place, clear_place=clear)


def sample_scene(options: NeedleOptions, split: str, key: Any) -> Scene:
    """Sample a scene.

    Args:
        options (`NeedleOptions`): How.
        split (`str`): `train`, `validation` or `test`; part of the key, and decides the digit images.
        key: Anything with a stable text form; the same key gives the same scene.

    Returns:
        The scene. Where objects find no room there are fewer than asked for.
    """
    rng = random.Random(f"needle/{split}/{key}")
    items: list[SceneObject] = []
    taken: set[str] = set()
    for _ in range(rng.randint(*options.num_objects)):
        item = _sample_object(rng, options, split, taken)
        for _ in range(ATTEMPTS):
            item = _placed(item, *_position(rng, item, options), options)
            if _is_free(item, items, options):
                items.append(item)
                taken |= {item.value, item.colour} if options.distinct else set()
                break
    return Scene(tuple(items), rng.choice(list(options.backgrounds)), split, rng.getrandbits(30), options)


def render_scene(scene: Scene) -> np.ndarray:
    """Draw a scene.

    Args:
        scene (`Scene`): The scene.

    Returns:
        `np.ndarray` (scene_size, scene_size, 3): uint8.
    """
    return paint_objects(scene, paint_scene_background(scene))


def paint_scene_background(scene: Scene) -> np.ndarray:
    """The background of a scene, `(scene_size, scene_size, 3)`, float32."""
    options = scene.options
    return paint_background(scene.background, scene.seed, options.scene_size, options.scene_size, options.unit)


def paint_objects(scene: Scene, image: np.ndarray) -> np.ndarray:
    """The objects of a scene on its background, which is changed; uint8."""
    for item in scene.objects:
        looks = random.Random(item.look + 1)
        colour = [channel + looks.uniform(-COLOUR_NOISE, COLOUR_NOISE) for channel in COLOURS[item.colour]]
        cover = object_sprite(item, scene.split, scene.options)[..., None]
        box = image[item.top : item.top + item.height, item.left : item.left + item.width]
        box += cover * (np.asarray(colour, dtype=np.float32) - box)
    return np.clip(image, 0, 255).astype(np.uint8)
