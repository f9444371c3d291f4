"""The questions of a sweep: from files, from packages that register some, or rows of any data set for the collator."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from importlib.metadata import entry_points
from inspect import signature
from pathlib import Path
from typing import Any, get_type_hints

from ..training.collator import find_image, read_messages
from ..training.data.conversations import read_llava_record
from .prompts import normalise_answer


GROUP = "hires_lmm.rows"
"""Entry points of packages that bring questions: name -> function `(split, **options)` that returns rows."""


@dataclass(frozen=True)
class SweepRow:
    """One question: its turns up to the last user turn, and its images in reading order.

    `group` names the scene that questions share; `cut`: a crop border cuts what it is about; `chance` is what guessing
    gets, `constant` what the best constant answer to questions of the kind gets.
    """

    index: int
    messages: list
    images: list
    answer: str
    kind: str | None
    group: str
    fine: bool | None
    cut: bool | None
    chance: float | None
    constant: float | None


def load_rows(dataset: str, options: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The questions that a name stands for.

    Args:
        dataset (`str`): A `.json` or `.jsonl` file, or the name of an entry point of the group `hires_lmm.rows`, such
            as `needle` or, with a split, `needle:test`.

    Raises:
        ValueError: If there is no such data set, or it has no such option.
    """
    options = dict(options or {})
    if Path(dataset).suffix in (".json", ".jsonl"):
        if options:
            raise ValueError(f"{dataset!r} is a file, which has no option {next(iter(options))!r}; leave it out.")
        return read_rows(dataset)
    name, _, split = dataset.partition(":")
    registered = {entry.name: entry for entry in entry_points(group=GROUP)}
    if name not in registered:
        known = ", ".join(sorted(registered)) or "none"
        raise ValueError(f"{dataset!r} is no data set; name a .json or .jsonl file, or a registered one: {known}.")
    function = registered[name].load()
    options |= {"split": split} if split else {}
    try:
        signature(function).bind(**options)
    except TypeError as error:
        raise ValueError(f"The data set {name!r}: {error}; its options are {signature(function)}.") from error
    _check_types(name, function, options)
    return list(function(**options))


def _check_types(dataset: str, function: Callable, options: dict[str, Any]) -> None:
    """Refuse an option of another type than the function declares, where that is a plain one."""
    declared = get_type_hints(function)
    for key, value in options.items():
        kind: Any = declared.get(key)
        if kind in (int, float, str, bool) and type(value) not in ((int, float) if kind is float else (kind,)):
            raise ValueError(
                f"The data set {dataset!r}: {key}={value!r} is of type {type(value).__name__}; it must be of type "
                f"{kind.__name__}."
            )


def read_rows(file: str | Path, image_folder: str | Path | None = None) -> list[dict[str, Any]]:
    """Read questions from a `.json` file with a list of records, or a `.jsonl` with one a line.

    Args:
        file (`str` or `Path`): Records in the form that the collator takes (`messages`, `images` or `image`) or in the
            LLaVA format (`conversations`); further keys `answer`, `kind`, `fine`, `cut`, `scene`.
        image_folder (`str` or `Path`, *optional*): Folder that relative paths start from; that of the file by default.

    Raises:
        ValueError: If the file is missing or holds no records.
    """
    file = Path(file)
    folder = Path(image_folder) if image_folder is not None else file.parent
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r}; correct the path.")
    text = file.read_text(encoding="utf-8")
    try:
        lines = [line for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else []
        records = [json.loads(line) for line in lines] if file.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(file)!r} is no JSON: {error}.") from error
    if not isinstance(records, list) or not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{str(file)!r} must hold a list of records, one a question.")
    return [_read_record(record, folder) for record in records]


def _read_record(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One record with its images in the messages, paths resolved."""
    if "conversations" in record:
        return {**record, "messages": read_llava_record(record, folder)["messages"], "image": None, "images": None}
    messages = [{**message, "content": _resolved(message["content"], folder)} for message in read_messages(record)]
    return {**record, "messages": messages, "image": None, "images": None}


def _resolved(parts: list[dict], folder: Path) -> list[dict]:
    resolved = []
    for part in parts:
        source = find_image(part)
        if isinstance(source, str) and "://" not in source and "base64" not in part:
            part = {"type": "image", "image": str(folder / source)}
        resolved.append(part)
    return resolved


def prepare_rows(rows: Iterable[dict[str, Any]]) -> list[SweepRow]:
    """Bring rows as the collator takes them into one form; the answer is `answer`, else the text of the last turn."""
    numbers: dict[str, int] = {}
    prepared = [_prepare(index, row, numbers) for index, row in enumerate(rows)]
    if not prepared:
        raise ValueError("There are no questions to ask; pass at least one row.")
    best = constant_shares([(row.kind, row.answer) for row in prepared])
    return [row if row.constant is not None else replace(row, constant=best[row.kind]) for row in prepared]


def constant_shares(questions: Sequence[tuple[str | None, str]]) -> dict[str | None, float]:
    """Kind -> share that the best constant answer to its questions gets."""
    answers: dict[str | None, Counter[str]] = defaultdict(Counter)
    for kind, answer in questions:
        answers[kind][normalise_answer(answer)] += 1
    return {kind: counts.most_common(1)[0][1] / counts.total() for kind, counts in answers.items()}


def _prepare(index: int, row: dict[str, Any], numbers: dict[str, int]) -> SweepRow:
    """One row; `numbers` counts the images in the order in which they appear first."""
    messages = read_messages(row)
    answer = row.get("answer")
    if messages[-1]["role"] == "assistant":
        said = "".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text").strip()
        answer = said if answer is None else answer
        messages = messages[:-1]
    if not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"Row {index} has the answer {answer!r}; give a text, as answer or as a last assistant turn.")
    if not messages or messages[-1]["role"] != "user":
        raise ValueError(f"Row {index} asks nothing: before its answer there must be a user turn.")
    sources = [find_image(part) for message in messages for part in message["content"] if part["type"] == "image"]
    return SweepRow(
        index=index,
        messages=[{**message, "content": _bare(message["content"])} for message in messages],
        images=sources,
        answer=answer,
        kind=row.get("kind"),
        group=_group(index, row, sources, numbers),
        fine=row.get("fine"),
        cut=row.get("cut"),
        chance=row.get("chance"),
        constant=row.get("constant"),
    )


def _bare(parts: list[dict]) -> list[dict]:
    """Parts without their images."""
    return [{"type": "image"} if part["type"] == "image" else part for part in parts]


def source_key(source: Any) -> str:
    """What tells images apart within one run: the path or address, or the identity of the object."""
    return str(source) if isinstance(source, (str, Path)) else f"object {id(source)}"


def _group(index: int, row: dict[str, Any], sources: list, numbers: dict[str, int]) -> str:
    """The scene, or else the images, or else the row alone."""
    if row.get("scene") is not None:
        return f"scene {row['scene']}"
    names = [str(numbers.setdefault(source_key(source), len(numbers))) for source in sources]
    return f"images {' '.join(names)}" if names else f"row {index}"


def digest_rows(rows: Sequence[SweepRow]) -> str:
    """A hash of texts, answers, kinds, groups and names of images, not of their pixels."""
    digest = blake2b(digest_size=16)
    for row in rows:
        named = [str(source) if isinstance(source, (str, Path)) else "" for source in row.images]
        record = [row.messages, named, row.answer, row.kind, row.group, row.fine, row.cut]
        digest.update(json.dumps(record, ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()
