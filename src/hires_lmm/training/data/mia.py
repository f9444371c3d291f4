"""Preference data about several pictures (MIA-DPO): answers of the model that looked at a wrong picture are rejected.

`build_pairs` shows pictures of single-image data together, asks `answer` about one of them, and keeps as rejected what
`Filters` accepts; `write_pairs` writes what `trl.DPOTrainer` reads.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...extras import import_extra
from ...processing.image_input_hires_lmm import open_image, to_rgb
from .composites import Composite, add_noise, make_composite


KINDS = ("sequence", "grid", "inner")


@dataclass(frozen=True)
class Answer:
    """A model's answer: text, share of the attention on the picture it was asked about, perplexity."""

    text: str
    share: float
    perplexity: float


@dataclass(frozen=True)
class Filters:
    """Which answers are rejected ones.

    Args:
        shares (mapping): Kind -> number of pictures -> an attention share below which an answer looked elsewhere; more
            pictures than named count as the most that are. Picture in picture is read as a grid of two.
        perplexity (`float`): Answers are above it: one of 1 was never in doubt.
        characters (`int`): Answers are at most so long.
        length_ratio (`float`, *optional*): An answer is at most so many times longer or shorter than the right one.
        edits (`int`): Characters that differ from the right answer, at least; 1: answers are not the same.

    Source: MIA-DPO (released code for the numbers; its paper names the filters of length and edits without numbers).
    """

    shares: Mapping[str, Mapping[int, float]] = field(
        default_factory=lambda: {
            "sequence": {2: 0.8, 3: 0.7},
            "grid": {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3},
            "inner": {2: 0.7},
        }
    )
    perplexity: float = 1.1
    characters: int = 512
    length_ratio: float | None = None
    edits: int = 1

    def reason(self, answer: Answer, right: str, kind: str, pictures: int) -> str | None:
        """Why an answer is not taken as a rejected one: the name of a filter, or None."""
        known = self.shares[kind]
        most = known[max((number for number in known if number <= pictures), default=min(known))]
        lengths = sorted((max(len(answer.text), 1), max(len(right), 1)))
        if edit_distance(answer.text.strip(), right.strip()) < self.edits:
            return "edits"
        if answer.share > most or (answer.share == most and kind != "sequence"):
            return "share"
        if answer.perplexity <= self.perplexity:
            return "perplexity"
        if len(answer.text) > self.characters:
            return "characters"
        return "length_ratio" if self.length_ratio and lengths[1] > self.length_ratio * lengths[0] else None


def edit_distance(first: str, second: str) -> int:
    """Characters to insert, remove or change that turn one text into the other."""
    costs = list(range(len(second) + 1))
    for row, letter in enumerate(first, 1):
        before, costs[0] = costs[0], row
        for column, other in enumerate(second, 1):
            change = before + (letter != other)
            before, costs[column] = costs[column], min(change, costs[column] + 1, costs[column - 1] + 1)
    return costs[-1]


def attention_share(attention: torch.Tensor, pictures: torch.Tensor, asked: int, by: str = "sum") -> float:
    """Of the attention on visual tokens, the share on one picture.

    Args:
        attention (`torch.Tensor` of shape `(N,)`): Attention that the answer gave each visual token.
        pictures (`torch.Tensor` of shape `(N,)`): The picture of each token; -1 for none.
        asked (`int`): The picture that the question is about.
        by (`str`): `"sum"`: over all tokens. `"mean"`: means over the tokens of each picture are compared, so that
            pictures of more tokens count no more.

    Raises:
        ValueError: If no token shows the picture.

    Source: MIA-DPO (released code): `"mean"` for sequences, `"sum"` for one image.
    """
    if not (pictures == asked).any():
        raise ValueError(f"No visual token shows picture {asked}: tokens need a place in the image.")
    if by == "sum":
        return (attention[pictures == asked].sum() / attention.sum()).item()
    means = {int(each): attention[pictures == each].mean() for each in pictures.unique() if each >= 0}
    return (means[asked] / sum(means.values())).item()


