"""Coordinates in texts: `<t=0.37>`, `<h=0.5>` and `<w=1>` name a time, height and width, from 0 to 1."""

import re
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

LETTERS = {"t": "time", "h": "height", "w": "width"}
PATTERN = re.compile(r"<([thw])=(-?\d+(?:\.\d*)?)>")


def write_coordinate(letter: str, place: int, last: int) -> str:
    """The name of a token: of its axis, the number `place` of those up to `last`."""
    return f"<{letter}={place / last:.{len(str(last))}f}>"


def coordinate_tokens(num_rows: int = 100, steps: int = 10) -> list[str]:
    """Names of the tokens of the part `coordinates`, for `tokenizer.add_tokens`.

    Args:
        num_rows, steps (`int`): As in the options of the part.

    Returns:
        `list[str]`: Times, heights, widths; `(num_rows - 1) * steps + 1` of each.
    """
    last = (num_rows - 1) * steps
    return [write_coordinate(letter, place, last) for letter in LETTERS for place in range(last + 1)]


def snap_coordinates(text: Any, tokenizer: Any) -> Any:
    """Texts in which each coordinate is the nearest that the tokenizer knows; it stays text where it knows none."""
    texts = [text] if isinstance(text, str) else text
    if not isinstance(texts, (list, tuple)) or not any(isinstance(own, str) and PATTERN.search(own) for own in texts):
        return text
    last = sum(name.startswith("<t=") for name in tokenizer.get_added_vocab()) - 1
    if last < 1:
        return text

    def snap(found: re.Match) -> str:
        return write_coordinate(found[1], round(min(max(float(found[2]), 0.0), 1.0) * last), last)

    snapped = [PATTERN.sub(snap, own) if isinstance(own, str) else own for own in texts]
    return snapped[0] if isinstance(text, str) else snapped


def read_coordinates(text: str) -> list[tuple[str, float]]:
    """The coordinates of an answer in their order, as pairs of `"time"`, `"height"` or `"width"` and a number."""
    return [(LETTERS[letter], float(number)) for letter, number in PATTERN.findall(text)]


def check_coordinates(config: Any, tokenizer: Any) -> None:
    """Warn where the tokens of a part `coordinates` are others in the tokenizer."""
    for spec in config.connector_config.map_ops:
        if spec.get("part") == "coordinates":
            names = coordinate_tokens(spec.get("num_rows", 100), spec.get("steps", 10))
            first, known = spec["first_token_id"], tokenizer.get_added_vocab()
            if [known.get(name) for name in names] != list(range(first, first + len(names))):
                logger.warning(
                    f"The tokenizer lacks the {len(names)} coordinates of the model from id {first} on, so no text "
                    "can name one; call tokenizer.add_tokens(coordinate_tokens(num_rows, steps)) before all else, and "
                    "give the first id as first_token_id."
                )


__all__ = ["check_coordinates", "coordinate_tokens", "read_coordinates", "snap_coordinates"]
