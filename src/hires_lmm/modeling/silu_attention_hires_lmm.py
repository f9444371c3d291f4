"""Attention with SiLU in place of the softmax, over a different number of keys for each image."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn


SCORES_PER_BLOCK = 2**20
"""Scores that the PyTorch implementation holds at a time: 4 MiB in float32."""

KERNEL_DTYPES = (torch.float16, torch.bfloat16)
"""What `"auto"` gives to the kernel; without TF32 its float32 products are slow."""

Implementation = Literal["auto", "torch", "triton"]


def silu_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    offsets: Sequence[int],
    scale: float = 1.0,
    mean: bool = False,
    implementation: Implementation = "auto",
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sum of the values of each image, weighted by SiLU(scale · query · key); the weights do not sum to one.

    Both implementations hold a bounded number of scores at a time, forward and backward: memory grows with the number
    of keys, not with queries × keys. Half precision is accumulated in float32.

    Args:
        query (`torch.Tensor` of shape `(I, Q, H, E)`): Queries of I images, H heads of E channels.
        key (`torch.Tensor` of shape `(T, H, E)`): Keys of all images, one image after another.
        value (`torch.Tensor` of shape `(T, H, E)`): Values of the keys; the same object as `key` where keys are their
            own values, which saves a gradient.
        offsets (`Sequence[int]` of length `I + 1`): Image i has the keys `offsets[i]` to `offsets[i + 1]`, maybe none;
            keys behind the last offset take part in nothing.
        scale (`float`): Multiplies the scores before the SiLU.
        mean (`bool`): Divide the sum by the number of keys of the image.
        implementation (`str`): `"torch"`, `"triton"`, or `"auto"`: Triton where it is installed and the tensors are on
            a GPU in half precision.
        dtype (`torch.dtype`, *optional*): Dtype of the result, that of the query by default. float16 ends at 65504,
            which sums over many keys of a tower with outlying channels exceed; float32 holds them for a norm.

    Returns:
        `(I, Q, H, E)`; zero for images without keys.

    Raises:
        ValueError: If shapes or offsets do not fit together.

    Source: VLSA, openreview.net/forum?id=RLhEGWt94S, which prints SiLU(Q Kᵀ) V without scale. `scale` and `mean` are
        ours.
    """
    offsets = tuple(int(offset) for offset in offsets)
    _check(query, key, value, offsets)
    is_shared = value is key
    key = key.to(query.dtype)
    values = None if is_shared else value.to(query.dtype)
    if implementation == "auto":
        implementation = choose_implementation(query.is_cuda, query.dtype)
    function = {"torch": BlockedSiluAttention, "triton": KernelSiluAttention}.get(implementation)
    if function is None:
        raise ValueError(f"implementation={implementation!r} is unknown; choose auto, torch or triton.")
    return function.apply(query, key, values, offsets, float(scale), bool(mean), dtype or query.dtype)


def choose_implementation(is_cuda: bool, dtype: torch.dtype) -> Implementation:
    """The implementation that `"auto"` stands for.

    Args:
        is_cuda (`bool`): Whether the tensors are on a GPU.
        dtype (`torch.dtype`): Their dtype.

    Returns:
        `"triton"` on a GPU in half precision where triton is installed, else `"torch"`.
    """
    return "triton" if is_cuda and dtype in KERNEL_DTYPES and find_spec("triton") is not None else "torch"


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: tuple) -> None:
    """Compare shapes and offsets; a wrong offset would let one image read another."""
    if query.ndim != 4 or key.ndim != 3 or key.shape != value.shape or query.shape[2:] != key.shape[1:]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: expected "
            "(images, queries, heads, channels) and twice (keys, heads, channels)."
        )
    falls = any(stop < start for start, stop in pairwise(offsets))
    if len(offsets) != query.shape[0] + 1 or offsets[0] != 0 or falls or offsets[-1] > key.shape[0]:
        raise ValueError(
            f"offsets={list(offsets)} do not fit {query.shape[0]} images and {key.shape[0]} keys: they start at 0, "
            "never fall and are one more than the images."
        )


