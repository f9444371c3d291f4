"""Messages before and behind chat templates: None means absent, and what a user writes stays text."""

import pytest
import torch

from builders.chat import fusion_setup
from builders.images import picture
from builders.text import tiny_tokenizer
from builders.tiny import make_batch, random_image, tiny_processor
from builders.training import slime_config
from hires_lmm.conversion.fusion_template import LLAMA2_VISION
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from hires_lmm.processing.image_processing_hires_lmm import HiResLmmImageProcessor
from hires_lmm.processing.messages_hires_lmm import MARK, QUERY_TOKEN
from hires_lmm.processing.processing_hires_lmm import HiResLmmProcessor
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.data.conversations import attach_images


FOREIGN = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>' + '\n' }}{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEMPLATES = {**CHAT_TEMPLATES, "llama2_vision": LLAMA2_VISION, "foreign": FOREIGN}
IMAGE = {"type": "image", "image": picture(20, 50)}
IDS = {"tokenize": True, "return_dict": True}


def small(template: str = "chatml") -> HiResLmmProcessor:
    image_processor = HiResLmmImageProcessor(planner="llava_next", view_size=28, patch_size=14)
    return HiResLmmProcessor(image_processor, tiny_tokenizer(), TEMPLATES.get(template, template))


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def answer(words: str) -> dict:
    return {"role": "assistant", "content": [text(words)]}


def with_nones(value):
    """What a columnar dataset makes of a value: every key that occurs somewhere occurs everywhere."""
    if isinstance(value, dict):
        keys = ("role", "content", "tool_calls") if "role" in value else ("type", "text", "image", "url", "image_url")
        return {key: with_nones(value[key]) if key in value else None for key in keys}
    return [with_nones(own) for own in value] if isinstance(value, list) else value


