"""Arrays and tensors of every dtype, shape, layout and content."""

import random

import numpy as np
import torch

from fuzz.harness import Place, Subject


DTYPES = [
    "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float16", "float32",
    "float64", "longdouble", "complex64", "object",
]  # fmt: skip
DTYPES += ["<U3", "S2", "V4", "M8[s]", "m8[s]", ">u2", ">f4", ">i8"]
SHAPES = [
    (), (0,), (5,), (0, 0), (0, 7), (7, 0), (1, 1), (9, 11), (3, 9), (9, 3), (1, 9, 11), (3, 9, 11), (4, 9, 11),
    (9, 11, 1), (9, 11, 3), (9, 11, 4), (9, 11, 2), (2, 9, 11), (5, 9, 11), (3, 9, 3), (1, 1, 1), (0, 9, 3),
    (9, 0, 3), (9, 11, 0), (1, 9, 11, 3), (2, 3, 9, 11), (0, 9, 11, 3), (1, 2, 3, 4, 5), (1, 3000, 3),
    (3000, 1, 3),
]  # fmt: skip
TORCH_DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16",
    "float32", "float64", "complex64",
]  # fmt: skip
TORCH_DTYPES += [
    "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint4", "int4", "uint1", "bits8", "float4_e2m1fn_x2",
]  # fmt: skip


def _values(rng: random.Random, shape: tuple, high: float) -> np.ndarray:
    return np.random.default_rng(rng.randrange(1 << 32)).uniform(0, high, shape)


def _spoil(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """Put one value in that no picture has."""
    if array.size and array.dtype.kind in "iuf":
        values = [np.nan, np.inf, -np.inf, -1.0, 256.0, 1e30] if array.dtype.kind == "f" else [255, 65_535, 65_536, -1]
        value = rng.choice(values)
        if array.dtype.kind == "f" or np.iinfo(array.dtype).min <= value <= np.iinfo(array.dtype).max:
            with np.errstate(over="ignore"):
                array.flat[rng.randrange(array.size)] = value
    return array


def _restrided(array: np.ndarray, rng: random.Random) -> np.ndarray:
    """The same picture in another order of memory, or a view that repeats itself."""
    kind = rng.randrange(6)
    if kind == 0 and array.ndim >= 2:
        return array[::-1, ::-1]
    if kind == 1:
        return np.asfortranarray(array)
    if kind == 2 and array.ndim == 3 and array.shape[2] == 3:
        return array[:, :, ::-1]
    if kind == 3:
        return np.broadcast_to(array[:1], array.shape) if array.ndim and array.shape[0] else array
    if kind == 4:
        return np.ma.masked_array(array, np.zeros(array.shape, bool))
    array.setflags(write=False)
    return array


def make_array(rng: random.Random, place: Place) -> Subject:
    """Any dtype in any shape; sound pictures of 8 bit must come out as they are."""
    if rng.random() < 0.2:
        array = _values(rng, (rng.randrange(5, 30), rng.randrange(5, 30), 3), 256).astype(np.uint8)
        array = array[::-1] if rng.random() < 0.3 else array
        return Subject("array, sound", array, np.ascontiguousarray(array))
    dtype, shape = np.dtype(rng.choice(DTYPES)), rng.choice(SHAPES)
    if dtype.kind in "OUSVMm":
        array = np.zeros(shape, dtype)
    else:
        high = 2 if dtype.kind == "b" else rng.choice([1, 1, 127, 255])
        array = _values(rng, shape, high).astype(dtype)
    if rng.random() < 0.4:
        array = _spoil(array, rng)
    array = _restrided(array, rng) if rng.random() < 0.5 else array
    return Subject(
        f"array {dtype.name}", array, refused=dtype.kind in "OUSVMmc" or 0 in shape or len(shape) in (0, 1, 5)
    )


def make_tensor(rng: random.Random, place: Place) -> Subject:
    """Any dtype and layout that torch has."""
    name, shape = rng.choice(TORCH_DTYPES), rng.choice([shape for shape in SHAPES if len(shape) < 5])
    dtype = torch.__dict__.get(name, torch.float32)
    values = torch.from_numpy(_values(rng, shape, 255.0))
    try:
        tensor = values.to(dtype)
    except (RuntimeError, NotImplementedError, TypeError):
        tensor = torch.empty(shape, dtype=dtype)
    kind = rng.randrange(9)
    matrix = tensor.dim() == 2 and tensor.numel() and tensor.is_floating_point() and tensor.itemsize > 1
    if kind == 0 and matrix:
        tensor = tensor.to_sparse() if rng.random() < 0.5 else tensor.float().to_sparse_csr()
    elif kind == 1:
        tensor = tensor.to("meta")
    elif kind == 2 and tensor.is_floating_point() and tensor.itemsize > 1:
        tensor = tensor.requires_grad_()
    elif kind == 3 and tensor.dtype == torch.float32 and tensor.dim():
        tensor = torch.quantize_per_tensor(tensor, 1.0, 0, torch.quint8)
    elif kind == 4 and tensor.dim() == 3:
        tensor = tensor.transpose(0, 2)
    elif kind == 5 and tensor.dtype == torch.float32 and tensor.numel():
        tensor = torch._neg_view(tensor)
    elif kind == 6 and tensor.dtype in (torch.float32, torch.float64) and tensor.numel():
        tensor.view(-1)[0] = float("nan")
    return Subject(f"tensor {name}", tensor, refused=tensor.is_complex() or tensor.is_meta or 0 in shape)
