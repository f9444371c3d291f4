"""What a processor is built of: options that fit a model, and a tokenizer that knows the image token."""

from typing import Any

from .image_processing_hires_lmm import HiResLmmImageProcessorKwargs
from .planners_hires_lmm import find_planner, find_video_planner
from .tower_table_hires_lmm import TOWERS, known_stats, view_side


PLANNERS_WITH_FILTERS = ("hd",)
VIDEO_NAMES = ("num_frames", "fps", "frame_sampling")
"""Options of the image processor that a configuration holds with its planner of videos."""

STAT_NAMES = ("image_mean", "image_std", "resample")
TEMPLATE_BY_TOKEN = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}


def refuse_unknown(given: set[str], known: set[str], what: str) -> None:
    """An error that names what is not known, and what is."""
    unknown = sorted(given - known)
    if unknown:
        raise ValueError(f"Unknown {what} {unknown}; the known ones are {', '.join(sorted(known)) or 'none'}.")


def known_token_id(tokenizer: Any, token: str) -> int:
    """The id of a token that every text is split at."""
    if tokenizer is None:
        raise ValueError("HiResLmmProcessor needs a tokenizer and an image processor; pass both.")
    ids = tokenizer(token + token, add_special_tokens=False)["input_ids"]
    if len(ids) != 2 or ids[0] != ids[1] or ids[0] != tokenizer.convert_tokens_to_ids(token):
        raise ValueError(
            f"The tokenizer writes {token!r} twice as ids {ids}, so it does not know it as one token; build the "
            f"processor with HiResLmmProcessor.from_config, or call tokenizer.add_special_tokens first."
        )
    return ids[0]


def place_image_token(tokenizer: Any) -> tuple[str, int]:
    """The image token and its id; it is added to the tokenizer where it is missing."""
    token = tokenizer.image_token if hasattr(tokenizer, "image_token") else "<image>"
    if token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return token, tokenizer.convert_tokens_to_ids(token)


def prepare_tokenizer(tokenizer: Any, image_token_id: int) -> str:
    """Place the image token and pad on the left; returns the token."""
    token, found = place_image_token(tokenizer)
    if found != image_token_id:
        raise ValueError(
            f"The tokenizer has {token!r} as id {found}, the config has image_token_id={image_token_id}; set "
            f"image_token_id={found} in the config and let the vocabulary have at least {len(tokenizer)} rows."
        )
    pad_left(tokenizer)
    return token


def pad_left(tokenizer: Any) -> None:
    """Pad as generation needs it, also once saved."""
    tokenizer.padding_side = "left"
    tokenizer.init_kwargs["padding_side"] = "left"


def choose_template(tokenizer: Any) -> str:
    """The template for a text model: its own if that reads images, else the one its special tokens belong to."""
    own = tokenizer.chat_template
    if isinstance(own, str) and "'image'" in own.replace('"', "'"):
        return own
    vocabulary = tokenizer.get_vocab()
    return next((name for token, name in TEMPLATE_BY_TOKEN.items() if token in vocabulary), "plain")


def _view_size(vision_config: Any) -> int:
    size = vision_config.image_size if hasattr(vision_config, "image_size") else None
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise ValueError(f"vision_config.image_size={size!r} is no side of a square; pass view_size=… (pixels).")
    return size


def image_options(config: Any, image_stats: Any = None, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """Options of the image processor that fits a model, some of them changed."""
    changes = changes or {}
    name, _, options = find_planner(config.planner)
    shared = HiResLmmImageProcessorKwargs.__annotations__
    own = {key: options.pop(key) for key in list(options) if key not in shared}
    options["planner"] = {"name": name, **own} if own else name
    if config.video_planner is not None:
        name, _, given = find_video_planner(config.video_planner)
        options.update({key: given.pop(key) for key in VIDEO_NAMES if key in given})
        options["video_planner"] = {"name": name, **given} if given else name
    options["extra_towers"] = _extra_towers(config)
    options["token_layout"] = config.token_layout()
    options["patch_size"] = config.vision_config.patch_size
    if not {"view_size", "size"} & set(changes):
        options["view_size"] = _view_size(config.vision_config)
    planner = find_planner(changes.get("planner", options["planner"]))[0]
    options.update(_tower_stats(config.vision_config.model_type, planner, image_stats))
    return {**options, **changes}


def _extra_towers(config: Any) -> dict[str, dict] | None:
    """Size and numbers of the views of extra towers."""
    towers = {}
    for name, tower in config.extra_tower_configs().items():
        stats = known_stats(tower.model_type)
        if stats is None:
            raise ValueError(f"Mean and deviation of the extra tower {name!r} ({tower.model_type}) are not known.")
        towers[name] = {"size": view_side(tower), **{key: list(stats[key]) for key in ("image_mean", "image_std")}}
    return towers or None


def _tower_stats(model_type: str, planner: str, image_stats: Any) -> dict[str, Any]:
    if image_stats is None:
        stats = known_stats(model_type)
        if stats is None:
            known = ", ".join(name for name, family in TOWERS.items() if family.stats is not None)
            raise ValueError(f"vision_config.model_type={model_type!r} is none of {known}; pass image_stats=….")
        if planner in PLANNERS_WITH_FILTERS:
            del stats["resample"]
        return stats
    if not isinstance(image_stats, dict):
        image_stats = {name: getattr(image_stats, name) for name in STAT_NAMES}
    refuse_unknown(set(image_stats), set(STAT_NAMES), "image_stats")
    return dict(image_stats)
