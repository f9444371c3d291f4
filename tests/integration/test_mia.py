"""Preference data about several pictures: where an answer looked, what is rejected, and DPO on what is written."""

import math
from collections import Counter
from functools import partial, wraps
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids
from hires_lmm.training.data.composites import add_noise, grid_composite, make_composite
from hires_lmm.training.data.mia import (
    Answer,
    Filters,
    answer_with_attention,
    attention_share,
    build_pairs,
    edit_distance,
    find_pictures,
    visual_columns,
    write_pairs,
)


ROUTER = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.6}}
PRESETS = {
    "llava_next": {},
    "slime": {"view_ops": [{"part": "query_compressor", "on": "crops", "num_queries": 4}], "token_ops": [ROUTER]},
}


def setup(preset):
    config = tiny_config(preset, connector_config=PRESETS[preset])
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    return tiny_model(config), processor


def rows(number=4):
    return [
        {"image": random_image(60 + 20 * index, 90, seed=index), "question": "What is it?", "answer": f"thing {index}"}
        for index in range(number)
    ]


@pytest.mark.parametrize("kind", ["sequence", "grid", "inner"])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_answer_and_its_attention(preset, kind, monkeypatch):
    """Perplexity from a second run, the share from plain sums over the columns that hold no text."""
    model, processor = setup(preset)
    composite = make_composite(kind, [row["image"] for row in rows(2)])
    seen = {}
    forward = type(model).forward

    @wraps(forward)  # `generate` reads the signature
    def watch(*args, **inputs):
        if inputs.get("output_attentions"):
            inputs["output_hidden_states"] = True
        seen["ids"], seen["images"] = args[0] if args else None, inputs.get("mm_encoder_outputs")
        seen["outputs"] = forward(model, *args, **inputs)
        return seen["outputs"]

    monkeypatch.setattr(model, "forward", watch)
    found = answer_with_attention(
        model, processor, composite, "Which?", 1 if kind != "inner" else 0, layer=1, max_new_tokens=5
    )
    assert model.config.text_config._attn_implementation != "eager"
    ids, outputs = seen["ids"], seen["outputs"]
    assert found.text == processor.tokenizer.decode(ids[0, -5:], skip_special_tokens=True)
    logits = forward(model, ids, mm_encoder_outputs=seen["images"]).logits
    chosen = logits[0, -6:-1].log_softmax(-1).gather(-1, ids[0, -5:, None])
    assert found.perplexity == pytest.approx(math.exp(-chosen.mean().item()), rel=1e-4)

    attention, token_map = outputs.attentions[1], outputs.token_map
    columns = visual_columns(ids[0] == model.config.image_token_id, token_map.kept, attention.shape[-1])
    if preset == "slime":
        assert not token_map.kept.all()
    text = torch.ones(attention.shape[-1], dtype=torch.bool)
    text[columns] = False
    embeds = model.get_input_embeddings()(ids[0][ids[0] != model.config.image_token_id])
    torch.testing.assert_close(outputs.hidden_states[0][0, text], embeds)  # so the others are what images gave
    pictures = find_pictures(composite, token_map)[token_map.kept]
    mean = attention[0].mean(dim=0)[-5:].mean(dim=0)
    sums = Counter()
    for column, picture in zip(columns.tolist(), pictures.tolist(), strict=True):
        sums[picture] += mean[column].item()
    if kind == "sequence":
        numbers = Counter(pictures.tolist())
        means = {index: sums[index] / numbers[index] for index in (0, 1)}
        assert found.share == pytest.approx(means[1] / (means[0] + means[1]), rel=1e-4)
    else:
        assert found.share == pytest.approx(sums[1 if kind == "grid" else 0] / sum(sums.values()), rel=1e-4)


