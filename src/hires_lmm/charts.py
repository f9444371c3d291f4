"""Does what a model writes about a chart agree with the numbers that its head read?"""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class NumberCheck(NamedTuple):
    """Mean distance between written and read numbers, NaN without numbers; and whether it is below the threshold."""

    distance: float
    reliable: bool


def read_numbers(answer: Any) -> list[float]:
    """The numbers of an answer in their order.

    Args:
        answer (`str` or `dict`): `{"values": {...}, ...}` as JSON or read from it. Values are numbers, texts such as
            "12.5%", whose other characters and notes such as "[1]" are left out, or dicts of these.

    Returns:
        The numbers; none where the answer has another form.
    """
    if isinstance(answer, str):
        try:
            answer = json.loads(answer[answer.find("{") :])  # the token of the head may stand before it
        except ValueError:
            return []
    try:
        return _numbers(answer["values"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return []


def _numbers(values: dict) -> list[float]:
    """All numbers of nested dicts."""
    found: list[float] = []
    for value in values.values():
        if isinstance(value, dict):
            found += _numbers(value)
        elif isinstance(value, (int, float)):
            found.append(float(value))
        else:
            found += _number(value or "")
    return found


def _number(text: str) -> list[float]:
    """The number of a text, with or without a power of ten, if it has one."""
    try:
        return [float(text)]
    except ValueError:
        digits = re.sub(r"[^\d.-]", "", re.sub(r"\(\d+\)|\[\d+\]", "", text))
        return [float(digits)] if digits not in ("", "-", ".") else []


def check_numbers(numbers: Sequence[float], read: Any, threshold: float = 0.1, most: int = 100) -> NumberCheck:
    """Compare the numbers that a model wrote with those that its head `number_decoder` read.

    Args:
        numbers (sequence of `float`): As written, see `read_numbers`; normalised here where they are two or more.
        read (`torch.Tensor` of shape `(slots,)`): What the head gave.
        threshold (`float`): Distance below which an answer is reliable.
        most (`int`): Numbers that are compared, from the first.

    Returns:
        `NumberCheck`.

    Source: OneChart, LingyvKong/OneChart at 4bf11d9, whose check fails beyond 100 numbers.
    """
    own = np.asarray(numbers, dtype=np.float64)
    if own.size == 0:
        return NumberCheck(float("nan"), False)
    if own.size > 1:
        own = ((own - own.min()) / (own.max() - own.min() + 1e-9)).round(4)
    own = own[:most]
    theirs = np.asarray(read.detach().float().cpu() if hasattr(read, "detach") else read, dtype=np.float64)[: own.size]
    distance = float(np.abs(theirs - own[: theirs.size]).mean())
    return NumberCheck(distance, distance < threshold)
