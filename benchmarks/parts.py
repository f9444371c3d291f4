"""Every view op, adapter and token op at true sizes: time, counted operations and bytes, share of the roofline.

    python benchmarks/parts.py                      on the CPU, float32, a minute on two idle cores
    python benchmarks/parts.py --device cuda        bfloat16
    python benchmarks/parts.py --write-budget       count only, and write the budget that `make test-slow` guards

One image: a global view and four crops of CLIP ViT-L/14-336 (576 patches of width 1024 each), a language model of
width 4096, 64 tokens of question. Roofline: the larger of operations / rate of matrix products and bytes / rate of a
copy, both measured in the same run; an operation's inputs and outputs count as bytes each time, as if nothing were
fused, so a fused kernel may exceed it.
"""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.fx.experimental._config
from measure import count_work, interleave, matrix_rate, median, memory_rate, plot_bars, print_table, report_path, say
from part_calls import CALLED, COUNTED_ON, OTHERWISE, label, part_call, part_names  # noqa: F401  # a test reads them
from record import write_result
from transformers import masking_utils


BUDGET_FILE = Path(__file__).parents[1] / "tests" / "fixtures" / "part_costs.json"
COLUMNS = {
    "part": "part",
    "milliseconds": "ms",
    "giga_operations": "Gop",
    "mebibytes": "MiB moved",
    "roofline_ms": "roofline ms",
    "share": "share of roofline",
}


def count_part(slot: str, name: str, options: dict) -> dict[str, int]:
    """Operations and bytes of one part at true sizes in bfloat16.

    Args:
        slot, name (`str`): Of the registry.
        options (`dict`): Options of the part.
    """
    call = part_call(slot, name, options, COUNTED_ON.get(name, "meta"))
    readable = torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True)  # the whole question
    unpacked = mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None)  # one a row
    with readable, unpacked:
        operations, moved = count_work(call)
    return {"operations": operations, "bytes": moved}


def count_all() -> dict[str, dict[str, int]]:
    """The costs of all parts, by label."""
    return {label(*part): count_part(*part) for part in part_names()}


def measure(device: str, shapes: str, repeats: int) -> list[dict[str, Any]]:
    """Time all parts.

    Args:
        device (`str`): Where.
        shapes (`str`): Key of `SHAPES` for widths and number format.
        repeats (`int`): Rounds.

    Returns:
        One row a part.
    """
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rate, copy_rate = matrix_rate(device, dtype, 8192 if device == "cuda" else 1536), memory_rate(device)
    rows = []
    for slot, name, options in part_names():
        call = part_call(slot, name, options, device, shapes)
        operations, moved = count_work(call)
        seconds = median(interleave({"part": call}, repeats, 2, device)["part"])
        roofline = max(operations / rate, moved / copy_rate)
        rows.append(
            {
                "part": label(slot, name, options),
                "milliseconds": seconds * 1e3,
                "giga_operations": operations / 1e9,
                "mebibytes": moved / 2**20,
                "roofline_ms": roofline * 1e3,
                "share": roofline / seconds if roofline else None,
            }
        )
        say(f"{rows[-1]['part']}: {seconds * 1e3:.0f} ms")
    return rows


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=("tiny", "true-cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--write-budget", action="store_true")
    arguments = parser.parse_args()
    if arguments.write_budget:
        BUDGET_FILE.write_text(json.dumps(count_all(), indent=1) + "\n")
        report_path(BUDGET_FILE)
        return
    torch.manual_seed(0)
    shapes = arguments.shapes or ("cuda" if arguments.device == "cuda" else "true-cpu")
    rows = measure(arguments.device, shapes, arguments.repeats)
    stem = f"parts_{arguments.device}"
    print_table(rows, COLUMNS, f"parts on one image of five views, {arguments.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "part", "milliseconds", "ms", f"parts, {arguments.device}")
    report_path(path)


if __name__ == "__main__":
    main()
