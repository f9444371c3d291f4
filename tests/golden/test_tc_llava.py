"""TC-LLaVA: positions and masks of the paper's equation, the index of the comparison code, logits of a tiny Llama."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from builders import randomise, tiny_config, tiny_model
from hires_lmm.modeling.bases_hires_lmm import PartContext, RowTokens
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, VisualTokens
from hires_lmm.modeling.geometry_hires_lmm import Grid, Kind
from hires_lmm.modeling.outputs_hires_lmm import HiResLmmImageFeatures
from hires_lmm.modeling.temporal_hires_lmm import HiResLmmTemporal

from .base import GoldenSet, write_set


NAME = "tc_llava"
GOLDEN = GoldenSet(NAME)
WAYS = {"logits": (True, "frames"), "logits_rope_only": (True, "causal"), "logits_mask_only": (False, "frames")}
every_case = pytest.mark.parametrize("case", GOLDEN.cases["cases"], ids=lambda case: case["case"])


def rows_of(case: dict) -> RowTokens:
    """What the plan is told of the row of a case."""
    size = case["grid"][0] * case["grid"][1]
    views = torch.arange(case["frames"]).repeat_interleave(size)
    around = [torch.full((case[name],), -1) for name in ("visual_start", "text_after")]
    view = torch.cat([around[0], views, around[1]])[None]
    none = torch.full_like(view, -1)
    kind = torch.where(view >= 0, int(Kind.FRAME), none)
    return RowTokens(torch.ones_like(view).bool(), torch.where(view >= 0, 0, none), view, kind, has_images=True)


def plan_of(**options) -> HiResLmmTemporal:
    return HiResLmmTemporal(PartContext(None, 1, 1, {}, (1, 1)), HiResLmmTemporal.Options(**options))


def model_of(settings: dict, weights: dict[str, torch.Tensor]):
    """A model around the language model of the set; of the sizes that weights do not tell, the released defaults."""
    q, k = (weights[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qk")
    heads, head = settings.get("heads", 2), weights["lm_head.weight"]
    text = LlamaConfig(
        vocab_size=len(head) + 1, hidden_size=head.shape[1], num_attention_heads=heads,
        intermediate_size=len(weights["model.layers.0.mlp.gate_proj.weight"]),
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in weights if ".layers." in name),
        num_key_value_heads=heads * len(k) // len(q), rms_norm_eps=settings.get("eps", 1e-6),
    )  # fmt: skip
    model = tiny_model(tiny_config(text=text, image_token_id=len(head)))
    own = {name.replace("model.", "model.language_model.", 1): value for name, value in weights.items()}
    tables = {name: torch.cat([value, value[:1]]) for name, value in own.items() if "embed" in name or "head" in name}
    unknown = model.load_state_dict(own | tables, strict=False).unexpected_keys
    assert not unknown
    return model


@torch.no_grad()
def logits_of(model, case: dict, embeds: torch.Tensor, **options) -> torch.Tensor:
    """Logits with a plan, or without one, of a prompt whose visual embeddings stand where the case says."""
    model.model.connector.position_plan = plan_of(**options) if options else None
    rows, cols = case["grid"]
    start, count = case["visual_start"], case["frames"] * rows * cols
    visual = embeds[0, start : start + count]
    ids = torch.zeros(1, embeds.shape[1], dtype=torch.long)
    ids[0, start : start + count] = model.config.image_token_id
    prompt = embeds.masked_scatter((ids > 0)[..., None], model.get_input_embeddings()(ids[ids > 0]))
    view = torch.arange(count) // (rows * cols)
    shape = (int(Kind.FRAME), case["frames"], 1, 0, 0, rows, cols, 0, rows, 0, cols)
    images = [ImageGeometry(0, (shape,) * case["frames"], count)]
    cell, kind = torch.zeros(count, 2, dtype=torch.long), torch.full_like(view, int(Kind.FRAME))
    grids = {int(Kind.FRAME): Grid(rows, cols)}
    tokens = VisualTokens(visual, [count], [count], view, cell, kind, grids, images)
    features = HiResLmmImageFeatures(pooler_output=[visual], tokens=tokens)
    return model(inputs_embeds=prompt, mm_encoder_outputs={"image": features}).logits[..., :-1]


@every_case
def test_positions_and_mask_are_those_of_the_equation(case):
    positions, seen = plan_of(gamma=case["gamma"])(rows_of(case))
    GOLDEN.close(positions[0].float(), f"{case['case']}.positions")
    assert torch.equal(seen[0], GOLDEN[f"{case['case']}.mask"].bool())
    assert int(seen.sum()) == case["allowed_pairs"]


@every_case
def test_the_index_of_the_comparison_code_starts_text_one_later(case):
    tokens, after = rows_of(case), -case["text_after"]
    found, paper = (plan_of(gamma=1, text_after=name)(tokens)[0][0] - tokens.number[0] for name in ("next", "shared"))
    assert torch.equal(found.float(), GOLDEN[f"{case['case']}.videorope_temporal"])
    if case["text_after"]:
        firsts = (found[after].item(), paper[after].item())
        assert firsts == (case["videorope_first_text_after"], case["paper_first_text_after"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*WAYS, "logits_plain"])
@every_case
def test_logits(case, name, attention):
    model = model_of(GOLDEN.cases["settings"], GOLDEN.under("weight."))
    model.set_attn_implementation(attention)
    rotates, mask = WAYS.get(name, (False, None))
    options = {} if mask is None else {"gamma": case["gamma"] if rotates else 0, "mask": mask}
    GOLDEN.close(logits_of(model, case, GOLDEN[f"{case['case']}.input"], **options), f"{case['case']}.{name}")


# ---- a set at other sizes


def remake(folder: Path, seed: int) -> None:
    settings = {"heads": 3, "eps": 1e-5}
    text = LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=20, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=1, rms_norm_eps=1e-5,
    )  # fmt: skip
    model = randomise(tiny_model(tiny_config(text=text, image_token_id=40)), seed)
    weights = {
        name.replace("model.language_model.", "model.", 1): value[:-1] if "embed" in name or "head" in name else value
        for name, value in model.state_dict().items()
        if "language_model" in name or "lm_head" in name
    }
    tensors, cases = {f"weight.{name}": value for name, value in weights.items()}, []
    for number, (start, frames, grid, after, gamma) in enumerate([(2, 3, [2, 3], 4, 1.5), (0, 2, [1, 2], 2, 1.0)]):
        own = {"case": f"case{number}", "visual_start": start, "frames": frames, "grid": grid, "text_after": after}
        case, name = {**own, "gamma": gamma}, f"case{number}"
        rows = rows_of(case)
        embeds = torch.randn(1, rows.real.shape[1], 24)
        positions, seen = plan_of(gamma=gamma)(rows)
        index = [plan_of(gamma=1, text_after=way)(rows)[0][0] - rows.number[0] for way in ("next", "shared")]
        tensors |= {f"{name}.input": embeds, f"{name}.positions": positions[0].float()}
        tensors |= {f"{name}.mask": seen[0].to(torch.uint8), f"{name}.videorope_temporal": index[0].float()}
        tensors[f"{name}.logits_plain"] = logits_of(model, case, embeds)
        for way, (rotates, mask) in WAYS.items():
            tensors[f"{name}.{way}"] = logits_of(model, case, embeds, gamma=gamma if rotates else 0, mask=mask)
        firsts = {
            f"{way}_first_text_after": each[-after].item()
            for way, each in zip(("videorope", "paper"), index, strict=True)
        }
        cases.append({**case, "allowed_pairs": int(seen.sum()), **firsts})
    write_set(folder, {"settings": settings, "cases": cases}, tensors)
