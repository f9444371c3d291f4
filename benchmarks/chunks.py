"""Peak memory and time of a 4096 x 4096 image with 36 crops against `vision_chunk_size`.

    python benchmarks/chunks.py                  four layers of CLIP ViT-L/14-336, float32; 3 minutes on two cores
    python benchmarks/chunks.py --device cuda    beside a language model of Llama-3-8B shapes, bfloat16: does 24 GB do?

On the CPU every size is a process of its own, whose largest resident memory counts; on CUDA the allocator counts.
"""

import argparse
import json
import sys
import time
from typing import Any

import torch
from cases import OURS, Shared, ours
from measure import in_subprocess, median, own_peak, plot_bars, print_table, report_path, say, wait
from prefill import picture
from record import write_result
from shapes import SHAPES, Shapes


SIZES = {"cpu": (None, 1, 4, 16), "cuda": (None, 1, 2, 4, 8, 16)}
NAME = "slime, 6x6"
CARD_BYTES = 24e9
COLUMNS = {
    "chunk": "views at once",
    "views": "views",
    "seconds": "s",
    "ratio": "of all at once",
    "peak_mib": "peak MiB",
    "total_gib": "total GiB",
}


def cpu_shapes(name: str) -> Shapes:
    """A tower of true width, four layers deep, beside a small language model."""
    small = SHAPES["cpu"]
    return (
        small
        if name == "cpu"
        else SHAPES["tiny"]
        if name == "tiny"
        else Shapes(SHAPES["wide"].tower, small.text, torch.float32)
    )


def run(chunk: int | None, device: str, shapes: str, repeats: int = 3) -> dict[str, Any]:
    """Encode one image in chunks and prefill with it.

    Args:
        chunk (`int`, *optional*): Most views at once.
        device (`str`): Where.
        shapes (`str`): `"cuda"`, or a name that `cpu_shapes` knows.
        repeats (`int`): Rounds after the first.
    """
    shared = Shared(SHAPES["cuda"] if device == "cuda" else cpu_shapes(shapes), device)
    case = ours(NAME, shared).take([picture(4096, 4096)])
    case.model.config.vision_chunk_size = chunk
    before = own_peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(1 + repeats):
        begin = time.perf_counter()
        case.prefill()
        wait(device)
        seconds.append(time.perf_counter() - begin)
    total = torch.cuda.max_memory_allocated() if device == "cuda" else own_peak()
    return {
        "chunk": "all" if chunk is None else chunk,
        "views": len(case.inputs["pixel_values"]),
        "seconds": median(seconds[1:] or seconds),
        "peak_mib": (total - before) / 2**20,
        "total_gib": total / 2**30,
    }


def main() -> int:
    """Measure, print, write JSON and plot; the exit status is 1 where no chunk size fits a card of 24 GB."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", default="tower", choices=("tower", "cpu", "tiny"), help="CPU only")
    parser.add_argument("--sizes", nargs="*", type=int, help="views at once beside all; by default those of the page")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.child:
        sys.stdout.write(json.dumps(run(**json.loads(arguments.child))) + "\n")
        return 0
    case = {"device": arguments.device, "shapes": arguments.shapes, "repeats": arguments.repeats}
    rows = []
    for size in (None, *arguments.sizes) if arguments.sizes else SIZES[arguments.device]:
        rows.append(in_subprocess(__file__, {**case, "chunk": size}))
        rows[-1]["ratio"] = rows[-1]["seconds"] / rows[0]["seconds"]
        say(f"views at once {rows[-1]['chunk']}: {rows[-1]['peak_mib']:.0f} MiB")
    stem = f"chunks_{arguments.device}"
    print_table(rows, COLUMNS, f"{NAME}, {OURS[NAME][0]}: a 4096 x 4096 image, {arguments.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "chunk", "peak_mib", "MiB above the weights", f"views at once, {arguments.device}")
    report_path(path)
    if arguments.device == "cuda":
        most = [row["chunk"] for row in rows if row["total_gib"] * 2**30 <= CARD_BYTES]
        say(f"weights, cache and all fit 24 GB with views at once: {most or 'none'}")
        return 0 if most else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
