"""How the benchmarks measure: cases in turn, medians, floors, peak memory, counted operations, tables and plots."""

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from record import RESULTS
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


MIB = 2**20
VIEWS_OF_MEMORY = ("view", "reshape", "expand", "permute", "transpose", "slice", "select", "detach", "alias", "t")


def median(values: list[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def wait(device: str) -> None:
    """Wait until a CUDA device has done all that was asked; the CPU never lags behind."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def interleave(
    cases: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time cases one after another, again and again, so that a busy moment hits all of them alike.

    Args:
        cases (`dict[str, Callable]`): What is timed, by name.
        repeats (`int`): Rounds that count.
        warmup (`int`): Rounds before them.
        device (`str`): Where the work happens.

    Returns:
        Seconds of each round, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for number in range(warmup + repeats):
        order = list(cases) if number % 2 == 0 else list(cases)[::-1]
        for name in order:
            wait(device)
            start = time.perf_counter()
            cases[name]()
            wait(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def floor_seconds(tower: float, language_model: float, operations: float, rate: float) -> float:
    """The least time a prefill could take: tower and language model alone, the rest at the rate of matrix products.

    Args:
        tower (`float`): Seconds of the vision tower alone on the same views.
        language_model (`float`): Seconds of the language model alone on as many tokens.
        operations (`float`): Counted operations of everything between.
        rate (`float`): Operations a second of a large matrix product, measured in the same run.
    """
    return tower + language_model + operations / rate


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


def count_work(call: Callable[[], Any]) -> tuple[int, int]:
    """Count operations (two a multiply-add, matrix products and attention) and bytes of a call.

    Args:
        call (`Callable`): Runs on any device; on `meta` nothing is computed.

    Returns:
        Operations, bytes.
    """
    flops, moved = FlopCounterMode(display=False), ByteCounter()
    with torch.no_grad(), flops, moved:
        call()
    return flops.get_total_flops(), moved.total


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes that a call needs at its peak above what was there before.

    On the CPU the resident memory is looked at every 2 ms; short peaks may be missed.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    peak = [before]

    def watch() -> None:
        while not done.is_set():
            peak[0] = max(peak[0], process.memory_info().rss)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return peak[0] - before


def own_peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_subprocess(script: str, case: dict) -> dict:
    """Run one case of a script in a process of its own: `script --child CASE`, which prints JSON on its last line.

    Args:
        script (`str`): Path of the script.
        case (`dict`): JSON values.

    Returns:
        What it printed.

    Raises:
        RuntimeError: If it failed; the message ends with its errors.
    """
    command = [sys.executable, script, "--child", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
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