def test_a_token_shows_the_picture_under_its_middle():
    composite = grid_composite([Image.new("RGB", (448, 448)), Image.new("RGB", (448, 448))])
    boxes = [[40, 0, 100, 60], [60, 500, 80, 540], [0, 0, 30, 30], [200, 440, 210, 460], [math.nan] * 4]
    found = find_pictures(composite, SimpleNamespace(box=torch.tensor(boxes)))
    assert found.tolist() == [0, 1, -1, -1, -1]  # the label and the gap are of none
    inner = make_composite("inner", [Image.new("RGB", (50, 50)), Image.new("RGB", (100, 100))])
    boxes = torch.tensor([[48.0, 48.0, 52.0, 52.0], [0.0, 0.0, 4.0, 4.0]])
    assert find_pictures(inner, SimpleNamespace(box=boxes)).tolist() == [0, 1]


def test_shares_by_mean_do_not_count_tokens():
    attention, pictures = torch.tensor([1.0, 1.0, 1.0, 3.0, 5.0]), torch.tensor([0, 0, 0, 1, -1])
    assert attention_share(attention, pictures, 1, "mean") == pytest.approx(3 / 4)
    assert attention_share(attention, pictures, 1, "sum") == pytest.approx(3 / 11)
    with pytest.raises(ValueError, match="No visual token shows picture 2"):
        attention_share(attention, pictures, 2)


def test_a_layer_behind_which_tokens_left_is_refused():
    with pytest.raises(ValueError, match="The attention has 3 positions"):
        visual_columns(torch.tensor([True, True, False, False]), torch.tensor([True, True]), 3)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer("a cat", 0.3, 2.0), None),
        (Answer(" a dog ", 0.3, 2.0), "edits"),
        (Answer("a cat", 0.9, 2.0), "share"),
        (Answer("a cat", 0.3, 1.1), "perplexity"),
        (Answer("c" * 30, 0.3, 2.0), "characters"),
        (Answer("a cat and a dog", 0.3, 2.0), "length_ratio"),
    ],
)
def test_filters_name_what_they_leave_out(answer, reason):
    filters = Filters(characters=20, length_ratio=2.5)
    assert filters.reason(answer, "a dog", "grid", 5) == reason


def test_edit_distance_counts_characters():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"), ("ab", "ba"))] == [
        3, 3, 0, 2,
    ]  # fmt: skip


def test_the_asked_picture_is_noisy_only_while_the_model_answers():
    data, asked = rows(), []

    def answer(composite, question, number):
        asked.append((composite, number))
        return Answer("wrong", 0.1, 3.0)

    counts = Counter()
    found = list(build_pairs(data, answer, pictures=3, seed=3, counts=counts))
    assert counts == {"kept": 4} and [row["kind"] for row in found] == ["sequence", "grid", "inner", "sequence"]
    for row, (composite, number), source in zip(found, asked, data, strict=True):
        text = row["prompt"][0]["content"][-1]["text"]
        where = "the picture in the middle" if row["kind"] == "inner" else f"Image{number + 1}"
        assert text == f"\nIn {where}, what is it?"
        assert row["chosen"][0]["content"][0]["text"] == source["answer"]
        assert row["rejected"][0]["content"][0]["text"] == "wrong"
        if row["kind"] == "sequence":
            assert len(row["images"]) == 3 and row["images"][number] is source["image"]
            differ = [
                bool((np.asarray(a) != np.asarray(b)).any())
                for a, b in zip(composite.images, row["images"], strict=True)
            ]
            assert differ == [index == number for index in range(3)]
    assert list(build_pairs(data, lambda *_: Answer("x", 1.0, 3.0), counts=counts)) == []
    assert counts["share"] == 4
    again = [row["images"][0] for row in build_pairs(data, answer, pictures=3, seed=3)]
    assert all(np.array_equal(a, b["images"][0]) for a, b in zip(again, found, strict=True))


