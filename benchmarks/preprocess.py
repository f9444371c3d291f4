"""Images to views: our processor against transformers' processors and bare Pillow resizes.

    python benchmarks/preprocess.py             about 4 minutes on two idle cores; there is no CUDA variant
    python benchmarks/preprocess.py --many 40   many images of 4.2 MP in one call, by two threads and by one; 2 minutes

One thread each, but for `--many`. `llava_next` of transformers makes the very same views. The other peers are set to
views of 336 pixels and at most four crops; "ours is faster by" is given where they make as many pixels as we do
(`qwen3_vl` makes no views: it resizes once to as many pixels as a 2 x 2 grid). "Two resizes" is what Pillow alone
takes for the two resizes that the views need. transformers' processors run on their Pillow backend. "jpeg, scaled" is
the same file with `decode="scaled"` for ours. Peak memory is that of the process above what it held before the call,
measured in a process of its own.
"""

import argparse
import io
import json
import sys
from typing import Any

import numpy as np
import torch
from cases import llava_next_processor
from measure import (
    FRESH_BLOCKS,
    in_subprocess,
    interleave,
    median,
    median_ratio,
    peak_resident,
    plot_bars,
    print_table,
    report_path,
    say,
)
from PIL import Image
from record import write_result
from shapes import VIEW
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hires_lmm.conversion import preset_processor


SIZES = {"1.0 MP": (1024, 1024), "2.1 MP": (1024, 2048), "4.2 MP": (2048, 2048), "8.3 MP": (2160, 3840)}
SCALED = "jpeg, scaled"
SOURCES = ("decoded", "array", "png", "jpeg", SCALED)
LEAST_SECONDS = 6.0
OURS, BY_PILLOW = "ours", "ours, resize_backend='pillow'"
SAME_VIEWS, FLOOR = "transformers llava_next", "two resizes"
MANY_SIZE, THREADS = "4.2 MP", (1, 2)
MANY_COLUMNS = {
    "source": "source",
    "threads": "threads",
    "images_per_second": "images/s",
    "speedup": "one thread / this",
    "peak_mib": "peak MiB",
}
COLUMNS = {
    "size": "image",
    "source": "source",
    "processor": "processor",
    "images_per_second": "images/s",
    "speedup": "ours is faster by",
    "of_resizes": "time / two resizes",
    "megapixels": "MP of output",
    "peak_mib": "peak MiB",
}


def make_picture(height: int, width: int) -> Image.Image:
    """Waves and noise: files of it are neither tiny nor incompressible."""
    rng = np.random.default_rng([height, width])
    rows, columns = np.mgrid[0:height, 0:width] / 97.0
    waves = 128 + 90 * np.sin(rows)[..., None] * np.cos(
        columns * np.array([1.0, 1.3, 0.7]).reshape(3, 1, 1)
    ).transpose(1, 2, 0)
    return Image.fromarray((waves + rng.normal(0, 6, waves.shape)).clip(0, 255).astype(np.uint8))


def make_source(picture: Image.Image, source: str) -> Any:
    """The picture as one of `SOURCES`; files are bytes in memory."""
    if source == "decoded":
        return picture
    if source == "array":
        return np.asarray(picture)
    file = io.BytesIO()
    picture.save(file, source.split(",")[0], **({"quality": 90} if source != "png" else {}))
    return file.getvalue()


def decode(given: Any) -> Any:
    """What a user of transformers' processors does with a file first."""
    return Image.open(io.BytesIO(given)).convert("RGB") if isinstance(given, bytes) else given


def processors(source: str) -> dict[str, Any]:
    """All processors, by name: given a source they return a batch."""
    ours = preset_processor("llava_next").image_processor
    side = {"height": VIEW, "width": VIEW}
    pinpoints = llava_next_processor().image_grid_pinpoints
    peers = {
        SAME_VIEWS: llava_next_processor(),
        "transformers llava_onevision": LlavaOnevisionImageProcessorPil(size=side, image_grid_pinpoints=pinpoints),
        "transformers idefics3": Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * VIEW}, max_image_size={"longest_edge": VIEW}
        ),
        "transformers internvl": GotOcr2ImageProcessorPil(crop_to_patches=True, size=side, max_patches=4),
        "transformers qwen3_vl": Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": VIEW * VIEW, "longest_edge": 4 * VIEW * VIEW}
        ),
    }
    options: dict[str, Any] = {
        "return_tensors": "pt",
        "num_threads": 1,
        "decode": "scaled" if source == SCALED else "full",
    }
    calls: dict[str, Any] = {
        OURS: lambda given: ours(given, **options),
        BY_PILLOW: lambda given: ours(given, resize_backend="pillow", **options),
    }
    for name, peer in peers.items():
        calls[name] = lambda given, peer=peer: peer([decode(given)], return_tensors="pt")
    return calls


def two_resizes(picture: Image.Image) -> Any:
    """The resizes of the planned views, by Pillow alone."""
    plan = preset_processor("llava_next").image_processor.plan(picture.height, picture.width)
    sizes = (plan.global_size[::-1], plan.resized[::-1])
    return lambda: [picture.resize(size, Image.Resampling.BICUBIC) for size in sizes]


