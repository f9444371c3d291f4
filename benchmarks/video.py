"""A video of 64 frames in 1080p: tokens, prefill and memory against transformers' llava_next_video.

    python benchmarks/video.py                  small models on the CPU, about five minutes on two idle cores
    python benchmarks/video.py --shapes wide    a tower of true width; longer
    python benchmarks/video.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

All models see the same 64 frames, squeezed to the view, and have one language model; of the presets only the number of
frames is changed. `decode` is reading the H.264 file (drawn and encoded here) with PyAV, `views` what our image
processor does to its frames, `tower` the vision tower on its views, `rest` all else up to the first new token. A ratio
is taken within a round. Memory: tensors above weights and inputs while the image features are made, by the most views
that pass the tower at once; and the resident memory of decoding and cutting.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from cases import KEEP_BUDGET, Case, Shared
from measure import (
    interleave,
    median,
    median_ratio,
    peak_memory,
    peak_resident,
    plot_bars,
    print_table,
    report_path,
    say,
)
from PIL import Image
from record import write_result
from shapes import IMAGE_TOKEN, SHAPES, build, rows_of_ids
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration
from transformers.video_utils import load_video

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmProcessor
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.processing.video_input_hires_lmm import Video


HEIGHT, WIDTH, FRAMES = 1080, 1920, 64
PEER = "transformers llava_next_video"
POOLED = 12
"""Rows and columns of a frame of 24 x 24 patches, in PLLaVA and in llava_next_video."""

CHUNKS = (None, 32, 8, 1)
STAGES = ("decode", "views", "tower", "rest")
COLUMNS = {
    "model": "model",
    "views": "views",
    "tokens": "visual tokens",
    "prefill_ms": "prefill ms",
    "ratio": "of llava_next_video",
    **{f"share_{stage}": f"{stage}, %" for stage in STAGES},
}
MEMORY_COLUMNS = {"model": "model", "chunk": "views at once", "peak_mib": "peak MiB", "ratio": "of all at once"}


def presets(frames: int) -> dict[str, tuple[str, dict]]:
    """Name -> preset and what changes for so many frames."""
    planner = {"num_frames": frames, "min_frames": min(frames, 16)}
    every = {"map_ops": [{"part": "pool3d", "shape": [frames, POOLED, POOLED]}]}
    router = {"token_ops": [{**KEEP_BUDGET, "on": ["crops", "frames"]}]}  # the work does not depend on weights
    side = next(side for side in range(1, frames + 1) if side * side >= frames)
    return {
        "pllava": ("pllava", {"video_planner": planner}),
        "pllava, every frame": ("pllava", {"video_planner": planner, "connector_config": every}),
        "ts_llava": ("ts_llava", {"video_planner": {"num_frames": frames}}),
        "slime_video": (
            "slime_video",
            {"video_planner": {"num_frames": frames, "grid": [side, side]}, "connector_config": router},
        ),
    }


def write_video(file: Path, frames: int, height: int, width: int) -> None:
    """A smooth picture that glides by, as H.264."""
    generator = np.random.default_rng(0)
    spots = Image.fromarray(generator.integers(0, 255, (height // 40, (width + 8 * frames) // 40, 3), dtype=np.uint8))
    scene = np.asarray(spots.resize((width + 8 * frames, height), Image.Resampling.BICUBIC))
    with av.open(str(file), "w") as container:
        stream = container.add_stream("h264", rate=30)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"preset": "veryfast"}
        for number in range(frames):
            picture = np.ascontiguousarray(scene[:, 8 * number : 8 * number + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def ours(preset: str, changes: dict, shared: Shared) -> tuple[Case, Any]:
    """A model of ours on a video, and its image processor."""
    shapes = shared.shapes
    config = HiResLmmConfig.from_preset(
        preset, shapes.clip(), shared.small_text(), image_token_id=IMAGE_TOKEN, **changes
    )
    model = shared.give(build(HiResLmmForConditionalGeneration, config, shapes.dtype, shared.device))
    image_processor = HiResLmmProcessor.from_config(config, build_byte_tokenizer()).image_processor

    def encode(videos: list) -> tuple[dict, list[int]]:
        batch = image_processor(list(map(Video, videos)), return_tensors="pt")
        positions = batch["view_positions"]
        counts = positions[positions[:, 8] != 0, 5].tolist()
        pixels = batch["pixel_values"].to(shared.device, shapes.dtype)
        return {**rows_of_ids(counts, shared.device), **batch, "pixel_values": pixels}, counts

    case = Case(preset, model, model.model.vision_tower, model.model.language_model, encode)
    return case, image_processor


def peer(shared: Shared, views: torch.Tensor) -> Case:
    """transformers' llava_next_video on views `(T, 3, H, W)` of frames."""
    config = LlavaNextVideoConfig(
        vision_config=shared.shapes.clip(),
        text_config=shared.small_text(),
        image_token_index=IMAGE_TOKEN + 1,
        video_token_index=IMAGE_TOKEN,
    )
    model = shared.give(build(LlavaNextVideoForConditionalGeneration, config, shared.shapes.dtype, shared.device))
    counts = [len(views) * POOLED**2]
    inputs = {**rows_of_ids(counts, shared.device), "pixel_values_videos": views[None]}
    encode: Any = None
    return Case(PEER, model, model.model.vision_tower, model.model.language_model, encode, inputs, counts)


