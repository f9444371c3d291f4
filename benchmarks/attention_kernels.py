"""Which attention ran in a prefill: fails where tower, connector or language model took an eager or math path.

    python benchmarks/attention_kernels.py                  operations of small models on the CPU, a minute
    python benchmarks/attention_kernels.py --device cuda    kernels of small models in bfloat16, with `sdpa` and, where
                                                            the flash-attn package is installed, `flash_attention_2`;
                                                            also the copies from the device and the difference in time

Every model runs one image and a padded batch under the profiler. An attention is fused where it ends in one of
`FUSED`; it is not where `_scaled_dot_product_attention_math` ran, or a softmax over scores of (batch, heads, queries,
keys). On CUDA kernels are listed by name, SiLU attention must run in its Triton kernel, and a prefill without padding
may read from the device once. Exit status 1 names what is wrong.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from cases import KEEP_BUDGET, OURS, Case, Shared, ours, ours_known
from measure import interleave, median, print_table, report_path, say
from prefill import pictures
from record import write_result
from shapes import SHAPES, Shapes
from torch.autograd.profiler import profile, record_function
from transformers import PreTrainedModel


FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attn_forward",
    "_flash_attn_varlen_forward",
)
"""Operations that never hold the whole matrix of scores."""

ASKED, SDPA = "scaled_dot_product_attention", "_scaled_dot_product"
MATH = "_scaled_dot_product_attention_math"
SOFTMAX = ("_softmax", "_safe_softmax")
SILU = ("silu", "KernelSiluAttention")
PARTS = ("tower", "connector", "language_model")
BATCHES = {"one image": "1024x1024", "padded batch": "mixed batch"}
ROUTER = {"connector_config": {"token_ops": [{**KEEP_BUDGET, "score": "attention"}]}}
SMALL_CUDA = Shapes((128, 4, 2, 512), (256, 4, 4, 2, 688, 4096), torch.bfloat16)
COLUMNS = {
    "implementation": "attention",
    "model": "model",
    "batch": "batch",
    "tower": "tower",
    "connector": "connector",
    "language_model": "language model",
    "copies_to_host": "copies to host",
    "milliseconds": "ms",
    "wrong": "wrong",
}


@dataclass
class PartRecord:
    """What one part of a model ran.

    Args:
        asked (`int`): Calls of `scaled_dot_product_attention`.
        fused (`Counter`): Fused operations, by name.
        silu (`Counter`): SiLU attention, by implementation.
        wrong (`Counter`): Math and eager attention, by the name of the operation.
        kernels (`Counter`): Kernels of the device, by name.
    """

    asked: int = 0
    fused: Counter = field(default_factory=Counter)
    silu: Counter = field(default_factory=Counter)
    wrong: Counter = field(default_factory=Counter)
    kernels: Counter = field(default_factory=Counter)


def name_parts(parts: dict[str, Any]) -> Callable[[], None]:
    """Open a named range around each call of some modules' `forward`.

    Args:
        parts (`dict[str, nn.Module]`): Modules by name.

    Returns:
        A function that takes the ranges away.
    """
    open_ranges: list[Any] = []
    handles = []

    def enter(name: str) -> None:
        open_ranges.append(record_function(f"part:{name}"))
        open_ranges[-1].__enter__()

    for name, module in parts.items():
        handles.append(module.register_forward_pre_hook(lambda module, args, name=name: enter(name)))
        handles.append(
            module.register_forward_hook(lambda module, args, output: open_ranges.pop().__exit__(None, None, None))
        )
    return lambda: [handle.remove() for handle in handles] and None


def leaves(connector: Any) -> dict[str, Any]:
    """Modules of a connector that are called as modules: its view ops, adapter and token ops."""
    parts = [*connector.view_ops, connector.adapter, *connector.token_ops]
    return {f"connector {number}": part for number, part in enumerate(parts)}


def part_of(event: Any) -> str:
    """The part in whose range an event of the profiler lies; `"between"` outside all."""
    while event is not None:
        if event.name.startswith("part:"):
            return event.name[len("part:") :].split()[0]
        event = event.cpu_parent
    return "between"


def examine(case: Case) -> tuple[dict[str, PartRecord], int]:
    """Profile one prefill.

    Args:
        case (`Case`): One of ours with its inputs; warmed up where kernels are compiled on the way.

    Returns:
        What each part ran, by its name, and the number of copies from the device to the host.
    """
    model = case.model.model
    remove = name_parts(
        {"tower": model.vision_tower, "language_model": model.language_model, **leaves(model.connector)}
    )
    device = "cuda" if torch.cuda.is_available() and next(case.model.parameters()).is_cuda else None
    try:
        with profile(use_device=device, record_shapes=True) as found:
            case.prefill()
            if device:
                torch.cuda.synchronize()
    finally:
        remove()
    records = {name: PartRecord() for name in (*PARTS, "between")}
    for event in found.function_events:
        name, record = event.name.split("::")[-1], records[part_of(event)]
        if name == ASKED:
            record.asked += 1
        elif name in FUSED:
            record.fused[name] += 1
        elif name in SILU and (name != "silu" or len((event.input_shapes or [[]])[0]) == 4):  # of scores
            record.silu[name] += 1
        elif name == MATH or (name in SOFTMAX and len((event.input_shapes or [[]])[0]) == 4):
            record.wrong[name] += 1
        for kernel in event.kernels:
            record.kernels[kernel.name] += 1
    copies = sum(1 for event in found.function_events if "Memcpy DtoH" in event.name)
    return records, copies


def find_faults(records: dict[str, PartRecord], implementation: str, silu: str | None) -> list[str]:
    """What is wrong with the attention of a prefill.

    Args:
        records (`dict[str, PartRecord]`): Of `examine`.
        implementation (`str`): What was asked for: `"sdpa"` or `"flash_attention_2"`.
        silu (`str`, *optional*): The one way SiLU attention may run.
    """
    faults = []
    for part, record in records.items():
        faults += [f"{part}: {number} x {name}" for name, number in record.wrong.items()]
        if implementation == "flash_attention_2" and record.asked:
            faults.append(f"{part}: {record.asked} x {ASKED} in place of flash attention")
        elif sum(number for name, number in record.fused.items() if name.startswith(SDPA)) != record.asked:
            faults.append(f"{part}: {record.asked} x {ASKED}, fused {dict(record.fused)}")
        faults += [f"{part}: {number} x {name}" for name, number in record.silu.items() if silu not in (None, name)]
    faults += [f"{part}: no attention was seen" for part in ("tower", "language_model") if not records[part].fused]
    return faults


def on_device(case: Case, device: str) -> Case:
    """The case with all of its inputs on the device, as a data loader would leave them."""
    case.inputs = {
        key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in case.inputs.items()
    }
    return case


def build_models(names: list[str], device: str, shapes: Shapes, implementation: str) -> dict[str, Case]:
    """Some of ours with one implementation of attention everywhere.

    Args:
        names (`list[str]`): Keys of `OURS`, or `"router with attention"`.
        device (`str`): Where.
        shapes (`Shapes`): Sizes.
        implementation (`str`): Of attention.
    """
    OURS.setdefault("router with attention", ("slime", ROUTER, {"max_crops": 4, "max_image_tokens": 576 + 144}))
    built = {}
    for name in names:
        shared = Shared(shapes, device)
        built[name] = ours(name, shared)
        set_attention(built[name].model, implementation)
    return built


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Choose the attention of tower, connector, its inner models and the language model."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._attn_implementation = implementation


def measure(
    device: str, names: list[str], implementation: str, shapes: Shapes, repeats: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Examine and time some models with one implementation.

    Args:
        device (`str`): Where.
        names (`list[str]`): See `build_models`.
        implementation (`str`): `"sdpa"` or `"flash_attention_2"`.
        shapes (`Shapes`): Sizes.
        repeats (`int`): Rounds of the timing.

    Returns:
        One row a model and batch, and what is wrong.
    """
    rows, wrong = [], []
    silu = SILU[device == "cuda"]
    for name, case in build_models(names, device, shapes, implementation).items():
        for batch, images in BATCHES.items():
            taken = on_device(case.take(pictures(images, device)), device)
            taken.prefill()
            records, copies = examine(taken)
            faults = find_faults(records, implementation, silu)
            if device == "cuda" and batch == "one image" and name != "fusion" and copies > 1:
                faults.append(f"{copies} copies to the host")
            wrong += [f"{implementation}, {name}, {batch}: {fault}" for fault in faults]
            seconds = interleave({"prefill": taken.prefill}, repeats, 1, device)["prefill"]
            rows.append(
                {
                    "implementation": implementation,
                    "model": name,
                    "batch": batch,
                    **{part: show_record(records[part]) for part in PARTS},
                    "kernels": {part: dict(records[part].kernels) for part in PARTS},
                    "copies_to_host": copies if device == "cuda" else None,
                    "milliseconds": median(seconds) * 1e3,
                    "wrong": "; ".join(faults) or "-",
                }
            )
        say(f"{implementation}: {name}")
    return rows, wrong


