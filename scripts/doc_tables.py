"""Write the tables of README.md and docs/ that hold numbers, each between its two comment lines.

    python scripts/doc_tables.py            writes
    python scripts/doc_tables.py --check    exits 1 if a table is not current

Token counts: each preset over CLIP ViT-L/14 at 336 pixels with at most 6 crops. Everything measured: from
benchmarks/results/*.json.
"""

import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from hires_lmm.accounting import PRESET_SETTINGS, account_image


ROOT = Path(__file__).parents[1]
SIZES = ((336, 336), (1024, 1024), (2048, 3072), (2160, 3840), (4000, 400))
MAX_CROPS = 6
RESULTS = ROOT / "benchmarks" / "results"
KEPT_SHARE = RESULTS / "kept_share.json"
PREFILL = {
    "ratio": "Time / time of transformers' llava_next",
    "overhead": "Time / floor",
    "tokens": "Visual tokens",
    "peak_mib": "Peak MiB above weights and inputs",
}
"""Value of a row of the prefill -> title of its table; one column a batch of images."""

OTHER_SHAPES = {
    "images": "image",
    "model": "model",
    "tokens": "visual tokens",
    "ratio": "time / llava_next",
    "overhead": "time / floor",
    "peak_mib": "peak MiB",
}
SPEED = {
    "prefill_counted": {
        "images": "image",
        "model": "model",
        "tokens": "visual tokens",
        "tera_operations": "Top",
        "ratio": "operations / llava_next",
        "between": "share outside tower and language model",
    },
    "prefill_wide": OTHER_SHAPES,
    "prefill_deep": OTHER_SHAPES,
    "parts": {
        "part": "part",
        "milliseconds": "ms",
        "giga_operations": "Gop",
        "mebibytes": "MiB moved",
        "share": "share of roofline",
    },
    "decode": {
        "model": "model",
        "tokens": "visual tokens",
        "tokens_per_second": "tokens/s",
        "ratio": "tokens/s / llava_next's",
        "cache_mib": "cache MiB",
    },
    "train_step": {
        "stage": "stage",
        "milliseconds": "ms",
        "overhead": "time / floor",
        "tower_calls": "tower calls",
        "peak_mib": "peak MiB",
        "memory_overhead": "memory / floor",
    },
    "train_step_deep": {
        "stage": "stage",
        "milliseconds": "ms",
        "overhead": "time / floor",
        "tower_calls": "tower calls",
        "peak_mib": "peak MiB",
        "memory_overhead": "memory / floor",
    },
    "load": {
        "model": "model",
        "weights": "weights",
        "seconds": "s",
        "ratio": "time / llava_next",
        "peak_mib": "peak MiB",
    },
    "chunks": {
        "chunk": "views at once",
        "views": "views",
        "seconds": "s",
        "ratio": "time / all at once",
        "peak_mib": "peak MiB above the weights",
    },
    "attention_kernels": {
        "implementation": "asked for",
        "model": "model",
        "batch": "batch",
        "tower": "tower",
        "connector": "connector",
        "language_model": "language model",
        "copies_to_host": "copies to the host",
        "milliseconds": "ms",
        "wrong": "wrong",
    },
}
"""Benchmark -> key of a row and title of a column."""

COMMANDS = {
    "prefill_counted": "python benchmarks/prefill.py --count",
    "prefill_wide": "python benchmarks/prefill.py --shapes wide",
    "prefill_deep": "python benchmarks/prefill.py --shapes deep",
    "train_step_deep": "python benchmarks/train_step.py --shapes deep --batch 1",
}
"""Benchmark -> how it is run, where that is not its name."""

GPU_ONLY = {"milliseconds", "images_per_second", "tokens_per_second", "seconds", "copies_to_host"}
"""Not said of CPU cores: absolute times, which the next machine does not have. The JSON files hold them."""


