"""Asks a model questions under several settings and counts the right answers."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ..training.parameters import find_base
from .asking import encode_prompts, find_ends, read_answers, use_threshold
from .encoding import EncodedImages, ImageEncoder
from .prompts import AskedQuestion, ask, draw_options, normalise_answer
from .rows import SweepRow, digest_rows, prepare_rows, source_key
from .settings import SweepSetting
from .statistics import Score, score
from .store import Answer, AnswerStore


Progress = Callable[[int, int, str], None]
SPARE_TOKENS = 2
"""Beyond the longest right answer: its end token, and one for tokenizers that write spaces of their own."""


@dataclass(frozen=True)
class SweepResult:
    """What came out."""

    settings: list
    answers: list
    seed: int = 0

    def scores(self, setting: SweepSetting) -> dict[str, Score]:
        """Scores of one setting, by the names of `group_answers`."""
        answers = [answer for answer in self.answers if answer.setting == setting]
        return {name: self._score(chosen) for name, chosen in group_answers(answers).items()}

    def _score(self, answers: list[Answer]) -> Score:
        return score(
            [answer.right for answer in answers],
            [answer.group for answer in answers],
            [answer.chance for answer in answers],
            [answer.constant for answer in answers],
            self.seed,
        )

    def mean_tokens(self, setting: SweepSetting) -> float:
        """Mean number of kept tokens, those that reached the language model, a question."""
        tokens = [answer.tokens for answer in self.answers if answer.setting == setting]
        return sum(tokens) / len(tokens)

    def summary(self) -> list[dict[str, Any]]:
        """One record a setting: `setting`, `questions`, `tokens` (mean) and `scores` by name, as JSON values."""
        records = []
        for setting in self.settings:
            scores = self.scores(setting)
            records.append(
                {
                    "setting": setting.to_dict(),
                    "questions": scores["all"].questions,
                    "tokens": self.mean_tokens(setting),
                    "scores": {name: value.to_dict() for name, value in scores.items()},
                }
            )
        return records


def group_answers(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """Answers of one setting: `all`, `fine`, `scene`, `fine_whole`, `fine_cut` where they say so, then each kind."""
    groups = {
        "all": list(answers),
        "fine": [answer for answer in answers if answer.fine is True],
        "scene": [answer for answer in answers if answer.fine is False],
        "fine_whole": [answer for answer in answers if answer.fine is True and answer.cut is False],
        "fine_cut": [answer for answer in answers if answer.fine is True and answer.cut is True],
    }
    for kind in sorted({answer.kind for answer in answers if answer.kind is not None}):
        groups[kind] = [answer for answer in answers if answer.kind == kind]
    return {name: chosen for name, chosen in groups.items() if chosen}


def evaluate(
    model: Any,
    processor: Any,
    rows: Iterable[dict[str, Any]],
    settings: Sequence[SweepSetting] = (SweepSetting(),),
    batch_size: int = 16,
    seed: int = 0,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
) -> SweepResult:
    """Ask all questions under all settings, greedily.

    Args:
        rows (iterable of `dict`): The questions, see `prepare_rows`. Neighbours that share images are cheap.
        settings (sequence of `SweepSetting`): How to ask.
        batch_size (`int`): Questions that are answered at once.
        seed (`int`): Of the options of the format `"letter"` and of the bootstrap.
        store (`AnswerStore`, *optional*): Where answers are kept; those it already holds are not asked again.
        progress (`Callable`, *optional*): Called with answers done, answers in all and a description.

    Raises:
        ValueError: If rows, settings or store do not fit together; if a budget is too small for an image.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")
    if model.training:
        raise ValueError("The model is in training mode, where routers add noise; call model.eval() first.")
    settings = list(dict.fromkeys(settings))
    questions = prepare_rows(rows)
    asker = _Asker(model, processor, batch_size, _ask_all(questions, settings, seed))
    asker.check(settings)
    known = store.begin(rows=digest_rows(questions), seed=seed) if store is not None else []
    found = {answer.key: answer for answer in known}
    total = len(questions) * len(settings)
    done = sum((setting, row.index) in found for setting in settings for row in questions)
    for number, chunk in enumerate(_chunks(questions, batch_size)):
        images = {source_key(source): source for row in chunk for source in row.images}
        encoder = ImageEncoder(find_base(model), processor, list(images.values()))
        if number == 0:  # said before the first answer; later images are checked as they come
            encoder.check_budgets(settings)
        for setting in settings:
            waiting = [row for row in chunk if (setting, row.index) not in found]
            if progress is not None:
                progress(done, total, setting.label)
            answers = asker.answer(setting, waiting, encoder) if waiting else []
            found.update({answer.key: answer for answer in answers})
            done += len(answers)
            if store is not None and answers:
                store.append(answers)
    if progress is not None:
        progress(done, total, "done")
    return SweepResult(settings, [found[setting, row.index] for setting in settings for row in questions], seed)


Asked = dict[tuple[str, int], AskedQuestion]


