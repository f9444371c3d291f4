"""transformers' common tests of image processors, processors and pipelines, on ours."""

import atexit
import json
import os
import shutil
import tempfile
import unittest
from functools import cache
from pathlib import Path

from skips import PRESETS
from tiny_presets import Suite, example

from builders.text import tiny_tokenizer
from builders.tiny import tiny_model, tiny_processor
from hires_lmm import HiResLmmForConditionalGeneration, HiResLmmImageProcessor, HiResLmmProcessor


MODEL = HiResLmmForConditionalGeneration.__name__
ROOT = Path(tempfile.mkdtemp(prefix="hires_lmm_upstream_"))
atexit.register(shutil.rmtree, ROOT, ignore_errors=True)

# The pipeline tests look up tiny checkpoints in a summary, which they read when they are imported.
PARTS = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["HiResLmmImageProcessor"]}
(ROOT / "reports").mkdir()
(ROOT / "reports" / "tiny_model_summary.json").write_text(json.dumps({MODEL: PARTS}))
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(ROOT)

from upstream_suite import test_image_processing_common, test_pipeline_mixin, test_processing_common  # noqa: E402


test_pipeline_mixin.PROCESSOR_MAPPING_NAMES = {"hires_lmm": "HiResLmmProcessor"}
for _task in test_pipeline_mixin.pipeline_test_mapping.values():
    if isinstance(_task["test"], str):
        _task["test"] = _task["test"].replace("tests.", "upstream_suite.", 1)


@cache
def checkpoint(preset: str) -> Path:
    """A tiny checkpoint where the pipeline tests look for one."""
    folder = ROOT / preset
    config = example(preset)[0]
    tiny_model(config).save_pretrained(folder / "hires_lmm" / MODEL)
    tiny_processor(config, "chatml").save_pretrained(folder / "hires_lmm" / MODEL)
    return folder


class ImageProcessorSuite(Suite, test_image_processing_common.ImageProcessingTestMixin):
    """The tests count one row of pixels an image: global views alone."""

    test_cast_dtype = True

    def image_processor_tester_class(self, parent: unittest.TestCase):
        """What the mixin asks about the image processor."""
        options = json.loads(tiny_processor(example(parent.preset)[0]).image_processor.to_json_string())
        known = HiResLmmImageProcessor.valid_kwargs.__annotations__
        options = {name: value for name, value in options.items() if name in known}
        return ImageTester(parent, batch_size=4, max_resolution=200, **{**options, "views": "global"})


class ImageTester(test_image_processing_common.ImageProcessingTester):
    """Our one class, which works with Pillow, and the shape of a view."""

    def _get_image_processing_classes(self) -> dict:
        return {"pil": HiResLmmImageProcessor}

    def expected_output_image_shape(self, images: list) -> tuple[int, int, int]:
        return 3, self.view_size, self.view_size


class ProcessorSuite(Suite, test_processing_common.ProcessorTesterMixin):
    """Tokenizer and image processor of a preset; texts with an image are longer than the tests expect."""

    processor_class = HiResLmmProcessor
    images_text_kwargs_max_length = images_text_kwargs_override_max_length = images_unstructured_max_length = 300

    @classmethod
    def _setup_image_processor(cls):
        return tiny_processor(example(cls.preset)[0]).image_processor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer("chatml")


class PipelineSuite(Suite, test_pipeline_mixin.PipelineTesterMixin):
    """The task of the model."""

    pipeline_model_mapping = {"image-text-to-text": HiResLmmForConditionalGeneration}

    def setUp(self) -> None:
        test_pipeline_mixin.TRANSFORMERS_TINY_MODEL_PATH = str(checkpoint(self.preset))


for _preset in PRESETS:
    for _suite in (ImageProcessorSuite, ProcessorSuite, PipelineSuite):
        _name = f"Test_{_preset}_{_suite.__name__.removesuffix('Suite')}"
        globals()[_name] = type(_name, (_suite, unittest.TestCase), {"preset": _preset, "__module__": __name__})
