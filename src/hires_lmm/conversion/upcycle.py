"""`upcycle`: a dense language model gets experts, each a copy of its feed-forward, so that answers stay the same."""

import json
import re
import shutil
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from .cards import write_card
from .checkpoint import REPORT_NAME, save_code, versions
from .configs import known_fields, model_shapes, saved_shapes
from .errors import ConversionError, readable
from .exporting import copy_processor, read_checkpoint_config
from .hub import is_repository, resolve_folder
from .mapping import Mapped, check_complete
from .prompts import has_tokenizer
from .tensors import Entries, Entry, entry_of, folder_entries, read_json
from .writing import MAX_SHARD_BYTES, Progress, new_folder, write_tensors


FAMILIES = {"llama": "mixtral", "mistral": "mixtral", "qwen2": "qwen2_moe", "qwen3": "qwen3_moe"}
"""Dense family -> its family with experts."""

PROJECTIONS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
"""Of a feed-forward, and what Mixtral's files call them."""

FEED = re.compile(r"(?P<layer>model\.(language_model\.)?layers\.(?P<index>\d+))\.mlp\.(?P<part>\w+_proj)\.weight")
SHARED_WIDTH = 64
"""Width of the shared expert of Qwen2-MoE, which is zero and adds nothing."""

COEFFICIENT = 0.01
"""Weight of the loss that balances experts, as in MoE-LLaVA."""

SEED = 0
COPIED = (".json", ".jinja", ".model", ".txt")
"""Ends of the files of a text checkpoint, tokenizer and generation defaults, that are taken over."""


def upcycle(
    dense: str | Path,
    destination: str | Path,
    experts: int = 4,
    top_k: int = 2,
    every: int = 1,
    progress: Progress | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    trust_remote_code: bool = False,
) -> dict:
    """Write a checkpoint whose language model has experts, all copies of the dense feed-forward, with new routers.

    Args:
        dense (`str` or `Path`): Folder or Hub repository: a checkpoint of ours, of which the language half changes, or
            a causal language model. Llama and Mistral become Mixtral, Qwen2 Qwen2-MoE, Qwen3 Qwen3-MoE.
        destination (`str` or `Path`): The folder to make; it appears only when it is whole.
        experts (`int`): Experts of a layer.
        top_k (`int`): Experts that a token passes.
        every (`int`): Layers from one with experts to the next, from the first on; Mixtral has them in all.
        progress (`Callable`, *optional*): Called with tensors done, tensors in all and a description.
        max_shard_bytes (`int`): Most bytes of tensors in one file.
        trust_remote_code (`bool`): Whether the files of a user's own parts may run.

    Returns:
        The report, which is also saved as `conversion_report.json`.

    Raises:
        ConversionError: If the language model is of another family or has what the experts' family has not.

    Source:
        MoE-LLaVA, huggingface.co/papers/2401.15947. Its experts have a capacity and its second one is drawn with
        noise; those of transformers have neither.
    """
    with new_folder(destination) as work:
        folder = resolve_folder(dense, "The dense checkpoint", with_code=trust_remote_code)
        is_ours = read_json(folder / "config.json").get("model_type") == "hires_lmm"
        if is_ours:
            config = read_checkpoint_config(folder, trust_remote_code)
            config.text_config = with_experts(config.text_config, experts, top_k, every)
            shapes, text_config = model_shapes(config), config.text_config
        else:
            with readable("The language model"):
                found = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            text_config = config = with_experts(found, experts, top_k, every)
            with readable("The model of this configuration"), torch.device("meta"):
                shapes = saved_shapes(AutoModelForCausalLM.from_config(config))
        entries = copy_experts(folder_entries(folder), text_config)
        check_complete(Mapped(entries), shapes, [], f"the checkpoint {folder.name}")
        write_tensors(work, entries, max_shard_bytes, progress)
        if is_ours:
            _finish_ours(folder, work, config, str(dense), trust_remote_code)
        else:
            config.save_pretrained(work)
            for file in folder.iterdir():
                if file.suffix in COPIED and file.name != "config.json" and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, work / file.name)
        facts = {"experts": experts, "top_k": top_k, "every": every, "family": text_config.model_type}
        report = {"conversion": "upcycle", "source": folder.name, **facts, "versions": versions(), "unused": []}
        (work / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def with_experts(dense: Any, experts: int = 4, top_k: int = 2, every: int = 1) -> Any:
    """The configuration of the family with experts, all else as in a dense one."""
    family, depth = FAMILIES.get(dense.model_type), dense.num_hidden_layers
    if family is None:
        raise ConversionError(
            f"A language model of the family {dense.model_type!r} cannot be upcycled; {', '.join(FAMILIES)} can."
        )
    if not 1 <= top_k <= experts or experts < 2:
        raise ConversionError(f"top_k={top_k} of {experts} experts: give 2 experts or more, and 1 to all for a token.")
    if not 1 <= every <= depth:
        raise ConversionError(f"every={every} must be 1 to {depth}, the number of layers.")
    if every > 1 and family == "mixtral":
        raise ConversionError(
            f"every={every} leaves layers dense, and all layers of Mixtral, which {dense.model_type} becomes, have "
            "experts; leave it out."
        )
    values = known_fields(dense.to_dict(), family, "head_dim")  # Qwen3-MoE reads it and does not list it
    values |= {"num_experts_per_tok": top_k, "output_router_logits": True, "router_aux_loss_coef": COEFFICIENT}
    if family == "mixtral":
        values |= {"num_local_experts": experts, "sliding_window": getattr(dense, "sliding_window", None)}
    else:
        width = dense.intermediate_size
        values |= {"num_experts": experts, "moe_intermediate_size": width, "norm_topk_prob": True}
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in range(depth) if n % every]}
    if family == "qwen2_moe":
        values["shared_expert_intermediate_size"] = min(SHARED_WIDTH, dense.intermediate_size)
    with readable("The configuration with experts"):
        config = AutoConfig.for_model(family, **values)
    config.dtype = dense.dtype
    if _windows(dense) != _windows(config):
        raise ConversionError(
            f"Layers of this {dense.model_type} attend to a window of positions, and those of {family} would not "
            "alike; such a model cannot be upcycled exactly."
        )
    return config


