"""Every registered part inside a tiny model, and pictures cut into views of every kind."""

import functools
import json
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from builders.sketches import SKETCHES
from builders.tiny import (
    make_batch,
    plain_tokenizer,
    random_image,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)
from hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.parts_hires_lmm import SLOTS
from hires_lmm.processing.planners_hires_lmm import PLANNERS, Planner, PlannerLimits


QUESTION = "What is it?"
TEXT = f"<image>{QUESTION}"
SIZES = ((90, 60), (40, 200), (60, 50))
SMALL = {
    "num_queries": 4,
    "later_queries": 2,
    "num_layers": 1,
    "num_heads": 2,
    "pool": [2, 3],
    "shape": [3, 2, 3],
    "query_width": 16,
    "number": 7,
    "token_id": plain_tokenizer()(QUESTION).input_ids[1],
}
"""Given to every part that has an option of that name."""

VARIANTS: dict[str, dict[str, dict]] = {
    "sa_perceiver": {
        "softmax": {"activation": "softmax", "self_attention": "softmax", "score_scale": "1/sqrt(d)"},
        "layer": {"norm": "layer", "self_attention": "none"},
    },
    "conv_merge": {"bare": {"norm": False, "residual": False}},
    "mixture": {"release": {"gate": "release"}, "crops": {"mix_on": "crops"}},
    "router": {
        "attention": {"score": "attention"},
        "saliency": {"score": "saliency", "on": "all"},
        "threshold": {"keep": {"rule": "threshold", "gamma": 0.5}},
    },
    "fusion": {"blind": {"question": False}},
    "blend": {"tower": {"of": "vision_tower", "layers": 1}},
    "dyvte": {"per_layer": {"gate": "per_layer"}},
    "yopo": {
        "heads": {"heads": [[1, 1, 0, 1], [0, 1, 1, 0]], "drop_from": 1},
        "release": {"heads": [[1, 1, 0, 1], [0, 1, 1, 0]], "drop_from": 1, "causal": False, "renormalise": False},
    },
    "mqt": {"content": {"key_mode": "content"}},
    "self_mining_sampler": {"plain": {"residual": False}},
    "slice_restore": {"one layer, coarse": {"layers": [1], "down_sampling": 3}},
    "globalcom2": {
        "probabilities": {"score": "probabilities"},
        "share": {"ratio": 0.5},
        "release": {"compat": "release"},
    },
    "prompt_fuser": {"release": {"compat": "release"}},
    "mean_global": {"first": {"rule": "first"}},
    "tower_mixer": {"scalar": {"weights": "scalar"}},
}
"""Further options of parts that work in several ways; every part also runs with its defaults."""

READS = {
    "gate": ("global", "crops", "detail"),
    "conv_gate": ("global", "crops", "detail"),
    "object_tokens": ("global", "crops", "detail"),
    "dual_enhancement": ("global", "crops", "strided"),
    "pool3d": ("global", "frames"),
    "mean_global": ("global", "frames"),
    "sample_tokens": ("global", "frames"),
    "tower_mixer": ("global", "frames", "detail"),
}
"""Kinds of views that a part reads, where they are not global views and crops."""

BESIDE = {"prompt_fuser": {"view_ops": [{"part": "mini_compressor", "num_queries": 4, "num_heads": 2}]}}
"""Parts without which a part cannot be."""

MAKES = {"mini_compressor": "detail", "prompt_fuser": "detail", "object_tokens": "objects"}
"""Kind of the views that a part makes."""


@dataclass(frozen=True)
class EveryKind(PlannerLimits):
    """Options of the planner `every_kind`: which kinds of views an image gets, in that order."""

    kinds: tuple = ("global", "crops")


