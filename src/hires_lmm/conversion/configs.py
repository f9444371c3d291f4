"""Configurations of foreign models as transformers builds them, and what ours needs beside its fields."""

from collections import Counter
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from ..modeling.modeling_hires_lmm import HiResLmmForConditionalGeneration
from .errors import ConversionError, readable
from .keys import Rename, Rule
from .tensors import Entries


BOOKKEEPING = {
    "model_type",
    "architectures",
    "transformers_version",
    "dtype",
    "id2label",
    "label2id",
    "_name_or_path",
}
"""Fields of saved configurations that do not describe a model's shape."""


def known_fields(values: dict, model_type: str, *others: str) -> dict:
    """Those fields of a foreign configuration that the class of a model, or the caller, knows."""
    known = {*AutoConfig.for_model(model_type).to_dict(), *others}
    return {key: value for key, value in values.items() if key in known - BOOKKEEPING}


def text_config_of(values: dict, model_type: str) -> Any:
    """The configuration of a language model, from a foreign `config.json` with the fields of a family."""
    with readable("The language model's configuration"):
        return AutoConfig.for_model(model_type, **known_fields(values, model_type, "rope_theta", "rope_scaling"))


def with_dtype(config: Any, dtype: torch.dtype) -> Any:
    """Name class and dtype in a configuration of ours, which is changed."""
    config.architectures = ["HiResLmmForConditionalGeneration"]
    for part in (config, config.vision_config, config.text_config, config.connector_config):
        part.dtype = dtype
    return config


def model_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a model, in its order, tied ones once; takes no memory."""
    return saved_shapes(meta_model(config))


def meta_model(config: Any) -> HiResLmmForConditionalGeneration:
    """The model of a configuration of ours without memory."""
    with readable("The model of this configuration"), torch.device("meta"):
        return HiResLmmForConditionalGeneration(config)


def saved_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a model as its files have them: experts one by one, tied ones once."""
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, tensors).items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def language_rules(text_config: Any) -> list[Rule]:
    """The key table of a language model in its own class, whatever that calls its backbone and its head."""
    with readable("The language model"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(text_config)
    head = model.get_output_embeddings()
    name = next(f"{name}.weight" for name, part in model.named_modules() if part is head)
    saved = next(iter(revert_weight_conversion(model, {name: head.weight})))
    return [Rename(f"{model.base_model_prefix}.**", "model.language_model.**"), Rename(saved, "lm_head.weight")]


def common_dtype(entries: Entries, named: Any = None) -> torch.dtype:
    """The dtype that a configuration names, else the most frequent floating-point one, weighted by size."""
    dtype = parse_dtype(named) if named not in (None, "auto") else None
    if dtype is not None:
        return dtype
    sizes: Counter = Counter()
    for entry in entries.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] += entry.num_bytes
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def parse_dtype(value: Any) -> torch.dtype | None:
    """A dtype from a name such as `"bfloat16"` or `"torch.bfloat16"`; None stays None."""
    if value is None or isinstance(value, torch.dtype):
        return value
    dtype = torch.__dict__.get(str(value).removeprefix("torch."))
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConversionError(f"dtype={value!r} is unknown; use float32, bfloat16 or float16.")
    return dtype
