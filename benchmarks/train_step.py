"""One training step of each stage of the plan `slime`: time and memory beside the floor.

    python benchmarks/train_step.py                  small models on the CPU, a minute on two idle cores
    python benchmarks/train_step.py --shapes deep --batch 1     true depth, all widths divided by 16; 4 minutes
    python benchmarks/train_step.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

The floor of the time: the tower alone, forward only, on the same views (nothing with cached features), the language
model alone with its loss on the same labels, forward and backward, and three times the counted operations of the
connector at the rate of a matrix product. The floor of the memory: the language model alone, and gradients and the
two AdamW moments of what the stage trains. The language model gets gradients of its weights only where the stage
trains them. On CUDA the full last stage does not fit beside AdamW on 80 GB; `--stages` chooses.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from cases import BUDGETED
from measure import (
    count_work,
    floor_seconds,
    interleave,
    matrix_rate,
    median,
    median_ratio,
    peak_memory,
    plot_bars,
    print_table,
    report_path,
    say,
)
from prefill import MATRIX, picture
from record import write_result
from shapes import IMAGE_TOKEN, SHAPES, TEXT_LENGTH, build, rows_of_ids

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmProcessor
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.training import get_plan


STAGES = ("I-a", "I-b", "II", "II, cached features", "III")
COLUMNS = {
    "stage": "stage",
    "milliseconds": "ms",
    "floor_ms": "floor ms",
    "overhead": "overhead",
    "tower_calls": "tower calls",
    "peak_mib": "peak MiB",
    "floor_mib": "floor MiB",
    "memory_overhead": "memory / floor",
}


def make_step(model: Any, inputs: dict, labels: torch.Tensor) -> Callable[[], None]:
    """A step of AdamW on one batch; the moments exist after the first call."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    def step() -> None:
        model(**inputs, labels=labels, prompt_mask=labels == -100).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_floor(model: Any, seen: dict, labels: torch.Tensor) -> Callable[[], None]:
    """The language model and its loss alone, on the embeddings that the step gave it."""
    kwargs = dict(seen["kwargs"])
    embeds = kwargs.pop("inputs_embeds").detach().requires_grad_()
    trained = [p for p in (*model.model.language_model.parameters(), *model.lm_head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if trained else None

    def step() -> None:
        hidden = model.model.language_model(inputs_embeds=embeds, **kwargs)[0]
        targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        logits = model.lm_head(hidden[targets != -100]).float()
        torch.nn.functional.cross_entropy(logits, targets[targets != -100]).backward()
        embeds.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()

    return step


def stage_inputs(model: Any, processor: Any, views: str, cached: bool, images: list, device: str) -> tuple[dict, Any]:
    """Inputs and labels of a batch as the stage sees it; with `cached`, tower features in place of pixels."""
    batch = processor.image_processor(images, return_tensors="pt", views=views, max_crops=4)
    positions = batch["view_positions"]
    rows = rows_of_ids(positions[positions[:, 8] != 0, 5].tolist(), device)
    labels = torch.full_like(rows["input_ids"], -100)
    labels[:, -TEXT_LENGTH // 2 :] = rows["input_ids"][:, -TEXT_LENGTH // 2 :]
    pixels = batch["pixel_values"].to(device, model.dtype)
    inputs = {**rows, "view_positions": positions, "view_spans": batch["view_spans"]}
    if cached:
        with torch.no_grad():
            return {**inputs, "vision_features": model.model.encode_pixels(pixels)}, labels
    return {**inputs, "pixel_values": pixels}, labels


def measure_stage(name: str, model: Any, processor: Any, settings: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Time one stage and its floor in turn.

    Args:
        name (`str`): One of `STAGES`.
        model, processor: Of the preset `slime`.
        settings (`argparse.Namespace`): Device, batch, side, repeats.
        rate (`float`): Of `matrix_rate`.
    """
    stage = {stage.name.split("/")[-1]: stage for stage in get_plan("slime")}[name.split(",")[0]]
    stage.apply(model)
    images = [picture(settings.side, settings.side, seed) for seed in range(settings.batch)]
    inputs, labels = stage_inputs(model, processor, stage.views, "cached" in name, images, settings.device)
    calls, seen = [], {}
    tower, language = model.model.vision_tower, model.model.language_model
    handles = [
        tower.register_forward_pre_hook(lambda module, args: calls.append(args[0])),
        language.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs=kwargs), with_kwargs=True),
    ]
    step = make_step(model.train(), inputs, labels)
    step()
    for handle in handles:
        handle.remove()
    floor = make_floor(model, seen, labels)
    pixels = calls[0] if calls else None

    def tower_alone() -> None:
        if pixels is not None:
            with torch.no_grad():
                tower(pixels)

    with torch.no_grad():
        whole = count_work(lambda: model(**inputs, labels=labels, prompt_mask=labels == -100))[0]
        head = count_work(lambda: model.lm_head(torch.zeros_like(seen["kwargs"]["inputs_embeds"])))[0]
        body = count_work(lambda: language(**seen["kwargs"]))[0]
        share = int((labels != -100).sum()) / labels.numel()
        connector = whole - body - count_work(tower_alone)[0] - int(head * share)
    trained = [p for part in (model.model.connector, tower) for p in part.parameters() if p.requires_grad]
    floor()  # the moments of its optimizer
    peak, floor_peak = peak_memory(step, settings.device), peak_memory(floor, settings.device)  # also the warm-up
    floor_peak += sum(p.numel() * p.element_size() for p in trained)  # their gradients; the moments exist already
    parts = {"step": step, "floor": floor, "tower": tower_alone}
    seconds = interleave(parts, settings.repeats, 0, settings.device)
    least = [
        floor_seconds(alone, 3 * max(connector, 0), rate)
        for alone in zip(seconds["tower"], seconds["floor"], strict=True)
    ]
    return {
        "stage": name,
        "tower_calls": len(calls),
        "milliseconds": median(seconds["step"]) * 1e3,
        "tower_ms": median(seconds["tower"]) * 1e3,
        "floor_ms": median(least) * 1e3,
        "overhead": median_ratio(seconds["step"], least),
        "connector_operations": connector,
        "peak_mib": peak / 2**20,
        "floor_mib": floor_peak / 2**20,
        "memory_overhead": peak / floor_peak if floor_peak else None,
    }


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--stages", nargs="*", choices=STAGES)
    parser.add_argument("--side", type=int, default=672)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    settings = parser.parse_args()
    torch.manual_seed(0)
    chosen = settings.shapes or settings.device
    shapes = SHAPES[chosen]
    stages = settings.stages or (STAGES[:-1] if settings.device == "cuda" else STAGES)
    config = HiResLmmConfig.from_preset("slime", shapes.clip(), shapes.llama(), image_token_id=IMAGE_TOKEN, **BUDGETED)
    model = build(HiResLmmForConditionalGeneration, config, shapes.dtype, settings.device)
    processor = HiResLmmProcessor.from_config(config, build_byte_tokenizer())
    rate = matrix_rate(settings.device, shapes.dtype, MATRIX[settings.device])
    rows = []
    for name in stages:
        rows.append(measure_stage(name, model, processor, settings, rate))
        say(f"stage {name}: {rows[-1]['milliseconds']:.0f} ms a step")
    stem = "_".join(["train_step", *([] if chosen == settings.device else [chosen]), settings.device])
    print_table(rows, COLUMNS, f"one step, {settings.batch} images of {settings.side} pixels, {settings.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "stage", "milliseconds", "ms a step", f"training, {settings.device}")
    report_path(path)


if __name__ == "__main__":
    main()
