"""The models that are compared, ours and transformers' own, on one language model: build, encode images, call."""

from collections import Counter
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from measure import operation_counter
from PIL import Image
from shapes import IMAGE_TOKEN, VIEW, Shapes, build, rows_of_ids
from torch import nn
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from hires_lmm import PRESETS, HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmProcessor
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.configuration_hires_lmm import LLAVA_NEXT_GRIDS


KEEP_BUDGET = {"part": "router", "on": "crops", "score": "cosine", "keep": {"rule": "budget"}}
COMPRESS = {"part": "query_compressor", "on": "crops", "num_queries": 144}
BUDGETED = {"connector_config": {"token_ops": [KEEP_BUDGET]}}
GLOBALCOM2 = {"connector_config": {"token_ops": [{"part": "globalcom2"}]}}
ROUTER = {"connector_config": {"token_ops": [{**KEEP_BUDGET, "on": "all"}]}}
NOT_ENLARGED = {"planner": {"enlarge": False}, "connector_config": {"token_ops": [{**KEEP_BUDGET, "on": "all"}]}}
OURS: dict[str, tuple[str, dict, dict]] = {
    "llava_next": ("llava_next", {}, {}),
    "slime, 4 crops": ("slime", BUDGETED, {"max_crops": 4}),
    "slime, 4 crops, 144 local": ("slime", BUDGETED, {"max_crops": 4, "max_image_tokens": 576 + 144}),
    "slime, 6x6": ("slime", BUDGETED, {}),
    "slime_release": ("slime_release", BUDGETED, {}),
    "monkey": ("monkey", {}, {}),
    "vlsa": ("vlsa", {}, {}),
    "fusion": ("fusion", {}, {}),
    "mqt": ("mqt", {}, {}),
    "mqt, 4 crops": ("mqt", {}, {"views": "all"}),
    "llava_uhd": ("llava_uhd", {}, {}),
    "inf_llava": ("inf_llava", {}, {}),
    "hires_llava": ("hires_llava", {}, {}),
    "llava_mini": ("llava_mini", {}, {}),
    "mg_llava": ("mg_llava", {}, {}),
    "llava_hd, 4 crops": ("llava_hd", {}, {"max_crops": 4}),
    "slime, not enlarged, 144 tokens": ("slime", NOT_ENLARGED, {"max_crops": 4, "max_image_tokens": 144}),
    **{f"llava_next, {budget} tokens": ("llava_next", {}, {"max_image_tokens": budget}) for budget in (720, 288)},
    **{
        f"globalcom2, {budget} tokens": ("llava_next", GLOBALCOM2, {"max_image_tokens": budget})
        for budget in (720, 288)
    },
    "router, 720 tokens": ("llava_next", ROUTER, {"max_image_tokens": 720}),
}
"""Name -> preset, changes of its configuration, options of the image processor. The routers keep an exact number, so
that the work does not depend on weights; without a budget they drop nothing."""

ON_REQUEST = [name for name in OURS if name.endswith(" tokens") or name == "mqt, 4 crops"]
"""Those that only run where they are asked for."""

SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


