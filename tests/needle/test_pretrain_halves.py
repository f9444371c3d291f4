"""The pieces of plan `pretrain_halves`: schedule, resuming, tokenizer, packed text, labelled views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids
from needle.halves.files import load_halves
from needle.halves.loop import LoopOptions, learning_rate, run_loop
from needle.halves.text import (
    FOCUS_KINDS,
    NO_WORD,
    TextPlan,
    answer_logits,
    build_batch,
    sample_row,
    text_config,
    training_rows,
)
from needle.halves.tokenizer import build_tokenizer
from needle.halves.vision import HEADS, VisionHalf, VisionPlan, normalise, placement_at, vision_config
from needle.questions import FINE_KINDS
from needle.scenes import NeedleOptions


# ---- the loop


def make_step_loss(model: nn.Module, fail_at: int | None = None):
    def step_loss(step: int):
        if step == fail_at:
            raise KeyboardInterrupt
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (model(inputs) - inputs.sum(1, keepdim=True)).pow(2).mean(), {"step_number": step}

    return step_loss


def fresh_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(tmp_path: Path):
    options = LoopOptions(steps=12, peak_rate=1e-2, warmup=3, save_every=4)
    whole, cut = fresh_model(), fresh_model()
    run_loop("whole", whole, make_step_loss(whole), options, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_loop("cut", cut, make_step_loss(cut, fail_at=6), options, tmp_path / "cut")
    resumed = fresh_model()
    clock = run_loop("cut", resumed, make_step_loss(resumed), options, tmp_path / "cut")
    assert clock.wall > 0
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = (tmp_path / "cut" / "log.jsonl").read_text().splitlines()
    assert len(lines) == 3


def test_the_rate_rises_stays_and_falls():
    options = LoopOptions(steps=1000, peak_rate=1.0, warmup=100, decay_share=0.2)
    rates = [learning_rate(step, options) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99] == rates[799] == 1.0
    assert rates[900] == pytest.approx(0.5) and rates[-1] == pytest.approx(0.01, abs=0.005)
    longer = LoopOptions(steps=2000, peak_rate=1.0, warmup=100, decay_share=0.2)
    assert all(learning_rate(step, longer) == rates[step] for step in range(800))


# ---- the tokenizer


def test_every_question_and_answer_is_made_of_known_words():
    tokenizer = build_tokenizer()
    for index in range(40):
        row = sample_row(str(index), "train", NeedleOptions(), 16)
        for question in row.questions:
            ids = tokenizer(f"{question.text} {question.answer}")["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert len(ids) == len(f"{question.text} {question.answer}".split())
            assert tokenizer.decode(tokenizer(question.answer)["input_ids"]) == question.answer


def test_unknown_words_do_not_crash():
    tokenizer = build_tokenizer()
    ids = tokenizer("Which ZEBRA is the red one, émigré 7?")["input_ids"]
    assert ids.count(tokenizer.unk_token_id) == 3
    assert tokenizer.convert_tokens_to_ids("<image>") == 4
    assert tokenizer("<image><image>")["input_ids"] == [4, 4]


def test_the_chat_template_opens_answers_with_known_ids():
    tokenizer = build_tokenizer()
    names = tokenizer.convert_ids_to_tokens(answer_prefix_ids(tokenizer))
    assert names == ["<|im_start|>", "assistant"]
    assert tokenizer.convert_ids_to_tokens(question_prefix_ids(tokenizer)) == ["<|im_start|>", "user"]


# ---- packed text


def test_packed_text_is_what_the_chat_template_writes():
    tokenizer = build_tokenizer()
    row = sample_row("3", "train", NeedleOptions(), 3)
    batch = build_batch([row], tokenizer)
    for number, question in enumerate(row.questions, start=1):
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question.text}]},
            {"role": "assistant", "content": question.answer},
        ]
        expected = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
        mine = batch.words[0, (batch.question[0] == 0) | (batch.question[0] == number), 0].tolist()
        scene = len(row.slots)
        assert [*mine[:2], 4, *mine[2 + scene :], tokenizer.eos_token_id] == expected
        labels = batch.labels[0, batch.question[0] == number]
        assert tokenizer.decode(labels[labels != -100]) == f"{question.answer} <|im_end|>"


def test_packed_questions_do_not_see_each_other():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(text_config(tokenizer)).eval()
    row = sample_row("5", "train", NeedleOptions(), 4)
    together, _ = answer_logits(model, build_batch([row], tokenizer))
    rows = [type(row)(row.slots, row.positions, [question]) for question in row.questions]
    apart, _ = answer_logits(model, build_batch(rows, tokenizer))
    assert torch.allclose(together, apart, atol=1e-4)


def test_rows_depend_on_seed_and_step_alone():
    plan = TextPlan(scenes=3)
    assert training_rows(0, 7, plan) == training_rows(0, 7, plan)
    assert training_rows(0, 7, plan) != training_rows(1, 7, plan)
    assert all(len(set(row.slots)) >= 2 for row in training_rows(0, 7, plan))


def test_the_focus_asks_for_values_and_their_colours_only():
    rows = training_rows(0, 1700, TextPlan(focus=(1700, 1701)))
    assert {question.kind for row in rows for question in row.questions} <= set(FOCUS_KINDS)
    after = training_rows(0, 1701, TextPlan(focus=(1700, 1701)))
    assert {question.kind for row in after for question in row.questions} - set(FOCUS_KINDS)


def test_global_only_texts_are_not_asked_about_detail():
    tokenizer = build_tokenizer()
    rows = [sample_row(str(index), "train", NeedleOptions(), 16) for index in range(40)]
    batch = build_batch(rows, tokenizer)
    assert batch.words.max() < len(tokenizer) and batch.words.min() == NO_WORD
    digits = set("0123456789")
    for row in rows:
        if not any(set(slot) & digits for slot in row.slots):  # no value in the text
            assert not any(question.kind == "read_digit" for question in row.questions)
    assert any(question.kind in FINE_KINDS for row in rows for question in row.questions)


# ---- views


def test_the_curriculum_goes_from_the_lattice_to_anywhere():
    plan = VisionPlan(steps=100, aligned=10, jittered=14)
    assert placement_at(9, plan) == ("aligned", 0)
    assert [placement_at(step, plan)[1] for step in (10, 16, 23)] == [1, 4, 7]
    assert placement_at(24, plan) == ("free", 0)


def test_the_tower_reads_views_patch_by_patch():
    half = VisionHalf(vision_config()).eval()
    views = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    logits = half(normalise(views))
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        name: (2, size) if name == "count" else (2, 64, size) for name, size in HEADS.items()
    }


def test_a_folder_without_halves_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="pretrain_halves --out"):
        load_halves(tmp_path)
