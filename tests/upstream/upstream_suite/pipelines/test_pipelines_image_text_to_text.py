"""Why: the checks of the pipeline mixin are not distributed. Text with images, a chat, and the prompt cut off."""

import torch
from transformers import pipeline

from builders.tiny import random_image


CHAT = [
    {"role": "user", "content": [{"type": "image", "image": random_image(90, 130)}, {"type": "text", "text": "What?"}]}
]


class ImageTextToTextPipelineTests:
    """What the mixin asks for: a pipeline with examples, and checks of it."""

    def get_test_pipeline(self, model, tokenizer=None, processor=None, image_processor=None, dtype="float32"):
        """The pipeline and examples of its input."""
        model.generation_config.max_new_tokens = 4
        pipe = pipeline("image-text-to-text", model=model.to(getattr(torch, dtype)), processor=processor)
        return pipe, [{"images": random_image(50, 60, seed), "text": "a <image> b"} for seed in range(2)]

    def run_pipeline_test(self, pipe, examples):
        """Results have the right form, and an answer alone is the rest of the whole text."""
        answers = pipe(text=CHAT, return_full_text=False)
        whole = pipe(text=CHAT)
        assert whole[0]["generated_text"][-1] == {"role": "assistant", "content": answers[0]["generated_text"]}
        texts = [example["text"] for example in examples]
        images = [example["images"] for example in examples]
        together = pipe(text=texts, images=images, batch_size=2)
        assert [len(own) for own in together] == [1, 1] or len(together) == 2
        alone = pipe(text=texts[0], images=images[0])
        assert alone[0]["generated_text"].startswith("a ")