def find_pictures(composite: Composite, token_map: Any) -> torch.Tensor:
    """The picture that each visual token shows, by the middle of its box; -1 for none. Inner pictures win."""
    if composite.kind == "sequence":
        return torch.where(token_map.kind < 0, -1, token_map.image)
    rows, columns = token_map.box[:, [0, 2]].mean(dim=1), token_map.box[:, [1, 3]].mean(dim=1)
    pictures = torch.full((len(rows),), -1)
    for index, (top, left, bottom, right) in reversed(list(enumerate(composite.boxes))):
        pictures[(rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)] = index
    return pictures


def visual_columns(is_image: torch.Tensor, kept: torch.Tensor, length: int) -> torch.Tensor:
    """Where the visual tokens that reached the language model stand in a sequence of `length` that it read.

    Args:
        is_image (`torch.Tensor` of shape `(S,)`): Placeholders of the caller's ids.
        kept (`torch.Tensor` of shape `(N,)`): As in a `TokenMap`.
        length (`int`): What the attention has.

    Raises:
        ValueError: If tokens left later, so that the sequence is shorter.
    """
    stays = torch.ones_like(is_image)
    if len(kept) == int(is_image.sum()):
        stays[is_image] = kept.to(is_image.device)
    columns = (stays.cumsum(0) - 1)[is_image & stays]
    if int(stays.sum()) != length or len(columns) != int(kept.sum()):
        raise ValueError(
            f"The attention has {length} positions, the prompt {int(stays.sum())} with {len(columns)} of "
            f"{int(kept.sum())} visual tokens: choose a layer before those behind which tokens leave."
        )
    return columns