def _ask_all(rows: list[SweepRow], settings: Sequence[SweepSetting], seed: int) -> Asked:
    """What is asked in each format: (format, row) -> question."""
    answers: dict[str | None, list[str]] = {}
    for row in rows:
        answers.setdefault(row.kind, []).append(row.answer)
    asked = {}
    for name in {setting.format for setting in settings}:
        for row in rows:
            options: list[str] = []
            if name == "letter":
                options = draw_options(row.answer, row.kind, answers[row.kind], f"{seed}/{row.index}")
            asked[name, row.index] = ask(row.answer, name, options)
    return asked


def _chunks(rows: Sequence[SweepRow], batch_size: int) -> Iterator[list[SweepRow]]:
    """Neighbours in groups of at least `batch_size`; neighbours with the same images stay together."""
    chunk: list[SweepRow] = []
    last: list[str] = []
    for row in rows:
        images = [source_key(source) for source in row.images]
        if len(chunk) >= batch_size and images != last:
            yield chunk
            chunk = []
        chunk.append(row)
        last = images
    if chunk:
        yield chunk


class _Asker:
    """A model with what is needed to ask it."""

    def __init__(self, model: Any, processor: Any, batch_size: int, asked: Asked):
        self.model, self.processor, self.batch_size, self.asked = model, processor, batch_size, asked
        tokenizer = processor.tokenizer
        self.ends = find_ends(model, tokenizer)
        answers = {question.answer for question in asked.values()}
        lengths = [len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
        self.max_new_tokens = max(lengths) + SPARE_TOKENS

    def check(self, settings: Sequence[SweepSetting]) -> None:
        """Refuse thresholds that nothing in the model reads."""
        for setting in settings:
            with use_threshold(self.model, setting.gamma):
                pass

    @torch.inference_mode()
    def answer(self, setting: SweepSetting, rows: list[SweepRow], encoder: ImageEncoder) -> list[Answer]:
        """Ask some questions under one setting."""
        images = encoder.encode(setting) if setting.views != "none" and encoder.sources else None
        answers = []
        with use_threshold(self.model, setting.gamma):
            for start in range(0, len(rows), self.batch_size):
                answers += self._batch(setting, rows[start : start + self.batch_size], images)
        return answers

    def _batch(self, setting: SweepSetting, rows: list[SweepRow], images: EncodedImages | None) -> list[Answer]:
        asked = [self.asked[setting.format, row.index] for row in rows]
        inputs, chosen = self._inputs(rows, [question.suffix for question in asked], images)
        options = {"max_new_tokens": self.max_new_tokens, "do_sample": False, "num_beams": 1, **inputs}
        if images is not None and chosen:
            options["mm_encoder_outputs"] = {"image": images.features.select_images(chosen)}
        with _count_tokens(self.model, self.processor.image_token_id) as counts:
            generated = self.model.generate(**options)
        new = generated[:, inputs["input_ids"].shape[1] :]
        texts, ended, _ = read_answers(self.processor.tokenizer, new, self.ends)
        answers = []
        for row, question, text, end, tokens in zip(rows, asked, texts, ended, counts, strict=True):
            num_options = question.num_options
            answers.append(
                Answer(
                    setting=setting,
                    row=row.index,
                    kind=row.kind,
                    group=row.group,
                    fine=row.fine,
                    cut=row.cut,
                    answer=question.answer,
                    prediction=text,
                    ended=end,
                    right=end and normalise_answer(text) == normalise_answer(question.answer),
                    tokens=tokens,
                    chance=row.chance if num_options is None else 1 / num_options,
                    constant=row.constant if num_options is None else None,
                )
            )
        return answers

    def _inputs(
        self, rows: list[SweepRow], suffixes: list[str], images: EncodedImages | None
    ) -> tuple[dict[str, torch.Tensor], list[int]]:
        """Ids and mask, padded on the left, and the number of each image in reading order."""
        conversations = [
            _conversation(row, suffix, images is not None) for row, suffix in zip(rows, suffixes, strict=True)
        ]
        texts = self.processor.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        chosen: list[int] = []
        if images is not None:
            chosen = [images.order[source_key(source)] for row in rows for source in row.images]
        placeholders = [images.placeholders[index] for index in chosen] if images is not None else []
        encoded = encode_prompts(self.processor, texts, placeholders)
        return {name: tensor.to(self.model.device) for name, tensor in encoded.items()}, chosen


def _conversation(row: SweepRow, suffix: str, with_images: bool) -> list[dict]:
    """The turns of a question with its response format."""
    turns = []
    for message in row.messages:
        parts = list(message["content"])
        if not with_images and any(part["type"] == "image" for part in parts):
            parts = [part for part in parts if part["type"] != "image"]
            parts[:1] = [{**part, "text": part["text"].lstrip("\n")} for part in parts[:1]]
        turns.append({**message, "content": parts})
    if suffix:
        turns[-1]["content"].append({"type": "text", "text": suffix})
    return turns


@contextmanager
def _count_tokens(model: Any, image_token_id: int) -> Iterator[list[int]]:
    """A list that holds, after one `generate`, the kept tokens of each row."""
    counts: list[int] = []

    def read(module: Any, arguments: tuple, options: dict[str, Any], output: Any) -> None:
        ids = options["input_ids"] if "input_ids" in options else arguments[0]
        if counts:
            return
        placed = ids == image_token_id
        kept = placed if output.kept_mask is None else placed & output.kept_mask
        counts.extend(kept.sum(dim=1).tolist())

    hook = find_base(model).register_forward_hook(read, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()
