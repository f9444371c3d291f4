"""Conversations with images: the LLaVA JSON format and datasets with a `messages` column, local or streamed."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from ...processing.messages_hires_lmm import clean_messages


IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def attach_images(messages: list[dict], images: Any = None, videos: Any = None) -> list[dict]:
    """Bring messages into one form: contents are lists of parts, and the parts of images and videos hold theirs.

    `<video>` in a text is a place for a video where there are videos.
    """
    given = {"image": _listed(images), "video": _listed(videos)}
    waiting = {kind: iter(own) for kind, own in given.items()}
    places = dict.fromkeys(given, 0)
    result = []
    for message in clean_messages(messages):
        parts = []
        for part in _split_content(message.get("content", ""), bool(given["video"])):
            kind = part["type"]
            if kind in places and not {kind, "url", "path", "base64"} & set(part):
                places[kind] += 1
                source = next(waiting[kind], None)
                part = part if source is None else {"type": kind, kind: source}
            parts.append(part)
        result.append({"role": message["role"], "content": parts})
    for kind, mark in (("image", IMAGE_MARK), ("video", VIDEO_MARK)):
        if places[kind] != len(given[kind]):
            raise ValueError(
                f"A conversation has {places[kind]} places for {kind}s ({mark} or {kind} parts without {kind}), but "
                f"{len(given[kind])} {kind}s; write one place for each {kind}. It begins {str(messages)[:120]!r}."
            )
    return result


def _listed(sources: Any) -> list:
    sources = sources if isinstance(sources, (list, tuple)) else [sources]
    return [source for source in sources if source is not None]


def _split_content(content: Any, has_videos: bool) -> list[dict]:
    """Parts of a content."""
    if not isinstance(content, str):
        return list(content)
    marks = {IMAGE_MARK: "image", **({VIDEO_MARK: "video"} if has_videos else {})}
    pieces = [piece for piece in re.split(f"({'|'.join(marks)})", content) if piece]
    return [{"type": marks[piece]} if piece in marks else {"type": "text", "text": piece} for piece in pieces]


def read_llava_record(record: dict, image_folder: str | Path | None = None, number: int | None = None) -> dict:
    """Turn one record of a LLaVA JSON file into an example."""
    if not isinstance(record, dict):
        where = "A record" if number is None else f"Record {number}"
        raise ValueError(f"{where} is a {type(record).__name__}, not a dict of conversations: {str(record)[:100]!r}.")
    name = record.get("id", "without an id" if number is None else number)
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"Record {name} has no conversations; it needs a list of {{'from', 'value'}}.")
    images = record.get("image")
    images = [] if images in (None, "") else images if isinstance(images, list) else [images]
    messages = []
    for turn in turns:
        is_turn = isinstance(turn, dict) and turn.get("from") in LLAVA_ROLES and isinstance(turn.get("value"), str)
        if not is_turn:
            raise ValueError(f"Record {name} has the turn {turn!r}; 'from' must be one of {', '.join(LLAVA_ROLES)}.")
        messages.append({"role": LLAVA_ROLES[turn["from"]], "content": turn["value"]})
    if not all(isinstance(image, str) for image in images):
        raise ValueError(f"Record {name} has the image {images!r}; it must be a path or a list of paths.")
    paths = [str(Path(image_folder or "") / image) for image in images]
    try:
        return {"id": str(name), "messages": attach_images(messages, paths)}
    except ValueError as error:
        raise ValueError(f"Record {name}: {error}") from error


class LlavaConversations(Dataset):
    """A LLaVA JSON or JSON-lines file as a dataset of examples for `HiResLmmCollator`.

    Args:
        file (`str`): A `.json` file with a list of records, or a `.jsonl` file with one a line.
        image_folder (`str`, *optional*): Folder of the images; by default that of the file.

    Raises:
        ValueError: If the file is missing or no list of records.
    """

    def __init__(self, file: str | Path, image_folder: str | Path | None = None):
        self.file = Path(file)
        self.image_folder = Path(image_folder) if image_folder is not None else self.file.parent
        if not self.file.is_file():
            raise ValueError(f"There is no file {str(file)!r}; correct the path.")
        try:
            if self.file.suffix == ".jsonl":
                self.records = list(_read_lines(self.file))
            else:
                self.records = json.loads(self.file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{str(file)!r} is no JSON: {error}.") from error
        if not isinstance(self.records, list):
            raise ValueError(f"{str(file)!r} holds a {type(self.records).__name__}; it must be a list of records.")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        return read_llava_record(self.records[index], self.image_folder, index)


def stream_llava(file: str | Path, image_folder: str | Path | None = None) -> Iterator[dict]:
    """Read a `.jsonl` file in the LLaVA format line by line, without holding it."""
    folder = Path(image_folder) if image_folder is not None else Path(file).parent
    for number, record in enumerate(_read_lines(Path(file))):
        yield read_llava_record(record, folder, number)


def _read_lines(file: Path) -> Iterator[Any]:
    """The values of a JSON-lines file; an error names the line, which a writer that was stopped may have cut off."""
    with open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"Line {number} of {str(file)!r} is no JSON ({error.msg}): {line.strip()[:80]!r}; it may be "
                        "cut off. Correct or remove it."
                    ) from error


def load_conversations(
    source: str, split: str = "train", streaming: bool = False, image_folder: str | Path | None = None
) -> Any:
    """Open training conversations of any kind.

    Args:
        source (`str`): A LLaVA file (`.json`, `.jsonl`), a folder written by `Dataset.save_to_disk`, a local folder
            or file that `datasets` reads, or a dataset on the Hub; the latter with a `messages` column and, where
            messages hold none themselves, an `images` or `image` column.
        split (`str`): Split of a dataset.
        streaming (`bool`): Read while training instead of loading first.
        image_folder (`str`, *optional*): Folder of the images of a LLaVA file.

    Returns:
        A dataset whose rows `HiResLmmCollator` reads.

    Raises:
        ValueError: If a dataset has no `messages` column.
    """
    path = Path(source)
    if path.is_file() and path.suffix in (".json", ".jsonl") and _is_llava(path):
        if not streaming:
            return LlavaConversations(path, image_folder)
        from datasets import IterableDataset

        if path.suffix != ".jsonl":
            raise ValueError(f"{source!r} cannot be streamed: only .jsonl is read line by line. Convert it.")
        return IterableDataset.from_generator(stream_llava, gen_kwargs={"file": path, "image_folder": image_folder})
    from datasets import load_dataset, load_from_disk

    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        dataset = load_from_disk(source)
        dataset = dataset[split] if (path / "dataset_dict.json").is_file() else dataset
        dataset = dataset.to_iterable_dataset() if streaming else dataset
    elif path.is_file():
        kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix, path.suffix[1:])
        dataset = load_dataset(kind, data_files=source, split="train", streaming=streaming)
    else:
        dataset = load_dataset(source, split=split, streaming=streaming)
    if dataset.column_names is not None and "messages" not in dataset.column_names:
        raise ValueError(
            f"{source!r} has the columns {', '.join(dataset.column_names)}, but no messages; rename the column, or "
            "convert records in the LLaVA format with read_llava_record."
        )
    return dataset


def _is_llava(path: Path) -> bool:
    """Whether a JSON file holds records with `conversations`."""
    with open(path, encoding="utf-8") as file:
        start = file.read(1 << 20)
    return '"conversations"' in start
