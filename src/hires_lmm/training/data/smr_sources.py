"""Readers of the sources of SMR, one function each, in the layouts their authors publish."""

import codecs
import io
import json
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

DESCRIBE = (
    "Describe the following image in detail",
    "Provide a detailed description of the given image",
    "Give an elaborate explanation of the image you see",
    "Share a comprehensive rundown of the presented image",
    "Offer a thorough analysis of the image",
    "Explain the various aspects of the image before you",
    "Clarify the contents of the displayed image with great detail",
    "Characterize the image using a well-detailed description",
    "Break down the elements of the image in a detailed manner",
    "Walk through the important details of the image",
    "Portray the image with a rich, descriptive narrative",
    "Narrate the contents of the image with precision",
    "Analyze the image in a comprehensive and detailed manner",
    "Illustrate the image through a descriptive explanation",
    "Examine the image closely and share its details",
    "Write an exhaustive depiction of the given image",
)
"""Table 5 of the paper: prompts for descriptions."""


@dataclass
class Record:
    """One question with its image.

    Args:
        name (`str`): Unique in its source.
        image (`Path` or `PIL.Image.Image`): The image, or its file.
        prompt (`str`): What the user says; empty = one of `DESCRIBE`, drawn by the builder.
        answer (`str`): What the assistant says.
    """

    name: str
    image: Path | Image.Image
    prompt: str
    answer: str


Entry = tuple[str, Callable[[], Any]]
"""Where something stands, for messages, and a function that makes a record of it, a list of records, or None."""


def with_options(question: str, options: list[str]) -> str:
    """A question, its options with letters, and the instruction to answer with one.

    Args:
        question (`str`): The question.
        options (`list[str]`): The options; letters they already carry are kept.
    """
    lines = []
    for letter, option in zip(LETTERS, options, strict=False):
        option = str(option).strip()
        marked = option[:2] in (f"{letter}.", f"{letter})") or option.startswith(f"({letter})")
        lines.append(option if marked else f"{letter}. {option}")
    return "\n".join([question.strip(), *lines, OPTION_LETTER])


def letter_of(answer: Any, options: list) -> str:
    """The letter of an answer that is an index, a letter or the text of an option.

    Args:
        answer: The answer as the source gives it.
        options (`list`): The options.

    Raises:
        ValueError: If no option is meant.
    """
    if isinstance(answer, (int, np.integer)) and 0 <= answer < len(options):
        return LETTERS[int(answer)]
    texts = [str(option).strip() for option in options]
    given = str(answer).strip()
    if given in texts:
        return LETTERS[texts.index(given)]
    bare = given.strip("().: ")
    if len(bare) >= 1 and bare[0].upper() in LETTERS[: len(options)] and (len(bare) == 1 or not bare[1].isalnum()):
        return bare[0].upper()
    raise ValueError(f"the answer {answer!r} is none of the options {options!r}")


def read_json(file: Path) -> Any:
    """Read a JSON or JSON-lines file.

    Args:
        file (`Path`): The file.
    """
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def read_arxivqa(folder: Path) -> Iterator[Entry]:
    """Arxiv-QA: `arxivqa.jsonl` and `images/`; the rationales are the answers.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(row: dict) -> Record:
        prompt = with_options(row["question"], row["options"]).removesuffix("\n" + OPTION_LETTER)
        return Record(str(row["id"]), folder / row["image"], prompt, row["rationale"])

    yield from _rows(folder / "arxivqa.jsonl", convert)


def read_scienceqa(folder: Path) -> Iterator[Entry]:
    """ScienceQA: `problems.json` and `<split>/<id>/image.png`; hint, question and options are the prompt.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(name: str, row: dict) -> Record | None:
        if row["image"] is None or row["split"] != "train":
            return None
        question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        image = folder / row["split"] / name / row["image"]
        return Record(name, image, with_options(question, row["choices"]), letter_of(row["answer"], row["choices"]))

    yield from _items(folder / "problems.json", convert)


