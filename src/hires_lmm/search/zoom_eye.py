"""ZoomEye: a model looks for what a question is about by zooming in, and answers from what it found."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .base import Ask, Oracle, Prompt, SearchResult, Step, check_texts, open_all
from .tree import SPLITS, Node, Showing


PRONOUNS = """
i me my mine you your yours he him his she her hers it its we us our ours they them their theirs this that these those
who whom whose someone something anyone anything everyone everything
"""
"""Cues with one of these words are dropped: nobody can look for them without the sentence they stood in."""


EXISTENCE = Prompt("Is there {} in the image? Answer Yes or No.")
LATENT = Prompt("Judging by what the image shows, could a closer look at a part of it find {}? Answer Yes or No.")
ANSWERING = Prompt("Question: {}\nDoes the image show clearly enough what the answer needs? Answer Yes or No.")


@dataclass(frozen=True)
class ZoomPrompts:
    """What ZoomEye asks; `{}` stands for a cue, in `answering` for a question, in `cues` for the question.

    Args:
        existence, latent, answering (`Prompt`): Is the cue in view; could it be found by looking closer; can the
            question be answered. Their confidences decide where to look.
        template (`str`): Question about one of several cues.
        cues (`str`): Has the model name what to look for, behind a colon and between commas.

    Raises:
        ValueError: If a prompt is none, or the braces of a text hold more than `{}`.
    """

    existence: Prompt = EXISTENCE
    latent: Prompt = LATENT
    answering: Prompt = ANSWERING
    template: str = "What is the appearance of the {}?"
    cues: str = (
        "Which objects must be looked at to answer the question? Write `Objects:` and their names between commas, and "
        "`all` before a name where every one of its kind counts.\n"
        "Question: Is the red cup left of the plate? Objects: red cup, plate\n"
        "Question: How many dogs are there? Objects: all dogs\n"
        "Question: {}"
    )

    def __post_init__(self) -> None:
        for name in ("existence", "latent", "answering"):
            if not isinstance(getattr(self, name), Prompt):
                raise ValueError(f"{name}={getattr(self, name)!r} must be a Prompt, in JSON a dict with its `text`.")
        check_texts(template=self.template, cues=self.cues)


def read_cues(text: str) -> list[str]:
    """The names behind the last colon of a text, between commas and `and`; none without a colon."""
    _, colon, names = text.rpartition(":")
    parts = re.split(r",|\band\b", names) if colon else []
    return [cue for part in parts if (cue := part.strip(" \t\n.`'\""))]


@dataclass(frozen=True)
class ZoomEye:
    """Zoom in best first, with three confidences, until the question can be answered.

    Args:
        prompts (`ZoomPrompts`): How the model is asked.
        cues (sequence of `str` or `Callable`, *optional*): What to look for, or a function of the question; by default
            the model is asked. `"all dogs"` looks for every one.
        crop_only (`bool`): For models that see one view: show the crop alone. Else the whole image stands beside it.
        bias (`float`, *optional*): Share of the existence confidence in the priority at the root, from where it rises
            to 1 at the greatest depth; 0.6, or 0.2 with `crop_only`.
        threshold, floor (`float`): Confidence with which a question counts as answerable, and below which it is given
            up; it falls by each of `decreases` in turn, the last again and again. Published: 0.6 and 0 for LLaVA, 0.2
            and -0.2 for InternVL, 0.95 and 0 with (0.05, 0.1, 0.2) for Qwen2.5-VL.
        all_threshold (`float`): Existence confidence with which a place of an `all` cue is kept.
        depth_limit, all_depth_limit (`int`): Greatest depths of the tree.
        patience, interval (`int`): The threshold falls after `patience` visits a level of the tree, then after each
            `interval`.
        patch_scale (`float`, *optional*): How much more than a box is shown; 1.2, or 1 with `crop_only`.
        split (`int`): Children of a node: 4, 9 or 16.
        side (`int`, *optional*): Boxes below it, pixels, are not cut further; by default the oracle's view.

    Raises:
        ValueError: If an option is out of range.

    Source: ZoomEye (EMNLP 2025). Its rules are kept; its few-shot cue prompts, one for each benchmark, are one short
    prompt here, and its part-of-speech tagger a list of pronouns.
    """

    prompts: ZoomPrompts = field(default_factory=ZoomPrompts)
    cues: Sequence[str] | Callable[[str], Sequence[str]] | None = None
    crop_only: bool = False
    bias: float | None = None
    threshold: float = 0.6
    floor: float = 0.0
    decreases: tuple[float, ...] = (0.1, 0.1, 0.2)
    all_threshold: float = 0.6
    depth_limit: int = 5
    all_depth_limit: int = 2
    patience: int = 3
    interval: int = 2
    patch_scale: float | None = None
    split: int = 4
    side: int | None = None

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split} must be one of {', '.join(map(str, SPLITS))}.")
        if self.floor > self.threshold:
            raise ValueError(f"floor={self.floor} must be at most threshold={self.threshold}.")
        if not self.decreases or min(self.decreases) <= 0:
            raise ValueError(f"decreases={self.decreases} must hold positive numbers, or a search may never end.")
        for name in ("depth_limit", "all_depth_limit", "patience", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        for name, low, high in (("side", 1, math.inf), ("patch_scale", 1, math.inf), ("bias", 0, 1)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}={value} must lie between {low} and {high}.")
        if isinstance(self.cues, str):
            raise ValueError(f"cues={self.cues!r} is one text; write a list: [{self.cues!r}].")
        given = () if self.cues is None or callable(self.cues) else self.cues
        if not isinstance(given, Sequence) or not all(isinstance(cue, str) and cue.strip() for cue in given):
            raise ValueError(f"cues={self.cues!r} must be a list of texts, or a function that returns one.")

    def run(self, images: Sequence[Any], question: str, oracle: Oracle) -> SearchResult:
        """Answer a question about one image.

        Args:
            images: One image, in any form that the processor takes.
            question (`str`): The question.
            oracle (`Oracle`): Who is asked.

        Returns:
            The answer, the boxes (left, top, width, height) that were shown for it, and all that was asked.

        Raises:
            ValueError: If there is not one image, or the oracle asks more than it may.
        """
        opened = open_all(images)
        if len(opened) != 1:
            raise ValueError(f"ZoomEye walks one image, and {len(opened)} were given; ask about each by itself.")
        (image,) = opened
        side = self.side or oracle.side
        scale = self.patch_scale or (1.0 if self.crop_only else 1.2)
        showing = Showing(side, scale, self.crop_only)
        root = Node((0, 0, *image.size), side, self.split, show=lambda boxes: showing.views(image, boxes))
        search = _Search(self, oracle, root)
        found = [node for cue in search.targets(question) for node in search.look_for(cue)]
        boxes = [node.box for node in found]
        views = found[0].views if len(found) == 1 else showing.views(image, boxes)
        return SearchResult(oracle.answer(views, [question]), boxes, search.steps)

    def priority(self, existence: float, latent: float, depth: int, deepest: int) -> float:
        """How soon a node is visited; the deeper, the more what is in view counts."""
        bias = (0.2 if self.crop_only else 0.6) if self.bias is None else self.bias
        weight = (1 - bias) * depth**2 / deepest**2 + bias
        return weight * existence + (1 - weight) * latent

    def thresholds(self) -> Iterator[float]:
        """The threshold after each fall. Running differences, not rounded, as published: 0.6 falls to exactly 0."""
        value, step = self.threshold, 0
        while True:
            value -= self.decreases[min(step, len(self.decreases) - 1)]
            step += 1
            yield value


class _Search:
    """One walk through one tree."""

    def __init__(self, policy: ZoomEye, oracle: Oracle, root: Node):
        self.policy, self.oracle, self.root = policy, oracle, root
        self.steps: list[Step] = []
        self.question: str | None = None

    def targets(self, question: str) -> list[str]:
        """The cues to look for; none where one of several can be seen without looking closer."""
        cues = [cue for cue in self._cues(question) if not set(PRONOUNS.split()) & set(cue.lower().split())]
        if len(cues) == 1:
            self.question = question
        elif not self.policy.crop_only:
            specific = [cue for cue in cues if _plural(cue) is None]
            found = self._ask([("answering", self._about(cue), self.root) for cue in specific], "root")
            cues = [] if any(value >= self.policy.threshold for value in found) else cues
        return cues

    def _cues(self, question: str) -> list[str]:
        given = self.policy.cues
        if given is None:
            asked = self.policy.prompts.cues.format(question)
            said = self.oracle.answer(self.root.views, [asked])
            self.steps.append(Step("cues", asked, said=said))
            return read_cues(said)
        return list(given(question) if callable(given) else given)

    def _about(self, cue: str) -> str:
        return self.question or self.policy.prompts.template.format(cue)

    def look_for(self, cue: str) -> list[Node]:
        """The nodes that show a cue."""
        one = _plural(cue)
        return self._one(cue) if one is None else self._all(one)

    def _all(self, cue: str) -> list[Node]:
        nodes = list(self.root.walk(self.policy.all_depth_limit))
        values = dict(zip(nodes, self._ask([("existence", cue, node) for node in nodes]), strict=True))
        least, kept = self.policy.all_threshold, []
        best: dict[Node, float] = {}
        for node in nodes:
            below = max((best[child] for child in node.children if child in best), default=least)
            if values[node] >= max(below, least):
                kept.append(node)
            best[node] = max(values[node], below)
        return kept

    def _one(self, cue: str) -> list[Node]:
        policy, asked, several = self.policy, self._about(cue), self.question is None
        deepest = self.root.levels(policy.depth_limit)
        limit, visits, is_down = policy.patience * deepest, 0, False
        threshold, thresholds = policy.threshold, policy.thresholds()
        waiting: list[tuple[float, Node]] = [(0.0, self.root)]
        visited: list[tuple[float, Node]] = []
        found: list[Node] = []
        while waiting:
            node = waiting.pop(max(range(len(waiting)), key=lambda index: waiting[index][0]))[1]
            visits += 1
            is_down |= node.is_leaf or node.depth == deepest
            if not (node is self.root and several and policy.crop_only):
                (value,) = self._ask([("answering", asked, node)])
                visited.append((value, node))
                if value >= threshold:
                    found.append(node)
                    if is_down or not several:
                        break
                elif visits >= limit:
                    limit, threshold = limit + policy.interval, next(thresholds)
                    if threshold < policy.floor:
                        break
                    best = max(visited, key=lambda pair: pair[0])
                    if best[0] >= threshold:
                        found.append(best[1])
                        break
            waiting += self._open(node, cue, deepest)
        return sorted(found, key=lambda node: node.depth)[-1:]

    def _open(self, node: Node, cue: str, deepest: int) -> list[tuple[float, Node]]:
        """The children of a node with their priorities."""
        children = node.children if node.depth < deepest else []
        values = self._ask([(kind, cue, child) for child in children for kind in ("existence", "latent")])
        pairs = zip(values[::2], values[1::2], children, strict=True)
        priority = self.policy.priority
        return [(priority(exists, latent, child.depth, deepest), child) for exists, latent, child in pairs]

    def _ask(self, wanted: Sequence[tuple[str, str, Node]], place: str | None = None) -> list[float]:
        """Confidences of (kind, subject, node); what is known of a node is not asked again."""
        new = [(kind, subject, node) for kind, subject, node in wanted if (kind, subject) not in node.known]
        prompts = self.policy.prompts
        asks = [
            Ask(kind, subject, getattr(prompts, kind), node.box, node.depth, partial(getattr, node, "views"))
            for kind, subject, node in new
        ]
        for value, (kind, subject, node) in zip(self.oracle.confidences(asks) if asks else [], new, strict=True):
            node.known[kind, subject] = value
        values = [node.known[kind, subject] for kind, subject, node in wanted]
        for value, (kind, subject, node) in zip(values, wanted, strict=True):
            self.steps.append(Step(place or kind, subject, node.box, node.depth, value))
        return values


def _plural(cue: str) -> str | None:
    """What one of an `all` cue is called; None for another cue."""
    kind, _, name = cue.partition(" ")
    return name.removesuffix("s") if kind.lower() == "all" and name else None