def token_table() -> str:
    """Tokens of images of some sizes, one row a preset, in Markdown."""
    rows = []
    for preset, settings in PRESET_SETTINGS.items():
        accounts = [account_image(settings, *size, max_crops=MAX_CROPS) for size in SIZES]
        rows.append([f"`{preset}`", *(str(account.visual_tokens) for account in accounts)])
    return markdown(["visual tokens", *(f"{height} × {width}" for height, width in SIZES)], rows)


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
        return value.replace("|", "/").replace("scaled_dot_product_", "")
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def results(name: str) -> list[tuple[dict, str]]:
    """What a benchmark wrote, one entry a device, with a sentence on where that was.

    Args:
        name (`str`): Of the benchmark.
    """
    found = []
    for suffix in ("", "_cpu", "_cuda"):
        path = RESULTS / f"{name}{suffix}.json"
        if path.exists():
            result = json.loads(path.read_text())
            cores = "1 CPU core" if result["threads"] == 1 else f"{result['threads']} CPU cores"
            where = cores if result["device"].startswith("CPU") else result["device"]
            versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
            found.append((result, f"`{result['command']}` on {result['date']}: {where}; {versions}."))
    return found


def speed_table(name: str) -> str:
    """What a benchmark found on each device where it was run, in Markdown.

    Args:
        name (`str`): Key of `SPEED`.
    """
    pieces = []
    for result, said in results(name):
        on_gpu = not result["device"].startswith("CPU")
        columns = {key: title for key, title in SPEED[name].items() if on_gpu or key not in GPU_ONLY}
        rows = [[cell(row.get(key)) for key in columns] for row in result["rows"]]
        pieces.append(f"{said}\n\n{markdown(list(columns.values()), rows)}")
    return "\n\n".join(pieces) or f"Not measured yet: `{COMMANDS.get(name, f'python benchmarks/{name}.py')}`."


def pivot(rows: list[dict], names: tuple[str, ...], column: str, value: str) -> str:
    """One value of many rows as a table, in Markdown.

    Args:
        rows (`list[dict]`): Rows of a result.
        names (`tuple[str, ...]`): Keys whose values name a line.
        column (`str`): Key whose values name the columns.
        value (`str`): Key of the cells; lines without any are left out.
    """
    columns = list(dict.fromkeys(row[column] for row in rows))
    at = {(*(row[name] for name in names), row[column]): row.get(value) for row in rows}
    lines = dict.fromkeys(key[:-1] for key, found in at.items() if found is not None)
    cells = [[*line, *(cell(at.get((*line, name))) for name in columns)] for line in lines]
    return markdown([*names, *columns], cells)


def prefill_tables() -> str:
    """The prefill on each device where it was run: models by batches, one table a value, in Markdown."""
    pieces = []
    for result, said in results("prefill"):
        values = {**PREFILL, **({"milliseconds": "ms"} if not result["device"].startswith("CPU") else {})}
        pieces.append(said)
        for key, title in values.items():
            pieces += [f"{title}:", pivot(result["rows"], ("model",), "images", key)]
    return "\n\n".join(pieces) or "Not measured yet: `python benchmarks/prefill.py`."


def preprocess_tables() -> str:
    """Images to views: processors and sources by sizes of the image, in Markdown."""
    pieces = []
    for result, said in results("preprocess"):
        decoded = [row for row in result["rows"] if row["source"] == "decoded"]
        pieces += [said, "Ours is faster by, where as many pixels are made:"]
        pieces.append(pivot(result["rows"], ("processor", "source"), "size", "speedup"))
        for key, title in {"of_resizes": "Time / two resizes", "peak_mib": "Peak MiB"}.items():
            pieces += [f"{title}, from decoded images:", pivot(decoded, ("processor",), "size", key)]
    return "\n\n".join(pieces) or "Not measured yet: `python benchmarks/preprocess.py`."


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
    **{
        (f"<!-- {name}: benchmarks/results -->", f"<!-- end of {name} -->"): (build, (ROOT / "docs" / "speed.md",))
        for name, build in {"prefill": prefill_tables, "preprocess": preprocess_tables}.items()
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