def plan_every_kind(height: int, width: int, options: EveryKind):
    """The canvas of `multiple`, cut contiguously, by strides and, its first two views, as frames."""
    plan = PLANNERS["multiple"](height, width, options)
    whole, *crops = plan.views
    last = replace(crops[-1], span=(0, 4, 0, 3))  # one that does not enter whole
    views = {
        "global": [whole],
        "crops": [*crops[:-1], last],
        "strided": [replace(view, kind=int(Kind.STRIDED), box=whole.box) for view in crops],
        "frames": [replace(view, kind=int(Kind.FRAME)) for view in crops[:2]],
    }
    return replace(plan, views=tuple(view for kind in options.kinds for view in views.get(kind, ())))


@dataclass(frozen=True)
class Case:
    """One part with some of its options."""

    slot: str
    name: str
    way: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, (self.slot, self.name, self.way)))

    @property
    def part(self) -> type:
        """Its class."""
        return SLOTS[self.slot][self.name] if self.name in SLOTS[self.slot] else SKETCHES[self.name][1]

    @property
    def names(self) -> tuple[str, ...]:
        """Its name and those of the parts without which it cannot be."""
        return (self.name, *(spec["part"] for specs in BESIDE.get(self.name, {}).values() for spec in specs))

    def has(self, option: str) -> bool:
        """Whether the part has an option of that name."""
        return option in {field.name for field in fields(self.part.Options)}

    def spec(self, **options) -> dict:
        """The part as the configuration names it."""
        small = {name: value for name, value in SMALL.items() if self.has(name)}
        return {"part": self.name, **small, **VARIANTS.get(self.name, {}).get(self.way, {}), **options}


CASES = [
    Case(slot, name, way) for slot, parts in SLOTS.items() for name in parts for way in ("", *VARIANTS.get(name, {}))
]
SKETCH_CASES = [Case(slot, name, way) for name, (slot, _) in SKETCHES.items() for way in ("", *VARIANTS.get(name, {}))]


def register(monkeypatch) -> None:
    """Put the sketches and the planner of every kind into the registries, for one test."""
    monkeypatch.setitem(PLANNERS, "every_kind", Planner(plan_every_kind, EveryKind))
    for name, (slot, part) in SKETCHES.items():
        monkeypatch.setitem(SLOTS[slot], name, part)


def config_of(case: Case, kinds: tuple, layout: dict, **options):
    """The configuration of a tiny model with one part, whose images have views of the given kinds."""
    empty = getattr(HiResLmmConnectorConfig(), case.slot)
    spec = case.spec(**options)
    several = [spec] if isinstance(empty, list) else {"mine": spec} if empty == {} else spec
    changes = {}
    order = dict.fromkeys([*kinds, *([MAKES[case.name]] if case.name in MAKES else [])])
    if "detail" in kinds:
        changes["extra_towers"] = {"fine": tiny_vision_config("siglip", 84, hidden_size=16).to_dict()}
    return tiny_config(
        "llava_next",
        planner={"name": "every_kind", "kinds": [kind for kind in kinds if kind != "detail"]},
        connector_config={
            **BESIDE.get(case.name, {}),
            case.slot: several,
            "layout": {"order": list(order), "crop_order": "views", **layout},
        },
        **changes,
    )


@functools.cache
def _built(case: Case, kinds: tuple, layout: str, options: str):
    config = config_of(case, kinds, json.loads(layout), **json.loads(options))
    return tiny_model(config), tiny_processor(config)


def built(case: Case, kinds: tuple = (), layout: dict | None = None, **options):
    """Model, which is not to be changed, and processor."""
    kinds = kinds or READS.get(case.name, ("global", "crops"))
    return _built(case, kinds, json.dumps(layout or {}), json.dumps(options))


def batch_of(processor, *sizes, text: str = TEXT, **options) -> dict[str, torch.Tensor]:
    """One row an image."""
    return dict(make_batch(processor, [(text, [random_image(*size)]) for size in sizes], **options))


def part_of(model, case: Case) -> nn.Module:
    """The part in a model."""
    found = getattr(model.model.connector, case.slot)
    return next(iter(found.children())) if isinstance(found, (nn.ModuleList, nn.ModuleDict)) else found
