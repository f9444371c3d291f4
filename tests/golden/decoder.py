"""The small decoders of golden sets inside a model of ours: a prompt is system text, visual embeddings, then text."""

import torch
from transformers import LlamaConfig

from builders import randomise, tiny_config, tiny_model
from hires_lmm.modeling.carriers_hires_lmm import VisualTokens
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.outputs_hires_lmm import HiResLmmImageFeatures


def build(settings: dict, layer_ops: list[dict], weights: dict[str, torch.Tensor] | None = None):
    """A model with one token id more, the placeholder; without weights (by their released names) a random one."""
    text = LlamaConfig(
        vocab_size=settings["vocab"] + 1,
        hidden_size=settings["hidden"],
        intermediate_size=settings["inter"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv"],
        rms_norm_eps=settings["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["theta"]},
    )
    image = settings["vocab"]
    model = tiny_model(tiny_config(text=text, connector_config={"layer_ops": layer_ops}, image_token_id=image))
    if weights is None:
        model = randomise(model, settings.get("seed", 0))
    else:
        pad = {name: torch.zeros(1, settings["hidden"]) for name in ("model.embed_tokens.weight", "lm_head.weight")}
        own = {
            name.replace("model.", "model.language_model.", 1): torch.cat([value, pad[name]]) if name in pad else value
            for name, value in weights.items()
            if name.startswith(("model.embed_tokens", "model.layers", "model.norm", "lm_head"))
        }
        missing, unknown = model.load_state_dict(own, strict=False)
        assert not unknown and not [name for name in missing if "language_model" in name or "lm_head" in name]
    model.generation_config.suppress_tokens, model.generation_config.eos_token_id = [image], None
    return model.eval()


def released(model) -> dict[str, torch.Tensor]:
    """The way back: the weights of the language model by their released names."""
    found = {}
    for name, value in model.state_dict().items():
        if name.startswith(("model.language_model.", "lm_head")):
            whole = "embed_tokens" not in name and "lm_head" not in name
            found[name.replace("model.language_model.", "model.", 1)] = value if whole else value[:-1]
    return found


def prompt(rows: list[tuple], grid: tuple[int, int] | None = None) -> dict:
    """Arguments of the model for rows of (system ids, visual embeddings, text ids), padded on the left.

    `grid` says how the visual tokens of a row stand.
    """
    lengths = [len(system) + len(visual) + len(text) for system, visual, text in rows]
    ids = torch.zeros(len(rows), max(lengths), dtype=torch.long)
    mask, parts = torch.zeros_like(ids), [visual for _, visual, _ in rows]
    for row, (system, visual, text) in enumerate(rows):
        ids[row, -lengths[row] :] = torch.cat([system.long(), torch.full((len(visual),), -1), text.long()])
        mask[row, -lengths[row] :] = 1
    features = HiResLmmImageFeatures(pooler_output=parts)
    if grid is not None:
        places = torch.arange(grid[0] * grid[1])
        cell = torch.stack([places // grid[1], places % grid[1]], dim=1).repeat(len(rows), 1)
        counts = [len(part) for part in parts]
        view = torch.arange(len(rows)).repeat_interleave(torch.tensor(counts))
        kind = torch.full_like(view, int(Kind.GLOBAL))
        features.tokens = VisualTokens(torch.cat(parts), counts, counts, view, cell, kind, {}, [])
    return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": features}}


def on(model, batch: dict) -> dict:
    """With the placeholder of a model."""
    ids = batch["input_ids"]
    return {**batch, "input_ids": ids.masked_fill(ids == -1, model.config.image_token_id)}


@torch.no_grad()
def generate(model, batch: dict, count: int) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens, and the logits `(B, count, vocabulary)` that chose them."""
    batch = on(model, batch)
    out = model.generate(
        **batch, max_new_tokens=count, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    logits = torch.stack(out.logits, dim=1)[..., :-1]
    return out.sequences[:, batch["input_ids"].shape[1] :].tolist(), logits


@torch.no_grad()
def prefill(model, batch: dict, count: int, **options) -> tuple[torch.Tensor, list[int], dict]:
    """Logits of the last positions `(B, count, vocabulary)`, how much each layer caches, and `aux`."""
    out = model(**on(model, batch), use_cache=True, **options)
    return out.logits[:, -count:, :-1], [layer.get_seq_length() for layer in out[CACHE].layers], out.aux or {}