def read_math_vision(folder: Path) -> Iterator[Entry]:
    """MATH-Vision: `test.jsonl` and `images/`.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(row: dict) -> Record:
        question = row["question"].replace("<image1>", "").strip()
        options = row.get("options") or []
        prompt = with_options(question, options) if options else f"{question}\n{SHORT_ANSWER}"
        return Record(str(row["id"]), folder / row["image"], prompt, str(row["answer"]))

    yield from _rows(folder / "test.jsonl", convert)


def read_ai2d(folder: Path) -> Iterator[Entry]:
    """AI2D: `questions/<image>.json` and `images/`.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(file: Path) -> list[Record]:
        content = read_json(file)
        return [
            Record(
                row["questionId"],
                folder / "images" / content["imageName"],
                with_options(question, row["answerTexts"]),
                letter_of(row["correctAnswer"], row["answerTexts"]),
            )
            for question, row in content["questions"].items()
        ]

    for file in sorted((folder / "questions").glob("*.json")):
        yield str(file), partial(convert, file)


def read_textbookqa(folder: Path) -> Iterator[Entry]:
    """TextbookQA: `tqa_v1_train.json` with its images: captions of lesson images, and diagram questions.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(lesson: dict) -> list[Record]:
        name, records = lesson["globalID"], []
        for topic, content in lesson["topics"].items():
            for number, figure in enumerate(content["content"]["figures"]):
                if figure["caption"].strip():
                    image = folder / figure["imagePath"]
                    records.append(Record(f"{name}-{topic}-{number}", image, "", figure["caption"].strip()))
        for key, row in lesson["questions"]["diagramQuestions"].items():
            options = [row["answerChoices"][letter]["processedText"] for letter in sorted(row["answerChoices"])]
            prompt = with_options(row["beingAsked"]["processedText"], options)
            answer = letter_of(row["correctAnswer"]["processedText"], options)
            records.append(Record(f"{name}-{key}", folder / row["imagePath"], prompt, answer))
        return records

    yield from _rows(folder / "tqa_v1_train.json", convert)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads plain containers, numbers, texts and numpy arrays, and nothing that could run code."""

    ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 2 arrays carry their bytes
            return codecs.encode
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which a dataset does not need")


def _read_geoqa(file: Path) -> Iterator[Entry]:
    """GeoQA pickles: a list of dicts with `image` (an array), `subject`, `choices`, `label`, `answer`."""

    def convert(number: int, row: dict) -> Record:
        image = Image.fromarray(np.asarray(row["image"]).astype(np.uint8))
        letter = LETTERS[int(row["label"])]
        rationale = str(row.get("answer") or "").strip()
        answer = f"{rationale}\n{letter}" if rationale else letter
        return Record(str(row.get("id", number)), image, with_options(row["subject"], row["choices"]), answer)

    rows = _ArrayUnpickler(io.BytesIO(file.read_bytes())).load()
    for number, row in enumerate(rows):
        yield f"{file}, record {number}", partial(convert, number, row)


def read_geoqa3(folder: Path) -> Iterator[Entry]:
    """GeoQA3: `train.pk` of its data folder.

    Args:
        folder (`Path`): Where the source was unpacked.
    """
    yield from _read_geoqa(folder / "train.pk")


def read_geoqa_plus(folder: Path) -> Iterator[Entry]:
    """GeoQA+: `Backtrans-train.pk` of its data folder, the augmented training set.

    Args:
        folder (`Path`): Where the source was unpacked.
    """
    yield from _read_geoqa(folder / "Backtrans-train.pk")


def read_geometry3k(folder: Path) -> Iterator[Entry]:
    """Geometry3K: `<split>/<id>/data.json` and `img_diagram.png`.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(file: Path) -> Record:
        row = read_json(file)
        prompt = with_options(row["problem_text"], row["choices"])
        return Record(
            file.parent.name, file.parent / "img_diagram.png", prompt, letter_of(row["answer"], row["choices"])
        )

    for split in ("train", "val", "test"):
        for file in sorted((folder / split).glob("*/data.json")):
            yield str(file), partial(convert, file)


def read_tabmwp(folder: Path) -> Iterator[Entry]:
    """TabMWP: `tabmwp/problems_train.json` and `tabmwp/tables/<id>.png`; the solutions are the answers.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(name: str, row: dict) -> Record:
        question = row["question"] if not row.get("unit") else f"{row['question']} (unit: {row['unit']})"
        prompt = with_options(question, row["choices"]) if row.get("choices") else question
        answer = f"{row['solution'].strip()}\nThe answer is {row['answer']}."
        image = folder / "tabmwp" / "tables" / f"{name}.png"
        return Record(name, image, prompt.removesuffix("\n" + OPTION_LETTER), answer)

    yield from _items(folder / "tabmwp" / "problems_train.json", convert)