def _sum_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Dtype in which sums are taken: at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(query: torch.Tensor, offsets: tuple) -> list[tuple[int, slice]]:
    """Image and slice of keys of each block of at most `SCORES_PER_BLOCK` scores."""
    step = max(SCORES_PER_BLOCK // max(query.shape[1] * query.shape[2], 1), 1)
    return [
        (image, slice(start, min(start + step, stop)))
        for image, (first, stop) in enumerate(pairwise(offsets))
        for start in range(first, stop, step)
    ]


def _shares(offsets: tuple, mean: bool) -> list[float]:
    """Factor on the sum of each image."""
    counts = [stop - start for start, stop in pairwise(offsets)]
    return [1 / max(count, 1) if mean else 1.0 for count in counts]


def _load(key: torch.Tensor, value: torch.Tensor | None, block: slice, dtype: torch.dtype) -> tuple:
    """Keys and values of a block, `(H, n, E)`."""
    keys = key[block].to(dtype).transpose(0, 1)
    return keys, keys if value is None else value[block].to(dtype).transpose(0, 1)


class BlockedSiluAttention(torch.autograd.Function):
    """`silu_attention` in PyTorch: blocks of keys one after another, recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        offsets: tuple,
        scale: float,
        mean: bool,
        result: torch.dtype,
    ) -> torch.Tensor:
        """See `silu_attention`; a value of None stands for the key."""
        ctx.save_for_backward(query, key, value)
        ctx.settings = offsets, scale, mean
        dtype = _sum_dtype(query)
        output = torch.zeros(query.shape, dtype=dtype, device=query.device).transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):
            wide = query.to(dtype).transpose(1, 2)  # (I, H, Q, E)
            for image, block in _blocks(query, offsets):
                keys, values = _load(key, value, block, dtype)
                weights = nn.functional.silu(torch.matmul(wide[image], keys.mT).mul_(scale), inplace=True)
                output[image] += weights @ values
            output *= output.new_tensor(_shares(offsets, mean))[:, None, None, None]
        return output.transpose(1, 2).to(result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        """Gradients of query, key and value, block by block."""
        query, key, value = ctx.saved_tensors
        offsets, scale, mean = ctx.settings
        dtype = _sum_dtype(query)
        grad_query = torch.zeros(query.shape, dtype=dtype, device=query.device).transpose(1, 2)
        grad_key, grad_value = torch.zeros_like(key), None if value is None else torch.zeros_like(value)
        with torch.autocast(query.device.type, enabled=False):
            grad = grad_output.to(dtype).transpose(1, 2)
            grad = grad * grad.new_tensor(_shares(offsets, mean))[:, None, None, None]
            wide = query.to(dtype).transpose(1, 2)
            for image, block in _blocks(query, offsets):
                keys, values = _load(key, value, block, dtype)
                scores = torch.matmul(wide[image], keys.mT).mul_(scale)
                gate = scores.sigmoid()
                slope = gate * (1 + scores * (1 - gate))
                grad_values = (scores * gate).mT @ grad[image]
                grad_scores = (grad[image] @ values.mT).mul_(slope).mul_(scale)
                grad_query[image] += grad_scores @ keys
                grad_keys = grad_scores.mT @ wide[image]
                if grad_value is None:
                    grad_keys += grad_values
                else:
                    grad_value[block] = grad_values.transpose(0, 1).to(key.dtype)
                grad_key[block] = grad_keys.transpose(0, 1).to(key.dtype)
        return grad_query.transpose(1, 2).to(query.dtype), grad_key, grad_value, None, None, None, None


class KernelSiluAttention(torch.autograd.Function):
    """`silu_attention` by the Triton kernel."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor | None,
        offsets: tuple,
        scale: float,
        mean: bool,
        result: torch.dtype,
    ) -> torch.Tensor:
        """See `silu_attention`; a value of None stands for the key."""
        from .silu_kernel_hires_lmm import launch_forward

        query, key = query.contiguous(), key.contiguous()
        value = None if value is None else value.contiguous()
        ctx.save_for_backward(query, key, value)
        ctx.settings = offsets, scale, mean
        return launch_forward(query, key, value, offsets, scale, mean, result)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple:
        """Gradients of query, key and value."""
        from .silu_kernel_hires_lmm import launch_backward

        query, key, value = ctx.saved_tensors
        gradients = launch_backward(grad_output.to(query.dtype).contiguous(), query, key, value, *ctx.settings)
        return *gradients, None, None, None, None