@torch.no_grad()
def answer_with_attention(
    model: Any,
    processor: Any,
    composite: Composite,
    question: str,
    asked: int,
    layer: int | None = None,
    **options: Any,
) -> Answer:
    """Let a model answer, and see where it looked: the mean over heads and tokens of the answer in one layer.

    Args:
        model, processor: Of this package; any planner.
        composite (`Composite`): What is shown.
        question (`str`): What is asked.
        asked (`int`): About which picture, from 0.
        layer (`int`, *optional*): Of the language model; default: the middle one (released: 16 of 32).
        options: For `generate`, such as `max_new_tokens`, `do_sample`.

    Raises:
        ValueError: If no token shows the picture.
    """
    message = composite.message(question, asked)
    pictures = iter(composite.images)
    parts = [{**part, "image": next(pictures)} if part["type"] == "image" else part for part in message["content"]]
    inputs = processor.apply_chat_template(
        [{**message, "content": parts}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    prompt = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, **{"max_new_tokens": 128, "do_sample": False, **options})
    images = {name: value for name, value in inputs.items() if name.startswith(("pixel_", "view_"))}
    read = {name: value for name, value in inputs.items() if name == "question_ids"}
    read["mm_encoder_outputs"] = {"image": model.get_image_features(**images)}  # apart: the tower keeps no attention
    with eager_attention(model):
        outputs = model(ids, **read, output_attentions=True, output_token_map=True, use_cache=False)
    losses = -outputs.logits[0, prompt - 1 : -1].float().log_softmax(-1).gather(-1, ids[0, prompt:, None])
    layer = len(outputs.attentions) // 2 if layer is None else layer
    weights = outputs.attentions[layer][0].float().mean(dim=0)[prompt - ids.shape[1] :].mean(dim=0)
    token_map = outputs.token_map
    columns = visual_columns(ids[0] == model.config.image_token_id, token_map.kept, len(weights))
    shown = find_pictures(composite, token_map)[token_map.kept]
    by = "mean" if composite.kind == "sequence" else "sum"
    share = attention_share(weights[columns].cpu(), shown, asked, by)
    text = processor.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    return Answer(text, share, losses.mean().exp().item())


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """The language model keeps its attention while this lasts."""
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def build_pairs(
    rows: Sequence[Mapping[str, Any]],
    answer: Callable[[Composite, str, int], Answer],
    kinds: Sequence[str] = KINDS,
    pictures: int = 2,
    noise: float | None = 225.0,
    filters: Filters | None = None,
    seed: int = 0,
    counts: Counter | None = None,
) -> Iterator[dict[str, Any]]:
    """Rows of preference data: the right answer is chosen, the model's own rejected.

    Args:
        rows (sequence of mappings): `image`, in any form that the processor takes, `question` and `answer`.
        answer (`Callable`): Composite, question and number of the picture -> `Answer`; `answer_with_attention` with
            its first arguments filled in.
        kinds (sequence of `str`): Of composites, in turn: `"sequence"`, `"grid"`, `"inner"`.
        pictures (`int`): Pictures shown together; always two with `"inner"`.
        noise (`float`, *optional*): Noise on the asked picture while the model answers; None: it sees the picture.
        filters (`Filters`, *optional*): Which answers are kept.
        seed (`int`): Of the choice and order of the other pictures, and of the noise.
        counts (`Counter`, *optional*): Counts what was `kept`, and what each filter left out.

    Yields:
        `images`, `prompt`, `chosen`, `rejected`, `kind`, `share`, `perplexity`.

    Raises:
        ValueError: If there are fewer rows than pictures, a kind is unknown or has no share, the noise is below 0, or
            an image cannot be read.

    Source: MIA-DPO (released code); which phrases name a picture is ours.
    """
    if len(rows) < max(2, pictures) or pictures < 1 or not kinds or set(kinds) - set(KINDS):
        raise ValueError(
            f"{len(rows)} rows, {pictures} pictures, kinds={list(kinds)}: give at least two rows, as many as "
            f"pictures, a picture or more, and a list of kinds of {', '.join(KINDS)}."
        )
    filters, counts = filters or Filters(), Counter() if counts is None else counts
    if missing := set(kinds) - {kind for kind, numbers in filters.shares.items() if numbers}:
        raise ValueError(f"shares={filters.shares} of the filters say nothing of {', '.join(sorted(missing))}.")
    if noise is not None and not 0 <= noise < math.inf:
        raise ValueError(f"noise={noise} is a standard deviation of pixels: give 0 or more, or None.")
    for index, row in enumerate(rows):
        rng = random.Random(f"{seed}/{index}")
        kind = kinds[index % len(kinds)]
        number = 2 if kind == "inner" else pictures
        others = rng.sample([other for other in range(len(rows)) if other != index], number - 1)
        asked = 0 if kind == "inner" else rng.randrange(number)
        order = [*others[:asked], index, *others[asked:]]
        shown = [to_rgb(open_image(rows[each]["image"], each), each) for each in order]
        seen = [*shown]
        if noise is not None:
            seen[asked] = add_noise(shown[asked], noise, rng.randrange(2**32))
        found = answer(make_composite(kind, seen), row["question"], asked)
        reason = filters.reason(found, row["answer"], kind, number)
        counts[reason or "kept"] += 1
        if reason is None:
            yield _pair(make_composite(kind, shown), row, asked, found)


def _pair(composite: Composite, row: Mapping[str, Any], asked: int, rejected: Answer) -> dict[str, Any]:
    def turn(text: str) -> list[dict]:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]

    return {
        "images": composite.images,
        "prompt": [composite.message(row["question"], asked)],
        "chosen": turn(row["answer"]),
        "rejected": turn(rejected.text),
        "kind": composite.kind,
        "share": rejected.share,
        "perplexity": rejected.perplexity,
    }


def write_pairs(rows: Iterator[dict[str, Any]] | Sequence[dict[str, Any]], folder: str | Path) -> Any:
    """Write rows of `build_pairs` as `train.parquet`, pictures included, which `datasets.load_dataset(folder)` reads.

    Args:
        rows (iterable of `dict`): The rows.
        folder (`str` or `Path`): Is made where it is missing.

    Returns:
        The `datasets.Dataset`, for `trl.DPOTrainer`.

    Raises:
        ValueError: If no row was kept.
    """
    datasets = import_extra("datasets", "train")
    found = list(rows)
    if not found:
        raise ValueError("No answer passed the filters, so there is nothing to write; see `counts` of `build_pairs`.")
    text, number = datasets.Value("string"), datasets.Value("float64")
    turns = [{"role": text, "content": [{"type": text, "text": text}]}]
    types = {"images": datasets.List(datasets.Image()), "kind": text, "share": number, "perplexity": number}
    types |= dict.fromkeys(("prompt", "chosen", "rejected"), turns)
    columns = {name: [row[name] for row in found] for name in types}
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    Path(folder).mkdir(parents=True, exist_ok=True)
    data.to_parquet(Path(folder) / "train.parquet")
    return data