def measure_size(name: str, source: str, repeats: int) -> list[dict[str, Any]]:
    """Time all processors on one picture.

    Args:
        name (`str`): Key of `SIZES`.
        source (`str`): One of `SOURCES`.
        repeats (`int`): Rounds.

    Returns:
        One row a processor, and one for the bare resizes.
    """
    picture = make_picture(*SIZES[name])
    given = make_source(picture, source)
    known = processors(source)
    calls = {key: (lambda call=call: call(given)) for key, call in known.items()}
    found = interleave({**calls, FLOOR: two_resizes(picture)}, repeats, 1, least_seconds=LEAST_SECONDS)
    rows = []
    for key, seconds in found.items():
        row: dict[str, Any] = {"size": name, "source": source, "processor": key}
        row["images_per_second"] = 1 / median(seconds)
        row["of_resizes"] = median_ratio(seconds, found[FLOOR])
        if key in calls:
            row["megapixels"] = calls[key]()["pixel_values"].numel() / 3e6
            if key not in (OURS, BY_PILLOW) and row["megapixels"] == rows[0]["megapixels"]:
                row["speedup"] = median_ratio(seconds, found[OURS])
        rows.append({**row, "rounds": len(seconds)})
    say(f"{name}, {source}: {rows[0]['rounds']} rounds")
    return rows


def measure_memory(sizes: list[str], sources: list[str]) -> dict[str, float | None]:
    """Peak memory of every processor, MiB, by `"size/source/processor"`; every call is made once before."""
    peaks: dict[str, float | None] = {}
    for name in sizes:
        picture = make_picture(*SIZES[name])
        for source in sources:
            calls = processors(source)
            given = make_source(picture, source)
            for key, call in calls.items():
                call(given)
                peak = peak_resident(lambda call=call, given=given: call(given))
                peaks[f"{name}/{source}/{key}"] = None if peak is None else peak / 2**20
    return peaks


def many_calls(number: int, source: str) -> dict[int, Any]:
    """One call for many images, by its number of threads."""
    ours = preset_processor("llava_next").image_processor
    picture = make_picture(*SIZES[MANY_SIZE])
    given = [make_source(picture.copy(), source) for _ in range(number)]
    decode = "scaled" if source == SCALED else "full"
    return {
        threads: lambda threads=threads: ours(given, return_tensors="pt", num_threads=threads, decode=decode)
        for threads in THREADS
    }


def measure_many(number: int, sources: list[str], repeats: int) -> list[dict[str, Any]]:
    """Time one call for many images with each number of threads.

    Args:
        number (`int`): Images.
        sources (`list[str]`): Of `SOURCES`.
        repeats (`int`): Rounds.
    """
    rows: list[dict[str, Any]] = []
    for source in sources:
        found = interleave({str(key): call for key, call in many_calls(number, source).items()}, repeats)
        for threads in THREADS:
            seconds, row = found[str(threads)], {"source": source, "threads": threads, "images": number}
            row["images_per_second"] = number / median(seconds)
            row["speedup"] = median_ratio(found["1"], seconds)
            child = in_subprocess(__file__, {"many": number, "source": source, "threads": threads}, FRESH_BLOCKS)
            rows.append({**row, "peak_mib": child["peak_mib"]})
        say(f"{number} images, {source}")
    return rows


def many_peak(many: int, source: str, threads: int) -> dict[str, float | None]:
    """Peak memory of such a call, MiB, after one call of the kind."""
    call = many_calls(many, source)[threads]
    call()
    peak = peak_resident(call)
    return {"peak_mib": None if peak is None else peak / 2**20}


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(SIZES))
    parser.add_argument("--sources", nargs="*", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--many", type=int, help="images in one call")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.child:
        given = json.loads(arguments.child)
        sys.stdout.write(json.dumps(many_peak(**given) if "many" in given else measure_memory(**given)) + "\n")
        return
    torch.manual_seed(0)
    if arguments.many:
        rows = measure_many(arguments.many, arguments.sources, arguments.repeats)
        print_table(rows, MANY_COLUMNS, f"{arguments.many} images of {MANY_SIZE} to views of llava_next, in one call")
        report_path(write_result("preprocess_many_cpu", rows, [0]))
        return
    rows: list[dict] = []
    for size in arguments.sizes:
        for source in arguments.sources:
            rows += measure_size(size, source, arguments.repeats)
    peaks = in_subprocess(__file__, {"sizes": arguments.sizes, "sources": arguments.sources}, FRESH_BLOCKS)
    for row in rows:
        row["peak_mib"] = peaks.get(f"{row['size']}/{row['source']}/{row['processor']}")
    print_table(rows, COLUMNS, "images to views (llava_next's views for ours and transformers llava_next)")
    path = write_result("preprocess_cpu", rows, [0])
    decoded = [{**row, "label": f"{row['size']}: {row['processor']}"} for row in rows if row["source"] == "decoded"]
    plot_bars("preprocess_cpu", decoded, "label", "images_per_second", "images per second", "from decoded images")
    report_path(path)


if __name__ == "__main__":
    main()
