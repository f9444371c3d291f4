"""The tiny LLaVA of golden sets inside a model of ours: one view an image, a patch a token."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from builders import randomise
from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration


NAMES = {
    "language_model.lm_head.": "lm_head.",
    "language_model.model.": "model.language_model.",
    "vision_tower.vision_model.": "model.vision_tower.",
    "multi_modal_projector.": "model.connector.adapter.mlp.",
}
"""Beginnings of released names and of ours."""


def build(settings: dict, weights: dict[str, torch.Tensor] | None = None) -> HiResLmmForConditionalGeneration:
    """The model with weights by their released names, or random ones."""
    vision = CLIPVisionConfig(
        hidden_size=settings["vh"],
        num_hidden_layers=settings["vl"],
        num_attention_heads=settings["vheads"],
        intermediate_size=settings["vi"],
        image_size=settings["img"],
        patch_size=settings["patch"],
    )
    text = LlamaConfig(
        vocab_size=settings["vocab"],
        hidden_size=settings["h"],
        intermediate_size=settings["inter"],
        num_hidden_layers=settings["l"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv"],
    )
    config = HiResLmmConfig(
        vision_config=vision,
        text_config=text,
        planner={"name": "slime", "views": "global"},
        image_token_id=settings["image_token"],
        vision_feature_layer=settings.get("vision_feature_layer", -2),
    )
    model = HiResLmmForConditionalGeneration(config)
    if weights is None:
        model = randomise(model, settings["seed"])
    else:
        model.load_state_dict({rename(name, NAMES): value for name, value in weights.items()})
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def rename(name: str, names: dict[str, str]) -> str:
    start = next(start for start in names if name.startswith(start))
    return names[start] + name.removeprefix(start)


def released(model: HiResLmmForConditionalGeneration) -> dict[str, torch.Tensor]:
    """The way back."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    return {rename(name, names): value for name, value in model.state_dict().items()}


def inputs_of(model: HiResLmmForConditionalGeneration, tensors: dict[str, torch.Tensor], rows: list[int]) -> dict:
    """What a processor would give for some prompts of a set, which hold one image token each."""
    token, (height, width) = model.config.image_token_id, model.config.patch_grid
    ids = tensors["input.input_ids"][rows].long()
    counts = torch.where(ids == token, height * width, 1)
    expanded = torch.stack([own.repeat_interleave(count) for own, count in zip(ids, counts, strict=True)])
    view = [0, 1, 1, 0, 0, height * width, height, width, 1]
    return {
        "input_ids": expanded,
        "attention_mask": torch.ones_like(expanded),
        "pixel_values": tensors["input.pixel_values"][rows],
        "view_positions": torch.tensor([view] * len(rows)),
        "view_spans": torch.tensor([[0, height, 0, width]] * len(rows)),
    }


def drawn(settings: dict, count: int) -> dict[str, torch.Tensor]:
    """Random images and prompts of a set that is made anew."""
    ids = torch.randint(2, settings["vocab"], (count, settings["pre"] + 1 + settings["txt"]))
    ids[:, settings["pre"]] = settings["image_token"]
    return {
        "input.pixel_values": torch.randn(count, 3, settings["img"], settings["img"]),
        "input.input_ids": ids,
    }


@torch.no_grad()
def generate(model, inputs: dict, count: int, processor=None) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Greedy tokens, what the processor made of the scores, and the logits, `(B, count, vocabulary)`."""
    out = model.generate(
        **inputs,
        max_new_tokens=count,
        do_sample=False,
        logits_processor=[] if processor is None else [processor],
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    tokens = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens, torch.stack(out.scores, dim=1), torch.stack(out.logits, dim=1)


def same_scores(found: torch.Tensor, wanted: torch.Tensor, name: str) -> None:
    """Compare normalised scores with those of a set, where -1e30 stands for no way."""
    wanted = wanted.masked_fill(wanted < -1e29, -torch.inf).log_softmax(dim=-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4, msg=lambda text: f"{name}: {text}")
