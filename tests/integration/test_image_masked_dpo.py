"""DPO with a pair of images: three rows a pair, of which the third has a masked image."""

import math

import pytest
import torch
from transformers import AutoModelForImageTextToText

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from builders.training import COMPRESS
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids
from hires_lmm.training.lora import lora_config
from hires_lmm.training.preference import mask_pixels, token_weights


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),  # by TRL and PEFT
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]

ANSWERS = [("a dog", "a cat or so"), ("three black birds", "two")]


def dataset(columns=(), images=True):
    """Two pairs about images of two sizes."""
    turn = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    rows = {
        "prompt": [turn("user", "what is it"), turn("user", "how many are there")],
        "chosen": [turn("assistant", chosen) for chosen, _ in ANSWERS],
        "rejected": [turn("assistant", rejected) for _, rejected in ANSWERS],
        **dict(columns),
    }
    types = {name: [{"role": datasets.Value("string"), "content": datasets.Value("string")}] for name in rows}
    types |= {name: datasets.List(datasets.Value("float64")) for name, _ in columns}
    types |= {"revised": datasets.Value("bool")} if "revised" in rows else {}
    if images:
        rows["images"] = [[random_image(80, 120)], [random_image(130, 60)]]
        types["images"] = datasets.List(datasets.Image())
    return datasets.Dataset.from_dict(rows, features=datasets.Features(types))


def save(folder, preset, **connector):
    config = tiny_config(preset, connector_config=connector)
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids = answer_prefix_ids(processor)
    tiny_model(config).save_pretrained(folder)
    return folder, processor


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), "llava_next")


def trainer_of(saved, folder, data=None, lora=False, **options):
    from hires_lmm.training.preference.image_masked import ImageMaskedDPOConfig, ImageMaskedDPOTrainer

    base, processor = saved
    values = {
        "report_to": [], "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 2, "logging_steps": 1,
        "max_length": None, "bf16": False, "gradient_checkpointing": False, "save_strategy": "no",
        "disable_tqdm": True, **options,
    }  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(base)
    return ImageMaskedDPOTrainer(
        model,
        args=ImageMaskedDPOConfig(str(folder), **values),
        train_dataset=dataset() if data is None else data,
        processing_class=processor,
        peft_config=lora_config(model, "language_only", r=4) if lora else None,
    )


@pytest.mark.parametrize(("level", "lora"), [("sequence", False), ("token", True)], ids=["copy", "lora"])
def test_all_terms_begin_at_ln_2(level, lora, saved, tmp_path):
    trainer = trainer_of(saved, tmp_path, lora=lora, level=level, image_weight=0.5, anchor_weight=2.0)
    trainer.train()
    log = trainer.state.log_history[0]
    assert [log[f"loss/{name}"] for name in ("answers", "images", "anchor")] == pytest.approx(
        [math.log(2)] * 3, abs=1e-4
    )
    assert log["loss"] == pytest.approx(3.5 * math.log(2), abs=1e-4)


