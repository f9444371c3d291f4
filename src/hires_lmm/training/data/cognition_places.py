"""Where a conversation has room for one more question, and how it gets in."""

from dataclasses import dataclass
from typing import Any

from .conversations import IMAGE_MARK


@dataclass(frozen=True)
class Place:
    """The message that a pair is put before, or the end, and whether the image of that message moves to the pair."""

    index: int
    moves: bool = False


def find_places(messages: list[dict], image: int, before: bool = True) -> list[Place]:
    """Places, in order, for a question about an image; `before`: also the one where the image would have to move."""
    counts = [_count_images(message["content"]) for message in messages]
    holder = next(index for index in range(len(messages)) if sum(counts[: index + 1]) > image)
    roles = [message["role"] for message in messages]
    places = [Place(index) for index in range(holder + 1, len(roles) + 1) if _may_begin(roles, index)]
    alone = counts[holder] == 1 and _split_image(messages[holder]["content"]) is not None
    if before and alone and _may_begin(roles, holder):
        places.insert(0, Place(holder, moves=True))
    return places


def insert_pair(messages: list[dict], place: Place, prompt: str, answer: str) -> list[dict]:
    """New messages with a question and its answer, in the form of those beside it; the others are the same objects."""
    neighbour = messages[place.index if place.moves else place.index - 1]
    as_parts = not isinstance(neighbour["content"], str)
    rest = list(messages[place.index :])
    question: Any = [{"type": "text", "text": prompt}] if as_parts else prompt
    if place.moves:
        head, question_rest = _split_image(neighbour["content"])  # type: ignore[misc]
        question = [head, {"type": "text", "text": f"\n{prompt}"}] if as_parts else f"{head}\n{prompt}"
        rest[0] = {**neighbour, "content": question_rest}
    reply: Any = [{"type": "text", "text": answer}] if as_parts else answer
    pair = [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    return [*messages[: place.index], *pair, *rest]


def _may_begin(roles: list[str], index: int) -> bool:
    """Whether a question may stand before the message `index`: outside of pairs, after the system text."""
    starts = index == len(roles) or roles[index] == "user"
    return starts and (roles[index - 1] == "assistant" or all(role == "system" for role in roles[:index]))


def _count_images(content: Any) -> int:
    if isinstance(content, str):
        return content.count(IMAGE_MARK)
    return sum(part["type"] == "image" for part in content)


def _split_image(content: Any) -> tuple[Any, Any] | None:
    """The image that opens or ends a content, and the rest without it; None where it does neither or is all."""
    if isinstance(content, str):
        text = content.strip()
        if text.startswith(IMAGE_MARK):
            rest = text.removeprefix(IMAGE_MARK).lstrip()
        else:
            rest = text.removesuffix(IMAGE_MARK).rstrip() if text.endswith(IMAGE_MARK) else ""
        return (IMAGE_MARK, rest) if rest else None
    parts: list[dict] = list(content)
    if parts[0]["type"] == "image":
        image, others, side, strip = parts[0], parts[1:], 0, str.lstrip
    elif parts[-1]["type"] == "image":
        image, others, side, strip = parts[-1], parts[:-1], -1, str.rstrip
    else:
        return None
    if not any(part["type"] == "text" and part["text"].strip() for part in others):
        return None
    if others[side]["type"] == "text":
        others[side] = {**others[side], "text": strip(others[side]["text"])}
    return image, others
