"""Needle scenes as text: what a language model reads where a picture's tokens will stand.

A slot stands for one visual token and holds up to five words, whose embeddings are summed. The global block says where
something of which colour is; the local block says what it is. Patches that show nothing hold the background.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .questions import FINE_KINDS, QUESTION_KINDS, SCENE_KINDS, Question
from .scenes import Scene, SceneObject


Slot = tuple[str, ...]

MOST_WORDS = 5
PLACE_KINDS = ("place_of_value", "digit_at_place", "place_of_colour", "colour_at_place")
VIEWS = ("both", "local", "global")


@dataclass(frozen=True)
class TextStyle:
    """How a scene is written.

    Args:
        views (`str`): `both`, `local` or `global` block.
        joined (`bool`): Whether the local block also says where things are, as adapters with positions could.
        listed (`bool`): Whether every word has a slot of its own.
        fillers (`int`): Background slots in each block.
        repeats (`bool`): Whether an object may fill two slots of the local block.
    """

    views: str
    joined: bool
    listed: bool
    fillers: int
    repeats: bool


def sample_style(rng: random.Random, listed_share: float = 0.15) -> TextStyle:
    """Sample a style.

    Args:
        rng (`random.Random`): Source of numbers.
        listed_share (`float`): Share of listed scenes.

    Returns:
        The style: mostly both blocks and one slot an object.
    """
    return TextStyle(
        views=rng.choices(VIEWS, (0.7, 0.18, 0.12))[0],
        joined=rng.random() < 0.4,
        listed=rng.random() < listed_share,
        fillers=rng.randint(1, 8),
        repeats=rng.random() < 0.4,
    )


def write_slots(scene: Scene, style: TextStyle, rng: random.Random) -> list[Slot]:
    """Write a scene.

    Args:
        scene (`Scene`): The scene.
        style (`TextStyle`): How.
        rng (`random.Random`): Places the fillers and repeats.

    Returns:
        The slots, global block first; within a block objects stand in reading order.
    """
    items = sorted(scene.objects, key=lambda item: (item.top, item.left))
    slots: list[Slot] = []
    if style.views != "local":
        marks: list[Slot] = [("object", item.colour, *item.place.split()) for item in items]
        slots += _filled(marks, (scene.background,), style, rng)
    if style.views != "global":
        block = [
            _local_words(item, style) for item in items for _ in range(1 + (style.repeats and rng.random() < 0.4))
        ]
        slots += _filled(block, (scene.background,), style, rng)
    if style.listed:
        return [(word,) for slot in slots for word in (*slot, ".")]
    return slots


def _local_words(item: SceneObject, style: TextStyle) -> Slot:
    place = item.place.split() if style.joined else []
    return (item.colour, item.kind, item.value, *place)


def _filled(block: Sequence[Slot], filler: Slot, style: TextStyle, rng: random.Random) -> list[Slot]:
    slots = list(block)
    for _ in range(style.fillers):
        slots.insert(rng.randint(0, len(slots)), filler)
    return slots


def answerable_kinds(style: TextStyle) -> tuple[str, ...]:
    """The question kinds that a text of this style answers.

    Args:
        style (`TextStyle`): The style.

    Returns:
        Kinds.
    """
    if style.views == "both":
        return QUESTION_KINDS
    if style.views == "global":
        return SCENE_KINDS
    unknown = [*([] if style.joined else PLACE_KINDS), *(["count"] if style.repeats else [])]
    return tuple(kind for kind in (*FINE_KINDS, *SCENE_KINDS) if kind not in unknown)


def pick_questions(
    questions: Sequence[Question], kinds: Sequence[str], most: int, rng: random.Random
) -> list[Question]:
    """Pick questions so that kinds, not questions, are equally likely.

    Args:
        questions (sequence of `Question`): All questions of a scene.
        kinds (sequence of `str`): Kinds that may be picked.
        most (`int`): Most questions.
        rng (`random.Random`): Source of numbers.

    Returns:
        At most `most` different questions.
    """
    by_kind = {kind: [question for question in questions if question.kind == kind] for kind in kinds}
    waiting = [rng.sample(group, len(group)) for group in by_kind.values() if group]
    picked: list[Question] = []
    while waiting and len(picked) < most:
        rng.shuffle(waiting)
        picked += [group.pop() for group in waiting][: most - len(picked)]
        waiting = [group for group in waiting if group]
    return picked