@dataclass
class Case:
    """One model with its way from images to inputs.

    Args:
        name (`str`): In tables.
        model (`nn.Module`): With its head.
        tower, language_model (`nn.Module`): Parts of it that also run alone.
        between (`nn.Module`, *optional*): A whole model between them, as the transformer of fusion; it runs alone too.
        encode (`Callable`): Images, one a row -> inputs of `forward`, on the device.
        inputs (`dict`): Of the batch at hand.
        tokens (`list[int]`): Placeholders of each row.
    """

    name: str
    model: Any
    tower: Any
    language_model: Any
    encode: Callable[[list], tuple[dict, list[int]]]
    inputs: dict = field(default_factory=dict)
    tokens: list = field(default_factory=list)
    between: Any = None

    def take(self, images: list[Image.Image]) -> "Case":
        """A case with the inputs of a batch."""
        inputs, tokens = self.encode(images)
        return replace(self, inputs=inputs, tokens=tokens)

    def prefill(self) -> Any:
        """Everything up to the logits of the first new token."""
        with torch.no_grad():
            return self.model(**self.inputs, logits_to_keep=1, use_cache=True)

    def survey(self) -> "Survey":
        """Run one prefill and note what goes into tower and language model, and the operations of each module."""
        counter, seen, spent = operation_counter(), {}, Counter()
        contexts = {}
        named = {"tower": self.tower, "language_model": self.language_model, "head": self.model.lm_head}
        named |= {} if self.between is None else {"between": self.between}

        def enter(name: str, args: tuple, kwargs: dict) -> None:
            seen.setdefault(name, (args, dict(kwargs)))
            contexts.setdefault(name, copy_context())  # how far our tower goes
            spent[name] -= counter.get_total_flops()

        def leave(name: str) -> None:
            spent[name] += counter.get_total_flops()

        handles = []
        for name, module in named.items():
            before = lambda module, args, kwargs, name=name: enter(name, args, kwargs)  # noqa: E731
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(lambda module, args, output, name=name: leave(name)))
        with counter:
            self.prefill()
        for handle in handles:
            handle.remove()
        seen["tower"][1].pop("output_hidden_states", None)
        for name in seen.keys() & {"language_model", "between"}:
            seen[name][1].update({CACHE: None, "use_cache": True})
        total = counter.get_total_flops()
        return Survey(self, seen, total, total - sum(spent.values()), contexts["tower"])


@dataclass
class Survey:
    """What one prefill showed.

    Args:
        case (`Case`): The model and its inputs.
        seen (`dict`): Positional and named arguments of `tower` and `language_model`.
        operations (`int`): Counted in all.
        between (`int`): Those outside tower, language model, head and what else runs alone.
        context (`Context`): In which the tower ran.
    """

    case: Case
    seen: dict[str, tuple[tuple, dict]]
    operations: int
    between: int
    context: Context

    def alone(self) -> dict[str, Callable[[], Any]]:
        """Whole models on exactly what the prefill gives them, as calls of their own."""
        case = self.case

        def tower() -> Any:
            args, kwargs = self.seen["tower"]
            with torch.no_grad():
                return self.context.run(case.tower, *args, **kwargs)

        def language_model() -> Any:
            args, kwargs = self.seen["language_model"]
            with torch.no_grad():
                return case.model.lm_head(case.language_model(*args, **kwargs)[0][:, -1:])

        def between() -> Any:
            args, kwargs = self.seen["between"]
            with torch.no_grad():
                return case.between(*args, **kwargs)

        calls = {"tower": tower, "language_model": language_model}
        return calls if case.between is None else {**calls, "between": between}


class Shared:
    """A language model and a head that several models use, so that one device holds them all.

    Args:
        shapes (`Shapes`): Sizes.
        device (`str`): Where.
    """

    def __init__(self, shapes: Shapes, device: str):
        self.shapes, self.device = shapes, device
        whole = build(LlamaForCausalLM, shapes.llama(), shapes.dtype, device)
        self.body, self.head = whole.model, whole.lm_head

    def small_text(self) -> Any:
        """A configuration for building: one layer, since the body is replaced."""
        return type(self.shapes.llama())(**{**self.shapes.text_numbers(), "num_hidden_layers": 1})

    def give(self, model: Any, attribute: str = "language_model") -> Any:
        """Put body and head into a model."""
        setattr(model.model, attribute, self.body)
        model.lm_head = self.head
        model.config.text_config = self.body.config
        return model


def ours(name: str, shared: Shared) -> Case:
    """One of `OURS`.

    Args:
        name (`str`): Key of `OURS`.
        shared (`Shared`): The language model.
    """
    preset, changes, options = OURS[name]
    shapes, tokenizer = shared.shapes, build_byte_tokenizer()
    changes = {**changes, **fitted(name, shapes)}
    config = HiResLmmConfig.from_preset(
        preset, shapes.clip(), shared.small_text(), image_token_id=IMAGE_TOKEN, **changes
    )
    model = build(HiResLmmForConditionalGeneration, config, shapes.dtype, shared.device)
    shared.give(model)
    image_processor = HiResLmmProcessor.from_config(config, tokenizer).image_processor

    def encode(images: list) -> tuple[dict, list[int]]:
        batch = image_processor(images, return_tensors="pt", **options)
        positions = batch["view_positions"]
        counts = positions[positions[:, 8] != 0, 5].tolist()
        pixels = {key: batch[key].to(shared.device, shapes.dtype) for key in batch if key.startswith("pixel_values")}
        views = {**batch, **pixels}
        rows = rows_of_ids(counts, shared.device)
        if shared.device == "meta":  # nothing can be read back there: see `image_geometry`
            views = {**pixels, "image_geometry": model.model.read_images(positions, batch["view_spans"])}
            rows.pop("attention_mask")
        return {**rows, **views}, counts

    between = model.model.connector.token_ops[0].model if name == "fusion" else None
    return Case(name, model, model.model.vision_tower, model.model.language_model, encode, between=between)


