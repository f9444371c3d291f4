"""Questions about needle scenes with exact answers, and what blind guessing gets."""

from collections import Counter
from dataclasses import dataclass

from .scenes import COLOURS, PLACES, NeedleOptions, Scene, SceneObject
from .sprites import BARS, DIGITS, NUMBERS, SHAPES, WORDS


FINE_KINDS = (
    "read_digit",
    "read_number",
    "read_word",
    "shape",
    "chart",
    "colour_of_value",
    "place_of_value",
    "digit_at_place",
    "larger_digit",
)
"""Kinds that need what an object shows, which the global view does not resolve."""

SCENE_KINDS = ("count", "background", "place_of_colour", "colour_at_place")
"""Kinds about the whole scene, for which the global view is enough."""

QUESTION_KINDS = (*FINE_KINDS, *SCENE_KINDS)


@dataclass(frozen=True)
class Question:
    """A question: its kind, text, exact answer, and whether an object it depends on is cut by a crop border."""

    kind: str
    text: str
    answer: str
    cut: bool

    @property
    def fine(self) -> bool:
        """Whether it is about fine detail."""
        return self.kind in FINE_KINDS


READING = {
    "digit": ("read_digit", "which digit is {} ?"),
    "number": ("read_number", "which number is {} ?"),
    "word": ("read_word", "which word is {} ?"),
    "shape": ("shape", "which shape is {} ?"),
    "chart": ("chart", "which bar of the {} chart is tallest ?"),
}


def ask_questions(scene: Scene) -> list[Question]:
    """All questions that a scene answers without doubt.

    Args:
        scene (`Scene`): A scene with distinct colours and values.

    Returns:
        The questions, in a fixed order. Places are asked for only where no object that matters lies on a middle line.

    Raises:
        ValueError: If the scene's objects need not be distinct.
    """
    if not scene.options.distinct:
        raise ValueError("Questions need distinct=True: with two red digits `which digit is red` has no answer.")
    questions = [_about_object(item) for item in scene.objects]
    found = [question for group in questions for question in group]
    found += _larger_digit(scene) + _at_places(scene)
    found.append(Question("count", "how many objects are there ?", str(len(scene.objects)), _any_cut(scene)))
    found.append(Question("background", "what is the background ?", scene.background, False))
    return found


def _any_cut(scene: Scene) -> bool:
    return any(item.cut for item in scene.objects)


def _about_object(item: SceneObject) -> list[Question]:
    kind, text = READING[item.kind]
    questions = [Question(kind, text.format(item.colour), item.value, item.cut)]
    if item.kind != "chart":
        questions.append(Question("colour_of_value", f"what colour is the {item.value} ?", item.colour, item.cut))
        if item.clear_place:
            questions.append(Question("place_of_value", f"where is the {item.value} ?", item.place, item.cut))
    if item.clear_place:
        questions.append(Question("place_of_colour", f"where is the {item.colour} object ?", item.place, item.cut))
    return questions


def _larger_digit(scene: Scene) -> list[Question]:
    digits = [item for item in scene.objects if item.kind == "digit"]
    questions = []
    for first in digits:
        for second in digits:
            if first is not second:
                text = f"which digit is larger , the {first.colour} or the {second.colour} ?"
                larger = max(first, second, key=lambda item: int(item.value))
                questions.append(Question("larger_digit", text, larger.colour, first.cut or second.cut))
    return questions


def _at_places(scene: Scene) -> list[Question]:
    questions = []
    for kind, text, some in (
        ("digit_at_place", "which digit is at the {} ?", [item for item in scene.objects if item.kind == "digit"]),
        ("colour_at_place", "what colour is the object at the {} ?", list(scene.objects)),
    ):
        if not all(item.clear_place for item in some):
            continue
        for place in PLACES:
            there = [item for item in some if item.place == place]
            if len(there) == 1:
                answer = there[0].value if kind == "digit_at_place" else there[0].colour
                questions.append(Question(kind, text.format(place), answer, there[0].cut))
    return questions


def chance_accuracy(options: NeedleOptions) -> dict[str, float]:
    """What guessing among the possible answers of a kind gets, without the image.

    Args:
        options (`NeedleOptions`): The numbers of objects and the backgrounds count.

    Returns:
        Kind -> accuracy, 0 to 1.
    """
    fewest, most = options.num_objects
    return {
        "read_digit": 1 / len(DIGITS),
        "read_number": 1 / len(NUMBERS),
        "read_word": 1 / len(WORDS),
        "shape": 1 / len(SHAPES),
        "chart": 1 / len(BARS),
        "colour_of_value": 1 / len(COLOURS),
        "place_of_value": 1 / len(PLACES),
        "digit_at_place": 1 / len(DIGITS),
        "larger_digit": 1 / 2,
        "count": 1 / (most - fewest + 1),
        "background": 1 / len(options.backgrounds),
        "place_of_colour": 1 / len(PLACES),
        "colour_at_place": 1 / len(COLOURS),
    }


def constant_accuracy(questions: list[Question]) -> dict[str, float]:
    """What the best constant answer to each kind gets on given questions: the floor a blind model can reach.

    Args:
        questions (`list`): Questions of any scenes.

    Returns:
        Kind -> accuracy, 0 to 1. For `larger_digit` the best of "the first named" and "the second named".
    """
    answers: dict[str, Counter[str]] = {}
    for question in questions:
        answer = question.answer
        if question.kind == "larger_digit":
            answer = "first" if f"the {answer} or" in question.text else "second"
        answers.setdefault(question.kind, Counter())[answer] += 1
    return {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in answers.items()}
