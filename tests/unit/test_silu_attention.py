"""SiLU attention against loops in float64: values, gradients, memory; the Triton kernels by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import silu_interpreted as cases
from hires_lmm.modeling import silu_attention_hires_lmm as module
from hires_lmm.modeling.silu_attention_hires_lmm import choose_implementation, silu_attention


TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
GRADED = [case for case in cases.CASES if case != cases.LARGE]
FAST = [case for case in GRADED if case != "1024"]  # the interpreter needs ten seconds for one of the widest
TESTS = Path(__file__).parents[1]


def assert_small(errors: list[float], dtype: str) -> None:
    """Errors of output and gradients of query, key and maybe value; NaN is no small error."""
    assert len(errors) in (3, 4) and all(error <= TOLERANCE[dtype] for error in errors), errors


@pytest.mark.parametrize("block", [2**21, 50], ids=["one block", "many blocks"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", GRADED)
def test_values_and_gradients(case, dtype, block, monkeypatch):
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", block)
    found = cases.errors(case, cases.DTYPES[dtype], "torch")
    assert_small(found, dtype)


def test_gradients_of_double_precision_by_finite_differences(monkeypatch):
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", 12)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((2, 3, 2, 4), (7, 2, 4), (7, 2, 4))
    )
    for mean in (False, True):
        assert torch.autograd.gradcheck(
            lambda q, k, v: silu_attention(q, k, v, (0, 5, 6), 0.7, mean), (query, key, value)
        )
    assert torch.autograd.gradcheck(lambda q, k: silu_attention(q, k, k, (0, 5, 6)), (query, key))  # shared


class Largest(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        result = function(*arguments, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_no_tensor_grows_with_queries_times_keys(monkeypatch):
    monkeypatch.setattr(module, "SCORES_PER_BLOCK", 1000)
    query, key = torch.randn(1, 100, 1, 4, requires_grad=True), torch.randn(700, 1, 4, requires_grad=True)
    with Largest() as record:
        silu_attention(query, key, key, (0, 700)).sum().backward()
    assert 1000 <= record.numel <= 700 * 4  # blocks of scores, and the keys
    with Largest() as record:
        (torch.nn.functional.silu(query[0, :, 0] @ key[:, 0].T) @ key[:, 0]).sum().backward()
    assert record.numel == 100 * 700


def test_images_without_keys_give_zero_and_unused_keys_get_none():
    query, key = torch.randn(2, 3, 1, 8, requires_grad=True), torch.randn(5, 1, 8, requires_grad=True)
    output = silu_attention(query, key, key, (0, 4, 4), mean=True)
    output.sum().backward()
    assert output[0].abs().min() > 0 and torch.equal(output[1], torch.zeros(3, 1, 8))
    assert torch.equal(query.grad[1], torch.zeros(3, 1, 8))
    assert key.grad[:4].abs().min() > 0 and torch.equal(key.grad[4], torch.zeros(1, 8))
    empty = silu_attention(query, key[:0], key[:0], (0, 0, 0))
    assert torch.equal(empty, torch.zeros(2, 3, 1, 8)) and empty.requires_grad


def test_autocast_does_not_round_the_scores():
    inputs, _ = cases.make_inputs("64", torch.float32)
    wanted = silu_attention(*inputs, cases.CASES["64"][3])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(silu_attention(*inputs, cases.CASES["64"][3]), wanted)


def test_keys_of_another_precision_follow_the_query():
    """In mixed precision the residual stream may be wider than the projections."""
    inputs, _ = cases.make_inputs("64", torch.float32)
    half = inputs[1].bfloat16()
    found = silu_attention(inputs[0], half, half, cases.CASES["64"][3])
    assert torch.equal(found, silu_attention(inputs[0], half.float(), half.float(), cases.CASES["64"][3]))


@pytest.mark.parametrize("offsets", [(0, 3), (0, 3, 2), (1, 2, 3), (0, 3, 6), (0, 1, 2, 3)])
def test_offsets_that_do_not_fit_are_refused(offsets):
    query, key = torch.randn(2, 3, 1, 8), torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match=r"offsets=\[.*\] do not fit 2 images and 5 keys"):
        silu_attention(query, key, key, offsets)


def test_shapes_and_names_that_do_not_fit_are_refused():
    query, key = torch.randn(2, 3, 1, 8), torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match=r"query \(2, 3, 1, 8\), key \(5, 8\)"):
        silu_attention(query, key[:, 0], key[:, 0], (0, 2, 3))
    with pytest.raises(ValueError, match="implementation='cuda' is unknown"):
        silu_attention(query, key, key, (0, 2, 3), implementation="cuda")


@pytest.mark.parametrize(
    "is_cuda, dtype, has_triton, wanted",
    [
        (True, torch.bfloat16, True, "triton"),
        (True, torch.float16, True, "triton"),
        (True, torch.float32, True, "torch"),
        (True, torch.bfloat16, False, "torch"),
        (False, torch.bfloat16, True, "torch"),
    ],
)
def test_the_kernel_runs_on_gpus_where_triton_is_installed(is_cuda, dtype, has_triton, wanted, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: object() if has_triton else None)
    assert choose_implementation(is_cuda, dtype) == wanted


# ---- the kernels


def interpreted_errors(*names: str) -> dict:
    """Errors of cases by the kernels in Triton's interpreter, which must be chosen before triton is imported."""
    pytest.importorskip("triton", reason="triton is not installed: its interpreter cannot run the kernels")
    path = os.pathsep.join([str(TESTS), str(Path(module.__file__).parents[2])])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, cases.__file__, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["case"], row["dtype"]): row["errors"] for row in rows}


@pytest.fixture(scope="module")
def interpreted():
    return interpreted_errors(*FAST, cases.LARGE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", FAST)
def test_kernels_in_the_interpreter(interpreted, case, dtype):
    assert_small(interpreted[case, dtype], dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_weights_and_sums_beyond_float16(interpreted, dtype):
    """In PyTorch and in the kernel, against float64; float16 by itself would give infinities."""
    torch_error = cases.errors(cases.LARGE, cases.DTYPES[dtype], "torch")
    for (error,) in (torch_error, interpreted[cases.LARGE, dtype]):
        assert error <= TOLERANCE[dtype]
    (query, key, value), _ = cases.make_inputs(cases.LARGE, cases.DTYPES[dtype])
    output = silu_attention(query, key, value, *cases.CASES[cases.LARGE][3:6])
    assert torch.isfinite(output).all() == (dtype != "float16")


@pytest.mark.slow
def test_the_widest_head_in_the_interpreter():
    for (_, dtype), found in interpreted_errors("1024").items():
        assert_small(found, dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", GRADED)
def test_kernels_on_the_gpu(case, dtype):
    found = cases.errors(case, cases.DTYPES[dtype], "triton", "cuda")
    assert_small(found, dtype)
