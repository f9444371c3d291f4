"""How the benchmarks measure: cases in turn, medians, floors, peak memory, counted operations, tables and plots."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from record import RESULTS
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


MIB = 2**20
STATUS = Path("/proc/self/status")
MOST_ROUNDS = 15
SILENCE = 10.0
"""Seconds without a line of progress, at most one round more."""
VIEWS_OF_MEMORY = ("view", "reshape", "expand", "permute", "transpose", "slice", "select", "detach", "alias", "t")


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def say(text: str) -> None:
    """One line of progress, on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)


def wait(device: str) -> None:
    """Wait until a CUDA device has done all that was asked; the CPU never lags behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    cases: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1, device: str = "cpu", least_seconds: float = 0.0
) -> dict[str, list[float]]:
    """Time cases one after another, again and again, so that a busy moment hits all of them alike.

    Args:
        cases (`dict[str, Callable]`): What is timed, by name.
        repeats (`int`): Rounds that count, at least.
        warmup (`int`): Rounds before them.
        device (`str`): Where the work happens.
        least_seconds (`float`): Short cases get more rounds, until so long was timed or there are `MOST_ROUNDS`.

    Returns:
        Seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    number, timed = 0, 0.0
    begin = time.perf_counter()
    while number < warmup + repeats or (timed < least_seconds and number < warmup + MOST_ROUNDS):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            wait(device)
            start = time.perf_counter()
            cases[name]()
            wait(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
                timed += seconds[name][-1]
        number += 1
        if time.perf_counter() - begin > SILENCE:
            say(f"  {number} rounds of {len(cases)} cases, the warm-up included")
            begin = time.perf_counter()
    return seconds


def median_ratio(above: list[float], below: list[float]) -> float:
    """Median over the rounds of one case's time by another's: what slows a whole round down cancels."""
    return median([one / other for one, other in zip(above, below, strict=True)])


def floor_seconds(alone: Iterable[float], operations: float, rate: float) -> float:
    """The least time a prefill could take: whole models alone, the rest at the rate of matrix products.

    Args:
        alone (iterable of `float`): Seconds of tower, language model and any other whole model alone, on the same
            views and as many tokens.
        operations (`float`): Counted operations of everything between.
        rate (`float`): Operations a second of a large matrix product, measured in the same run.
    """
    return sum(alone) + operations / rate


def matrix_rate(device: str, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    """Operations a second of a square matrix product.

    Args:
        device (`str`): Where.
        dtype (`torch.dtype`): Number format.
        size (`int`): Rows and columns.
        repeats (`int`): Rounds; the best one counts, since this is a limit.
    """
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = interleave({"product": lambda: a @ a}, repeats, 2, device)["product"]
    return 2 * size**3 / min(seconds)


def memory_rate(device: str, size: int = 64 * MIB, repeats: int = 5) -> float:
    """Bytes a second of a large copy, read and written bytes together."""
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / min(interleave({"copy": lambda: b.copy_(a)}, repeats, 2, device)["copy"])


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operations read and write, each operation by itself (nothing fused)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and add its inputs and outputs, unless it only looks at memory in another way."""
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__.lstrip("_")
        if name not in VIEWS_OF_MEMORY and not function.is_view:
            leaves = tree_leaves((args, kwargs or {}, result))
            self.total += sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, torch.Tensor))
        return result


def _cpu_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


_cpu_attention._get_raw = True  # type: ignore[attr-defined]  # the counter hands over tensors


def operation_counter() -> FlopCounterMode:
    """A counter of operations, two a multiply-add, in matrix products and attention, that of the CPU included."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={attention: _cpu_attention})


def count_work(call: Callable[[], Any]) -> tuple[int, int]:
    """Count operations (two a multiply-add, matrix products and attention) and bytes of a call.

    Args:
        call (`Callable`): Runs on any device; on `meta` nothing is computed.

    Returns:
        Operations, bytes.
    """
    flops, moved = operation_counter(), ByteCounter()
    with torch.no_grad(), flops, moved:
        call()
    return flops.get_total_flops(), moved.total


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Some builds of torch write a line for each start of the profiler."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept), os.close(nowhere)


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes of tensors that a call holds at its peak above what was there before, by torch's own allocator.

    Args:
        call (`Callable`): What is run.
        device (`str`): Where its tensors lie; on the CPU a profiler reports each block that is taken or given back.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _without_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(sizes), default=0)


def _highest_resident() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_resident(call: Callable[[], Any]) -> int | None:
    """Bytes of memory of any library that a call needs at its peak above what the process held before.

    Linux keeps the highest value itself. Blocks that earlier calls gave back to the C library are not seen: start the
    process with `FRESH_BLOCKS` in its environment. None elsewhere.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = _highest_resident()
    call()
    return _highest_resident() - before


FRESH_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings of the C library under which memory that is given back leaves the process."""


def own_peak() -> int:
    """Largest resident memory of this program so far, bytes.

    On Linux that of the program alone: what `getrusage` says includes the process that started it.
    """
    if STATUS.exists():
        return _highest_resident()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_subprocess(script: str, case: dict, environment: dict[str, str] | None = None) -> dict:
    """Run one case of a script in a process of its own: `script --child CASE`, which prints JSON on its last line.

    Args:
        script (`str`): Path of the script.
        case (`dict`): JSON values.
        environment (`dict[str, str]`, *optional*): Added to that of this process.

    Returns:
        What it printed.

    Raises:
        RuntimeError: If it failed; the message ends with its errors.
    """
    command = [sys.executable, script, "--child", json.dumps(case)]
    env = {**os.environ, **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise RuntimeError(f"{Path(script).name} {case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(value: Any) -> str:
    """A cell of a table: three digits, whole numbers from 1000 on, `-` for what was not measured."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:,.0f}"


def print_table(rows: list[dict], columns: dict[str, str], title: str) -> None:
    """Print rows.

    Args:
        rows (`list[dict]`): One dict a row.
        columns (`dict[str, str]`): Key of a row -> heading.
        title (`str`): Above the table.
    """
    table = Table(*columns.values(), title=title)
    for row in rows:
        table.add_row(*(show(row.get(key)) for key in columns))
    Console(width=140).print(table)


def report_path(path: Path) -> None:
    """Say where the numbers lie."""
    Console().print(f"written: {path}")


def plot_bars(name: str, rows: list[dict], label: str, value: str, axis_label: str, title: str) -> Path:
    """Draw one bar a row as `results/<name>.png`.

    Args:
        name (`str`): Name of the benchmark.
        rows (`list[dict]`): Rows; those without the value are left out.
        label, value (`str`): Keys of the text and of the length of a bar.
        axis_label, title (`str`): Texts.

    Returns:
        The path.
    """
    drawn = [row for row in rows if row.get(value) is not None]
    figure = Figure(figsize=(7, 1 + 0.22 * max(len(drawn), 1)), layout="constrained")
    axis = figure.subplots()
    axis.barh(range(len(drawn)), [row[value] for row in drawn])
    axis.set_yticks(range(len(drawn)), [str(row[label]) for row in drawn], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=axis_label)
    axis.set_title(title, fontsize=9)
    axis.grid(alpha=0.3, axis="x")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.png"
    figure.savefig(path, dpi=120)
    return path
