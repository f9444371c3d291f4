"""Images to views: pixels, positions, boxes, spans and the number of tokens of each image."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch  # noqa: F401  # for `get_type_hints` of the options below, which names "torch.device"
from huggingface_hub.dataclasses import validate_typed_dict
from huggingface_hub.errors import StrictDataclassError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    ImageInput,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs, Unpack

from .compat_hires_lmm import warn_if_untested
from .dense_layout_hires_lmm import CROP_TO_PATCHES, pack_samples, refuse_boxes, require_samples
from .frame_sampling_hires_lmm import Sampling
from .image_boxes_hires_lmm import check_objects, read_objects, write_objects
from .image_input_hires_lmm import (
    DEFAULT_PIXEL_LIMIT,
    flatten_budgets,
    flatten_images,
    open_image,
)
from .loading_names_hires_lmm import is_loading_name, is_service_name
from .own_parts_hires_lmm import HiResLmmOwnPartsMixin, as_name, map_planner, part_loader
from .planners_hires_lmm import Planner, find_planner, find_video_planner
from .reading_hires_lmm import DECODES
from .rendering_hires_lmm import check_views, cut, cut_towers, draw_sources, scale_and_shift
from .resizing_hires_lmm import RESIZE_BACKENDS
from .token_layout_hires_lmm import TokenLayout, apply_budget, check_frames, count_tokens, min_budget
from .video_input_hires_lmm import Frames, flatten_videos, open_video
from .view_plans_hires_lmm import PlannerLimits, ViewPlan, check_count


class HiResLmmImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """Options of `HiResLmmImageProcessor`, at construction and per call.

    Args:
        planner (`str`, `type` or `dict`): How images are cut: a name in `PLANNERS`, the class or name of a planner of
            your own, or a dict of its name and own options.
        video_planner (`str`, `type` or `dict`): The same for videos, a name in `VIDEO_PLANNERS`; it takes no option of
            the images' planner.
        num_frames (`int`, *optional*): Most frames of a video. `None`: all that were passed, and 16 of a file.
        fps (`float`, *optional*): In place of it, frames a second of a file.
        frame_sampling (`str`): How they are chosen: `"uniform"`, `"segments"` or `"linspace"`.
        view_size, patch_size (`int`): Side of a view and of a patch of the vision tower, pixels.
        max_crops (`int`, *optional*): Most crops of one image; `None` = the planner's own default.
        pinpoints (`list[list[int]]`, *optional*): Allowed canvas sizes (height, width), pixels.
        unpad (`bool`, *optional*): Whether only patches that show the image enter the sequence.
        global_view (`str`, *optional*): `"squeeze"` or `"pad"`.
        views (`str`): `"all"`, `"global"` or `"crops"`.
        enlarge (`bool`, *optional*): False: no crops of an image that its global view shows at its own size or larger.
        token_layout (`dict`, *optional*): `config.token_layout()` of the model; `None` = every patch is a token.
        extra_towers (`dict[str, dict]`, *optional*): Name of an extra tower -> `size`, `image_mean`, `image_std`; each
            sees every image whole, as `pixel_values_<name>`.
        max_image_tokens (`int` or `list[int]`, *optional*): Most placeholders of one image: global view, crops and
            marks together. In a call also one number an image: a list in their order, or nested as they are.
        image_layout (`str`, *optional*): What the processor gives. `"flat"`: one row a view. `"dense"`: one row a
            sample, see `pack_samples`, for trainers and wrappers that cut batches by sample. `None`: dense where a
            call of the processor asks for one padded tensor and passes equally long lists of images, one a text, as
            such trainers do; else, and in `apply_chat_template`, flat. The image processor alone is flat unless a call
            says `"dense"`, with one list a sample. It is not saved.
        image_boxes (`list`, *optional*): In a call, the objects of each image that become tokens, see `read_objects`.
        background (`list[int]`): Colour under transparent pixels, RGB.
        pixel_limit (`int`): Most pixels of a source image.
        resize_backend (`str`): `"torch"`, or `"pillow"`, several times slower, for the very pixels of published
            processors: bicubic and bilinear filters of both differ by at most 2 of 255 levels.
        decode (`str`): `"full"`, or `"scaled"`: a JPEG file is decoded at a half, a quarter or an eighth where no view
            needs more. Pixels differ a little; sizes, plan and boxes are those of the whole picture.
        num_threads (`int`, *optional*): Images that are read and drawn at once. `None`: as many threads as torch has,
            at most 4; 1 in the workers of a data loader.
    """

    planner: str | dict | type | None
    video_planner: str | dict | type | None
    num_frames: int | None
    fps: float | int | None
    frame_sampling: str | None
    view_size: int | None
    patch_size: int | None
    max_crops: int | None
    pinpoints: list | tuple | None
    unpad: bool | None
    global_view: str | None
    views: str | None
    enlarge: bool | None
    token_layout: dict | None
    extra_towers: dict | None
    max_image_tokens: int | list | tuple | None
    image_layout: str | None
    image_boxes: Any
    rescale_factor: float | int | None
    image_mean: float | int | list | tuple | None
    image_std: float | int | list | tuple | None
    background: list[int] | tuple[int, ...] | None
    pixel_limit: int | None
    resize_backend: str | None
    decode: str | None
    num_threads: int | None


FIXED_OPTIONS = {
    "do_resize": (None, True),
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "crop_size": (None,),
    "pad_size": (None,),
    "image_seq_length": (None,),
    "data_format": (None, ChannelDimension.FIRST, ChannelDimension.FIRST.value),
}
"""Options of transformers that mean nothing here, with the values that ask for nothing."""

PLANNER_NAMES = ("planner", "video_planner")
FORMATS = (ChannelDimension.FIRST.value, ChannelDimension.LAST.value)
TOKENS_LIMIT = 1_000_000
"""Most placeholders of one image."""


@dataclass(frozen=True)
class _Settings:
    """All options of one call, checked."""

    planner: Planner
    limits: PlannerLimits
    video_planner: Planner
    video_limits: PlannerLimits
    sampling: Sampling
    layout: TokenLayout
    max_image_tokens: Any
    resample: int | None
    scale: np.ndarray
    shift: np.ndarray
    background: tuple[int, int, int]
    image_mean: Any
    pixel_limit: int
    input_data_format: str | None
    do_rescale: bool
    extra_towers: dict | None
    rescale_factor: float
    resize_backend: str
    decode: str
    num_threads: int | None


class HiResLmmImageProcessor(HiResLmmOwnPartsMixin, PilBackend):
    """Cuts images of any size into views for a vision tower and counts their tokens.

    Args:
        kwargs: See `HiResLmmImageProcessorKwargs` and transformers' `ImagesKwargs` (`resample`, `do_rescale`,
            `rescale_factor`, `do_normalize`, `image_mean`, `image_std`, `input_data_format`, `return_tensors`).
            `size` is another name of `view_size`; `resample=None` takes the planner's filters, else bicubic.

    Raises:
        ValueError: If an option is unknown or wrong.
    """

    valid_kwargs = HiResLmmImageProcessorKwargs
    model_input_names = ["pixel_values", "view_positions", "view_boxes", "view_spans"]

    planner = "slime"
    video_planner = "frames"
    num_frames = None
    fps = None
    frame_sampling = "uniform"
    view_size = 336
    patch_size = 14
    max_crops = None
    pinpoints = None
    unpad = None
    global_view = None
    views = "all"
    enlarge = None
    token_layout = None
    extra_towers = None
    max_image_tokens = None
    image_layout = None
    background = (255, 255, 255)
    pixel_limit = DEFAULT_PIXEL_LIMIT
    resize_backend = "torch"
    decode = "full"
    num_threads = None

    resample = None
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[HiResLmmImageProcessorKwargs]):
        warn_if_untested()
        options = {name: value for name, value in kwargs.items() if not is_service_name(name)}
        self._check_types(options)
        super().__init__(**_with_view_size(kwargs))
        self._settings({})
        if isinstance(self.max_image_tokens, (list, tuple)):
            raise ValueError(f"max_image_tokens={self.max_image_tokens!r} must be one number; pass lists in a call.")
        if self.__dict__.pop("image_boxes", None) is not None:
            raise ValueError("image_boxes belong to images; pass them in a call.")

    @property
    def size(self) -> dict[str, int]:
        """The size of a view, in transformers' form."""
        return {"height": self.view_size, "width": self.view_size}

    @size.setter
    def size(self, value: Any) -> None:
        if value is not None:
            self.view_size = _square_side(value)

    def part_names(self) -> list[Any]:
        """The names of the planners."""
        return [find_planner(self.planner)[0], find_video_planner(self.video_planner)[0]]

    @classmethod
    def get_image_processor_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, and the user's own planner: of the checkpoint if that is trusted.

        AutoImageProcessor keeps `trust_remote_code` for itself; AutoProcessor hands it on under another name.
        """
        is_trusted = bool(kwargs.pop("_trust_planner", None) or kwargs.get("trust_remote_code"))
        load = part_loader(pretrained_model_name_or_path, is_trusted, cls.__module__, kwargs)
        values, kwargs = super().get_image_processor_dict(pretrained_model_name_or_path, **kwargs)
        for name in PLANNER_NAMES:
            if kwargs.get(name) is None and name in values:
                values = {**values, name: map_planner(values[name], load)}
        return values, kwargs

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> "HiResLmmImageProcessor":
        """As in transformers; unknown options are errors, and a given `size` replaces a saved `view_size`."""
        if not kwargs.get("return_unused_kwargs"):
            cls._refuse_unknown({name for name in kwargs if not is_loading_name(name)})
        if kwargs.get("size") is not None:
            image_processor_dict = {key: value for key, value in image_processor_dict.items() if key != "view_size"}
        if {"num_frames", "fps"} & kwargs.keys():  # one replaces the other
            image_processor_dict = {**image_processor_dict, "num_frames": None, "fps": None}
        return super().from_dict(image_processor_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, without the layout: that is a matter of the run, and who loads the checkpoint next may
        not know it."""
        return {name: value for name, value in super().to_dict().items() if name != "image_layout"}

    def fetch_images(self, images: Any) -> Any:
        """Open paths, URLs, base64 texts and bytes in a (nested) list; images and arrays are passed on."""
        flatten_images(images)  # refuses what is nested too deeply
        return self._fetch(images, [0])

    def open_videos(self, videos: Any, **kwargs: Unpack[HiResLmmImageProcessorKwargs]) -> list[Frames]:
        """Read videos and take their frames as a call does, which takes what this returns for the videos.

        Args:
            videos: One video or a (nested) list: frames, an array, a path, a URL.
            kwargs: Options as in a call.

        Raises:
            ValueError: If one cannot be read; the message names its index.
            ImportError: If no decoder of files is installed.
        """
        settings = self._settings(kwargs)
        found = enumerate(flatten_videos(videos))
        return [open_video(video, index, settings.sampling, settings) for index, video in found]

    def preprocess(self, images: ImageInput, **kwargs: Unpack[HiResLmmImageProcessorKwargs]) -> BatchFeature:
        """Cut images and videos into views.

        Args:
            images: One image or a (nested) list; PIL images, arrays, tensors, paths, URLs, base64 texts, bytes; and
                videos as `Video` among them.
            kwargs: Options for this call; `None` = the processor's own value.

        Returns:
            A batch with one row a view, image after image: `pixel_values` float32 `(views, 3, height, width)`,
            views of unequal size padded at bottom and right; int64 `view_positions` `(views, 9)` (see `Column`),
            `view_boxes` `(views, 4)` (top, left, bottom, right in 1/256 source pixel) and `view_spans` `(views, 4)`
            (first and past-last row and column of patches that enter). For each extra tower `pixel_values_<name>`
            `(global views and frames, 3, size, size)`. With objects int64 `image_boxes` `(images, objects, 4)`: top,
            left, bottom, right in 1/65536 of a side of the global view, zeros behind the last object of an image.
            With `image_layout="dense"` see `pack_samples`.

        Raises:
            ValueError: If an image or option is wrong; the message names the image's index.
        """
        settings = self._settings(kwargs)
        samples = require_samples(images) if kwargs.get("image_layout") == "dense" else None
        sources = flatten_images(images)
        if not sources:
            raise ValueError("There is no image: the list is empty; pass at least one image or leave images out.")
        plans, drawn = draw_sources(sources, settings)
        boxes = read_objects(kwargs.get("image_boxes"), plans)
        counts = self._count(plans, settings, images, list(map(len, boxes)))
        _check_padded(plans)
        data = {"pixel_values": cut(drawn, plans, settings), **_geometry(plans, counts)}
        data.update({f"pixel_values_{name}": views for name, views in cut_towers(drawn, plans, settings).items()})
        if samples is not None:
            refuse_boxes(boxes)
            data = pack_samples(data, samples)
        if any(map(len, boxes)):
            data["image_boxes"] = write_objects(boxes, plans)
        batch = BatchFeature(data=data, tensor_type=kwargs.get("return_tensors"))
        return batch if kwargs.get("device") is None else batch.to(kwargs["device"])

    def plan(self, height: int, width: int, **kwargs: Unpack[HiResLmmImageProcessorKwargs]) -> ViewPlan:
        """Plan the views of an image without its pixels.

        Args:
            height, width (`int`): The upright image (after EXIF orientation), pixels.
            kwargs: Options as in a call.

        Raises:
            ValueError: If a size or option is wrong.
        """
        settings = self._settings(kwargs)
        return settings.planner(height, width, settings.limits)

    def plan_video(
        self, frames: int, height: int, width: int, **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> ViewPlan:
        """Plan the views of a video of so many frames without its pixels. Args and errors as in `plan`."""
        return _plan_video(frames, height, width, self._settings(kwargs))

    def image_tokens(
        self, height: int, width: int, num_objects: int = 0, **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> int:
        """Count the placeholders of an image without its pixels; exactly what a call gives. Args as in `plan`."""
        return self.count_images([(height, width)], [num_objects], **kwargs)[0][0]

    def video_tokens(
        self, frames: int, height: int, width: int, **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> int:
        """Count the placeholders of a video without its pixels; exactly what a call gives.

        Args:
            frames (`int`): Frames that it has, of which `num_frames` at most are taken.
            height, width (`int`): Each upright frame, pixels.
            kwargs: Options as in a call.

        Raises:
            ValueError: If a size or option is wrong, or the model has no place for frames.
        """
        return self.count_videos([(frames, height, width)], **kwargs)[0][0]

    def count_images(
        self,
        image_sizes: list[tuple[int, int]],
        num_objects: list[int] | None = None,
        **kwargs: Unpack[HiResLmmImageProcessorKwargs],
    ) -> tuple[list[int], list[int]]:
        """Count placeholders and views of several images without their pixels.

        Args:
            image_sizes (`list[tuple[int, int]]`): (height, width) of each upright image, pixels.
            num_objects (`list[int]`, *optional*): Objects of each image; by default as many as `image_boxes` holds.
            kwargs: Options as in a call.

        Returns:
            Placeholders of each image, and rows of `pixel_values` of each image.

        Raises:
            ValueError: If a size or option is wrong; the message names the image's index.
        """
        settings = self._settings(kwargs)
        plans = [settings.planner(height, width, settings.limits) for height, width in image_sizes]
        if num_objects is None:
            num_objects = list(map(len, read_objects(kwargs.get("image_boxes"), plans)))
        counts = self._count(plans, settings, list(range(len(plans))), num_objects)
        return counts, [len(plan.views) for plan in plans]

    def count_videos(
        self, video_sizes: list[tuple[int, int, int]], **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> tuple[list[int], list[int]]:
        """As `count_images`, for videos of (frames, height, width)."""
        settings = self._settings(kwargs)
        plans = [_plan_video(*size, settings) for size in video_sizes]
        counts = self._count(plans, settings, list(range(len(plans))), [0] * len(plans))
        return counts, [len(plan.views) for plan in plans]

    def min_image_tokens(
        self, height: int, width: int, num_objects: int = 0, **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> int:
        """Tell the smallest `max_image_tokens` that an image allows.

        Args:
            height, width (`int`): The upright image (after EXIF orientation), pixels.
            num_objects (`int`): Objects of it that become tokens.
            kwargs: Options as in a call; a budget among them changes nothing.

        Returns:
            The tokens that no part of the model drops, and one more; the full count where no part drops any.

        Raises:
            ValueError: If a size or option is wrong.
        """
        settings = self._settings({**kwargs, "max_image_tokens": None})
        return self._min_tokens(settings.planner(height, width, settings.limits), num_objects, settings)

    def min_video_tokens(
        self, frames: int, height: int, width: int, **kwargs: Unpack[HiResLmmImageProcessorKwargs]
    ) -> int:
        """Tell the smallest `max_image_tokens` that a video allows, as `min_image_tokens` does for an image."""
        settings = self._settings({**kwargs, "max_image_tokens": None})
        return self._min_tokens(_plan_video(frames, height, width, settings), 0, settings)

    def _min_tokens(self, plan: ViewPlan, num_objects: int, settings: _Settings) -> int:
        self._count([plan], settings, [0], [num_objects])
        return min_budget(count_tokens(plan, settings.layout, num_objects))

    def _count(self, plans: list[ViewPlan], settings: _Settings, images: Any, num_objects: list[int]) -> list[int]:
        """Placeholders of each image; the budgets are one for all, or stand as the images do."""
        check_objects(num_objects, settings.layout.reads_objects)
        budgets = flatten_budgets(settings.max_image_tokens, images)
        budgets = [self.max_image_tokens if own is None else own for own in budgets]
        of_images = zip(plans, budgets, num_objects, strict=True)
        return [_num_tokens(*own, settings, index) for index, own in enumerate(of_images)]

    def _fetch(self, images: Any, counter: list[int]) -> Any:
        if isinstance(images, (list, tuple)):
            return [self._fetch(entry, counter) for entry in images]
        index = counter[0]
        counter[0] += len(flatten_images(images))
        return open_image(images, index)

    def _check_types(self, options: dict[str, Any]) -> None:
        self._refuse_unknown(set(options))
        try:
            validate_typed_dict(self.valid_kwargs, options)
        except StrictDataclassError as error:
            raise ValueError(f"Wrong image option. {str(error)[:1000]}") from error

    @classmethod
    def _refuse_unknown(cls, names: set[str]) -> None:
        known = set(cls.valid_kwargs.__annotations__)
        if "crop_to_patches" in names:
            raise ValueError(CROP_TO_PATCHES)
        if names - known:
            shown = ", ".join(sorted(known - set(FIXED_OPTIONS)))
            raise ValueError(f"Unknown image options {sorted(names - known)}; the known ones are {shown}.")

    def _settings(self, kwargs: dict[str, Any]) -> _Settings:
        """The options of one call, checked: given ones before the processor's own."""
        self._check_types(kwargs)
        names = set(self.valid_kwargs.__annotations__) - {"size"}
        own = {name: getattr(self, name) for name in names if hasattr(self, name)}
        given = {name: value for name, value in _with_view_size(kwargs).items() if value is not None}
        options = {**own, **given}
        _check_values(options)
        name, planner, planner_options = find_planner(options["planner"])
        shared = ("view_size", "patch_size", "max_crops", "pinpoints", "unpad", "global_view", "views", "enlarge")
        limits = planner.build_options(name, {**{each: options[each] for each in shared}, **planner_options})
        name, video_planner, planner_options = find_video_planner(options["video_planner"])
        sides = {each: options[each] for each in ("view_size", "patch_size")}
        given_frames = [each for each in ("num_frames", "fps") if given.get(each) is not None]
        asked = {each: options[each] for each in given_frames or ("num_frames", "fps")}
        layout = options["token_layout"]
        scale, shift = scale_and_shift(
            options["rescale_factor"] if options["do_rescale"] else 1.0,
            *((options["image_mean"], options["image_std"]) if options["do_normalize"] else (0.0, 1.0)),
        )
        return _Settings(
            planner=planner,
            limits=limits,
            video_planner=video_planner,
            video_limits=video_planner.build_options(name, {**sides, **planner_options}),
            sampling=Sampling(**asked, sampler=options["frame_sampling"]),
            layout=TokenLayout.plain(limits.patch_grid) if layout is None else TokenLayout.from_dict(layout),
            scale=scale,
            shift=shift,
            **{name: options[name] for name in ("max_image_tokens", "resample", "pixel_limit", "do_rescale")},
            **{name: options[name] for name in ("resize_backend", "decode", "num_threads")},
            extra_towers=options["extra_towers"],
            rescale_factor=options["rescale_factor"] if options["do_rescale"] else 1.0,
            background=tuple(options["background"]),
            image_mean=options["image_mean"],
            input_data_format=options.get("input_data_format"),
        )


def _check_values(options: dict[str, Any]) -> None:
    """Refuse values of the right type that are wrong or would have no effect."""
    for name, allowed in FIXED_OPTIONS.items():
        if options.get(name) not in allowed:
            raise ValueError(f"{name}={options[name]!r} has no meaning here; leave it out.")
    resample, color, limit, order, budget = (
        options.get(name)
        for name in ("resample", "background", "pixel_limit", "input_data_format", "max_image_tokens")
    )
    rules = {
        "do_convert_rgb": (options["do_convert_rgb"], "True: the vision tower reads RGB"),
        "resample": (resample is None or resample in list(PILImageResampling), "a Pillow filter, 0 to 5, or None"),
        "background": (_is_color(color), "three integers from 0 to 255 (RGB)"),
        "pixel_limit": (limit is not None and limit >= 1, "an integer of at least 1"),
        "input_data_format": (order in (None, *FORMATS), f"'{FORMATS[0]}' or '{FORMATS[1]}'"),
        "resize_backend": (options["resize_backend"] in RESIZE_BACKENDS, "'torch' or 'pillow'"),
        "decode": (options["decode"] in DECODES, "'full' or 'scaled'"),
        "num_threads": (options["num_threads"] is None or options["num_threads"] >= 1, "at least 1, or None"),
        "image_layout": (options["image_layout"] in (None, "flat", "dense"), "'flat', 'dense' or None"),
        "max_image_tokens": (_is_budget(budget), "an integer of at least 1 (in a call also a list), or None"),
    }
    for name, (is_right, words) in rules.items():
        if not is_right:
            raise ValueError(f"{name}={options.get(name)!r} must be {words}.")


def _with_view_size(options: dict[str, Any]) -> dict[str, Any]:
    """Options with `size`, of transformers, as `view_size`, and with the name of a planner in place of its class."""
    for name in PLANNER_NAMES:
        if isinstance(options.get(name), (dict, type)):
            options = {**options, name: map_planner(options[name], as_name)}
    if options.get("size") is None:
        return {name: value for name, value in options.items() if name != "size"}
    side = _square_side(options["size"])
    if options.get("view_size") not in (None, side):
        raise ValueError(f"size={options['size']!r} contradicts view_size={options['view_size']}; pass one of them.")
    return {**{name: value for name, value in options.items() if name != "size"}, "view_size": side}


def _is_color(value: Any) -> bool:
    return value is not None and len(value) == 3 and all(type(part) is int and 0 <= part <= 255 for part in value)


def _is_budget(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_budget, value))
    return value is None or (type(value) is int and value >= 1)


def _plan_video(frames: int, height: int, width: int, settings: _Settings) -> ViewPlan:
    check_count("frames", frames)
    return settings.video_planner(height, width, settings.video_limits, settings.sampling.count(frames))


def _num_tokens(plan: ViewPlan, budget: int | None, num_objects: int, settings: _Settings, index: int) -> int:
    check_frames(plan, settings.layout, index)
    number = apply_budget(count_tokens(plan, settings.layout, num_objects), settings.layout, budget, index)
    if number < 1:
        padded = settings.planner(*plan.size, replace(settings.limits, unpad=False))
        remedy = ", or unpad=False" if count_tokens(padded, settings.layout).total else ""
        raise ValueError(
            f"Image {index} of {plan.size[0]}x{plan.size[1]} pixels has no tokens with "
            f"views={settings.limits.views!r}; take other views{remedy}."
        )
    if number > TOKENS_LIMIT:
        raise ValueError(
            f"Image {index} of {plan.size[0]}x{plan.size[1]} pixels would have {number} tokens, more than "
            f"{TOKENS_LIMIT}; correct view_size, patch_size, max_crops, num_frames or token_layout."
        )
    return number


def _check_padded(plans: list[ViewPlan]) -> None:
    """The same for views that are padded to the largest of the batch."""
    sizes = [plan.view_pixels(view) for plan in plans for view in plan.views]
    largest = (max(size[0] for size in sizes), max(size[1] for size in sizes))
    for index, plan in enumerate(plans):
        check_views(plan, index, largest)


def _geometry(plans: list[ViewPlan], counts: list[int]) -> dict[str, np.ndarray]:
    views = [view for plan in plans for view in plan.views]
    positions = [
        (*view.shape[:5], count, *view.patches, not number)  # in the order of Column
        for plan, count in zip(plans, counts, strict=True)
        for number, view in enumerate(plan.views)
    ]
    return {
        "view_positions": np.array(positions, dtype=np.int64),
        "view_boxes": np.array([view.box for view in views], dtype=np.int64),
        "view_spans": np.array([view.span for view in views], dtype=np.int64),
    }


def _square_side(size: Any) -> int:
    if isinstance(size, int):
        return size
    sides = dict(size) if not isinstance(size, (list, tuple)) else dict(zip(("height", "width"), size, strict=False))
    sides = {name: value for name, value in sides.items() if value is not None}
    if set(sides) != {"height", "width"} or sides["height"] != sides["width"]:
        raise ValueError(f"size={size!r} must be one side of a square view, as {{'height': 336, 'width': 336}}.")
    return sides["height"]


__all__ = ["HiResLmmImageProcessor"]