def _windows(config: Any) -> list[int | None]:
    """Positions that each layer attends to; None = all."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        uses = getattr(config, "use_sliding_window", True)
        return [window if uses else None] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def copy_experts(entries: Entries, config: Any) -> Entries:
    """The tensors of the model with experts, under the names of its files; routers are new."""
    dense, is_mixtral = set(getattr(config, "mlp_only_layers", None) or ()), config.model_type == "mixtral"
    number, width = getattr(config, "num_local_experts", None) or config.num_experts, config.hidden_size
    generator = torch.Generator().manual_seed(SEED)
    made: Entries = {}
    for name, entry in entries.items():
        match = FEED.fullmatch(name)
        if match is None or int(match["index"]) in dense:
            made[name] = entry
            continue
        part, projection = f"{match['layer']}.{'block_sparse_moe' if is_mixtral else 'mlp'}", match["part"]
        for expert in range(number):
            own = f"{part}.experts.{expert}.{PROJECTIONS[projection] if is_mixtral else projection}.weight"
            made[own] = replace(entry, note=f"copied into {number} experts")
        if projection == "gate_proj":
            router = torch.randn(number, width, generator=generator) * config.initializer_range
            made[f"{part}.gate.weight"] = _new(router, entry)
            if config.model_type == "qwen2_moe":
                made[f"{part}.shared_expert_gate.weight"] = _new(torch.zeros(1, width), entry)
        if config.model_type == "qwen2_moe":
            shape = [config.shared_expert_intermediate_size, width]
            shared = torch.zeros(shape[::-1] if projection == "down_proj" else shape)
            made[f"{part}.shared_expert.{projection}.weight"] = _new(shared, entry)
    return made


def _new(tensor: torch.Tensor, like: Entry) -> Entry:
    return entry_of(tensor.to(like.dtype), note="new")


def _finish_ours(folder: Path, work: Path, config: Any, source: str, trust_remote_code: bool) -> None:
    """Write what a checkpoint of ours holds beside its weights."""
    image_processor = copy_processor(folder, work, config, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        with readable("The generation configuration"):
            GenerationConfig.from_pretrained(folder).save_pretrained(work)
    save_code(work, copy(config))
    facts = {"chat": has_tokenizer(folder), "versions": versions(), "title": work.name.partition(".incomplete-")[0]}
    facts |= {"repository": source} if is_repository(source) else {}
    earlier = folder / "README.md" if (folder / "README.md").is_file() else None
    write_card(work, config, image_processor, facts, earlier)
