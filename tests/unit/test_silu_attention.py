"""SiLU attention against loops in float64: values, gradients, memory; the Triton kernels by Triton's interpreter."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from hires_lmm.modeling import silu_attention_hires_lmm as module
from hires_lmm.modeling.silu_attention_hires_lmm import silu_attention
from reference_silu import attention_with_gradients, relative_error


TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
# name -> images, heads, queries, keys, channels, scale, whether keys are their own values; just above and below a tile
CASES = {
    "64": (2, 1, 5, 70, 64, 1.0, False),
    "80": (2, 2, 3, 9, 80, 0.5, True),
    "70": (1, 1, 70, 6, 64, 0.3, True),
    "320": (1, 1, 3, 7, 320, 0.2, False),
    "large": (1, 1, 5, 70, 64, 2e4, False),  # weights beyond float16, and incoming gradients below it
}


def errors(case: str, dtype: torch.dtype, run, device: str = "cpu") -> list[float]:
    """Errors of output and gradients of query, key and maybe value, over the largest value."""
    images, heads, queries, keys, channels, scale, is_shared = CASES[case]
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(images, heads, length, channels, generator=generator) / 2
        for length in (queries, keys, keys, queries)
    )
    grad = grad * 1e-8 if case == "large" else grad
    leaves = [states.to(dtype).to(device).requires_grad_() for states in (query, key, value)[: 3 - is_shared]]
    output = run(leaves[0], leaves[1], leaves[-1], scale)
    output.backward(grad.transpose(1, 2).to(output))
    flat = [states.detach().double().cpu().transpose(1, 2).numpy() for states in (leaves[0], leaves[1], leaves[-1])]
    offsets = list(range(0, keys * images + 1, keys))
    own = [flat[0], *(states.reshape(-1, heads, channels) for states in flat[1:])]
    wanted = list(attention_with_gradients(*own, offsets, scale, False, grad.double().transpose(1, 2).numpy()))
    wanted[2:] = [states.reshape(images, keys, heads, channels) for states in wanted[2:]]
    wanted[2:] = [wanted[2] + wanted[3]] if is_shared else wanted[2:]
    found = [output, *(leaf.grad.transpose(1, 2) for leaf in leaves)]
    return [relative_error(*pair) for pair in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("limit", [2**24, 50], ids=["whole", "in blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype, limit, monkeypatch):
    monkeypatch.setattr(module, "SCORES_LIMIT", limit)
    found = errors(case, getattr(torch, dtype), lambda q, k, v, s: silu_attention(None, q, k, v, scaling=s)[0])
    assert max(found) <= TOLERANCE[dtype], found


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation makes."""

    numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        self.numel = max(self.numel, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("limit, most", [(2**24, 100 * 700), (1000, 700 * 4)], ids=["whole", "in blocks"])
def test_beyond_the_limit_no_tensor_grows_with_queries_times_keys(limit, most, monkeypatch):
    monkeypatch.setattr(module, "SCORES_LIMIT", limit)
    query, key = torch.randn(1, 1, 100, 4, requires_grad=True), torch.randn(1, 1, 700, 4, requires_grad=True)
    kept = []
    with Largest() as record, torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        silu_attention(None, query, key, key)[0].sum().backward()
    assert record.numel == most and max(states.numel() for states in kept) <= most


def test_sums_beyond_float16_and_autocast_are_held_in_float32():
    query, key = torch.full((1, 1, 1, 64), 30.0).half(), torch.full((1, 1, 70, 64), 30.0).half()
    with torch.autocast("cpu", torch.bfloat16):
        output = silu_attention(None, query, key, key)[0]
    assert output.dtype == torch.float32 and output[0, 0, 0, 0] == 70 * (64 * 900) * 30


# ---- the kernels

INTERPRETED = """
import json, sys, torch, triton.language as tl
from triton.runtime import interpreter
from hires_lmm.kernels.silu import run_kernels
from test_silu_attention import CASES, TOLERANCE, errors

convert = interpreter._convert_float
def to_nearest(data, source, target, mode):  # the interpreter cuts off where GPUs round
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(data, source, target, mode)
    return torch.tensor(data).bfloat16().view(torch.uint16).numpy()
interpreter._convert_float = to_nearest
print(json.dumps({f"{c} {d}": errors(c, getattr(torch, d), run_kernels) for c in CASES for d in TOLERANCE}))
"""


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed: its interpreter cannot run the kernels")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", INTERPRETED]
    folder = os.path.dirname(__file__)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, found in json.loads(done.stdout).items():
        assert len(found) in (3, 4) and max(found) <= TOLERANCE[name.split()[-1]], (name, found)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_importing_the_kernels_registers_them_and_on_a_cpu_they_are_the_plain_function():
    from hires_lmm.kernels import silu_triton

    assert AttentionInterface()["silu_triton"] is silu_triton
    query, key = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 5, 8).bfloat16()
    assert torch.equal(silu_triton(None, query, key, key)[0], silu_attention(None, query, key, key)[0])
    del AttentionInterface._global_mapping["silu_triton"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES)
def test_kernels_on_the_gpu(case, dtype):
    from hires_lmm.kernels.silu import run_kernels

    found = errors(case, getattr(torch, dtype), run_kernels, "cuda")
    assert max(found) <= TOLERANCE[dtype], found