def fitted(name: str, shapes: Shapes) -> dict:
    """What of a preset follows the sizes of tower and language model: at true sizes what the preset has."""
    share = shapes.tower[0] / 1024
    sizes = [max(8, int(width * share)) for width in (192, 384, 768, 1536)]
    convnext = {"model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": sizes, "image_size": 768}
    marks = {"comma": {"place": "crop_column", "value": [11]}, "newline": {"place": "crop_row_end", "value": [13]}}
    layout = {"order": ["crops", "global"], "crop_order": "views", "separators": marks}
    heads = shapes.tower[2]
    return {
        "fusion": {"connector_config": {"token_ops": [{"part": "fusion", "num_heads": heads}]}},
        "llava_mini": {"question_scope": "prompt"},
        "mg_llava": {"extra_towers": {"hires": convnext}},
        "llava_uhd": {"connector_config": {"layout": layout}},
    }.get(name, {})


def ours_known() -> list[str]:
    """Names in `OURS` whose preset this version has, but those that run on request alone."""
    return [name for name, (preset, _, _) in OURS.items() if preset in PRESETS and name not in ON_REQUEST]


def _peer_inputs(shared: Shared, batch: dict, counts: list[int]) -> tuple[dict, list[int]]:
    moved = {key: value.to(shared.device) if key.startswith("pixel") else value for key, value in batch.items()}
    moved["pixel_values"] = moved["pixel_values"].to(shared.shapes.dtype)
    return {**rows_of_ids(counts, shared.device), **moved}, counts


def llava_next_processor() -> LlavaNextImageProcessorPil:
    """Views of 336 pixels, the five grids of the released checkpoints."""
    side = {"height": VIEW, "width": VIEW}
    pinpoints = [[rows * VIEW, columns * VIEW] for rows, columns in LLAVA_NEXT_GRIDS]
    return LlavaNextImageProcessorPil(size=side, crop_size=side, image_grid_pinpoints=pinpoints)


def _llava_next(shared: Shared) -> Case:
    processor = llava_next_processor()
    config = LlavaNextConfig(
        vision_config=shared.shapes.clip(),
        text_config=shared.small_text(),
        image_grid_pinpoints=processor.image_grid_pinpoints,
        image_token_index=IMAGE_TOKEN,
    )
    model = shared.give(build(LlavaNextForConditionalGeneration, config, shared.shapes.dtype, shared.device))
    return _anyres("transformers llava_next", model, processor, shared)


def _llava_onevision(shared: Shared) -> Case:
    processor = LlavaOnevisionImageProcessorPil()
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            **_tower(shared, "hidden_size"), image_size=384, patch_size=14, vision_use_head=False
        ),
        text_config=shared.small_text(),
        image_grid_pinpoints=processor.image_grid_pinpoints,
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN + 1,
    )
    model = shared.give(build(LlavaOnevisionForConditionalGeneration, config, shared.shapes.dtype, shared.device))
    return _anyres("transformers llava_onevision", model, processor, shared)


def _anyres(name: str, model: Any, processor: Any, shared: Shared) -> Case:
    def encode(images: list) -> tuple[dict, list[int]]:
        batch = processor(images, return_tensors="pt")
        inputs, _ = _peer_inputs(shared, batch, [1])
        features = {key: inputs[key] for key in ("pixel_values", "image_sizes", "batch_num_images") if key in inputs}
        with torch.no_grad():
            found = model.get_image_features(**features, return_dict=True).pooler_output
        return _peer_inputs(shared, batch, [len(part) for part in found])

    return Case(name, model, model.model.vision_tower, model.model.language_model, encode)


