"""Peak memory of SiLU attention against the naive version: 577 queries read the keys of 1 to 64 crops.

    python benchmarks/silu_memory.py                 on the CPU: resident memory, a process a point
    python benchmarks/silu_memory.py --device cuda   on a GPU: memory, time and share of the measured matrix rate

Memory is what a call adds at its peak to the inputs, results and gradients included. The naive version is
`silu(q @ k.T) @ v` under autograd. Errors are largest differences to float64 over the largest value. Writes
results/silu_memory.json, or results/silu_memory_cuda.json.
"""

import argparse
import json
import multiprocessing
import sys

import torch
from record import write_result

from hires_lmm.modeling.silu_attention_hires_lmm import silu_attention


QUERIES, KEYS_OF_A_CROP, WIDTH = 577, 576, 1024
MIB = 2**20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """SiLU attention of one image `(1, Q, H, E)` with all its scores at once."""
    scores = torch.einsum("iqhe,khe->ihqk", query, key)
    return torch.einsum("ihqk,khe->iqhe", torch.nn.functional.silu(scores), value)


def make_inputs(point: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and keys that are also the values, as the perceiver has them."""
    generator = torch.Generator().manual_seed(0)
    shape = (point["heads"], WIDTH // point["heads"])
    query = torch.randn(1, QUERIES, *shape, generator=generator) / shape[1] ** 0.5
    key = torch.randn(point["crops"] * KEYS_OF_A_CROP, *shape, generator=generator)
    needs_grad = point["direction"] == "forward + backward"
    dtype, device = DTYPES[point["dtype"]], point["device"]
    return tuple(tensor.to(dtype).to(device).requires_grad_(needs_grad) for tensor in (query, key))


def run(point: dict, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """One call, with its backward pass where asked for."""
    queries, keys = query.transpose(1, 2), key[None].transpose(1, 2)
    if point["version"] == "naive":
        output = naive(query, key, key)
    elif point["version"] == "torch":
        output = silu_attention(None, queries, keys, keys)[0]
    else:
        from hires_lmm.kernels.silu import run_kernels

        output = run_kernels(queries, keys, keys, 1.0)
    if query.requires_grad:
        torch.autograd.grad(output, (query, key), torch.ones_like(output))
    return output.detach()


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM at its highest."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


@torch.no_grad()
def error_of(query: torch.Tensor, key: torch.Tensor, output: torch.Tensor) -> float:
    """Largest difference to float64 over the largest value, of 64 queries."""
    wide = key.detach().double()
    wanted = naive(query[:, :64].double(), wide, wide)
    return float((output[:, :64].double() - wanted).abs().max() / wanted.abs().max())


def measure_cpu(point: dict) -> dict:
    """Peak of resident memory above the inputs; the process has loaded all libraries by a small call before."""
    torch.set_num_threads(1)
    small = {**point, "crops": 1}
    run(small, *(tensor.detach()[..., :8].requires_grad_(tensor.requires_grad) for tensor in make_inputs(small)))
    query, key = make_inputs(point)
    before = resident("VmRSS")
    output = run(point, query, key)
    peak = resident("VmHWM") - before
    return {"peak_mib": round(peak / MIB, 1), "error": error_of(query, key, output)}


def matrix_rate(dtype: torch.dtype, size: int = 8192) -> float:
    """Floating-point operations a second of a large matrix product, the best of ten."""
    left = torch.randn(size, size, device="cuda", dtype=dtype)
    return 2 * size**3 / min(timed(lambda: left @ left) for _ in range(10))


def timed(call) -> float:
    """Seconds of one call on the GPU."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1000


def measure_cuda(point: dict) -> dict:
    """Peak of allocated memory, the median of ten times, and the rate of the useful operations."""
    query, key = make_inputs(point)
    output = run(point, query, key)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(point, query, key)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = sorted(timed(lambda: run(point, query, key)) for _ in range(10))[5]
    products = 2 if point["direction"] == "forward" else 7  # backward: scores again, weights, and three gradients
    rate = products * 2 * QUERIES * key.shape[0] * WIDTH / seconds
    return {
        "peak_mib": round(peak / MIB, 1),
        "milliseconds": round(1000 * seconds, 3),
        "share_of_matrix_rate": round(rate / matrix_rate(query.dtype), 3),
        "error": error_of(query, key, output),
    }


def points(device: str, most_crops: int) -> list[dict]:
    """What is measured."""
    versions = ("naive", "torch", "triton") if device == "cuda" else ("naive", "torch")
    usual, other = ("bfloat16", "float32") if device == "cuda" else ("float32", "bfloat16")
    shapes = [(1, 1), (9, 1), (36, 1), (64, 1), (36, 16)]
    settings = [(crops, heads, usual) for crops, heads in shapes] + [(36, 1, other)]
    return [
        {"version": v, "crops": c, "heads": h, "dtype": t, "direction": d, "device": device}
        for c, h, t in settings
        if c <= most_crops
        for d in ("forward", "forward + backward")
        for v in versions
    ]


def in_a_process(point: dict) -> dict:
    """Measure in a forked process, whose highest resident memory starts anew."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure_cpu, (point,))


def main() -> None:
    """Measure all points."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--crops", type=int, default=64, help="crops of the largest image")
    arguments = parser.parse_args()
    device = arguments.device
    torch.set_num_threads(1)
    rows = []
    for point in points(device, arguments.crops):
        rows.append({**point, **(measure_cuda if device == "cuda" else in_a_process)(point)})
        sys.stdout.write(json.dumps(rows[-1]) + "\n")
        sys.stdout.flush()
    write_result("silu_memory" + ("_cuda" if device == "cuda" else ""), rows, [0])


if __name__ == "__main__":
    main()
