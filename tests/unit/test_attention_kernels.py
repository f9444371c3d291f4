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
    assert records["tower"].asked == 3 + case.model.config.vision_feature_layer  # of two layers
    assert records["language_model"].asked == 2
    assert records["between"].asked == 0
    if name in CONNECTOR:
        assert records["connector"].asked == CONNECTOR[name]
    else:  # the query compressor, the query former of the mixture, and one score an image
        assert records["connector"].asked == 2 + (name == "router with attention") * len(mask)
    sizes = int(batch == "padded batch")  # numbers of crops, one call of the cross step each; a small image has none
    assert records["connector"].silu == ({"silu": 1 + sizes} if name == "vlsa" else {})


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
