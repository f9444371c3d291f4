"""Runs the Triton kernels, interpreted on the CPU or on a GPU, against the reference; prints one line of JSON a case.

TRITON_INTERPRET=1 python silu_interpreted.py       (with the package and tests/ on the path)
"""

import json
import sys

import torch

from hires_lmm.modeling.silu_attention_hires_lmm import silu_attention
from reference_silu import attention_with_gradients, relative_error


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# name -> channels, heads, queries, offsets, scale, mean, whether keys are their own values; sizes just above and below
# a tile, an image without keys
CASES = {
    "64": (64, 1, 5, (0, 70, 70, 73), 1.0, False, False),
    "80": (80, 2, 3, (0, 9, 20), 0.5, True, True),
    "70": (64, 1, 70, (0, 6), 0.3, False, True),
    "320": (320, 1, 3, (0, 7), 0.2, True, False),
    "1024": (1024, 1, 2, (0, 5), 0.1, False, True),
    "large": (64, 1, 5, (0, 70, 71), 2e4, True, False),
}
LARGE = "large"  # weights and sums beyond float16, so the result is float32 and gradients are not looked at


def make_inputs(case: str, dtype: torch.dtype, device: str = "cpu") -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value, and the gradient of the output; two keys behind the last offset belong to nobody."""
    channels, heads, queries, offsets, *_ = CASES[case]
    generator = torch.Generator().manual_seed(0)
    images, keys = len(offsets) - 1, offsets[-1] + 2
    shapes = [(images, queries, heads, channels), *[(keys, heads, channels)] * 2, (images, queries, heads, channels)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(tensor / 2).to(dtype).to(device) for tensor in tensors[:3]], tensors[3].to(dtype).to(device)


def errors(case: str, dtype: torch.dtype, implementation: str, device: str = "cpu") -> list[float]:
    """Errors of the output and of the gradients of query, key and value, over the largest value."""
    offsets, scale, mean, is_shared = CASES[case][3:]
    (query, key, value), grad = make_inputs(case, dtype, device)
    value = key if is_shared else value
    wide = [tensor.double().cpu().numpy() for tensor in (query, key, value, grad)]
    wanted = list(attention_with_gradients(*wide[:3], offsets, scale, mean, wide[3]))
    if is_shared:
        wanted[2:] = [wanted[2] + wanted[3]]
    if case == LARGE:
        with torch.no_grad():
            output = silu_attention(query, key, value, offsets, scale, mean, implementation, torch.float32)
        return [relative_error(output, wanted[0])]
    leaves = [tensor.requires_grad_() for tensor in ((query, key) if is_shared else (query, key, value))]
    output = silu_attention(query, key, value, offsets, scale, mean, implementation)
    output.backward(grad)
    found = [output, *(leaf.grad for leaf in leaves)]
    return [relative_error(*pair) for pair in zip(found, wanted, strict=True)]


def round_to_nearest() -> None:
    """Make the interpreter round float32 to bfloat16 as GPUs do; by itself it cuts off, a larger error than ours."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def convert_float(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        return torch.tensor(data).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = convert_float


def main() -> None:
    torch.set_num_threads(1)
    round_to_nearest()
    for case in sys.argv[1:]:
        for name, dtype in DTYPES.items():
            result = {"case": case, "dtype": name, "errors": errors(case, dtype, "triton")}
            sys.stdout.write(json.dumps(result) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
