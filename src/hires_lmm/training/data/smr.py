"""SMR, the training data of SliME, from the downloads of its sources.

The paper filtered by hand and had GPT-4V rewrite some answers; neither can be repeated, so counts may differ.
"""

import json
import logging
import pickle
import random
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from PIL import Image

from ...files import replacing
from .smr_sources import DESCRIBE, SMR_SOURCES, Record


logger = logging.getLogger(__name__)


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

    Returns:
        Records written, by source.

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
    """Read one source whole.

    Args:
        name (`str`): A key of `SMR_SOURCES`.
        folder (`str`): Its folder.
        skip_broken (`bool`): Leave out what is missing or malformed, with a warning.

    Returns:
        The records whose image exists.

    Raises:
        ValueError: If a file is missing or malformed; the message names it.
    """
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
