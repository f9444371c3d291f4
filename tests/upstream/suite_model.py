"""transformers' common tests of configurations, models and training, on our model."""

import json
import unittest

from skips import PRESETS
from tiny_presets import ModelTester, Suite, example
from transformers import PreTrainedConfig
from upstream_suite import (
    test_configuration_common,
    test_modeling_common,
    test_training_mixin,
)
from upstream_suite.generation.test_utils import GenerationTesterMixin

from builders import geometry_of
from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmModel


# The tests choose by class name what a class can do; ours stand in no list of transformers.
test_modeling_common.MODEL_MAPPING_NAMES = {**test_modeling_common.MODEL_MAPPING_NAMES, "hires_lmm": "HiResLmmModel"}
test_modeling_common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES = {
    **test_modeling_common.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "hires_lmm": "HiResLmmForConditionalGeneration",
}


class ModelSuite(
    Suite,
    test_modeling_common.ModelTesterMixin,
    GenerationTesterMixin,
    test_training_mixin.TrainingTesterMixin,
):
    """The mixins on our two classes."""

    all_model_classes = (HiResLmmModel, HiResLmmForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # our file has no year in its head
    test_all_params_have_gradient = False  # layers of the tower behind `vision_feature_layer`

    def setUp(self) -> None:
        self.model_tester = ModelTester(self.preset)

    def _image_features_prepare_config_and_inputs(self) -> tuple[HiResLmmConfig, dict]:
        config, inputs = example(self.preset)
        return config, geometry_of(inputs)

    def test_config(self) -> None:
        ours = HiResLmmConfig.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        saved = json.loads(example(self.preset)[0].to_json_string())
        inputs = {name: value for name, value in saved.items() if name in ours}
        tester = test_configuration_common.ConfigTester(
            self, config_class=HiResLmmConfig, has_text_modality=False, **inputs
        )
        tester.run_common_tests()


for _preset in PRESETS:
    _name = f"Test_{_preset}"
    globals()[_name] = type(_name, (ModelSuite, unittest.TestCase), {"preset": _preset, "__module__": __name__})