def read_dvqa(folder: Path) -> Iterator[Entry]:
    """DVQA: `qa/train_qa.json` and `images/`; only questions of the reasoning template.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(row: dict) -> Record | None:
        if row["template_id"] != "reasoning":
            return None
        prompt = f"{row['question']}\n{SHORT_ANSWER}"
        return Record(str(row["question_id"]), folder / "images" / row["image"], prompt, str(row["answer"]))

    yield from _rows(folder / "qa" / "train_qa.json", convert)


def read_chartqa(folder: Path) -> Iterator[Entry]:
    """ChartQA: `<split>/<split>_human.json` and `<split>/png/`; only questions written by people.

    Args:
        folder (`Path`): Where the source was unpacked.
    """

    def convert(split: str, number: int, row: dict) -> Record:
        image = folder / split / "png" / row["imgname"]
        return Record(f"{split}-{number}", image, f"{row['query']}\n{SHORT_ANSWER}", str(row["label"]))

    for split in ("train", "val", "test"):
        file = folder / split / f"{split}_human.json"
        if split == "train" or file.is_file():
            for number, row in enumerate(read_json(file)):
                yield f"{file}, record {number}", partial(convert, split, number, row)


def _rows(file: Path, convert: Callable[[dict], Any]) -> Iterator[Entry]:
    """Entries of a file that holds a list."""
    for number, row in enumerate(read_json(file)):
        yield f"{file}, record {number}", partial(convert, row)


def _items(file: Path, convert: Callable[[str, dict], Any]) -> Iterator[Entry]:
    """Entries of a file that holds a dict."""
    for name, row in read_json(file).items():
        yield f"{file}, record {name}", partial(convert, name, row)


@dataclass(frozen=True)
class SmrSource:
    """A source and what the paper says about it.

    Args:
        read (`Callable`): Reader of its folder.
        needs (`str`): A file that must exist in the folder.
        number (`int`, *optional*): Records taken by default; None = all.
        note (`str`): What the paper says, contradictions included.
    """

    read: Callable[[Path], Iterator[Entry]]
    needs: str
    number: int | None
    note: str


SMR_SOURCES: dict[str, SmrSource] = {
    "arxivqa": SmrSource(read_arxivqa, "arxivqa.jsonl", 100_000, "100K; the rationales are the answers"),
    "scienceqa": SmrSource(read_scienceqa, "problems.json", 12_700, "12.7K; question and instructions are the prompt"),
    "math_vision": SmrSource(read_math_vision, "test.jsonl", 3_040, "3,040, its whole test set"),
    "ai2d": SmrSource(read_ai2d, "questions", 12_000, "12K"),
    "textbookqa": SmrSource(read_textbookqa, "tqa_v1_train.json", 9_500, "9.5K: captions and diagram questions"),
    "geoqa3": SmrSource(read_geoqa3, "train.pk", None, "76K together with GeoQA+"),
    "geoqa_plus": SmrSource(read_geoqa_plus, "Backtrans-train.pk", None, "76K together with GeoQA3"),
    "geometry3k": SmrSource(read_geometry3k, "train", 3_002, "3,002"),
    "tabmwp": SmrSource(read_tabmwp, "tabmwp/problems_train.json", 30_000, "30K"),
    "dvqa": SmrSource(read_dvqa, "qa/train_qa.json", 100_000, "text: 100K, reasoning only; Fig. 3: 200K"),
    "chartqa": SmrSource(read_chartqa, "train/train_human.json", 9_600, "text: 9.6K, people only; Fig. 3: 28.3K"),
}
"""The sources by name. The paper says nine and lists ten; GeoQA3 and GeoQA+, one of the ten, are two downloads."""
