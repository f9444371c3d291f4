"""Every attention of a prefill is fused: tower, connector and language model, padded batches included.

`benchmarks/attention_kernels.py` looks at a profile; the same check runs here on small models on the CPU, and on CUDA
with its kernels.
"""

import importlib
import sys
from pathlib import Path

import pytest
import torch


pytest.importorskip("matplotlib")
pytest.importorskip("psutil")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MODELS = ("llava_next", "slime, 4 crops, 144 local", "monkey", "vlsa", "fusion", "router with attention")
CONNECTOR = {"llava_next": 0, "monkey": 2, "vlsa": 0, "fusion": 20}
"""Softmax attentions of the connector; those of `slime` are counted in the tests."""


@pytest.fixture(scope="module")
def kernels():
    """The benchmark as a module."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("attention_kernels")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def built(kernels):
    """All models at tiny sizes with `sdpa`."""
    return kernels.build_models(list(MODELS), "cpu", kernels.SHAPES["tiny"], "sdpa")


def taken(kernels, case, batch: str):
    sizes = [(60, 90)] if batch == "one image" else [(60, 90), (400, 300)]
    return case.take([kernels.pictures("336x336", "cpu")[0].resize(size[::-1]) for size in sizes])


@pytest.mark.parametrize("batch", ["one image", "padded batch"])
@pytest.mark.parametrize("name", MODELS)
def test_every_attention_is_fused(kernels, built, name, batch):
    case = taken(kernels, built[name], batch)
    mask = case.inputs["attention_mask"]
    records, copies = kernels.examine(case)
    assert kernels.find_faults(records, "sdpa", "silu") == [] and copies == 0
    assert records["tower"].asked == 2 and records["language_model"].asked == 2  # layers
    assert records["between"].asked == 0
    if name in CONNECTOR:
        assert records["connector"].asked == CONNECTOR[name]
    else:  # the query compressor, the query former of the mixture, and one score an image
        assert records["connector"].asked == 2 + (name == "router with attention") * len(mask)
    sizes = 1 if batch == "one image" else 2  # numbers of crops: one call of the cross step each
    assert records["connector"].silu == ({"silu": 1 + sizes} if name == "vlsa" else {})


def test_batches_of_unequal_rows_are_padded(kernels, built):
    masks = [taken(kernels, built[name], "padded batch").inputs["attention_mask"] for name in ("llava_next", "monkey")]
    assert all((mask == 0).any() for mask in masks)


@pytest.mark.parametrize("part", ["tower", "connector", "language_model"])
def test_an_eager_part_is_named(kernels, part):
    case = taken(
        kernels, kernels.build_models(["monkey"], "cpu", kernels.SHAPES["tiny"], "sdpa")["monkey"], "one image"
    )
    kernels.set_attention(
        {"tower": case.tower, "connector": case.model.model.connector, "language_model": case.language_model}[part],
        "eager",
    )
    faults = kernels.find_faults(kernels.examine(case)[0], "sdpa", None)
    assert f"{part}: 2 x _softmax" in faults and all(fault.startswith(part) for fault in faults)


def test_the_math_path_is_named(kernels, built):
    case = taken(kernels, built["monkey"], "one image")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        faults = kernels.find_faults(kernels.examine(case)[0], "sdpa", None)
    for part in kernels.PARTS:
        assert f"{part}: 2 x _scaled_dot_product_attention_math" in faults


def test_other_faults_are_named(kernels):
    """What flash attention or a kernel would be on CUDA, made up."""
    records = {name: kernels.PartRecord() for name in (*kernels.PARTS, "between")}
    for part in ("tower", "language_model"):
        records[part].fused["_flash_attn_forward"] = 2
    assert kernels.find_faults(records, "flash_attention_2", None) == []
    records["tower"].asked, records["connector"].silu["silu"] = 2, 1
    assert kernels.find_faults(records, "flash_attention_2", "KernelSiluAttention") == [
        "tower: 2 x scaled_dot_product_attention in place of flash attention",
        "connector: 1 x silu",
    ]
    records["language_model"].fused.clear()
    assert "language_model: no attention was seen" in kernels.find_faults(records, "sdpa", None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_kernels_and_copies_on_cuda(kernels, name):
    """The profile of a GPU: fused kernels, SiLU attention in Triton, one copy to the host for an unpadded image."""
    pytest.importorskip("hires_lmm.kernels")
    case = kernels.build_models([name], "cuda", kernels.SMALL_CUDA, "sdpa")[name]
    for batch in ("one image", "padded batch"):
        own = kernels.on_device(taken(kernels, case, batch), "cuda")
        own.prefill()
        records, copies = kernels.examine(own)
        assert kernels.find_faults(records, "sdpa", "KernelSiluAttention") == []
        assert all(records[part].kernels for part in kernels.PARTS)
        if batch == "one image" and name in ("llava_next", "slime, 4 crops, 144 local", "monkey", "vlsa"):
            assert copies == 1
