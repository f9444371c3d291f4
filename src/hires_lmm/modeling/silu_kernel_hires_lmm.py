"""Triton kernels of SiLU attention. This file needs triton; only the functions that launch the kernels import it.

A program owns one tile of rows and `BLOCK_V` of the channels of its result; the scores need all channels, so they are
summed over pieces of `BLOCK_D` and made anew for each piece of the result. That bounds registers for heads of up to
1024 channels. Nothing is written twice: results do not depend on the order of programs. What lies outside an image
loads as zero, and SiLU(0) = 0, so scores need no mask.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl


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
def _share(count, MEAN: tl.constexpr):
    """Factor on the sum over the keys of an image."""
    share = 1.0
    if MEAN:
        share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    return share


@triton.jit
def _forward_kernel(
    query,
    key,
    value,
    offsets,
    output,
    scale,
    num_queries,
    heads,
    MEAN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Tile of queries × piece of the channels of the output."""
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first, stop = tl.load(offsets + image), tl.load(offsets + image + 1)
    rows = image * num_queries + tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_stop = (image + 1) * num_queries
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_Q, BLOCK_V], dtype=tl.float32)
    for start in range(first, stop, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        scores = scale * _products(
            query, rows, row_stop, key, keys, stop, heads, head, CHANNELS, OPERAND, BLOCK_Q, BLOCK_K, BLOCK_D
        )
        values = _load_tile(value, keys, stop, columns, heads, head, CHANNELS)
        total = _weigh(scores * tl.sigmoid(scores), values, total, OPERAND)
    total = total * _share(stop - first, MEAN)
    _store_tile(output, total, rows, row_stop, columns, heads, head, CHANNELS)


@triton.jit
def _slope(scores):
    """Derivative of SiLU."""
    gate = tl.sigmoid(scores)
    return gate * (1.0 + scores * (1.0 - gate))


@triton.jit
def _grad_query_kernel(
    grad,
    query,
    key,
    value,
    offsets,
    grad_query,
    scale,
    num_queries,
    heads,
    MEAN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Tile of queries × piece of the channels of their gradient."""
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first, stop = tl.load(offsets + image), tl.load(offsets + image + 1)
    rows = image * num_queries + tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_stop = (image + 1) * num_queries
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_Q, BLOCK_V], dtype=tl.float32)
    for start in range(first, stop, BLOCK_K):
        keys = start + tl.arange(0, BLOCK_K)
        scores = scale * _products(
            query, rows, row_stop, key, keys, stop, heads, head, CHANNELS, OPERAND, BLOCK_Q, BLOCK_K, BLOCK_D
        )
        grad_weights = _products(
            grad, rows, row_stop, value, keys, stop, heads, head, CHANNELS, OPERAND, BLOCK_Q, BLOCK_K, BLOCK_D
        )
        piece = _load_tile(key, keys, stop, columns, heads, head, CHANNELS)
        total = _weigh(grad_weights * _slope(scores), piece, total, OPERAND)
    total = total * (scale * _share(stop - first, MEAN))
    _store_tile(grad_query, total, rows, row_stop, columns, heads, head, CHANNELS)


@triton.jit
def _grad_key_value_kernel(
    grad,
    query,
    key,
    value,
    offsets,
    grad_key,
    grad_value,
    scale,
    num_queries,
    heads,
    SHARED: tl.constexpr,
    MEAN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OPERAND: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Tile of keys × piece of the channels of the gradients of keys and values, or of both in one."""
    image, head = tl.program_id(2) // heads, tl.program_id(2) % heads
    first, stop = tl.load(offsets + image), tl.load(offsets + image + 1)
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
        share = _share(stop - first, MEAN)
        total_key = total_key * (scale * share)
        total_value = total_value * share
        if SHARED:
            total_key += total_value
        else:
            _store_tile(grad_value, total_value, keys, stop, columns, heads, head, CHANNELS)
        _store_tile(grad_key, total_key, keys, stop, columns, heads, head, CHANNELS)


def operand_type(tensor: torch.Tensor) -> tl.dtype:
    """Type in which tiles are multiplied: that of the tensor.

    Args:
        tensor (`torch.Tensor`): An input. On the CPU, Triton's interpreter runs the kernels; it cannot multiply
            bfloat16, so its products, exact in float32, are taken there.

    Returns:
        A Triton dtype.
    """
    if tensor.dtype == torch.bfloat16:
        return tl.bfloat16 if tensor.is_cuda else tl.float32
    return tl.float16 if tensor.dtype == torch.float16 else tl.float32


def block_sizes(channels: int, is_backward: bool) -> dict:
    """Tile sizes of a head size.

    Args:
        channels (`int`): Channels of a head.
        is_backward (`bool`): The backward kernels hold two sums where the forward kernel holds one.

    Returns:
        Keyword arguments of the kernels.
    """
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
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    offsets: tuple,
    scale: float,
    mean: bool,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """SiLU attention, see `silu_attention`.

    Args:
        query (`torch.Tensor` of shape `(I, Q, H, E)`): Contiguous, as all tensors here.
        key (`torch.Tensor` of shape `(T, H, E)`): Keys of all images.
        value (`torch.Tensor` of shape `(T, H, E)`, *optional*): Values of all images; None = the keys.
        offsets (`tuple[int]`): First key of each image and the end of the last.
        scale (`float`): Multiplies the scores.
        mean (`bool`): Divide by the number of keys.
        dtype (`torch.dtype`, *optional*): Dtype of the result; that of the query by default.

    Returns:
        `(I, Q, H, E)`.
    """
    images, queries, heads, channels = query.shape
    output = torch.empty_like(query, dtype=dtype)
    if not output.numel():
        return output
    blocks = block_sizes(channels, is_backward=False)
    grid = (triton.cdiv(queries, blocks["BLOCK_Q"]), triton.cdiv(channels, blocks["BLOCK_V"]), images * heads)
    numbers = torch.tensor(offsets, dtype=torch.int32, device=query.device)
    settings = {"MEAN": mean, "CHANNELS": channels, "OPERAND": operand_type(query), **blocks}
    values = key if value is None else value
    _forward_kernel[grid](query, key, values, numbers, output, scale, queries, heads, **settings)
    return output


def launch_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    offsets: tuple,
    scale: float,
    mean: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of query, key and value.

    Args:
        grad (`torch.Tensor` of shape `(I, Q, H, E)`): Gradient of the output.
        query (`torch.Tensor` of shape `(I, Q, H, E)`): As in `launch_forward`, like the rest.
        key (`torch.Tensor` of shape `(T, H, E)`): Keys.
        value (`torch.Tensor` of shape `(T, H, E)`, *optional*): Values; None = the keys.
        offsets (`tuple[int]`): First key of each image and the end of the last.
        scale (`float`): Multiplies the scores.
        mean (`bool`): Divide by the number of keys.

    Returns:
        Gradients of query, key and value; None for a value that is the key, whose gradient then holds both.
    """
    images, queries, heads, channels = query.shape
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    grad_value = None if value is None else torch.zeros_like(value)
    values = key if value is None else value
    most_keys = max((stop - start for start, stop in pairwise(offsets)), default=0)
    if not most_keys or not query.numel():
        return grad_query, grad_key, grad_value
    blocks = block_sizes(channels, is_backward=True)
    pieces = triton.cdiv(channels, blocks["BLOCK_V"])
    numbers = torch.tensor(offsets, dtype=torch.int32, device=query.device)
    tensors = (grad, query, key, values, numbers)
    settings = {"MEAN": mean, "CHANNELS": channels, "OPERAND": operand_type(query), **blocks}
    grid = (triton.cdiv(queries, blocks["BLOCK_Q"]), pieces, images * heads)
    _grad_query_kernel[grid](*tensors, grad_query, scale, queries, heads, **settings)
    grid = (triton.cdiv(most_keys, blocks["BLOCK_K"]), pieces, images * heads)
    settings["SHARED"] = value is None
    _grad_key_value_kernel[grid](
        *tensors, grad_key, grad_key if grad_value is None else grad_value, scale, queries, heads, **settings
    )
    return grad_query, grad_key, grad_value
