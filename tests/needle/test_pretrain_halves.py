"""The pieces of plan `pretrain_halves`: schedule, resuming, tokenizer, packed text, labelled views."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids
from needle.halves.loop import LoopOptions, run_loop
from needle.halves.text import (
    answer_logits,
    build_batch,
    sample_row,
    text_config,
)
from needle.halves.tokenizer import build_tokenizer
from needle.halves.vision import HEADS, VisionHalf, normalise, vision_config
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


# ---- views


def test_the_tower_reads_views_patch_by_patch():
    half = VisionHalf(vision_config()).eval()
    views = np.random.default_rng(0).integers(0, 255, (2, 64, 64, 3), dtype=np.uint8)
    logits = half(normalise(views))
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        name: (2, size) if name == "count" else (2, 64, size) for name, size in HEADS.items()
    }