def test_noise_is_cut_at_black_and_white():
    grey = Image.new("RGB", (200, 200), (128, 128, 128))
    pixels = np.asarray(add_noise(grey, 20.0, seed=1), dtype=float)
    assert abs(pixels.mean() - 128) < 1 and abs(pixels.std() - 20) < 1
    assert abs(np.asarray(add_noise(Image.new("RGB", (200, 200)), 20.0)).mean() - 20 / math.sqrt(2 * math.pi)) < 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kinds": ["pile"]}, "pile"),
        ({"kinds": []}, r"kinds=\[\]"),
        ({"pictures": 9}, "9 pictures"),
        ({"pictures": 0}, "0 pictures"),
        ({"noise": -1.0}, "noise=-1.0"),
        ({"filters": Filters(shares={"grid": {2: 0.5}})}, "say nothing of inner, sequence"),
        ({"kinds": ["grid"], "pictures": 3}, ""),
    ],
)
def test_what_cannot_be_shown_is_refused(options, says):
    answer = lambda *_: Answer("x", 0.1, 3.0)  # noqa: E731
    if says:
        with pytest.raises(ValueError, match=says):
            list(build_pairs(rows(), answer, **options))
    else:
        assert len(list(build_pairs(rows(), answer, **options))) == 4
    with pytest.raises(ValueError, match="5 pictures make no grid"):
        grid_composite([Image.new("RGB", (9, 9))] * 5)
    with pytest.raises(ValueError, match="nothing to write"):
        write_pairs([], "nowhere")


def test_pictures_are_read_as_the_processor_reads_them(tmp_path):
    """Turned by EXIF, of 16 bit, with alpha, or a path: the same as the plain picture."""
    plain = Image.fromarray(np.arange(60 * 40, dtype=np.uint8).reshape(60, 40)).convert("RGB")
    exif = Image.Exif()
    exif[0x112] = 6
    plain.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    wide = Image.fromarray(np.asarray(plain.convert("L")).astype(np.uint16) * 257)
    clear = Image.new("RGBA", plain.size, (0, 0, 0, 0))
    white, turned = Image.new("RGB", plain.size, "white"), Image.open(tmp_path / "turned.png")
    for kind in ("grid", "inner"):
        for other, same in ((turned, plain), (wide, plain), (clear, white)):
            found, wanted = make_composite(kind, [other, other]), make_composite(kind, [same, same])
            assert found.boxes == wanted.boxes
            assert np.array_equal(*(np.asarray(each.images[0]) for each in (found, wanted)))
            assert np.array_equal(np.asarray(add_noise(other, 3.0)), np.asarray(add_noise(same, 3.0)))
    found, wanted = (
        list(build_pairs([{**row, "image": image} for row in rows()], lambda *_: Answer("x", 0.1, 3.0), noise=None))
        for image in (str(tmp_path / "turned.png"), plain)
    )
    for one, other in zip(found, wanted, strict=True):
        assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(one["images"], other["images"], strict=True))


@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_dpo_reads_what_is_written(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model, processor = setup("llava_next")
    model.save_pretrained(tmp_path / "model")
    answer = partial(answer_with_attention, model, processor, max_new_tokens=3)
    loose = Filters(shares={"sequence": {2: 1.0}, "grid": {2: 1.0}, "inner": {2: 1.0}}, perplexity=0.0)
    write_pairs(build_pairs(rows(), answer, filters=loose), tmp_path / "data")
    data = datasets.load_dataset(str(tmp_path / "data"), split="train", cache_dir=str(tmp_path / "cache"))
    assert data[0]["prompt"][0]["content"][1] == {"type": "image", "text": None}
    args = trl.DPOConfig(
        str(tmp_path / "out"), report_to=[], use_cpu=True, max_steps=2, per_device_train_batch_size=2, logging_steps=1,
        max_length=None, bf16=False, gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = type(model).from_pretrained(tmp_path / "model")
    trainer = trl.DPOTrainer(model, args=args, train_dataset=data, processing_class=processor)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert trainer.state.log_history[1]["loss"] != pytest.approx(math.log(2), abs=1e-6)
