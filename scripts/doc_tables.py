"""Write the tables of README.md and docs/ that hold numbers, each between its two comment lines.

    python scripts/doc_tables.py            writes
    python scripts/doc_tables.py --check    exits 1 if a table is not current

Token counts: each preset by its own processor over CLIP ViT-L/14 at 336 pixels with at most 6 crops, LLaVA-NeXT by
transformers' processor with its released settings. Everything measured: from benchmarks/results/*.json.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hires_lmm import PRESETS
from hires_lmm.accounting import count_llava_next, preset_processor


ROOT = Path(__file__).parents[1]
SIZES = ((336, 336), (1024, 1024), (2048, 3072), (2160, 3840), (4000, 400))
MAX_CROPS = 6
RESULTS = ROOT / "benchmarks" / "results"
KEPT_SHARE = RESULTS / "kept_share.json"
SPEED = {
    "prefill": {
        "images": "images",
        "model": "model",
        "tokens": "visual tokens",
        "milliseconds": "ms",
        "overhead": "time / floor",
        "ratio": "time / llava_next",
        "peak_mib": "peak MiB",
    },
    "preprocess": {
        "size": "image",
        "source": "source",
        "processor": "processor",
        "images_per_second": "images/s",
        "of_resizes": "time / two resizes",
        "speedup": "ours is faster by",
        "peak_mib": "peak MiB",
    },
    "parts": {
        "part": "part",
        "milliseconds": "ms",
        "giga_operations": "Gop",
        "mebibytes": "MiB moved",
        "share": "share of roofline",
    },
    "decode": {"model": "model", "tokens": "visual tokens", "tokens_per_second": "tokens/s", "cache_mib": "cache MiB"},
    "train_step": {
        "stage": "stage",
        "milliseconds": "ms",
        "overhead": "time / floor",
        "tower_calls": "tower calls",
        "memory_overhead": "memory / floor",
    },
    "load": {"model": "model", "weights": "weights", "seconds": "s", "peak_mib": "peak MiB"},
    "chunks": {"chunk": "views at once", "views": "views", "seconds": "s", "peak_mib": "peak MiB above the weights"},
}
"""Benchmark -> key of a row and title of a column."""


def token_table() -> str:
    """Tokens of images of some sizes, one row a preset, in Markdown."""
    rows = []
    for preset in PRESETS:
        processor = preset_processor(preset)
        rows.append([f"`{preset}`", *(str(processor.image_tokens(*size, max_crops=MAX_CROPS)) for size in SIZES)])
    rows.append(["LLaVA-NeXT in transformers", *(str(count_llava_next(*size)) for size in SIZES)])
    return markdown(["tokens of an image", *(f"{height} × {width}" for height, width in SIZES)], rows)


def kept_share_table() -> str:
    """Kept share by the length of the prompt, in Markdown."""
    measured = [row for row in json.loads(KEPT_SHARE.read_text())["rows"] if row["part"] == "length"]
    shares = {(row["text_tokens"], row["reduce"]): f"{row['kept']:.3f}" for row in measured}
    lengths = sorted({length for length, _ in shares})
    rows = [[f"{length:,}", shares[length, "sum"], shares[length, "mean"]] for length in lengths]
    return markdown(["text tokens", "`sum` (released)", "`mean`"], rows)


def cell(value: Any) -> str:
    """A number with three digits, a text as it is, `-` for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value.replace("|", "/")
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def speed_table(name: str) -> str:
    """What a benchmark found on each device where it was run, in Markdown.

    Args:
        name (`str`): Key of `SPEED`.
    """
    pieces = []
    for device in ("cpu", "cuda"):
        path = RESULTS / f"{name}_{device}.json"
        if path.exists():
            found = json.loads(path.read_text())
            rows = [[cell(row.get(key)) for key in SPEED[name]] for row in found["rows"]]
            where = f"{found['device']}, {found['threads']} threads" if device == "cpu" else found["device"]
            versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
            said = f"`{found['command']}` on {found['date']}: {where}; {versions}."
            pieces.append(f"{said}\n\n{markdown(list(SPEED[name].values()), rows)}")
    return "\n\n".join(pieces) or f"Not measured yet: `python benchmarks/{name}.py`."


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right.

    Args:
        head (`list[str]`): Titles.
        rows (`list[list[str]]`): Cells.
    """
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(head) - 1), *lines[1:]])


TABLES = {
    ("<!-- token table: scripts/doc_tables.py -->", "<!-- end of token table -->"): (
        token_table,
        (ROOT / "README.md", ROOT / "docs" / "parts.md"),
    ),
    ("<!-- kept share: benchmarks/results/kept_share.json -->", "<!-- end of kept share -->"): (
        kept_share_table,
        (ROOT / "docs" / "routing.md",),
    ),
    **{
        (f"<!-- {name}: benchmarks/results -->", f"<!-- end of {name} -->"): (
            partial(speed_table, name),
            (ROOT / "docs" / "speed.md",),
        )
        for name in SPEED
    },
}


def put_table(text: str, marks: tuple[str, str], table: str) -> str:
    """A text with the table between its two comment lines.

    Args:
        text (`str`): Of a Markdown file.
        marks (`tuple[str, str]`): The comment lines.
        table (`str`): The table.
    """
    pattern = re.compile(re.escape(marks[0]) + ".*?" + re.escape(marks[1]), re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"There are no lines {marks[0]} and {marks[1]}.")
    return pattern.sub(lambda _: f"{marks[0]}\n{table}\n{marks[1]}", text)


def main(arguments: list[str]) -> int:
    """Write or check; returns the exit status."""
    stale = []
    for marks, (build, files) in TABLES.items():
        table = build()
        for file in files:
            text = file.read_text(encoding="utf-8")
            wanted = put_table(text, marks, table)
            if wanted != text:
                stale.append(file.name)
                if "--check" not in arguments:
                    file.write_text(wanted, encoding="utf-8")
    sys.stdout.write(f"{'not current' if '--check' in arguments else 'written'}: {', '.join(stale) or 'none'}\n")
    return 1 if stale and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
