"""Tiny configurations and batches of the presets, and what all our test classes share."""

import copy
from contextlib import contextmanager
from functools import cache

from builders.tiny import make_batch, random_image, tiny_config, tiny_processor, tiny_text_config, tiny_vision_config
from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration
from reference_routing import SMALL_CONNECTORS


QUESTIONS = ("What is in the picture?", "How many cats are on the table?", "Describe the image.")


@cache
def _example(preset: str) -> tuple[HiResLmmConfig, dict]:
    config = tiny_config(
        preset,
        vision=tiny_vision_config("clip", layers=2),
        text=tiny_text_config("llama"),
        connector_config=SMALL_CONNECTORS.get(preset, {}),
    )
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = config.question_prefix_ids = None  # embeddings cannot be searched for them
    samples = []
    for seed, question in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        samples.append((text, [random_image(90, 130, seed)]))
    batch = dict(make_batch(processor, samples))
    return config, {**batch, "prompt_mask": batch["attention_mask"].bool()}


def example(preset: str) -> tuple[HiResLmmConfig, dict]:
    """A new tiny configuration of a preset and a new batch of three questions, each about an image with crops."""
    return copy.deepcopy(_example(preset))


class Suite:
    """The preset of a test class; and a skip within a part of a test counts as a skip of the test."""

    preset: str

    @contextmanager
    def subTest(self, *args: object, **kwargs: object):
        yield


class ModelTester:
    """What the mixins ask about the model: sizes, a configuration, inputs."""

    is_training = True
    causal_lm_class = conditional_generation_class = HiResLmmForConditionalGeneration

    def __init__(self, preset: str):
        self.preset = preset
        config, inputs = example(preset)
        self.batch_size, self.seq_length = inputs["input_ids"].shape
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads

    def get_config(self) -> HiResLmmConfig:
        """A new configuration; tests for text models read the size of the vocabulary from it."""
        config = example(self.preset)[0]
        config.vocab_size = config.text_config.vocab_size
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[HiResLmmConfig, dict]:
        """A new configuration and new inputs."""
        return example(self.preset)
