"""Write the tables of README.md and docs/ that hold numbers, each between its two comment lines.

    python scripts/doc_tables.py            writes
    python scripts/doc_tables.py --check    exits 1 if a table is not current

Token counts: each preset over CLIP ViT-L/14 at 336 pixels with at most 6 crops. Everything measured: from
benchmarks/results/*.json.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from hires_lmm.accounting import PRESET_SETTINGS, account_image
from hires_lmm.processing.planners_hires_lmm import VIDEO_PLANNERS


ROOT = Path(__file__).parents[1]
SIZES = ((336, 336), (1024, 1024), (2048, 3072), (2160, 3840), (4000, 400))
MAX_CROPS = 6
RESULTS = ROOT / "benchmarks" / "results"
KEPT_SHARE = RESULTS / "kept_share.json"
SQUARE = "1024x1024"


def token_table() -> str:
    """Tokens of images of some sizes, one row a preset, in Markdown."""
    rows = []
    for preset, settings in PRESET_SETTINGS.items():
        limits = {} if settings["planner"] in VIDEO_PLANNERS else {"max_crops": MAX_CROPS}
        accounts = [account_image(settings, *size, **limits) for size in SIZES]
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
        return value
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


def speed_tables(name: str, build: Callable[[list[dict]], str]) -> str:
    """A table of what a benchmark found, one a device where it was run, in Markdown.

    Args:
        name (`str`): Of the benchmark.
        build (`Callable`): Makes the table from the rows of a result.
    """
    tables = [f"{said}\n\n{build(result['rows'])}" for result, said in results(name)]
    return "\n\n".join(tables) or "Not measured yet."


def prefill_table(rows: list[dict]) -> str:
    """Time of the prefill against transformers' llava_next by model and image, and against the floor, in Markdown."""
    images = list(dict.fromkeys(row["images"] for row in rows))
    models: dict[str, dict[str, dict]] = {}
    for row in rows:
        models.setdefault(row["model"], {})[row["images"]] = row
    lines = []
    for model, found in models.items():
        floors = [row["overhead"] for row in found.values()]
        tokens = cell(found.get(SQUARE, {}).get("tokens"))
        ratios = [cell(found.get(image, {}).get("ratio")) for image in images]
        lines.append([model, tokens, *ratios, cell(median(floors)), cell(max(floors))])
    return markdown(["model", f"tokens of {SQUARE}", *images, "time / floor, median", "largest"], lines)


def preprocess_table(rows: list[dict]) -> str:
    """Images to views: a line a processor, each cell the smallest and largest value over sizes, in Markdown."""
    sources = list(dict.fromkeys(row["source"] for row in rows))
    peaks = {row["size"]: row["peak_mib"] for row in rows if row["processor"] == "ours" and row["source"] == "decoded"}
    lines = []
    for name in dict.fromkeys(row["processor"] for row in rows):
        own = [row for row in rows if row["processor"] == name]
        decoded = [row for row in own if row["source"] == "decoded"]
        faster = [ends(row.get("speedup") for row in own if row["source"] == source) for source in sources]
        memory = [row["peak_mib"] / peaks[row["size"]] if row.get("peak_mib") else None for row in decoded]
        lines.append([name, *faster, ends(row.get("of_resizes") for row in decoded), ends(memory)])
    return markdown(["processor", *sources, "time / two resizes", "memory / ours"], lines)


def ends(values: Iterable[float | None]) -> str:
    """The smallest and the largest value, `-` where there is none."""
    known = [value for value in values if value is not None]
    return "–".join(dict.fromkeys((cell(min(known)), cell(max(known))))) if known else "-"


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
        (ROOT / "README.md", ROOT / "docs" / "presets.md"),
    ),
    ("<!-- kept share: benchmarks/results/kept_share.json -->", "<!-- end of kept share -->"): (
        kept_share_table,
        (ROOT / "docs" / "routing.md",),
    ),
    **{
        (f"<!-- {name}: benchmarks/results -->", f"<!-- end of {name} -->"): (
            partial(speed_tables, name, build),
            (ROOT / "docs" / page,),
        )
        for name, build, page in (
            ("prefill", prefill_table, "speed.md"),
            ("prefill_deep", prefill_table, "speed.md"),
            ("preprocess", preprocess_table, "preprocessing.md"),
        )
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
