"""Kernels that no checkpoint carries. Importing the package needs triton and registers `silu_triton`.

The perceiver's SiLU attention then runs by it on a GPU in half precision.
"""

from transformers import AttentionInterface

from .silu import silu_triton


AttentionInterface.register("silu_triton", silu_triton)

__all__ = ["silu_triton"]
