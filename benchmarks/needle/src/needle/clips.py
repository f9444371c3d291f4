"""Needle clips: short videos of needle objects, with questions that no single frame answers.

A clip is data, as a scene is; `render_clip` draws its frames. Its objects are as large as in the crops of scenes, so
that one view shows what they are.
"""

import random
from dataclasses import dataclass, replace

import numpy as np

from .questions import Question
from .scenes import NeedleOptions, Scene, SceneObject, _placed, _sample_object, paint_objects, paint_scene_background
from .sprites import DIGITS, SPLITS


CLIP_KINDS = ("way", "first", "before", "total")
"""Which way an object moves, which came first, which digit stood before or after another, how many there were."""

CLIP_CHANCE = {"way": 1 / 4, "first": 1 / 2, "before": 1 / 9, "total": 1 / 4}
"""What guessing among the possible answers gets."""

CLIP_WORDS = ("way", "does", "move", "up", "down", "first", "before", "after", "all")
"""Words of the questions that the vocabulary of the halves lacks."""

WAYS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
STEPS = 8
"""Equal parts of a clip; something changes between them alone, so eight even frames miss nothing."""

TOTALS = (2, 3, 4, 5)


@dataclass(frozen=True)
class Track:
    """An object in its first frame, the frames that show it, and rows and columns that it moves from frame to frame,
    pixels."""

    item: SceneObject
    frames: range
    move: tuple[float, float] = (0.0, 0.0)

    def at(self, frame: int) -> SceneObject:
        """The object in a frame."""
        down, across = (round(length * (frame - self.frames.start)) for length in self.move)
        return replace(self.item, top=self.item.top + down, left=self.item.left + across)


@dataclass(frozen=True)
class Clip:
    """A clip without its pixels: kind of its questions, tracks, questions, and a scene that holds the rest."""

    kind: str
    tracks: tuple[Track, ...]
    questions: tuple[Question, ...]
    scene: Scene
    num_frames: int


def clip_options(size: int = 64) -> NeedleOptions:
    """How the frames of clips are drawn: digits and shapes at the size they have in crops of scenes.

    Args:
        size (`int`): Height and width, pixels.
    """
    kinds = (("digit", 0.5), ("shape", 0.5))
    return NeedleOptions(scene_size=size, grid=1, object_height=(12.0, 13.5), kinds=kinds)


def needle_clip(index: int, split: str, seed: int = 0, num_frames: int = STEPS, size: int = 64) -> Clip:
    """One clip, without its pixels.

    Args:
        index (`int`): Number of the clip; the kinds take turns.
        split (`str`): `train`, `validation` or `test`; they share neither clips nor digit images.
        seed (`int`): Another seed, other clips.
        num_frames (`int`): A multiple of 8.
        size (`int`): Height and width, pixels.

    Raises:
        ValueError: If the split or the number of frames is wrong.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    if num_frames < STEPS or num_frames % STEPS:
        raise ValueError(f"num_frames={num_frames} must be a multiple of {STEPS}.")
    options, kind = clip_options(size), CLIP_KINDS[index % len(CLIP_KINDS)]
    rng = random.Random(f"clip/{split}/{seed}/{index}")
    scene = Scene((), rng.choice(list(options.backgrounds)), split, rng.getrandbits(30), options)
    tracks, questions = _MAKERS[kind](rng, scene, num_frames)
    return Clip(kind, tuple(tracks), tuple(Question(kind, *pair, False) for pair in questions), scene, num_frames)


def render_clip(clip: Clip, frames: range | None = None) -> np.ndarray:
    """Draw a clip, or some of its frames.

    Args:
        clip (`Clip`): The clip.
        frames (`range`, *optional*): Numbers of the frames.

    Returns:
        `np.ndarray` (frames, size, size, 3): uint8.
    """
    background, pictures = paint_scene_background(clip.scene), []
    for frame in range(clip.num_frames) if frames is None else frames:
        shown = tuple(track.at(frame) for track in clip.tracks if frame in track.frames)
        pictures.append(paint_objects(replace(clip.scene, objects=shown), background.copy()))
    return np.stack(pictures)


Made = tuple[list[Track], list[tuple[str, str]]]
"""Tracks, and questions with their answers."""


def _objects(rng: random.Random, scene: Scene, count: int) -> list[SceneObject]:
    """Objects of different colours and values, each at a place of its own choice."""
    items: list[SceneObject] = []
    taken: set[str] = set()
    for _ in range(count):
        item = _sample_object(rng, scene.options, scene.split, taken)
        taken |= {item.value, item.colour}
        side = scene.options.scene_size
        items.append(
            _placed(item, rng.randint(0, side - item.height), rng.randint(0, side - item.width), scene.options)
        )
    return items


def _in_turn(rng: random.Random, items: list[SceneObject], num_frames: int) -> list[Track]:
    """One object after another."""
    cuts = [0, *sorted(rng.sample(range(1, STEPS), len(items) - 1)), STEPS]
    edges = [cut * num_frames // STEPS for cut in cuts]
    return [Track(item, range(*edges[number : number + 2])) for number, item in enumerate(items)]


def _make_way(rng: random.Random, scene: Scene, num_frames: int) -> Made:
    """Two objects, each moving within a quarter of its own; where one is in the middle of the clip tells no way."""
    half = scene.options.scene_size // 2
    travel, tracks, questions = round(0.22 * scene.options.scene_size), [], []
    corners = rng.sample([(0, 0), (0, half), (half, 0), (half, half)], 2)
    for corner, item in zip(corners, _objects(rng, scene, 2), strict=True):
        way = rng.choice(list(WAYS))
        lengths = (item.height, item.width)
        middle = [rng.randint(0, half - length - travel) + travel / 2 for length in lengths]
        place = [c + m - step * travel / 2 for c, m, step in zip(corner, middle, WAYS[way], strict=True)]
        down, across = (step * travel / (num_frames - 1) for step in WAYS[way])
        item = _placed(item, int(place[0]), int(place[1]), scene.options)
        tracks.append(Track(item, range(num_frames), (down, across)))
        questions.append((f"which way does the {item.colour} object move ?", way))
    return tracks, questions


def _make_first(rng: random.Random, scene: Scene, num_frames: int) -> Made:
    """Three objects, one after another."""
    tracks = _in_turn(rng, _objects(rng, scene, 3), num_frames)
    colours, questions = [track.item.colour for track in tracks], []
    for pair in ((0, 1), (1, 2), (0, 2)):
        named = rng.sample([colours[number] for number in pair], 2)
        questions.append((f"which object is first , the {named[0]} or the {named[1]} ?", colours[pair[0]]))
    return tracks, questions


def _make_before(rng: random.Random, scene: Scene, num_frames: int) -> Made:
    """One digit that becomes another, and another."""
    first = _objects(rng, scene, 1)[0]
    values = rng.sample(DIGITS, 3)
    items = [replace(first, kind="digit", value=value, look=rng.getrandbits(30)) for value in values]
    texts = [f"which digit is {word} the {values[1]} ?" for word in ("before", "after")]
    return _in_turn(rng, items, num_frames), list(zip(texts, (values[0], values[2]), strict=True))


def _make_total(rng: random.Random, scene: Scene, num_frames: int) -> Made:
    """Some objects, one after another."""
    count = rng.choice(TOTALS)
    tracks = _in_turn(rng, _objects(rng, scene, count), num_frames)
    return tracks, [("how many objects are there in all ?", str(count))]


_MAKERS = {"way": _make_way, "first": _make_first, "before": _make_before, "total": _make_total}
