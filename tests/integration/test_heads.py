"""Heads on hidden states at a token, with the decoder of numbers that OneChart has."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from builders import make_batch, random_image, tiny_config, tiny_model, tiny_processor, tiny_text_config
from builders.training import conversation
from hires_lmm import HiResLmmForConditionalGeneration
from hires_lmm.conversion.cards import write_card
from hires_lmm.training import HiResLmmCollator
from hires_lmm.training.columns import BatchColumn


NUMBER = 7
"""Id of the token, which the texts below hold nowhere."""


def build(preset="llava_next", width=32, slots=6, weight=1.0, **connector):
    heads = {"numbers": {"part": "number_decoder", "token_id": NUMBER, "slots": slots, "weight": weight}}
    text = tiny_text_config("llama", hidden_size=width)
    config = tiny_config(preset, text=text, connector_config={"heads": heads, **connector})
    return tiny_model(config), tiny_processor(config)


def ask(processor, *sizes, marks=None, text="<image>What is it?"):
    """A batch in which the given positions from the end of each row hold the token."""
    batch = make_batch(processor, [(text, [random_image(*size)]) for size in sizes])
    for row, places in enumerate(marks or [(2,)] * len(sizes)):
        for place in places:
            batch["input_ids"][row, -place] = NUMBER
    return batch


def padded(numbers, slots):
    """Numbers `(N, slots)`, NaN behind those of each row."""
    rows = [torch.tensor([*own, *[float("nan")] * (slots - len(own))]) for own in numbers]
    return torch.stack(rows)


def answer_labels(batch):
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    return labels


@pytest.mark.parametrize("preset", ["llava_next", "slime"])
@torch.no_grad()
def test_a_head_reads_the_state_at_each_token_in_reading_order(preset):
    """Also where visual tokens are dropped, and with padding in front of a row."""
    model, processor = build(preset)
    batch = ask(processor, (90, 60), (40, 200), marks=[(3, 1), (2,)])
    hidden = model.model(**batch).last_hidden_state
    wanted = torch.stack([hidden[0, -3], hidden[0, -1], hidden[1, -2]])
    found = model(**batch).heads["numbers"]
    torch.testing.assert_close(found, model.model.connector.heads["numbers"](wanted))
    single = [model(**ask(processor, size, marks=[mark])).heads["numbers"] for size, mark in
              (((90, 60), (3, 1)), ((40, 200), (2,)))]  # fmt: skip
    torch.testing.assert_close(found, torch.cat(single), atol=1e-4, rtol=1e-4)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    if preset == "llava_next":
        torch.testing.assert_close(model(inputs_embeds=embeds, **rest).heads["numbers"], found)


@torch.no_grad()
def test_what_was_generated_is_read_by_a_forward_pass_on_its_ids():
    model, processor = build()
    batch = ask(processor, (90, 60), marks=[()])
    plain = model.generate(**batch, max_new_tokens=5, do_sample=False)
    length = batch["input_ids"].shape[1]

    def force(ids, scores):
        here = ids.shape[1] == length + 1
        return scores.index_fill(1, torch.tensor([NUMBER]), 1e9) if here else scores

    output = model.generate(**batch, max_new_tokens=5, do_sample=False, logits_processor=[force])
    assert output[0, length + 1] == NUMBER and output[0, length] == plain[0, length]
    whole = {**batch, "input_ids": output, "attention_mask": torch.ones_like(output)}
    found = model(**whole)
    hidden = model.model(**whole).last_hidden_state[0, length + 1]
    torch.testing.assert_close(found.heads["numbers"][0], model.model.connector.heads["numbers"](hidden))


def forced(writes):
    """A logits processor that has each row write the token at one of its new positions."""
    start = []

    def force(ids, scores):
        start.append(ids.shape[1])
        chosen = torch.tensor([ids.shape[1] - start[0] == place for place in writes])
        others = torch.full_like(scores, -1e9).index_fill(1, torch.tensor([NUMBER]), 0.0)
        return torch.where(chosen[:, None], others, scores.index_fill(1, torch.tensor([NUMBER]), -1e9))

    return force


@pytest.mark.parametrize("preset", ["llava_next", "slime"])
@torch.no_grad()
def test_generate_tells_what_heads_read_while_it_wrote(preset):
    """Where each row wrote the token, and where its prompt holds it; as one call on the finished ids reads it."""
    model, processor = build(preset)
    sizes = ((90, 60), (40, 200), (60, 50))
    batch = ask(processor, *sizes, marks=[(), (2,), ()])
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    options |= {"logits_processor": [forced([0, 2, 4])], "output_heads": True}
    output = model.generate(**batch, **options)
    counts = [1, 2, 0]  # nothing reads the last token that is written
    assert [len(own) for own in output.heads["numbers"]] == counts
    length = batch["input_ids"].shape[1]
    assert [row[length:].tolist().count(NUMBER) for row in output.sequences] == [1, 1, 1]
    mask = torch.cat([batch["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=1)
    placed = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    prompt = torch.arange(length + 5).expand(3, -1) < length
    if preset == "slime":  # its router reads the prompt
        placed["prompt_mask"] = prompt & (output.sequences != model.config.image_token_id) & mask.bool()
    whole = model(input_ids=output.sequences, attention_mask=mask, **placed).heads["numbers"]
    torch.testing.assert_close(torch.cat(output.heads["numbers"]), whole[:-1], atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(**batch, **{**options, "logits_processor": [forced([0, 2, 4])],
                                                  "output_heads": None}).sequences, output.sequences)  # fmt: skip


def test_heads_are_not_read_where_tokens_may_be_taken_back():
    model, processor = build()
    batch = ask(processor, (90, 60))
    for options, message in (
        ({"num_beams": 2}, "num_beams=2.*reads tokens as they are written"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"assistant_model": model}, "assistant_model: output_heads=True"),
        ({"return_dict_in_generate": False}, "output_heads=True needs return_dict_in_generate=True"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(
                **batch, max_new_tokens=2, output_heads=True, **{"return_dict_in_generate": True, **options}
            )


@torch.no_grad()
def test_cached_steps_run_no_heads_unless_asked():
    model, processor = build()
    batch = ask(processor, (90, 60), marks=[(1,)])
    whole = model(**batch)
    first = {**batch, "input_ids": batch["input_ids"][:, :-1], "attention_mask": batch["attention_mask"][:, :-1]}
    start = model(**first, use_cache=True)
    assert start.heads["numbers"].shape == (0, 6)
    step = {"input_ids": batch["input_ids"][:, -1:], "attention_mask": batch["attention_mask"]}
    asked = model(**step, cache=start.cache if "cache" in start else start.past_key_values, output_heads=True)
    torch.testing.assert_close(asked.heads["numbers"], whole.heads["numbers"], atol=1e-4, rtol=1e-4)
    again = model(**first, use_cache=True)
    cache = again.cache if "cache" in again else again.past_key_values
    assert model(**step, cache=cache).heads is None and model(**batch, output_heads=False).heads is None


def test_every_batch_trains_the_head_and_constant_charts_count_nothing():
    model, processor = build()
    model.train()
    head = model.model.connector.heads["numbers"]
    for marks, numbers in (([()], None), ([(2,)], None), ([()], torch.zeros(0, 6)), ([(2,)], padded([[3.0, 3.0]], 6))):
        model.zero_grad()
        batch = ask(processor, (90, 60), marks=marks)
        outputs = model(**batch, labels=answer_labels(batch), labels_numbers=numbers)
        assert not outputs.aux["loss/numbers"].any() and torch.isfinite(outputs.loss)
        outputs.loss.backward()
        assert all(not parameter.grad.any() for parameter in head.parameters())
    assert model(**batch).loss is None
    outputs = model(**batch, labels_numbers=padded([[3.0, 5.0]], 6))
    torch.testing.assert_close(outputs.loss, outputs.aux["loss/numbers"])
    outputs.loss.backward()
    assert all(parameter.grad.any() for parameter in head.parameters())


def test_a_step_of_the_trainer_is_one_step_however_it_is_cut(tmp_path):
    """The loss of a head has the share of its batch in the answer tokens, as the language loss has."""
    model, processor = build(weight=0.5)
    batches = [ask(processor, (90, 60)), ask(processor, (40, 200))]
    numbers = [padded([[1.0, 4.0]], 6), padded([[2.0, 7.0, 3.0]], 6)]
    inputs = [{**batch, "labels": answer_labels(batch)} for batch in batches]
    inputs[1]["labels"][:, :-2] = -100
    losses = []
    for own, own_numbers in zip(inputs, numbers, strict=True):
        outputs = model(**own, labels_numbers=own_numbers)
        losses.append(outputs.loss.item())
    counts = [int((own["labels"][:, 1:] != -100).sum()) for own in inputs]
    wanted = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
    data = [{**own, "labels_numbers": each} for own, each in zip(inputs, numbers, strict=True)]
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=1,
        remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no",
    )  # fmt: skip
    model.train()
    trainer = Trainer(model, args, train_dataset=data, data_collator=lambda rows: rows[0])
    trainer.train()
    assert abs(trainer.state.log_history[0]["loss"] - wanted) < 1e-3


def test_a_saved_head_reads_the_same(tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path)
    again = HiResLmmForConditionalGeneration.from_pretrained(tmp_path)
    batch = ask(processor, (90, 60))
    assert again.config.connector_config.heads == model.config.connector_config.heads
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).heads["numbers"], model(**batch).heads["numbers"])


@pytest.mark.parametrize(
    "heads, message",
    [
        ({"numbers": {"part": "numbers"}}, "unknown part 'numbers'; known parts of this slot: number_decoder"),
        ({"numbers": {"part": "number_decoder"}}, "token_id"),
        ({"numbers": {"part": "number_decoder", "token_id": 10**6}}, "token_id=1000000 is no token"),
        ({"a.b": {"part": "number_decoder", "token_id": 1}}, "heads.a.b is no name for a head"),
        ({"keys": {"part": "number_decoder", "token_id": 1}}, "heads.keys is no name for a head"),
        ({"n": {"part": "number_decoder", "token_id": 1, "slot": 1}}, "Unknown option 'slot'"),
    ],
)
def test_wrong_heads_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(connector_config={"heads": heads})


def test_labels_of_another_number_of_tokens_are_refused():
    model, processor = build()
    batch = ask(processor, (90, 60))
    with pytest.raises(ValueError, match="labels_numbers has 2 rows, but the token 7 occurs 1 times"):
        model(**batch, labels_numbers=torch.zeros(2, 6))


class Numbers(BatchColumn):
    """The numbers of a conversation, one row each."""

    def encode(self, messages):
        text = messages[-1]["content"][0]["text"]
        return padded([[float(word) for word in text.split() if word.isdigit()]], 6) if text else None


def test_the_collator_brings_the_numbers_of_each_conversation():
    mark = tiny_processor(tiny_config(), "chatml").tokenizer("boat", add_special_tokens=False)["input_ids"]
    heads = {"numbers": {"part": "number_decoder", "token_id": mark[-1], "slots": 6}}
    config = tiny_config(connector_config={"heads": heads})
    model, processor = tiny_model(config).train(), tiny_processor(config, "chatml")
    data = [conversation(number) for number in (2, 5)]
    for sample, answer in zip(data, ("boat 3 9", "boat 4 7 5"), strict=True):
        sample["messages"][1]["content"] = answer
    batch = HiResLmmCollator(processor, columns=[Numbers("labels_numbers")])(data)
    assert (batch["input_ids"] == mark[-1]).sum(dim=1).tolist() == [1, 1]
    torch.testing.assert_close(batch["labels_numbers"], padded([[3.0, 9.0], [4.0, 7.0, 5.0]], 6), equal_nan=True)
    outputs = model(**batch)
    targets, read = torch.tensor([0.0, 1.0, 0.0, 1.0, 1 / 3]), outputs.heads["numbers"]
    wanted = (torch.cat([read[0, :2], read[1, :3]]) - targets).abs().mean()
    torch.testing.assert_close(outputs.aux["loss/numbers"], wanted)


def test_the_card_names_the_heads(tmp_path):
    model, processor = build()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    write_card(tmp_path, model.config, processor.image_processor, {"versions": {}})
    assert f"* heads: `{model.config.connector_config.heads}`\n" in (tmp_path / "README.md").read_text()


def test_labels_of_no_head_are_refused_by_name():
    model, processor = build()
    with pytest.raises(
        ValueError, match="labels_nunbers belongs to no head of this model; its heads read labels_numbers"
    ):
        model(**ask(processor, (90, 60)), labels_nunbers=torch.zeros(1, 6))
