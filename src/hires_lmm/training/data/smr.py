"""SMR, the training data of SliME, from the downloads of its sources, each in the layout of its authors.

The paper filtered by hand and had GPT-4V rewrite some answers; neither can be repeated, so counts may differ.
"""

import codecs
import io
import json
import logging
import pickle
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...files import replacing


logger = logging.getLogger(__name__)


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
    """One question with its image."""

    name: str
    image: Path | Image.Image
    prompt: str
    answer: str


Entry = tuple[str, Callable[[], Any]]
"""Where something stands, for messages, and a function that makes a record of it, a list of records, or None."""


def with_options(question: str, options: list[str]) -> str:
    """A question, its options with letters, and the instruction to answer with one."""
    lines = []
    for letter, option in zip(LETTERS, options, strict=False):
        option = str(option).strip()
        marked = option[:2] in (f"{letter}.", f"{letter})") or option.startswith(f"({letter})")
        lines.append(option if marked else f"{letter}. {option}")
    return "\n".join([question.strip(), *lines, OPTION_LETTER])


def letter_of(answer: Any, options: list) -> str:
    """The letter of an answer that is an index, a letter or the text of an option."""
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
    """Read a JSON or JSON-lines file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return json.loads(text)


def read_arxivqa(folder: Path) -> Iterator[Entry]:
    """Arxiv-QA: `arxivqa.jsonl` and `images/`; the rationales are the answers."""

    def convert(row: dict) -> Record:
        prompt = with_options(row["question"], row["options"]).removesuffix("\n" + OPTION_LETTER)
        return Record(str(row["id"]), folder / row["image"], prompt, row["rationale"])

    yield from _rows(folder / "arxivqa.jsonl", convert)


def read_scienceqa(folder: Path) -> Iterator[Entry]:
    """ScienceQA: `problems.json` and `<split>/<id>/image.png`; hint, question and options are the prompt."""

    def convert(name: str, row: dict) -> Record | None:
        if row["image"] is None or row["split"] != "train":
            return None
        question = f"{row['hint']}\n{row['question']}" if row.get("hint") else row["question"]
        image = folder / row["split"] / name / row["image"]
        return Record(name, image, with_options(question, row["choices"]), letter_of(row["answer"], row["choices"]))

    yield from _items(folder / "problems.json", convert)


def read_math_vision(folder: Path) -> Iterator[Entry]:
    """MATH-Vision: `test.jsonl` and `images/`."""

    def convert(row: dict) -> Record:
        question = row["question"].replace("<image1>", "").strip()
        options = row.get("options") or []
        prompt = with_options(question, options) if options else f"{question}\n{SHORT_ANSWER}"
        return Record(str(row["id"]), folder / row["image"], prompt, str(row["answer"]))

    yield from _rows(folder / "test.jsonl", convert)


def read_ai2d(folder: Path) -> Iterator[Entry]:
    """AI2D: `questions/<image>.json` and `images/`."""

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
    """TextbookQA: `tqa_v1_train.json` with its images: captions of lesson images, and diagram questions."""

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


def read_geoqa(name: str, folder: Path) -> Iterator[Entry]:
    """A pickle of GeoQA3 or GeoQA+: dicts with `image` (an array), `subject`, `choices`, `label`, `answer`."""

    def convert(number: int, row: dict) -> Record:
        image = Image.fromarray(np.asarray(row["image"]).astype(np.uint8))
        letter = LETTERS[int(row["label"])]
        rationale = str(row.get("answer") or "").strip()
        answer = f"{rationale}\n{letter}" if rationale else letter
        return Record(str(row.get("id", number)), image, with_options(row["subject"], row["choices"]), answer)

    file = folder / name
    for number, row in enumerate(_ArrayUnpickler(io.BytesIO(file.read_bytes())).load()):
        yield f"{file}, record {number}", partial(convert, number, row)


def read_geometry3k(folder: Path) -> Iterator[Entry]:
    """Geometry3K: `<split>/<id>/data.json` and `img_diagram.png`."""

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
    """TabMWP: `tabmwp/problems_train.json` and `tabmwp/tables/<id>.png`; the solutions are the answers."""

    def convert(name: str, row: dict) -> Record:
        question = row["question"] if not row.get("unit") else f"{row['question']} (unit: {row['unit']})"
        prompt = with_options(question, row["choices"]) if row.get("choices") else question
        answer = f"{row['solution'].strip()}\nThe answer is {row['answer']}."
        image = folder / "tabmwp" / "tables" / f"{name}.png"
        return Record(name, image, prompt.removesuffix("\n" + OPTION_LETTER), answer)

    yield from _items(folder / "tabmwp" / "problems_train.json", convert)


def read_dvqa(folder: Path) -> Iterator[Entry]:
    """DVQA: `qa/train_qa.json` and `images/`; only questions of the reasoning template."""

    def convert(row: dict) -> Record | None:
        if row["template_id"] != "reasoning":
            return None
        prompt = f"{row['question']}\n{SHORT_ANSWER}"
        return Record(str(row["question_id"]), folder / "images" / row["image"], prompt, str(row["answer"]))

    yield from _rows(folder / "qa" / "train_qa.json", convert)


def read_chartqa(folder: Path) -> Iterator[Entry]:
    """ChartQA: `<split>/<split>_human.json` and `<split>/png/`; only questions written by people."""

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
    """A source and what the paper says about it."""

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
    "geoqa3": SmrSource(partial(read_geoqa, "train.pk"), "train.pk", None, "76K together with GeoQA+"),
    "geoqa_plus": SmrSource(
        partial(read_geoqa, "Backtrans-train.pk"), "Backtrans-train.pk", None, "76K together with GeoQA3"
    ),
    "geometry3k": SmrSource(read_geometry3k, "train", 3_002, "3,002"),
    "tabmwp": SmrSource(read_tabmwp, "tabmwp/problems_train.json", 30_000, "30K"),
    "dvqa": SmrSource(read_dvqa, "qa/train_qa.json", 100_000, "text: 100K, reasoning only; Fig. 3: 200K"),
    "chartqa": SmrSource(read_chartqa, "train/train_human.json", 9_600, "text: 9.6K, people only; Fig. 3: 28.3K"),
}
"""The sources by name. The paper says nine and lists ten; GeoQA3 and GeoQA+, one of the ten, are two downloads."""


def build_smr(
    root: str | Path,
    output: str | Path,
    sources: Iterable[str] | None = None,
    numbers: dict[str, int | None] | None = None,
    skip_broken: bool = False,
    seed: int = 0,
) -> dict[str, int]:
    """Turn the downloaded sources into one file in the LLaVA conversation format.

    Args:
        root (`str`): Folder with one folder a source, named as in `SMR_SOURCES`, in the layout of its authors.
        output (`str`): The `.jsonl` file to write; images that a source keeps inside other files go beside it. Paths
            of images are relative to `root`.
        sources (*optional*): Names of the sources to take; all by default.
        numbers (`dict`, *optional*): Records of a source, instead of those in the text of the paper; None = all. A
            larger source is sampled by seed.
        skip_broken (`bool`): Leave out missing sources and malformed records, with a warning that names them.
        seed (`int`): Seed of the samples and of the prompts for descriptions.

    Raises:
        ValueError: If a source is unknown, missing or malformed; the message names the file.

    Source: SliME, huggingface.co/papers/2406.08487, section 3.4 and Table 5.
    """
    root, output = Path(root), Path(output)
    names = list(SMR_SOURCES if sources is None else sources)
    unknown = [name for name in [*names, *(numbers or {})] if name not in SMR_SOURCES]
    if unknown:
        raise ValueError(f"Unknown source {unknown[0]!r} of SMR; known sources: {', '.join(SMR_SOURCES)}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    counts = {}
    with replacing(output) as partial, open(partial, "w", encoding="utf-8") as file:
        for name in names:
            number = (numbers or {}).get(name, SMR_SOURCES[name].number)
            records = read_source(name, root / name, skip_broken)
            chooser = random.Random(f"{seed}/{name}")
            if number is not None and len(records) > number:
                records = [records[index] for index in sorted(chooser.sample(range(len(records)), number))]
            for record in records:
                file.write(json.dumps(_conversation(record, name, root, output, chooser), ensure_ascii=False) + "\n")
            counts[name] = len(records)
            logger.info("SMR: %d records of %s (the paper: %s)", len(records), name, SMR_SOURCES[name].note)
    return counts


def read_source(name: str, folder: str | Path, skip_broken: bool = False) -> list[Record]:
    """Read one source whole."""
    source, folder = SMR_SOURCES[name], Path(folder)
    if not (folder / source.needs).exists():
        return _broken(f"SMR source {name}: {str(folder / source.needs)!r} is missing; download it", skip_broken)
    records: list[Record] = []
    where = str(folder / source.needs)
    try:
        for where, make in source.read(folder):
            try:
                made = make()
            except Exception as error:
                made = _broken(
                    f"SMR source {name}: {where} is malformed ({_describe(error)}); download it", skip_broken
                )
            records += made if isinstance(made, list) else [] if made is None else [made]
    except (OSError, UnicodeError, json.JSONDecodeError, pickle.UnpicklingError, AttributeError, EOFError) as error:
        _broken(f"SMR source {name}: {where} cannot be read ({_describe(error)}); download it", skip_broken)
    missing = [r for r in records if isinstance(r.image, Path) and not r.image.is_file()]
    if missing:
        shown = ", ".join(str(record.image) for record in islice(missing, 3))
        _broken(f"SMR source {name} lacks {len(missing)} images, such as {shown}; download them", skip_broken)
    gone = {id(record) for record in missing}
    return [record for record in records if id(record) not in gone]


def _describe(error: Exception) -> str:
    """Kind and text of an error."""
    return f"{type(error).__name__}: {error}"


def _broken(message: str, skip: bool) -> list:
    """Raise, or warn and return nothing."""
    if not skip:
        raise ValueError(f"{message}, or pass skip_broken=True.")
    logger.warning("%s; skipped.", message)
    return []


def _conversation(record: Record, source: str, root: Path, output: Path, chooser: random.Random) -> dict:
    """A record in the LLaVA format."""
    image = record.image
    if isinstance(image, Image.Image):
        file = output.parent / f"{output.stem}_images" / source / f"{record.name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        image = file
    prompt = record.prompt or f"{chooser.choice(DESCRIBE)}."
    inside = image.is_relative_to(root)
    return {
        "id": f"{source}/{record.name}",
        "image": str(image.relative_to(root) if inside else image.resolve()),
        "conversations": [
            {"from": "human", "value": f"<image>\n{prompt}"},
            {"from": "gpt", "value": record.answer},
        ],
    }