def show_record(record: PartRecord) -> str:
    """The attention of a part in a few words."""
    return ", ".join(f"{number} x {name.lstrip('_')}" for name, number in (record.fused + record.silu).items()) or "-"


def main() -> int:
    """Examine, print, write JSON; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=("tiny", "cpu", "cuda"), help="small ones by default")
    parser.add_argument("--models", nargs="*", help="names of models; all of ours by default")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    cuda = arguments.device == "cuda"
    if cuda:
        import hires_lmm.kernels  # noqa: F401  # registers the kernel of SiLU attention

    default = SMALL_CUDA if cuda else SHAPES["tiny"]
    shapes = SHAPES[arguments.shapes] if arguments.shapes else default
    names = arguments.models or [*ours_known(), "router with attention"]
    implementations = ["sdpa", *(["flash_attention_2"] if cuda and find_spec("flash_attn") else [])]
    rows, wrong = [], []
    for implementation in implementations:
        found = measure(arguments.device, names, implementation, shapes, arguments.repeats)
        rows, wrong = rows + found[0], wrong + found[1]
    print_table(rows, COLUMNS, f"attention of a prefill, {arguments.device}")
    report_path(write_result(f"attention_kernels_{arguments.device}", rows, [0]))
    for fault in wrong:
        say(f"wrong: {fault}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
