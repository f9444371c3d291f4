"""Batches of needle scenes: one picture, several questions behind it, each blind to the others."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image

from hires_lmm.training.collator import GEOMETRY, IGNORED, HiResLmmCollator

from ..questions import FINE_KINDS, QUESTION_KINDS, SCENE_KINDS, Question
from ..text_scenes import PLACE_KINDS
from .scenes import SceneFeatures, SceneSet


NO_IMAGE = "none"
KINDS_BY_VIEWS: dict[str, tuple[str, ...]] = {
    "all": QUESTION_KINDS,
    "global": SCENE_KINDS,
    "crops": tuple(kind for kind in (*FINE_KINDS, "background") if kind not in PLACE_KINDS),
    NO_IMAGE: QUESTION_KINDS,
}
"""What views answer: a crop knows what it shows, not where it lies; the global view resolves no detail."""


BLANK = Question("count", "how many ?", "2", False)
"""Any question, to see where a prompt's picture ends."""


class _Text(NamedTuple):
    ids: torch.Tensor
    answer: torch.Tensor


class _Frame(NamedTuple):
    """What all rows with the same views share: ids up to the question, and the geometry of the views."""

    ids: torch.Tensor
    geometry: dict[str, torch.Tensor]


@dataclass
class PackedBatch:
    """inputs for the model; number (B, S) of the question a token belongs to: 0 picture, from 1, -1 padding; the
    questions of each row; the views of the batch; the scene of each row."""

    inputs: dict[str, torch.Tensor]
    number: torch.Tensor
    questions: list[list[Question]]
    views: str
    scenes: list[int]


@dataclass(frozen=True)
class Near:
    """Pictures whose global view shows everything, as the pictures of SliME's first stage do.

    Args:
        scenes (`SceneSet`): The scenes, see `near_options`.
        store (`SceneFeatures`, *optional*): Their tower features.
        share (`float`): Share of the batches that hold them.
    """

    scenes: SceneSet
    store: SceneFeatures | None
    share: float


