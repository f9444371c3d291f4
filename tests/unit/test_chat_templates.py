"""Chat templates: the exact texts, generation marks through image expansion, ids that open questions and answers."""

import pytest
from jinja2.exceptions import TemplateError

from builders.images import picture
from builders.text import tiny_tokenizer
from hires_lmm.processing.chat_templates_hires_lmm import (
    CHAT_TEMPLATES,
    VICUNA_SYSTEM,
    answer_prefix_ids,
    question_prefix_ids,
)
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor


CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
TEXTS = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "vicuna": "<s>Be kind. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT: Yes.</s>",
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n"
    "<|im_start|>assistant\nYes.<|im_end|>\n",
    "plain": "<s>Be kind.\n<image>\nWhat is it?\nA cat.</s>Sure?\nYes.</s>",
}
PROMPT_ENDS = {
    "llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna": " ASSISTANT:",
    "chatml": "<|im_start|>assistant\n",
    "plain": "",
}
ANSWERS = {
    "llama3": "A cat.<|eot_id|>Yes.<|eot_id|>",
    "vicuna": " A cat.</s> Yes.</s>",
    "chatml": "A cat.<|im_end|>Yes.<|im_end|>",
    "plain": "A cat.</s>Yes.</s>",
}


def render(name, messages, **kwargs) -> str:
    return tiny_tokenizer(name).apply_chat_template(messages, tokenize=False, **kwargs)


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_exact_text(name):
    assert render(name, CHAT) == TEXTS[name]
    before = render(name, CHAT[:2])
    assert TEXTS[name].startswith(before)
    assert render(name, CHAT[:2], add_generation_prompt=True) == before + PROMPT_ENDS[name]


def test_system_prompts():
    question = [{"role": "user", "content": "x"}]
    assert render("vicuna", question) == f"<s>{VICUNA_SYSTEM} USER: x"
    assert render("vicuna", [{"role": "system", "content": ""}, *question]) == "<s>USER: x"
    assert render("llama3", question).startswith("<s><|start_header_id|>user")
    assert render("chatml", question).startswith("<|im_start|>user")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_image_parts(name):
    def text_of(content):
        return render(name, [{"role": "user", "content": content}])

    image, text = {"type": "image"}, {"type": "text", "text": "Q"}
    assert "<image>\n<image>\nQ" in text_of([image, image, text])
    assert "Q<image>" in text_of([text, image]) and "Q<image>\n" not in text_of([text, image]).replace(
        "<|im_end|>\n", ""
    )
    assert "<image>\nQ" in text_of([image, {"type": "text", "text": "\nQ"}])
    assert text_of([image, text]) == text_of("<image>\nQ")


def test_plain_is_image_then_caption():
    chat = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A lake."}]
    assert render("plain", chat) == "<s><image>A lake.</s>"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_unknown_roles_and_parts_are_errors(name):
    with pytest.raises(TemplateError, match="not tool"):
        render(name, [{"role": "tool", "content": "x"}])
    with pytest.raises(TemplateError, match="not audio"):
        render(name, [{"role": "user", "content": [{"type": "audio"}]}])


def processor(name) -> HiResLmmProcessor:
    image_processor = HiResLmmImageProcessor(planner="llava_next", view_size=28, patch_size=14)
    return HiResLmmProcessor(image_processor, tiny_tokenizer(name))


def with_image(chat):
    image = {"type": "image", "image": picture(20, 50)}
    return [
        {**message, "content": [image, *message["content"][1:]] if index == 1 else message["content"]}
        for index, message in enumerate(chat)
    ]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_assistant_mask_through_image_expansion(name, padding_side):
    """Two conversations of unequal length; the mask marks the answers and the token that ends each of them."""
    expanding = processor(name)
    batch = expanding.apply_chat_template(
        [with_image(CHAT), [CHAT[0], *CHAT[3:]]],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    assert (batch["input_ids"] == expanding.image_token_id).sum(1).tolist() == [batch["view_positions"][0, 5], 0]
    assert batch["view_positions"][0, 5] > 5
    marked = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["assistant_masks"], strict=True)]
    assert expanding.tokenizer.decode(marked[0]) == ANSWERS[name]
    assert expanding.tokenizer.decode(marked[1]) == ANSWERS[name].split(".", 1)[1].split(">", 1)[1]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_processor_adds_no_second_bos(name):
    ids = processor(name).apply_chat_template(with_image(CHAT), tokenize=True, return_dict=True)["input_ids"][0]
    bos = tiny_tokenizer().bos_token_id
    assert ids.count(bos) == (name != "chatml")


EXPECTED_OPENINGS = {
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n"),
    "vicuna": (" ASSISTANT:", "USER:"),
    "chatml": ("<|im_start|>assistant\n", "<|im_start|>user\n"),
    "plain": ("", ""),
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_opening_ids(name):
    tokenizer = tiny_tokenizer(name)
    answer, question = answer_prefix_ids(tokenizer), question_prefix_ids(tokenizer)
    assert (tokenizer.decode(answer), tokenizer.decode(question)) == EXPECTED_OPENINGS[name]
    assert answer_prefix_ids(processor(name)) == answer and question_prefix_ids(processor(name)) == question


def find(ids: list[int], run: list[int]) -> list[int]:
    return [start for start in range(len(ids)) if ids[start : start + len(run)] == run]


@pytest.mark.parametrize("name", ["llama3", "vicuna", "chatml"])
def test_opening_ids_are_found_in_conversations(name):
    """Each answer once, the second question once, whatever the texts around them."""
    tokenizer = tiny_tokenizer(name)
    answer, question = answer_prefix_ids(tokenizer), question_prefix_ids(tokenizer)
    for texts in [("x", "y", "z", "w"), ("Is it?\n", "\nNo", " 7", "!"), ("<image>", "USER", "ASSISTANT", "1.")]:
        roles = ["user", "assistant", "user", "assistant"]
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
        assert len(find(ids, answer)) == 2
        second = find(ids, question)[-1]
        assert find(ids, answer)[0] < second < find(ids, answer)[1]


def test_openings_of_a_tokenizer_that_merges_line_breaks():
    """A line break that a tokenizer merges with the answer's own is left out of the opening."""
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer("chatml")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    assert tokenizer.decode(answer_prefix_ids(tokenizer)) == "<|im_start|>assistant"
