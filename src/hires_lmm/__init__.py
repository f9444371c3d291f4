"""High-resolution multimodal models for transformers: slicing, adapting, compressing and routing of visual tokens.

Importing the package registers the classes with transformers' Auto classes, and makes every saved checkpoint carry its
own code, so that it loads elsewhere with `trust_remote_code=True`.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
)

from .modeling.configuration_hires_lmm import PRESETS, HiResLmmConfig, HiResLmmConnectorConfig
from .modeling.modeling_hires_lmm import (
    HiResLmmForConditionalGeneration,
    HiResLmmForSequenceClassification,
    HiResLmmModel,
)
from .processing.image_processing_hires_lmm import HiResLmmImageProcessor
from .processing.processing_hires_lmm import HiResLmmProcessor


__version__ = "0.1.0.dev0"

AutoConfig.register("hires_lmm", HiResLmmConfig, exist_ok=True)
AutoModel.register(HiResLmmConfig, HiResLmmModel, exist_ok=True)
AutoModelForImageTextToText.register(HiResLmmConfig, HiResLmmForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(HiResLmmConfig, HiResLmmForConditionalGeneration, exist_ok=True)
AutoModelForSequenceClassification.register(HiResLmmConfig, HiResLmmForSequenceClassification, exist_ok=True)
AutoImageProcessor.register(HiResLmmConfig, image_processor_classes={"pil": HiResLmmImageProcessor}, exist_ok=True)
AutoProcessor.register(HiResLmmConfig, HiResLmmProcessor, exist_ok=True)

HiResLmmConfig.register_for_auto_class("AutoConfig")
HiResLmmModel.register_for_auto_class("AutoModel")
HiResLmmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
HiResLmmForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
HiResLmmImageProcessor.register_for_auto_class("AutoImageProcessor")
HiResLmmProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "PRESETS",
    "HiResLmmConfig",
    "HiResLmmConnectorConfig",
    "HiResLmmForConditionalGeneration",
    "HiResLmmForSequenceClassification",
    "HiResLmmImageProcessor",
    "HiResLmmModel",
    "HiResLmmProcessor",
]