def _tower(shared: Shared, width_name: str) -> dict[str, int]:
    """Numbers of the peers' towers: SO400M beside CLIP-L, else those of our tower."""
    if shared.shapes.dtype == torch.bfloat16:
        return SO400M
    width, layers, heads, inner = shared.shapes.tower
    return {width_name: width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": inner}


def _idefics3(shared: Shared) -> Case:
    processor = Idefics3ImageProcessorPil()
    config = Idefics3Config(
        vision_config={**_tower(shared, "hidden_size"), "image_size": 364, "patch_size": 14},
        text_config=shared.small_text(),
        image_token_id=IMAGE_TOKEN,
        scale_factor=2,
    )
    model = build(Idefics3ForConditionalGeneration, config, shared.shapes.dtype, shared.device)
    shared.give(model, "text_model")

    def encode(images: list) -> tuple[dict, list[int]]:
        batch = processor([[image] for image in images], return_tensors="pt")
        tiles = batch["pixel_attention_mask"].flatten(2).any(-1).sum(1).tolist()
        return _peer_inputs(shared, dict(batch), [169 * number for number in tiles])

    return Case("transformers idefics3", model, model.model.vision_model, model.model.text_model, encode)


def _internvl(shared: Shared) -> Case:
    processor = GotOcr2ImageProcessorPil(crop_to_patches=True, size={"height": 448, "width": 448}, max_patches=12)
    width, layers, heads, inner = shared.shapes.tower
    config = InternVLConfig(
        vision_config={
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": inner,
        },
        text_config=shared.small_text(),
        image_token_id=IMAGE_TOKEN,
    )
    model = shared.give(build(InternVLForConditionalGeneration, config, shared.shapes.dtype, shared.device))

    def encode(images: list) -> tuple[dict, list[int]]:
        batch = processor(images, return_tensors="pt")
        counts = [256 * number for number in batch["num_patches"].tolist()]
        return _peer_inputs(shared, {"pixel_values": batch["pixel_values"]}, counts)

    return Case("transformers internvl", model, model.model.vision_tower, model.model.language_model, encode)


def _qwen3_vl(shared: Shared) -> Case:
    """With a language model of its own: its class differs. Images of at most 1 megapixel, the class's own limit."""
    processor = Qwen2VLImageProcessorPil(patch_size=16)
    shapes = shared.shapes
    tower = {
        key.replace("num_attention_heads", "num_heads"): value for key, value in _tower(shared, "hidden_size").items()
    }
    depth = tower.pop("num_hidden_layers")
    head = shapes.text[0] // shapes.text[2]
    sections = [head // 2 - 2 * (head // 6), head // 6, head // 6]
    config = Qwen3VLConfig(
        vision_config={
            **tower,
            "depth": depth,
            "out_hidden_size": shapes.text[0],
            "deepstack_visual_indexes": list(range(depth))[:3],
        },
        text_config={
            **shapes.text_numbers(),
            "head_dim": head,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": sections},
        },
        image_token_id=IMAGE_TOKEN,
        video_token_id=IMAGE_TOKEN + 1,
        vision_start_token_id=IMAGE_TOKEN + 2,
        vision_end_token_id=IMAGE_TOKEN + 3,
    )
    model = build(Qwen3VLForConditionalGeneration, config, shapes.dtype, shared.device)

    def encode(images: list) -> tuple[dict, list[int]]:
        batch = processor(images, return_tensors="pt")
        counts = (batch["image_grid_thw"].prod(1) // 4).tolist()
        inputs, _ = _peer_inputs(shared, dict(batch), counts)
        inputs["image_grid_thw"] = inputs["image_grid_thw"].to(shared.device)
        return {**inputs, "mm_token_type_ids": (inputs["input_ids"] == IMAGE_TOKEN).long()}, counts

    return Case("transformers qwen3_vl", model, model.model.visual, model.model.language_model, encode)


PEERS: dict[str, Callable[[Shared], Case]] = {
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "idefics3": _idefics3,
    "internvl": _internvl,
    "qwen3_vl": _qwen3_vl,
}


def num_parameters(module: nn.Module) -> int:
    """Number of weights of a module."""
    return sum(parameter.numel() for parameter in module.parameters())
