"""Conversations of several turns about one image, for the preset `fusion`."""

import functools

import torch

from builders.tiny import GEOMETRY, make_batch, tiny_config, tiny_model, tiny_processor
from hires_lmm.modeling.compat_hires_lmm import CACHE


QUESTIONS = ("what is red here", "and what is blue", "how many are there")
OTHER = ("how many are there", "what is red here", "and what is blue")
ANSWERS = ("a box", "the sky")


@functools.cache
def fusion_setup():
    """Model and processor of the preset `fusion` over a tiny tower and language model; shared, so do not change it."""
    from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids

    config = tiny_config("fusion")
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    config.question_prefix_ids = question_prefix_ids(processor)
    return tiny_model(config), processor


def chat(turns: int, questions=QUESTIONS) -> list[dict]:
    """A conversation of some user turns, the last one without an answer."""
    messages = []
    for number in range(turns):
        content = [{"type": "text", "text": questions[number]}]
        messages.append({"role": "user", "content": [{"type": "image"}] * (number == 0) + content})
        if number + 1 < turns:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": ANSWERS[number]}]})
    return messages


def inputs_of(processor, turns: int, image, questions=QUESTIONS, **kwargs):
    """Tensors of one conversation."""
    text = processor.apply_chat_template(chat(turns, questions), add_generation_prompt=True)
    return make_batch(processor, [(text, [image])], **kwargs)


def runs_of(processor, ids) -> list[int]:
    """Lengths of the runs of placeholders."""
    from hires_lmm.modeling.blocks_hires_lmm import find_runs

    return [stop - start for start, stop in find_runs((ids == processor.image_token_id).tolist())]


@torch.no_grad()
def logits_of(model, batch, **kwargs):
    """Logits of a call."""
    return model(**batch, **kwargs).logits


@torch.no_grad()
def features_of(model, batch):
    """Image features of a batch."""
    return model.get_image_features(**{name: batch[name] for name in GEOMETRY}, return_dict=True)


def blocks_of(model, batch) -> list:
    """The blocks of a batch of one conversation, with the ids of their questions."""
    with torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
    return cache.conversation.records["fusion"].rows[0].blocks


def read_lengths(model) -> tuple[list, object]:
    """Rows and positions of all that the fusion transformer reads from now on, and the handle that ends it."""
    shapes = []
    handle = model.model.connector.token_ops[0].model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    return shapes, handle


@torch.no_grad()
def go_on(model, whole, begin, cache, features):
    """The positions of a conversation from `begin` on, after a language model cache."""
    return model(
        input_ids=whole["input_ids"][:, begin:],
        attention_mask=torch.ones_like(whole["input_ids"]),
        cache=cache,
        mm_encoder_outputs={"image": features},
        use_cache=True,
    )


def text_only(batch) -> dict:
    """What is left of a batch without its views."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