CHAT = [
    {"role": "system", "content": [text("Be kind.")]},
    user(IMAGE, IMAGE, text("Which?")),
    answer("The left."),
    user(text("Sure?")),
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_none_means_absent_under_every_template(name):
    processor = small(name)
    wanted = processor.apply_chat_template(CHAT, **IDS)
    rows = with_nones(CHAT)
    rows[1]["content"] = [None, *rows[1]["content"], {"type": "text", "text": None}, dict.fromkeys(rows[1])]
    found = processor.apply_chat_template([*rows, None], **IDS)
    assert found["input_ids"] == wanted["input_ids"]
    assert (found["pixel_values"] == wanted["pixel_values"]).all()
    batch = processor.apply_chat_template([rows, rows], tokenize=False)
    assert batch == [processor.apply_chat_template(CHAT, tokenize=False)] * 2


def test_rows_of_a_dataset_give_the_prompt_of_the_messages(tmp_path):
    """Through Arrow a picture becomes a dict of bytes and path."""
    datasets = pytest.importorskip("datasets")
    picture(20, 50).save(tmp_path / "a.png")
    by_path = {"type": "image", "path": str(tmp_path / "a.png")}
    row = [user(IMAGE, by_path, text("Which?")), answer("Both.")]
    stored = datasets.Dataset.from_list([{"messages": row}])[0]["messages"]
    assert set(stored[0]["content"][2]) == {"type", "image", "path", "text"}
    processor = small()
    wanted, found = (processor.apply_chat_template(messages, **IDS) for messages in (row, stored))
    assert found["input_ids"] == wanted["input_ids"]
    assert (found["pixel_values"] == wanted["pixel_values"]).all()


def test_the_collator_reads_rows_with_nones():
    processor = tiny_processor(slime_config(), "chatml")
    picture, row = random_image(60, 80), [user({"type": "image"}, text("What?")), answer("A lake.")]
    wanted = HiResLmmCollator(processor)([{"messages": row, "images": [picture]}])
    given = {"messages": [*with_nones(row), None], "images": [None, picture], "image": None, "max_image_tokens": None}
    found = HiResLmmCollator(processor)([given])
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert attach_images(with_nones([user(text("Hi"))]), [None]) == [user(text("Hi"))]


# ---- text stays text

QUOTES = [
    "what does the <image> tag do",
    "<image>",
    "<image><image> twice, and <query>",
    f"forged <{MARK}image> and {QUERY_TOKEN}",
]


def spoken(processor, ids) -> str:
    """The text of ids without the placeholders of real images."""
    tokenizer = processor.tokenizer
    kept = [int(number) for number in ids if number not in (processor.image_token_id, tokenizer.pad_token_id)]
    return tokenizer.decode(kept)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("words", QUOTES)
def test_a_text_part_stays_text_under_every_template(name, words):
    """The ids are those of the image and of the text as it is written, rendered before or in one go."""
    processor = small(name)
    chat = [user(IMAGE, text(words)), answer(words), user(text(words))]
    plain = processor.apply_chat_template([user(IMAGE, text("~")), answer("~"), user(text("~"))], **IDS)
    found = processor.apply_chat_template(chat, **IDS)["input_ids"][0]
    assert found.count(3) == plain["input_ids"][0].count(3) == processor.image_tokens(20, 50)
    wanted = spoken(processor, plain["input_ids"][0]).replace("~", words.replace(MARK, ""))
    assert spoken(processor, found) == wanted
    rendered = processor.apply_chat_template(chat, tokenize=False)
    adds = not rendered.startswith("<s>")
    assert processor(text=rendered, images=IMAGE["image"], add_special_tokens=adds)["input_ids"][0] == found


@pytest.mark.parametrize("kind", [None, "pt", "np"])
@pytest.mark.parametrize("options", [{"padding": True}, {"padding": "max_length", "max_length": 160}])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_keep_their_length(kind, options, side):
    """The row with quotes is the longest of its batch until its marks go."""
    processor = small()
    chats = [[user(IMAGE, text("x <image> " * 5))], [user(text("short"))]]
    options = {**options, "padding_side": side, "return_special_tokens_mask": True, "return_offsets_mapping": True}
    found = processor.apply_chat_template(chats, return_tensors=kind, processor_kwargs=options, **IDS)
    lengths = {len(row) for row in (*found["input_ids"], *found["attention_mask"], *found["offset_mapping"])}
    assert len(lengths) == 1 and (lengths == {160}) == ("max_length" in options)
    alone = [processor.apply_chat_template(chat, **IDS)["input_ids"][0] for chat in chats]
    rows = zip(found["input_ids"], found["attention_mask"], found["special_tokens_mask"], alone, strict=True)
    for ids, mask, special, wanted in rows:
        ids, mask = [int(number) for number in ids], [int(number) for number in mask]
        assert [number for number, seen in zip(ids, mask, strict=True) if seen] == wanted
        assert mask == sorted(mask, reverse=side == "right")
        assert all(is_special or seen for is_special, seen in zip(special, mask, strict=True))
        assert all(number == 2 for number, seen in zip(ids, mask, strict=True) if not seen)


@pytest.mark.parametrize("template", ["chatml", "vicuna", "llama3", "plain"])
def test_answers_that_quote_are_learned_whole(template):
    processor = tiny_processor(slime_config(), template)
    row = {"messages": [user({"type": "image", "image": random_image(60, 80)}, text("Is <image> a tag?"))]}
    row["messages"].append(answer("Yes, <image> and <query> are."))
    batch = HiResLmmCollator(processor)([row])
    learned = batch["labels"][0][batch["labels"][0] != -100]
    assert processor.tokenizer.decode(learned).strip(" </s>|imend_o").startswith("Yes, <image> and <query> are.")
    assert (batch["input_ids"] == 3).sum() == batch["view_positions"][0, 5]


def test_tools_and_documents_stay_text():
    template = "{{ documents[0]['text'] }}{{ tools[0]['name'] }}{{ messages[0]['content'][0]['text'] }}"
    shown = small(template).apply_chat_template(
        [user(text("<image>"))], tools=[{"name": "<image>"}], documents=[{"text": "<image>"}], tokenize=False
    )
    assert shown == f"<{MARK}image>" * 3
    assert small(template).tokenizer.decode(small(template)(text=shown)["input_ids"][0]) == "<image>" * 3


def test_a_string_content_still_places_images():
    """As in LLaVA's data; what does not fit says where a text stays text."""
    processor = small()
    chat = [{"role": "user", "content": "<image>\nWhat?"}]
    ids = processor(text=processor.apply_chat_template(chat), images=IMAGE["image"])["input_ids"][0]
    assert ids.count(3) == processor.image_tokens(20, 50)
    with pytest.raises(ValueError, match=r"2 <image> placeholders, but 1 images .*in a text part a text"):
        processor(text="<image><image>", images=IMAGE["image"])


@pytest.mark.parametrize("kind", ["llama", "unigram", "words"])
def test_marks_leave_the_ids_of_other_tokenizers(kind):
    """Byte fallback, unknown tokens for what is not in the vocabulary, and words; `<` may be unknown with its mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    corpus, quiet = ["what does the image tag do, <image> is it > < ?"] * 3, {"show_progress": False}
    if kind == "llama":
        backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        bytes_ = [f"<0x{number:02X}>" for number in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", "<pad>", *bytes_], **quiet)
    elif kind == "unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=["<unk>", "<pad>"], unk_token="<unk>", **quiet)
    else:
        backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "<pad>"], **quiet)
    backend.train_from_iterator(corpus, trainer)
    backend.decoder = decoders.Metaspace() if kind != "words" else decoders.WordPiece()
    backend.add_special_tokens(["<image>"])
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "extra_special_tokens": {"image_token": "<image>"}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    template = "{{ messages[0]['content'][0]['text'] }}"
    processor = HiResLmmProcessor(HiResLmmImageProcessor(), tokenizer, template)
    ids = processor.apply_chat_template([user(text("what is the <image> tag"))], **IDS)["input_ids"][0]
    tokens = [token.strip("▁") for token in tokenizer.convert_ids_to_tokens(ids)]
    wanted = {"words": "whatisthe<unk>image>tag"}.get(kind, "whatisthe<image>tag")
    assert "".join(tokens) == wanted and processor.image_token_id not in ids


# ---- later turns of fusion


def test_a_query_in_a_text_is_no_later_turn():
    """Not in a chat, not in a plain text, and not in a later turn that has placeholders of its own."""
    _, processor = fusion_setup()
    picture, image = random_image(60, 60), {"type": "image", "image": random_image(60, 60)}

    def runs(words, later):
        chat = [user(image, text(words)), answer("yes"), {"role": "user", "content": later}]
        return processor.apply_chat_template(chat, **IDS)["input_ids"][0]

    for later in ("and <query> now", [text("and <query> now")], f"and {QUERY_TOKEN} now"):
        ids = runs("what does <query> do", later)
        assert ids.count(3) == runs("what", "and now").count(3) == 12 + 3
        assert "what does <query> do" in spoken(processor, ids) and "and <query> now" in spoken(processor, ids)
    plain = make_batch(processor, [("<image> what does <query> do", [picture])])
    assert (plain["input_ids"] == 3).sum() == 12 and "<query> do" in spoken(processor, plain["input_ids"][0])


def test_questions_in_another_vocabulary_are_the_words_of_the_parts():
    _, processor = fusion_setup()
    tokenizer = tiny_tokenizer()
    chat = [user(IMAGE, text("is <image> a tag")), answer("yes"), {"role": "user", "content": None}]
    table = processor.question_ids(with_nones(chat), tokenizer)
    assert tokenizer.decode(table[0, 0]) == tokenizer.decode(tokenizer("is <image> a tag")["input_ids"])
    assert (table[0, 1] == -1).all()


# ---- options that change the rows


def test_overflowing_rows_are_for_texts_alone():
    processor, options = (
        small(),
        {"truncation": True, "max_length": 20, "stride": 2, "return_overflowing_tokens": True},
    )
    rows = processor(text=["w " * 50, "short"], **options)
    assert rows["overflow_to_sample_mapping"] == [0] * (len(rows["input_ids"]) - 1) + [1]
    assert max(map(len, rows["input_ids"])) == 20
    with pytest.raises(ValueError, match=r"return_overflowing_tokens=True .*texts without images"):
        processor(text="<image> " + "w " * 50, images=IMAGE["image"], **{**options, "max_length": 40})
    with pytest.raises(ValueError, match="is_split_into_words=True"):
        processor(text=["two", "words"], is_split_into_words=True)


def test_videos_of_a_row_get_their_places():
    clip, picture_ = ["a.jpg", "b.jpg"], "c.jpg"
    row = [{"role": "user", "content": "<video>\n<image> what?"}]
    (message,) = attach_images(row, [picture_], [clip])
    kinds = [{key: part[key] for key in part if key in ("video", "image")} for part in message["content"]]
    assert [each for each in kinds if each] == [{"video": clip}, {"image": picture_}]
    assert attach_images([user(text("<video>"))])[0]["content"][0]["text"] == "<video>"  # a text without videos
    with pytest.raises(ValueError, match=r"1 places for videos .* but 2 videos"):
        attach_images([{"role": "user", "content": "<video> what?"}], None, ["a.mp4", "b.mp4"])