class SceneCollator(HiResLmmCollator):
    """Turns rows `{"scene": number, "visit": number}` into batches over cached tower features.

    Every token is one that the processor makes; only the repetition of the picture is left out. A packed row holds
    the picture once, then its questions with their answers; a mask shows each question the picture and itself, and its
    positions start behind the picture, so its logits are those of the question asked alone. Models whose parts read
    the question need `packed=False`: one row a question.

    Args:
        processor (`HiResLmmProcessor`): Of the model.
        scenes (`SceneSet`): The scenes.
        store (`SceneFeatures`, *optional*): Their tower features; None where the tower learns, then pictures are made.
        views (`str`): `"all"`, `"global"` or `"crops"`, that of the stage; `"none"` leaves the picture out.
        questions (`int`): Most questions a scene.
        packed (`bool`): See above.
        mix (`dict`, *optional*): Views -> weight: each batch draws its own, for stages with `views="all"`.
        near (`Near`, *optional*): Pictures that need no crops, for a share of the batches.
        kinds (`dict`, *optional*): Views -> question kinds, instead of `KINDS_BY_VIEWS`.
        options: Other options of `HiResLmmCollator`.

    Raises:
        ValueError: If an option is unknown, or `mix` is given where a stage names its views.
    """

    def __init__(
        self,
        processor: Any,
        scenes: SceneSet,
        store: SceneFeatures | None = None,
        views: str = "all",
        questions: int = 8,
        packed: bool = True,
        mix: dict[str, float] | None = None,
        near: Near | None = None,
        kinds: dict[str, Sequence[str]] | None = None,
        **options: Any,
    ):
        super().__init__(processor, views="all" if views == NO_IMAGE else views, **options)
        if mix and views != "all":
            raise ValueError(f"mix={mix!r} needs views='all', not {views!r}: a stage that names its views sees them.")
        self.scenes, self.store, self.questions, self.packed = scenes, store, questions, packed
        self.near = near
        self.mix = mix or {views: 1.0}
        self.kinds = {**KINDS_BY_VIEWS, **(kinds or {})}
        self._frames: dict[tuple[str, int | None, int], _Frame] = {}
        self._texts: dict[tuple[str, str], _Text] = {}
        self._values: dict[tuple[str, int, int], Any] = {}

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Build a batch of rows `{"scene", "visit"}`."""
        return self.build(examples).inputs

    def build(self, examples: list[dict]) -> PackedBatch:
        """Build a batch and say what is in it.

        Args:
            examples (`list[dict]`): Rows with `scene` and, for another choice of questions, `visit`.

        Returns:
            The batch.
        """
        rng = random.Random(f"views/{[(row['scene'], row.get('visit', 0)) for row in examples]}")
        views = rng.choices(list(self.mix), list(self.mix.values()))[0]
        scenes, store, kinds = self.scenes, self.store, self.kinds[views]
        if self.near is not None and rng.random() < self.near.share:
            scenes, store = self.near.scenes, self.near.store
            kinds = self.kinds["crops" if views == "crops" else "all"]
        numbers = [row["scene"] % scenes.count for row in examples]
        visits = [row.get("visit", 0) for row in examples]
        asked = [
            scenes.questions(number, kinds, self.questions, visit)
            for number, visit in zip(numbers, visits, strict=True)
        ]
        if not self.packed:
            numbers = [scene for scene, group in zip(numbers, asked, strict=True) for _ in group]
            asked = [[question] for group in asked for question in group]
        frame = self._frame(views, self._next_budget(), scenes.options.scene_size)
        inputs, number = self._text_inputs(frame, asked)
        if frame.geometry:
            inputs.update(self._pixels(scenes, store, numbers, views, len(frame.geometry["view_positions"])))
            inputs.update(self._column_values(scenes, numbers))
        return PackedBatch(inputs, number, asked, views, numbers)

    def _text_inputs(self, frame: _Frame, asked: list[list[Question]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Everything but what the views show, and the number of the question of each token."""
        rows = [self._row(frame.ids, [self._text(question) for question in group]) for group in asked]
        ids, labels, positions, number = (
            torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=value)
            for column, value in zip(zip(*rows, strict=True), (self._pad(), IGNORED, 0, -1), strict=True)
        )
        inputs = {"input_ids": ids, "labels": labels}
        inputs["prompt_mask"] = (labels == IGNORED) & (ids != self.processor.image_token_id) & (number >= 0)
        inputs["attention_mask"] = (number >= 0).long()
        if self.packed:
            inputs["attention_mask"], inputs["position_ids"] = packed_mask(number), positions
        for name, value in frame.geometry.items():
            inputs[name] = value.repeat(len(asked), 1)
        return inputs, number

    def _pad(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _pixels(
        self, scenes: SceneSet, store: SceneFeatures | None, numbers: list[int], views: str, num_views: int
    ) -> dict[str, torch.Tensor]:
        """What the views show: cached features, or pixels."""
        if store is not None:
            return {"vision_features": store.first_views(numbers, num_views)}
        kwargs = {**self.images_kwargs, "views": views}
        pixels = [
            self.processor.image_processor(scenes.picture(number), return_tensors="pt", **kwargs)["pixel_values"]
            for number in numbers
        ]
        return {"pixel_values": torch.cat(pixels)}

    def _column_values(self, scenes: SceneSet, numbers: list[int]) -> dict[str, Any]:
        """Columns of objectives, which read the picture alone; computed once a scene."""
        inputs = {}
        for column in self.columns:
            keys = [(column.name, scenes.options.scene_size, number) for number in numbers]
            for key in dict.fromkeys(keys):
                if key not in self._values:
                    image = {"type": "image", "image": scenes.picture(key[2])}
                    self._values[key] = column.encode([{"role": "user", "content": [image]}])
            values = [self._values[key] for key in keys if self._values[key] is not None]
            if values:
                inputs[column.name] = column.join(values)
        return inputs

    def _row(self, prefix: torch.Tensor, texts: list[_Text]) -> tuple[torch.Tensor, ...]:
        """ids, labels, positions and question numbers of one row."""
        ids, labels = [prefix], [torch.full_like(prefix, IGNORED)]
        positions, numbers = [torch.arange(len(prefix))], [torch.zeros_like(prefix)]
        for number, text in enumerate(texts, start=1):
            ids.append(text.ids)
            labels.append(torch.where(text.answer, text.ids, IGNORED))
            positions.append(len(prefix) + torch.arange(len(text.ids)))
            numbers.append(torch.full_like(text.ids, number))
        return torch.cat(ids), torch.cat(labels), torch.cat(positions), torch.cat(numbers)

    def _frame(self, views: str, budget: int | None, side: int) -> _Frame:
        """Prefix and geometry of square pictures, from a blank one; computed once."""
        key = (views, budget, side)
        if key not in self._frames:
            sample = self._sample(BLANK, views, side, budget)
            start = int(sample["is_image"].nonzero().max()) + 1 if views != NO_IMAGE else self._opening()
            geometry = {name: sample[name] for name in GEOMETRY if name in sample}
            self._frames[key] = _Frame(sample["input_ids"][:start], geometry)
        return self._frames[key]

    def _opening(self) -> int:
        """Tokens before the first picture of a prompt."""
        sample = self._sample(BLANK, "global", self.processor.image_processor.view_size)
        return int(sample["is_image"].nonzero().min())

    def _text(self, question: Question) -> _Text:
        """Tokens of a question and its answer behind a picture; computed once."""
        key = (question.text, question.answer)
        if key not in self._texts:
            sample = self._sample(question, "global", self.processor.image_processor.view_size)
            start = int(sample["is_image"].nonzero().max()) + 1
            answer = sample["labels"] != IGNORED
            self._texts[key] = _Text(sample["input_ids"][start:], answer[start:])
        return self._texts[key]

    def _sample(self, question: Question, views: str, side: int, budget: int | None = None) -> dict[str, torch.Tensor]:
        """What the ordinary collator makes of a blank picture and a question."""
        text = {"type": "text", "text": question.text}
        image = {"type": "image", "image": Image.new("RGB", (side, side))}
        content = [text] if views == NO_IMAGE else [image, text]
        answer = [{"type": "text", "text": question.answer}]
        messages: list[dict] = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        own, self.images_kwargs = self.images_kwargs, {**self.images_kwargs, "views": views}
        try:
            return self._encode(messages, budget)
        finally:
            self.images_kwargs = own


def packed_mask(number: torch.Tensor) -> torch.Tensor:
    """The additive attention mask of packed rows.

    Args:
        number (`torch.Tensor` of shape `(B, S)`): Number of the question of each token: 0 picture, -1 padding.

    Returns:
        `(B, 1, S, S)` float32: 0 where a token may look, else the most negative number. Tokens look back at the
        picture and at their own question; padding, which nothing reads, at the picture and itself.
    """
    length = number.shape[1]
    related = (number[:, None, :] == 0) | (number[:, None, :] == number[:, :, None])
    seen = related & torch.ones(length, length, dtype=torch.bool).tril() & (number[:, None, :] >= 0)
    seen |= torch.eye(length, dtype=torch.bool)
    return torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]
