"""transformers' common tests of FSDP and tensor parallelism on our model, in two processes on the CPU."""

import unittest

from skips import SHARDED
from tiny_presets import ModelTester, Suite
from upstream_suite import test_fsdp_mixin, test_tensor_parallel_mixin

from hires_lmm import HiResLmmForConditionalGeneration, HiResLmmModel


test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None  # not only the models of its own list
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin._get_available_fsdp_workers = lambda: 2  # on every machine


class ShardingSuite(Suite, test_fsdp_mixin.FSDPTesterMixin, test_tensor_parallel_mixin.TensorParallelTesterMixin):
    """The mixins on our classes; their batches are texts, so the visual parts run on an idle view."""

    all_model_classes = (HiResLmmModel, HiResLmmForConditionalGeneration)
    model_tester = None

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.preset)


for _preset in SHARDED:
    _name = f"Test_{_preset}_Sharding"
    globals()[_name] = type(_name, (ShardingSuite, unittest.TestCase), {"preset": _preset, "__module__": __name__})
