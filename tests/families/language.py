"""Every family of language models that was run, tiny; `python tests/families/language.py [NAMES]` writes the table."""

import copy
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


sys.path.insert(0, str(Path(__file__).parents[1]))

from builders.tiny import make_batch, text_numbers, tiny_config, tiny_model, tiny_processor
from families.checks import COLUMNS, ROOT, TEXT, close, run_checks, write_table


PAGE = ROOT / "docs" / "language-models.md"
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "norm_topk_prob": True}
HEAD = {"head_dim": 8}
SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]}
MAMBA = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
SCALES = {"logits_scaling": 3.0, "logit_scale": 0.3, "lm_head_multiplier": 0.3, "final_logit_softcapping": 5.0}
"""What families do behind their head, with values that tell."""

GEMMA = {**HEAD, **SLIDING, "query_pre_attn_scalar": 8}

DENSE = {
    "llama": {},
    "mistral": {**HEAD, "sliding_window": 12},
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {},
    "stablelm": {},
    "glm": HEAD,
    "glm4": HEAD,
    "granite": {},
    "smollm3": {},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "starcoder2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
SPARSE = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, **HEAD},
    "qwen2_moe": SHARED,
    "qwen3_moe": {**SHARED, **HEAD},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": DEEPSEEK,
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, **HEAD, **SLIDING},
}
STATES = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "falcon_h1": MAMBA,
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_next": {
        **SHARED,
        **HEAD,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
FAMILIES = {**DENSE, **SPARSE, **STATES}


def family_config(family: str, **changes) -> transformers.PreTrainedConfig:
    """A text config of two layers with the tiny tokenizer's vocabulary."""
    numbers = text_numbers() | {"tie_word_embeddings": False}
    if family in ("mamba", "mamba2"):
        numbers = {key: value for key, value in numbers.items() if "head" not in key and "posit" not in key}
        del numbers["intermediate_size"]
    return AutoConfig.for_model(family, **{**numbers, **FAMILIES[family], **changes})


def family_model(family: str, **changes):
    """Model and processor over one family, preset `llava_next`; every weight has values that tell."""
    config = tiny_config("llava_next", text=family_config(family, **changes))
    return tiny_model(config), tiny_processor(config)


@torch.no_grad()
def as_own_class(model, processor, folder: Path) -> None:
    """Logits of text are those of transformers' own class with the same weights, scales and caps included."""
    config = copy.deepcopy(model.config.text_config)
    changes = {name: value for name, value in SCALES.items() if getattr(config, name, None) is not None}
    for each in (config, model.config.text_config):
        each.update(changes)
    own = AutoModelForCausalLM.from_config(config).eval()
    own.base_model.load_state_dict(model.model.language_model.state_dict())
    own.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    batch = make_batch(processor, [TEXT, ("USER: A small red boat on a lake, or in the picture? ASSISTANT: A", [])])
    real = batch["attention_mask"].bool()
    close(model(**batch).logits[real], own(**batch).logits[real], "logits")


CHECKS = {"own class": as_own_class, **COLUMNS}


def family_row(family: str) -> list[str]:
    """The cells of a family."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        return run_checks(*family_model(family), Path(folder), CHECKS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    names = sys.argv[1:] or list(FAMILIES)
    rows = []
    for name in names:
        rows.append([f"`{name}`", *family_row(name)])
        print(*rows[-1], sep=" | ", flush=True)
    if names == list(FAMILIES):
        write_table(PAGE, "language models", ["family", *CHECKS], rows)