def test_noise_and_tokens_that_leave_do_not_move_the_start(tmp_path):
    """A masked image keeps other tokens than the image does."""
    router = {"part": "router", "on": "crops", "keep": {"rule": "threshold", "gamma": 0.75}, "noise": 3.0}
    saved = save(tmp_path / "model", "slime", view_ops=[COMPRESS], token_ops=[router])
    trainer = trainer_of(saved, tmp_path, mask_share=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(2.2 * math.log(2), abs=1e-4)


ADDED = ("revised", "answer_weights", "image_weights")


def log_probs(model, batch, pixels):
    """Of the tokens of answers, from logits: (rows, L - 1), and their mask."""
    inputs = {name: value for name, value in batch.items() if name not in ("completion_mask", *ADDED)}
    logits = model(**{**inputs, "pixel_values": pixels}).logits[:, :-1]
    ids, mask = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask, mask.bool()


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_the_loss_is_that_of_three_separate_forwards(level, saved, tmp_path):
    """The reference here: plain logits, rows in a loop, masks drawn in the same order."""
    weights = [
        ("chosen_weights", [[1.5, 2.0], [0.5]]),
        ("rejected_weights", [[3.0], []]),
        ("image_weights", [[2.0], [4.0]]),
    ]
    data = dataset([("revised", [False, True]), *(weights if level == "token" else [])])
    options = {"level": level, "beta": 0.3, "anchor_offset": 0.1, "anchor_revised": "down", "mask_share": 0.6}
    trainer = trainer_of(saved, tmp_path, data, **options)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    batch = trainer.data_collator([dict(row) for row in data])
    model, reference = trainer.model.eval(), trainer.ref_model.eval()
    torch.manual_seed(5)
    found = trainer._compute_loss(model, batch, False)
    torch.manual_seed(5)
    pixels = batch["pixel_values"]
    half = len(pixels) // 2
    masked = torch.cat([mask_pixels(pixels[:half], 0.6), pixels[half:]])
    with torch.no_grad():
        policy, mask = log_probs(model, batch, pixels)
        ratio = policy - log_probs(reference, batch, pixels)[0]
        hidden = (log_probs(model, batch, masked)[0] - log_probs(reference, batch, masked)[0])[:2]
    wanted = 0.0
    sigmoid = lambda value: -torch.nn.functional.logsigmoid(value)  # noqa: E731
    count = {"answers": 0, "images": 0}
    parts = dict.fromkeys(("answers", "images", "anchor"), 0.0)
    for row in range(2):
        chosen, rejected, without = ratio[row], ratio[row + 2], hidden[row]
        real = mask[row] | mask[row + 2]
        sign = -1 if row == 1 else 1
        if level == "sequence":
            parts["answers"] += sigmoid(0.3 * (chosen.sum() - rejected.sum())) / 2
            parts["images"] += sigmoid(0.3 * (chosen.sum() - without.sum())) / 2
            parts["anchor"] += sigmoid(sign * (0.3 * chosen.sum() - 0.1)) / 2
            continue
        first = int(mask[row].nonzero()[0])
        on = {name: torch.ones_like(chosen) for name, _ in weights}
        for name, values in weights:
            on[name][first : first + len(values[row])] = torch.tensor(values[row])
        answers = sigmoid(0.3 * (chosen * on["chosen_weights"] - rejected * on["rejected_weights"]))
        images = sigmoid(0.3 * on["image_weights"] * (chosen - without))
        parts["answers"] += answers[real].sum()
        parts["images"] += images[mask[row]].sum()
        parts["anchor"] += sigmoid(sign * (0.3 * chosen - 0.1))[mask[row]].sum()
        count["answers"] += int(real.sum())
        count["images"] += int(mask[row].sum())
    if level == "token":
        parts["answers"] /= count["answers"]
        parts["images"] /= count["images"]
        parts["anchor"] /= count["images"]
    wanted = parts["answers"] + 0.2 * parts["images"] + parts["anchor"]
    assert abs(parts["images"] - math.log(2)) > 1e-3
    assert found.item() == pytest.approx(wanted.item(), abs=1e-5)


def test_training_makes_the_image_matter(saved, tmp_path):
    trainer = trainer_of(saved, tmp_path, max_steps=12, learning_rate=2e-3, image_weight=1.0, beta=1.0, mask_share=1.0)
    trainer.train()
    losses = [entry["loss/images"] for entry in trainer.state.log_history if "loss/images" in entry]
    assert losses[-1] < 0.6 * losses[0]


def test_evaluation_logs_the_same_terms(saved, tmp_path):
    trainer = trainer_of(saved, tmp_path)
    found = trainer.evaluate(dataset())
    assert found["eval_loss"] == pytest.approx(2.2 * math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"level": "word"}, "level='word' must be one of sequence, token"),
        ({"anchor_revised": "left"}, "anchor_revised='left'"),
        ({"mask_share": 0.0}, "mask_share=0.0"),
        ({"ld_alpha": 0.5}, "ld_alpha=0.5"),
        ({"image_weight": -1.0}, "image_weight=-1.0"),
        ({"anchor_weight": float("nan")}, "anchor_weight=nan"),
        ({"anchor_offset": float("inf")}, "anchor_offset=inf"),
        ({"level": "token", "loss_type": ["ipo"]}, "level='token'"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, says, tmp_path):
    from hires_lmm.training.preference.image_masked import ImageMaskedDPOConfig

    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        ImageMaskedDPOConfig(str(tmp_path), use_cpu=True, bf16=False, **options)


def test_data_that_cannot_be_trained_on_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match="no images to mask"):
        trainer_of(saved, tmp_path, dataset(images=False))
    trainer = trainer_of(saved, tmp_path, dataset([("chosen_weights", [[1.0], [2.0]])]))
    with pytest.raises(ValueError, match="need level='token'"):
        trainer.train()
    texts = dataset().add_column("revised", ["no", "yes"])
    with pytest.raises(ValueError, match="revised='no' must be true or false"):
        trainer_of(saved, tmp_path, texts).train()


def test_weights_follow_the_spans_of_an_answer(saved):
    tokenizer = saved[1].tokenizer
    answer = "three black birds"
    weights = token_weights(tokenizer, answer, {"black": 1.5})
    offsets = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    assert weights == [1.5 if start < 11 and end > 6 else 1.0 for start, end in offsets]
    assert 1.5 in weights and 1.0 in weights
    with pytest.raises(ValueError, match="'white' is no piece"):
        token_weights(tokenizer, answer, {"white": 2.0})


def test_more_weights_than_tokens_are_refused(saved, tmp_path):
    data = dataset([("chosen_weights", [[1.0] * 200, []])])
    with pytest.raises(ValueError, match="200 weights for an answer of"):
        trainer_of(saved, tmp_path, data, level="token").train()
