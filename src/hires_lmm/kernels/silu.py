"""Triton kernels of SiLU attention, and the function that the attention interface gets.

A program owns one tile of rows and `BLOCK_V` of the channels of its result; the scores need all channels, so they are
summed over pieces of `BLOCK_D` and made anew for each piece of the result. That bounds registers for heads of up to
1024 channels. Nothing is written twice: results do not depend on the order of programs. What lies outside an image
loads as zero, and SiLU(0) = 0, so scores need no mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import nn

from ..modeling.silu_attention_hires_lmm import silu_attention


KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""Without TF32 float32 products are slow in the kernel."""


@triton.jit
def _load_tile(base, rows, row_stop, columns, heads, head, CHANNELS: tl.constexpr):
    """Tile of a `(rows, heads, channels)` tensor; zero outside."""
    at = base + (rows.to(tl.int64)[:, None] * heads + head) * CHANNELS + columns[None, :]
    return tl.load(at, mask=(rows[:, None] < row_stop) & (columns[None, :] < CHANNELS), other=0.0)


@triton.jit
def _store_tile(base, tile, rows, row_stop, columns, heads, head, CHANNELS: tl.constexpr):
    """Write a tile back, rounded to the dtype of the tensor."""
    at = base + (rows.to(tl.int64)[:, None] * heads + head) * CHANNELS + columns[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=(rows[:, None] < row_stop) & (columns[None, :] < CHANNELS))


@triton.jit
def _dot(left, right, total, OPERAND: tl.constexpr):
    """Add a matrix product to a float32 tile, without TF32."""
    return tl.dot(left.to(OPERAND), right.to(OPERAND), total, input_precision="ieee")


@triton.jit
def _weigh(weights, right, total, OPERAND: tl.constexpr):
    """Add the product of float32 weights with a tile; float16 ends at 65504, so there their rows are shrunk to fit."""
    if OPERAND == tl.float16:  # noqa: SIM300
        shrink = tl.maximum(tl.max(tl.abs(weights), axis=1) / 32768.0, 1.0)[:, None]
        part = tl.dot((weights / shrink).to(OPERAND), right.to(OPERAND), input_precision="ieee")
        total += part * shrink
    else:
        total = _dot(weights.to(right.dtype), right, total, OPERAND)
    return total