def measure(arguments: argparse.Namespace, file: Path) -> tuple[list[dict], list[dict]]:
    """Rows of time and of memory."""
    shared = Shared(SHAPES[arguments.shapes], arguments.device)
    frames = load_video(str(file), backend="pyav")[0]
    cases, cutters = {}, {}
    for name, (preset, changes) in presets(arguments.frames).items():
        if name not in (arguments.models or [name]):
            continue
        case, cutters[name] = ours(preset, changes, shared)
        cases[name] = case.take([frames])
        say(f"{name}: {cases[name].tokens[0]} tokens")
    first = next(iter(cases))
    cases[PEER] = peer(shared, cases[first].inputs["pixel_values"][-arguments.frames :])
    calls: dict[str, Callable[[], Any]] = {"decode": lambda: load_video(str(file), backend="pyav")}
    for name, case in cases.items():
        calls[f"prefill {name}"] = case.prefill
        if name != PEER:
            calls[f"views {name}"] = lambda cut=cutters[name]: cut([Video(frames)])
            calls[f"tower {name}"] = tower_call(case)
    seconds = interleave(calls, arguments.repeats, 1, arguments.device)
    rows = [time_row(name, case, seconds) for name, case in cases.items()]
    return rows, memory_rows(first, cases[first], cutters[first], file, arguments.device)


def tower_call(case: Case) -> Callable[[], Any]:
    """The tower alone on the views of a case, as the model calls it."""

    def call() -> Any:
        with torch.no_grad():
            return case.model.model.encode_pixels(case.inputs["pixel_values"])

    return call


def time_row(name: str, case: Case, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """One model: its prefill, and the shares of a question about a file."""
    prefill = seconds[f"prefill {name}"]
    pixels = case.inputs["pixel_values_videos"][0] if name == PEER else case.inputs["pixel_values"]
    row = {"model": name, "views": len(pixels), "tokens": case.tokens[0], "prefill_ms": 1e3 * median(prefill)}
    row["ratio"] = median_ratio(prefill, seconds[f"prefill {PEER}"])
    if name != PEER:
        parts = {stage: median(seconds[f"{stage} {name}"]) for stage in ("views", "tower")}
        parts = {"decode": median(seconds["decode"]), **parts, "rest": median(prefill) - parts["tower"]}
        total = sum(parts.values())
        row |= {f"share_{stage}": 100 * parts[stage] / total for stage in STAGES}
    return {**row, "rounds": len(prefill)}


def memory_rows(name: str, case: Case, cutter: Any, file: Path, device: str) -> list[dict[str, Any]]:
    """Peaks of the image features by views at once, and of decoding and cutting."""
    base, inputs = case.model.model, case.inputs
    given = {name: inputs[name] for name in inputs if name.startswith(("pixel", "view"))}
    rows: list[dict[str, Any]] = []
    for chunk in CHUNKS:

        def features(chunk: int | None = chunk) -> None:
            with torch.no_grad():
                base.get_image_features(**given, vision_chunk_size=chunk or len(given["pixel_values"]))

        features()
        peak = peak_memory(features, device) / 2**20
        rows.append({"model": name, "chunk": "all" if chunk is None else chunk, "peak_mib": peak})
        rows[-1]["ratio"] = peak / rows[0]["peak_mib"]
    resident = peak_resident(lambda: cutter([Video(str(file))]))
    return [*rows, {"model": "decoding and cutting", "peak_mib": None if resident is None else resident / 2**20}]


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--height", type=int, default=HEIGHT)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--models", nargs="*", help="some of the presets; all by default")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.shapes = arguments.shapes or arguments.device
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        write_video(file, arguments.frames, arguments.height, arguments.width)
        rows, memory = measure(arguments, file)
    title = f"{arguments.frames} frames of {arguments.width} x {arguments.height}, shapes {arguments.shapes}"
    print_table(rows, COLUMNS, title)
    print_table(memory, MEMORY_COLUMNS, "memory of the image features")
    stem = f"video_{arguments.shapes}" if arguments.device == "cpu" else "video_cuda"
    path = write_result(stem, [*rows, *({"memory": True, **row} for row in memory)], [0])
    plot_bars(stem, memory[:-1], "chunk", "peak_mib", "MiB", f"views at once, {title}")
    report_path(path)


if __name__ == "__main__":
    main()
