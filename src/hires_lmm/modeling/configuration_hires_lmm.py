"""Configuration of the model and of its connector, and the published combinations as presets."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.auto import AutoConfig

from .compat_hires_lmm import CACHE_NAMES, keeps_state, warn_if_untested
from .geometry_hires_lmm import KINDS, MADE_KINDS, MAIN_TOWER, OBJECTS, WHOLE_KINDS, Grid, Kind
from .own_parts_hires_lmm import (
    HiResLmmOwnPartsMixin,
    as_name,
    is_known,
    list_names,
    map_names,
    map_planner,
    part_loader,
)
from .tower_table_hires_lmm import (
    LAYERS_LIMIT,
    check_tower,
    complete_tower,
    patch_side,
    tower_depth,
    tower_family,
    tower_grid,
    tower_levels,
    tower_width,
    view_side,
)


AUTO_MAP = {
    "AutoConfig": "configuration_hires_lmm.HiResLmmConfig",
    "AutoModel": "modeling_hires_lmm.HiResLmmModel",
    "AutoModelForImageTextToText": "modeling_hires_lmm.HiResLmmForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_hires_lmm.HiResLmmForConditionalGeneration",
    "AutoModelForSequenceClassification": "modeling_hires_lmm.HiResLmmForSequenceClassification",
    "AutoProcessor": "processing_hires_lmm.HiResLmmProcessor",
    "AutoImageProcessor": "image_processing_hires_lmm.HiResLmmImageProcessor",
}

TEXT_REFUSED = {
    "minimax": "its cache is of a class of its own, which generation here does not make",
    "recurrent_gemma": "padding enters its state, so rows of a batch would change",
    "rwkv": "padding enters its state, so rows of a batch would change",
}
"""Language models by `model_type` that cannot be here, and why."""

LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))

_MLP = {"part": "mlp"}
_COMPRESS_144 = {"part": "query_compressor", "on": "crops", "num_queries": 144}
_NEWLINE = {"place": "token_row_end", "on": "crops"}
_CONVNEXT_LARGE = {
    "model_type": "convnext",
    "depths": [3, 3, 27, 3],
    "hidden_sizes": [192, 384, 768, 1536],
    "image_size": 768,
}
_COSINE = {"part": "router", "on": "crops", "score": "cosine"}

PRESETS: dict[str, dict] = {
    "llava_next": {
        "planner": {"name": "llava_next"},
        "connector_config": {"adapter": _MLP, "layout": {"separators": {"newline": _NEWLINE}}},
    },
    "llava_hd": {
        "planner": {"name": "slime", "global_view": "pad", "unpad": True, "enlarge": False},
        "connector_config": {"adapter": _MLP, "layout": {"separators": {"newline": _NEWLINE}}},
    },
    "slime": {
        "planner": {"name": "slime"},
        "connector_config": {
            "view_ops": [_COMPRESS_144],
            "adapter": {"part": "mixture"},
            "token_ops": [{**_COSINE, "keep": {"rule": "threshold", "gamma": 0.75}}],
        },
    },
    "slime_release": {
        "planner": {"name": "slime_release"},
        "question_scope": "prompt",
        "connector_config": {
            "view_ops": [_COMPRESS_144],
            "adapter": {"part": "mixture", "gate": "release"},
            "layout": {"separators": {"separator": {"place": "between_views", "value": [1919]}}},
            "token_ops": [{**_COSINE, "keep": {"rule": "threshold", "gamma": 0.95}}],
        },
    },
    "monkey": {
        "planner": {"name": "slime", "max_crops": 6},
        "connector_config": {
            "view_ops": [{"part": "query_compressor", "on": "all", "num_queries": 256}],
            "adapter": {"part": "linear"},
            "layout": {"crop_order": "views"},
        },
    },
    "fusion": {
        "planner": {"name": "hd", "max_crops": 9},
        "vision_feature_layer": -1,
        "connector_config": {
            "view_ops": [{"part": "conv_merge"}],
            "adapter": {"part": "identity"},
            "layout": {"crop_order": "views", "separators": {"view_end": {"place": "view_end"}}},
            "token_ops": [{"part": "fusion"}],
        },
    },
    "vlsa": {
        "planner": {"name": "multiple", "enlarge": False},
        "connector_config": {"view_ops": [{"part": "sa_perceiver"}], "adapter": _MLP},
    },
    "mqt": {
        "planner": {"name": "slime", "max_crops": 4, "views": "global"},
        "connector_config": {
            "view_ops": [{"part": "mqt"}],
            "adapter": {"part": "linear", "bias": False},
            "layout": {"crop_order": "views"},
        },
    },
    "llava_mini": {
        "planner": {"name": "slime", "max_crops": 4},
        "connector_config": {
            "view_ops": [{"part": "mini_compressor"}],
            "adapter": _MLP,
            "layout": {"order": ["crops", "global", "frames", "detail"]},
            "token_ops": [{"part": "prompt_fuser"}],
        },
    },
    "mg_llava": {
        "planner": {"name": "multiple", "views": "global"},
        "extra_towers": {"hires": _CONVNEXT_LARGE},
        "connector_config": {
            "view_ops": [{"part": "object_tokens"}, {"part": "conv_gate"}],
            "adapter": _MLP,
            "layout": {"order": ["global", "crops", "objects"]},
        },
    },
    "llava_uhd": {
        "planner": {"name": "llava_uhd"},
        "unequal_views": True,
        "connector_config": {
            "view_ops": [{"part": "uhd_resampler"}],
            "adapter": {"part": "identity"},
            "layout": {
                "order": ["crops", "global"],
                "crop_order": "views",
                "separators": {
                    "comma": {"place": "crop_column", "value": [29892], "on": "crops"},
                    "newline": {"place": "crop_row_end", "value": [13], "on": "crops"},
                },
            },
        },
    },
    "inf_llava": {
        "planner": {"name": "dual"},
        "connector_config": {
            "view_ops": [{"part": "dual_enhancement"}],
            "adapter": _MLP,
            "layout": {"order": ["global", "crops", "strided"]},
        },
    },
    "pllava": {
        "planner": {"name": "frames"},
        "video_planner": {"name": "frames", "num_frames": 16, "min_frames": 16, "frame_sampling": "uniform"},
        "connector_config": {"adapter": _MLP, "map_ops": [{"part": "pool3d"}], "layout": {"order": ["frames"]}},
    },
    "ts_llava": {
        "planner": {"name": "llava_next"},
        "video_planner": {"name": "thumbnail", "num_frames": 50, "collage": 6, "frame_sampling": "linspace"},
        "connector_config": {
            "view_ops": [{"part": "sample_tokens"}],
            "adapter": _MLP,
            "layout": {"order": ["frames", "global", "crops"], "separators": {"newline": _NEWLINE}},
        },
    },
    "slime_video": {
        "planner": {"name": "slime_release"},
        "video_planner": {"name": "frames", "num_frames": 8, "grid": [2, 4]},
        "question_scope": "prompt",
        "connector_config": {
            "view_ops": [{"part": "mean_global"}, {**_COMPRESS_144, "on": ["crops", "frames"]}],
            "adapter": {"part": "mixture", "gate": "release"},
            "layout": {
                "order": ["global", "crops", "frames"],
                "separators": {"separator": {"place": "between_views", "value": [1919]}},
            },
            "token_ops": [{**_COSINE, "on": ["crops", "frames"], "keep": {"rule": "threshold", "gamma": 0.95}}],
        },
    },
    "hires_llava": {
        "planner": {"name": "slime", "max_crops": 9, "enlarge": False},
        "connector_config": {
            "view_ops": [{"part": "self_mining_sampler"}],
            "adapter": _MLP,
            "layer_ops": [{"part": "slice_restore"}],
        },
    },
}


def check_dtype(dtype: Any, where: str) -> None:
    """Refuse the name of a number format that torch does not have, or that holds no fractions."""
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ValueError(f"{where}={dtype!r} is no floating-point format; use float32, bfloat16 or float16.")


@strict
class HiResLmmConnectorConfig(PreTrainedConfig):
    """Configuration of the connector: the named parts between vision tower and language model.

    Args:
        view_ops (`list[dict]`, *optional*): Operations on the features of views, each `{"part": name, **options}`.
        adapter (`dict`, *optional*): The adapter; a two-layer perceptron by default.
        tower_adapters (`dict[str, dict]`, *optional*): Adapters of extra towers by name; like the main one by default.
        map_ops (`list[dict]`, *optional*): Operations on adapted features of views.
        token_ops (`list[dict]`, *optional*): Operations on the token sequence.
        layer_ops (`list[dict]`, *optional*): Operations behind layers of the language model or the vision tower.
        position_plan (`dict`, *optional*): Positions and mask of the language model; one after the other by default.
        heads (`dict[str, dict]`, *optional*): By name, modules on the last hidden states at a token.
        layout (`dict`, *optional*): Order of views and separators, see `LayoutOptions`.
        initializer_range (`float`): Standard deviation of new linear weights.

    Raises:
        ValueError: If a part or an option is unknown or out of range.
    """

    model_type = "hires_lmm_connector"
    base_config_key = "connector_config"

    view_ops: list | None = None
    adapter: dict | None = None
    tower_adapters: dict | None = None
    map_ops: list | None = None
    token_ops: list | None = None
    layer_ops: list | None = None
    position_plan: dict | None = None
    heads: dict | None = None
    layout: dict | None = None
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        own = ("model_type", "transformers_version", "dtype", "torch_dtype", "architectures")
        unknown = [
            key for key in kwargs if not key.startswith("_") and key not in own and not hasattr(type(self), key)
        ]
        if unknown:
            known = ", ".join(type(self).__annotations__)
            raise ValueError(f"Unknown key {unknown[0]!r} in connector_config; known keys: {known}.")
        super().__post_init__(**kwargs)
        self.view_ops, self.map_ops, self.token_ops = self.view_ops or [], self.map_ops or [], self.token_ops or []
        self.layer_ops, self.heads = self.layer_ops or [], self.heads or {}
        self.adapter = self.adapter if self.adapter is not None else {"part": "mlp"}
        self.tower_adapters, self.layout = self.tower_adapters or {}, self.layout or {}
        self.map_parts(as_name)
        if all(map(is_known, self.part_names())):
            self.resolve()

    def map_parts(self, change: Callable[[Any], Any]) -> None:
        """Change the name of each part, in whatever slot."""
        for slot in type(self).__annotations__:
            setattr(self, slot, map_names(getattr(self, slot), change))

    def part_names(self) -> list[Any]:
        """The name of each part, in whatever slot."""
        return [name for slot in type(self).__annotations__ for name in list_names(getattr(self, slot))]

    def resolve(self) -> Any:
        """Classes and checked options of all parts, a `ResolvedChain`.

        Imported here: vLLM sends the class to its workers by value, with all that its module names.
        """
        from .parts_hires_lmm import resolve_chain

        return resolve_chain(self)


@strict
class HiResLmmConfig(HiResLmmOwnPartsMixin, PreTrainedConfig):
    """Configuration of a high-resolution multimodal model.

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*): Vision tower; CLIP by default.
        text_config (`dict` or `PreTrainedConfig`, *optional*): Language model; Llama by default.
        connector_config (`dict` or `PreTrainedConfig`, *optional*): Parts between the two.
        extra_towers (`dict[str, dict]`, *optional*): Configurations of further towers by name; each sees every image
            whole, at a size of its own, as `pixel_values_<name>`.
        unequal_views (`bool`): Views have sizes of their own, in multiples of a patch, in place of the tower's.
        planner (`dict`, *optional*): Name and limits of the slicing rule, read by `HiResLmmProcessor.from_config`.
        video_planner (`dict`, *optional*): The same for videos, with `num_frames`, `fps` and `frame_sampling`.
        image_token_id (`int`): Id of the placeholder token.
        vision_feature_layer (`int`): Layer of the tower whose hidden states are used; convolutional and timm towers
            give their last alone, -1.
        vision_view_size (`int`, *optional*): Side of views in pixels, where it is not the tower's own or the tower
            names none.
        vision_patch_size (`int`, *optional*): Pixels from one feature to the next, of a timm tower that names none.
        vision_chunk_size (`int`, *optional*): Most views that pass the tower at once, which bounds its memory; None =
            all views of a batch.
        question_scope (`str`): `"turn"`: an image is routed by the user text of its own turn. `"prompt"`: by the whole
            prompt, as released SliME does.
        answer_prefix_ids (`list[int]`, *optional*): Ids that open an answer in the chat template.
        question_prefix_ids (`list[int]`, *optional*): Ids that open a user turn in the chat template.
        training_stage (`str`, *optional*): Stage of training that wrote the weights; the model does not read it.
        tie_word_embeddings (`bool`): Share input and output embeddings; taken from `text_config` if set there.
        auto_map (`dict`, *optional*): Classes for loading without this package; complete by default.

    Raises:
        ValueError: If the parts do not fit together.
    """

    model_type = "hires_lmm"
    keys_to_ignore_at_inference = [
        *CACHE_NAMES,
        "hidden_states",
        "attentions",
        "image_outputs",
        "packed_attention_mask",
        "num_drafted",
        "kept_mask",
        "token_map",
        "aux",
        "heads",
        "router_logits",
        "aux_loss",
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "connector_config": SubConfigSpec(config_class=HiResLmmConnectorConfig),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    extra_towers: dict | None = None
    unequal_views: bool = False
    planner: dict[str, Any] | None = None
    video_planner: dict[str, Any] | None = None
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    vision_view_size: int | None = None
    vision_patch_size: int | None = None
    vision_chunk_size: int | None = None
    question_scope: Literal["turn", "prompt"] = "turn"
    answer_prefix_ids: list | None = None
    question_prefix_ids: list | None = None
    training_stage: str | None = None
    tie_word_embeddings: bool = False
    auto_map: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        warn_if_untested()
        dtypes = {"dtype": self.dtype, "torch_dtype": kwargs.get("torch_dtype")}
        parts = {name: getattr(self, name) for name in type(self).sub_configs_defaults}
        for name, part in parts.items():
            if isinstance(part, dict):
                dtypes.update({f"{name}.{key}": part.get(key) for key in ("dtype", "torch_dtype")})
        for where, dtype in dtypes.items():
            check_dtype(dtype, where)
        super().__post_init__(**kwargs)
        self.vision_config = complete_tower(self.vision_config, self.vision_view_size, self.vision_patch_size)
        self._read_extra_towers()
        self._check_halves()
        self.planner = map_planner(self.planner if self.planner is not None else {"name": "slime"}, as_name)
        self.video_planner = None if self.video_planner is None else map_planner(self.video_planner, as_name)
        self.auto_map = {**AUTO_MAP, **(self.auto_map or {})}
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True
        if self.vision_chunk_size is not None and self.vision_chunk_size < 1:
            raise ValueError(f"vision_chunk_size={self.vision_chunk_size} must be at least 1, or null for all views.")
        if all(map(is_known, self.connector_config.part_names())):
            self.fitted_chain()

    def _check_halves(self) -> None:
        """Refuse towers and language models that cannot be, before anyone builds them layer by layer."""
        towers = {"vision_config": self.vision_config}
        towers |= {f"extra_towers.{name}": tower for name, tower in self.extra_tower_configs().items()}
        for where, tower in towers.items():
            check_tower(tower, where)
        if self.text_config.model_type in TEXT_REFUSED:
            kind = self.text_config.model_type
            raise ValueError(f"text_config is of type {kind!r}: {TEXT_REFUSED[kind]}; use another language model.")
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            value = getattr(self.text_config, name, None)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                kind = self.text_config.model_type
                raise ValueError(f"text_config.{name}={value!r} of a {kind!r} must be an integer above 0.")
        if self.text_config.num_hidden_layers > LAYERS_LIMIT:
            layers = self.text_config.num_hidden_layers
            raise ValueError(f"text_config.num_hidden_layers={layers} is more than {LAYERS_LIMIT}.")
        kind, family = self.vision_config.model_type, tower_family(self.vision_config)
        if self.unequal_views and family.is_fixed:
            raise ValueError(
                f"unequal_views needs a tower that takes views of any size; one of type {kind!r} takes its own alone."
            )
        if not family.has_layers and self.vision_feature_layer != -1:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer}, but a tower of type {kind!r} gives its last "
                "features alone; pass vision_feature_layer=-1."
            )

    def _read_extra_towers(self) -> None:
        """Bring the extra towers into one form: complete dicts; their names become arguments of calls."""
        for name, tower in (self.extra_towers or {}).items():
            taken = (MAIN_TOWER, OBJECTS)
            if not isinstance(name, str) or not name.isidentifier() or name in taken or hasattr(dict, name):
                raise ValueError(
                    f"extra_towers has the name {name!r}; use a plain word other than {', '.join(taken)}."
                )
            if isinstance(tower, dict) and "model_type" not in tower:
                raise ValueError(f"extra_towers.{name} has no model_type, such as 'clip_vision_model'; add it.")
            if not isinstance(tower, (dict, PreTrainedConfig)):
                raise ValueError(f"extra_towers.{name}={tower!r} is no configuration; pass a dict with a model_type.")
        towers = {
            name: AutoConfig.for_model(**tower) if isinstance(tower, dict) else tower
            for name, tower in (self.extra_towers or {}).items()
        }
        self.extra_towers = {name: complete_tower(tower).to_dict() for name, tower in towers.items()} or None

    @classmethod
    def from_preset(
        cls, name: str, vision_config: Any = None, text_config: Any = None, **changes: Any
    ) -> "HiResLmmConfig":
        """Build the configuration of a published combination.

        Args:
            name (`str`): Name of the preset.
            changes: Fields of `HiResLmmConfig` that replace those of the preset; `planner`, `video_planner` and
                `connector_config` are merged key by key.

        Raises:
            ValueError: If the preset is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"Unknown preset {name!r}; known presets: {', '.join(PRESETS)}.")
        unknown = [key for key in changes if key not in cls.__dataclass_fields__]
        if unknown:
            raise ValueError(f"HiResLmmConfig has no field {unknown[0]!r}; parts belong into connector_config.")
        values = deepcopy(PRESETS[name])
        for key, value in changes.items():
            merge = key in ("planner", "video_planner", "connector_config") and isinstance(value, dict)
            values[key] = {**values.get(key, {}), **value} if merge else value
        config = cls(vision_config=vision_config, text_config=text_config, **values)
        planner = dict(config.planner or {})
        if planner["name"] == "llava_next" and "pinpoints" not in planner:
            side = config.view_size
            config.planner = {**planner, "pinpoints": [[r * side, c * side] for r, c in LLAVA_NEXT_GRIDS]}
        return config

    def part_names(self) -> list[Any]:
        """The names of all parts and of the planners."""
        planners = list_names([self.planner, self.video_planner or {}], "name")
        return [*self.connector_config.part_names(), *planners]

    def load_parts(self, trust_remote_code: Any = None, source: Any = None, **hub: Any) -> None:
        """Find the classes of the user's own parts; models call it when they are made.

        Args:
            trust_remote_code (`bool`, *optional*): Whether the files of the checkpoint may run; they may as well where
                its code runs already.
            source (`str`, *optional*): Its folder or Hub id; by default where the configuration was read.
            hub: `revision`, `token` and the like.

        Raises:
            ValueError: If a part is neither trusted nor imported.
        """
        load = part_loader(source or self.name_or_path, bool(trust_remote_code), type(self).__module__, hub)
        self.connector_config.map_parts(load)
        self.planner = map_planner(self.planner, load)
        self.video_planner = None if self.video_planner is None else map_planner(self.video_planner, load)
        self.fitted_chain()

    @property
    def view_size(self) -> int:
        """Side of a view in pixels."""
        return view_side(self.vision_config)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return patch_side(self.vision_config)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Patch rows and columns of a view."""
        return tower_grid(self.vision_config)

    @property
    def vision_width(self) -> int:
        """Channels of the main tower."""
        return tower_width(self.vision_config)

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Names of the extra towers."""
        return tuple(self.extra_towers or {})

    def extra_tower_configs(self) -> dict[str, PreTrainedConfig]:
        """Configurations of the extra towers; number format and attention are those of the main one."""
        towers = {name: AutoConfig.for_model(**values) for name, values in (self.extra_towers or {}).items()}
        for tower in towers.values():
            tower.dtype = self.vision_config.dtype
            if hasattr(tower, "num_attention_heads"):
                tower._attn_implementation = self.vision_config._attn_implementation
        return towers

    def part_context(self) -> Any:
        """What the towers give and the language model takes, a `PartContext`."""
        from .bases_hires_lmm import PartContext

        towers, depth, layer = self.extra_tower_configs(), tower_depth(self.vision_config), self.vision_feature_layer
        kinds = self.connector_config.resolve().kinds
        grids = {(int(KINDS[name]), MAIN_TOWER): Grid(*self.patch_grid) for name in kinds if name not in MADE_KINDS}
        for name, tower in towers.items():
            grids[int(Kind.DETAIL), name] = Grid(*tower_grid(tower), stride=None, whole=True, source=WHOLE_KINDS)
        return PartContext(
            self.connector_config,
            self.vision_width,
            self.text_config.hidden_size,
            grids,
            self.patch_grid,
            self.text_config.vocab_size,
            {name: tower_width(tower) for name, tower in towers.items()},
            {name: tower_levels(tower) for name, tower in towers.items()},
            {
                "language_model": self.text_config.num_hidden_layers,
                "vision_tower": layer if layer >= 0 else depth + 1 + layer,  # the layers whose result is used
            },
        )

    def fitted_chain(self) -> Any:
        """All parts with what surrounds each, a `FittedChain`; refused where they do not fit together."""
        resolved = self.connector_config.resolve()
        inside = any(op.options.of == "vision_tower" for op in resolved.layer_ops)
        if inside and not tower_family(self.vision_config).has_layers:
            raise ValueError(
                f"A layer op of the vision tower needs layers to run behind, which a tower of type "
                f"{self.vision_config.model_type!r} does not show; leave it out, or use a ViT of transformers."
            )
        if inside and self.unequal_views:
            raise ValueError("A layer op of the vision tower needs views of one size; leave out unequal_views.")
        chain = resolved.fit(self.part_context())
        if chain.width != self.text_config.hidden_size:
            raise ValueError(
                f"The adapter gives features of width {chain.adapted.width}, but the language model has width "
                f"{self.text_config.hidden_size}; use an adapter that projects, such as mlp."
            )
        for name, separator in chain.layout.parts().items():
            for mark in (each for ids in separator.flat() for each in ids):
                if separator.value != "learned" and not 0 <= mark < self.text_config.vocab_size:
                    raise ValueError(
                        f"layout.separators.{name} is the token id {mark}, but the language model has "
                        f'{self.text_config.vocab_size} tokens; use one of them, or "learned".'
                    )
        for step in chain.steps if self.unequal_views else ():
            if step.part.needs_equal_views and any(grid.stride is not None for grid in step.context.grids.values()):
                raise ValueError(
                    f"{step.part.__name__} reads views of one size; leave out unequal_views, or put a part that makes "
                    "as many tokens of every view before it, such as uhd_resampler."
                )
        from .towers_hires_lmm import check_needs

        for step in chain.steps:
            check_needs(self.vision_config, step.traits.needs)
        return chain

    def token_layout(self) -> dict:
        """What the processor counts by, as JSON values: token grids, layout, own counts, who consumes the budget."""
        return self.fitted_chain().token_layout()


def check_fit(config: HiResLmmConfig, language_model: Any) -> None:
    """Refuse settings that tower or language model cannot serve."""
    vocabulary, layer = config.text_config.vocab_size, config.vision_feature_layer
    depth = tower_depth(config.vision_config)
    if not 0 <= config.image_token_id < vocabulary:
        raise ValueError(
            f"image_token_id={config.image_token_id} is no token of the language model, which has {vocabulary}; add a "
            "token and resize, or use a spare one."
        )
    if tower_family(config.vision_config).has_layers and not -depth - 1 <= layer <= depth:
        raise ValueError(f"vision_feature_layer={layer} does not exist; the vision tower has {depth} layers.")
    if config.connector_config.position_plan is not None and keeps_state(config.text_config):
        raise ValueError(
            f"A position plan moves what attention sees, and the language model {config.text_config.model_type!r} has "
            "recurrent layers, which read in order; leave position_plan out."
        )


__all__ = ["HiResLmmConfig", "HiResLmmConnectorConfig"]