@triton.jit
def _products(
    left,
    left_rows,
    left_stop,
    right,
    right_rows,
    right_stop,
    heads,
    head,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Inner products of the rows of two tensors over all channels, float32."""
    total = tl.zeros([BLOCK_L, BLOCK_R], dtype=tl.float32)
    for start in range(0, CHANNELS, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        first = _load_tile(left, left_rows, left_stop, columns, heads, head, CHANNELS)
        second = _load_tile(right, right_rows, right_stop, columns, heads, head, CHANNELS)
        total = _dot(first, tl.trans(second), total, OPERAND)
    return total


@triton.jit
def _slope(scores):
    """Derivative of SiLU."""
    gate = tl.sigmoid(scores)
    return gate * (1.0 + scores * (1.0 - gate))


@triton.jit
def _query_kernel(
    query,
    key,
    value,
    grad,
    result,
    scale,
    num_queries,
    num_keys,
    heads,
    BACKWARD: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Tile of queries × piece of the channels of the output, or of the gradient of the queries."""
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first, stop = image * num_keys, (image + 1) * num_keys
    rows = image * num_queries + tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_stop = (image + 1) * num_queries
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_Q, BLOCK_V], dtype=tl.float32)
    for start in range(first, stop, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        scores = scale * _products(
            query, rows, row_stop, key, keys, stop, heads, head, CHANNELS, OPERAND, BLOCK_Q, BLOCK_K, BLOCK_D
        )
        if BACKWARD:
            grad_weights = _products(
                grad, rows, row_stop, value, keys, stop, heads, head, CHANNELS, OPERAND, BLOCK_Q, BLOCK_K, BLOCK_D
            )
            piece = _load_tile(key, keys, stop, columns, heads, head, CHANNELS)
            total = _weigh(grad_weights * _slope(scores), piece, total, OPERAND)
        else:
            values = _load_tile(value, keys, stop, columns, heads, head, CHANNELS)
            total = _weigh(scores * tl.sigmoid(scores), values, total, OPERAND)
    if BACKWARD:
        total = total * scale
    _store_tile(result, total, rows, row_stop, columns, heads, head, CHANNELS)


@triton.jit
def _grad_key_value_kernel(
    query,
    key,
    value,
    grad,
    grad_key,
    grad_value,
    scale,
    num_queries,
    num_keys,
    heads,
    SHARED: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Tile of keys × piece of the channels of the gradients of keys and values, or of both in one."""
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first, stop = image * num_keys, (image + 1) * num_keys
    keys = first + tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_stop = (image + 1) * num_queries
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total_key = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    total_value = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    if first + tl.program_id(0) * BLOCK_K < stop:
        for start in range(image * num_queries, row_stop, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            scores = scale * _products(
                key, keys, stop, query, rows, row_stop, heads, head, CHANNELS, OPERAND, BLOCK_K, BLOCK_Q, BLOCK_D
            )
            grad_weights = _products(
                value, keys, stop, grad, rows, row_stop, heads, head, CHANNELS, OPERAND, BLOCK_K, BLOCK_Q, BLOCK_D
            )
            grads = _load_tile(grad, rows, row_stop, columns, heads, head, CHANNELS)
            total_value = _weigh(scores * tl.sigmoid(scores), grads, total_value, OPERAND)
            queries = _load_tile(query, rows, row_stop, columns, heads, head, CHANNELS)
            total_key = _weigh(grad_weights * _slope(scores), queries, total_key, OPERAND)
        total_key = total_key * scale
        if SHARED:
            total_key += total_value
        else:
            _store_tile(grad_value, total_value, keys, stop, columns, heads, head, CHANNELS)
        _store_tile(grad_key, total_key, keys, stop, columns, heads, head, CHANNELS)


def operand_type(tensor: torch.Tensor) -> tl.dtype:
    """Type of the products: that of the tensor; on a CPU float32 for bfloat16, which is not multiplied there."""
    if tensor.dtype == torch.bfloat16:
        return tl.bfloat16 if tensor.is_cuda else tl.float32
    return tl.float16 if tensor.dtype == torch.float16 else tl.float32


def block_sizes(channels: int, is_backward: bool) -> dict:
    """Tile sizes of a head size, as keyword arguments; backward kernels hold two sums where the other holds one."""
    width = max(triton.next_power_of_2(channels), 16)
    return {
        "BLOCK_Q": 64,
        "BLOCK_K": 64,
        "BLOCK_D": min(width, 64),
        "BLOCK_V": min(width, 128 if is_backward else 256),
        "num_warps": 8 if is_backward or width > 64 else 4,
        "num_stages": 2,
    }


def launch_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, scale: float, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """SiLU attention of `(I, Q, H, E)` queries over `(I, K, H, E)` keys; a value of None stands for the key."""
    (images, queries, heads, channels), keys = query.shape, key.shape[1]
    output = torch.empty_like(query, dtype=dtype)
    if not output.numel():
        return output
    blocks = block_sizes(channels, is_backward=False)
    grid = (triton.cdiv(queries, blocks["BLOCK_Q"]), triton.cdiv(channels, blocks["BLOCK_V"]), images * heads)
    settings = {"CHANNELS": channels, "OPERAND": operand_type(query), **blocks}
    values = key if value is None else value
    tensors = (query, key, values, query, output)  # the gradient is not read
    _query_kernel[grid](*tensors, scale, queries, keys, heads, BACKWARD=False, **settings)
    return output


def launch_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Float32 gradients of query, key and value; None for a value that is the key, whose gradient then holds both."""
    (images, queries, heads, channels), keys = query.shape, key.shape[1]
    grad_query, grad_key = (torch.zeros_like(states, dtype=torch.float32) for states in (query, key))
    grad_value = None if value is None else torch.zeros_like(value, dtype=torch.float32)
    values = key if value is None else value
    if not key.numel() or not query.numel():
        return grad_query, grad_key, grad_value
    blocks = block_sizes(channels, is_backward=True)
    pieces = triton.cdiv(channels, blocks["BLOCK_V"])
    tensors = (query, key, values, grad)
    settings = {"CHANNELS": channels, "OPERAND": operand_type(query), **blocks}
    grid = (triton.cdiv(queries, blocks["BLOCK_Q"]), pieces, images * heads)
    _query_kernel[grid](*tensors, grad_query, scale, queries, keys, heads, BACKWARD=True, **settings)
    grid = (triton.cdiv(keys, blocks["BLOCK_K"]), pieces, images * heads)
    outputs = (grad_key, grad_key if grad_value is None else grad_value)
    _grad_key_value_kernel[grid](*tensors, *outputs, scale, queries, keys, heads, SHARED=value is None, **settings)
    return grad_query, grad_key, grad_value


class KernelSiluAttention(torch.autograd.Function):
    """SiLU attention by the kernels; the result is float32 as that of `silu_attention`."""

    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """See `launch_forward`."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return launch_forward(query, key, value, scale, torch.float32)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        """See `launch_backward`."""
        query, key, value = ctx.saved_tensors
        size = grad_output.abs().amax().clamp(min=1e-30)  # a mean over many keys leaves less than float16 can say
        grad = (grad_output / size).to(query.dtype).contiguous()
        found = launch_backward(grad, query, key, value, ctx.scale)
        return *(None if each is None else (each * size).to(query.dtype) for each in found), None


def silu_triton(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float = 1.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`silu_attention` by the kernels where the tensors are on a GPU in half precision, else itself."""
    if not query.is_cuda or query.dtype not in KERNEL_DTYPES:
        return silu_attention(module, query, key, value, attention_mask, scaling, **kwargs)
    return run_kernels(query, key, value, scaling), None


def run_kernels(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """Run the kernels on `(B, H, Q, E)` queries and `(B, H, K, E)` keys and values: `(B, Q, H, E)` float32."""
    queries, keys = (states.transpose(1, 2).to(query.dtype).contiguous() for states in (query, key))
    values = None if value is key else value.transpose(1, 2).to(query.dtype).contiguous()
    return KernelSiluAttention.apply(queries, keys, values, float(scaling))
