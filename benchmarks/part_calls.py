"""Every view op, adapter and token op of the registry on one image of true size, ready to be called alone."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from shapes import SHAPES

from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, ViewGroup
from hires_lmm.modeling.configuration_hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import BOX_SIDE, MAIN_TOWER, Grid, Kind
from hires_lmm.modeling.parts_hires_lmm import SLOTS


SIDE, GRID = 24, 2
"""Patches along a view, crops along the image: a global view and 2 x 2 crops of CLIP ViT-L/14-336."""

QUESTION_TOKENS, BUDGET = 64, 720
VARIANTS: dict[str, list[dict]] = {
    "query_compressor": [{"num_queries": 144}, {"on": "all", "num_queries": 256}],
    "pool3d": [{"shape": [4, 12, 12]}],
    "region_pack": [{"spatial_factor": 2, "temporal_factor": 4}],
    "query_former": [{"num_queries": 576}],
    "fusion": [{"num_layers": 1, "vocab_size": 32064}],  # one of its 20 layers
    "router": [{"score": score, "on": "crops"} for score in ("cosine", "attention", "saliency")],
}
"""Options worth measuring; a part that is not named here runs with its defaults."""

CALLED = ("view_ops", "adapter", "map_ops", "token_ops")
"""Slots whose parts are called on views or tokens; what runs inside the language model is no call of its own."""

SECOND, STAGES, NUM_OBJECTS = "hires", ((192, 192), (96, 384), (48, 768), (24, 1536)), 100
"""Name of the second tower, side and width of the maps of its stages, those of ConvNeXt-L at 768 pixels; boxes."""

OTHERWISE = {"prompt_fuser", "sample_tokens", "coordinates", "tower_mixer"}
"""Parts that are no call of their own: layers of a language model, which the prefill of `llava_mini` shows; a choice
that the layout makes; embeddings of coordinates, added to others; a sum of towers, which are what costs."""

KINDS: dict[str, tuple[Kind, ...]] = {
    "dual_enhancement": (Kind.CROP, Kind.STRIDED),
    **dict.fromkeys(("mean_global", "pool3d", "region_pack"), (Kind.FRAME,)),
}
"""Kinds of views beside the global one, where they are not crops; a video has as many frames as an image crops."""

BESIDE = {"conv_gate", "object_tokens"}
"""Parts that read a second tower."""

AROUND: dict[str, dict] = {
    "fusion": {"adapter": {"part": "identity"}},
    "mqt": {"layout": {"crop_order": "views"}},
    "mini_compressor": {"layout": {"order": ["global", "crops", "detail"]}},
    "dual_enhancement": {"layout": {"order": ["global", "crops", "strided"]}},
    "object_tokens": {"layout": {"order": ["global", "crops", "detail", "objects"]}},
    "mean_global": {"layout": {"order": ["global", "frames"]}},
    "pool3d": {"layout": {"order": ["frames"]}},
    "region_pack": {"layout": {"order": ["global", "frames", "detail"]}},
}
"""Other parts and the order of tokens that a part needs around it."""

READS_IMAGE_ALONE = {"fusion"}
"""Token ops that are called without a question: what they read of it would have to come back from the device."""

COUNTED_ON = {"sa_perceiver": "cpu", "globalcom2": "cpu"}
"""Where operations are counted, if not on `meta`, where nothing is computed."""


def part_names() -> list[tuple[str, str, dict]]:
    """(slot, part, options) of everything that is measured."""
    return [
        (slot, name, options)
        for slot in CALLED
        for name in SLOTS[slot]
        if name not in OTHERWISE
        for options in VARIANTS.get(name, [{}])
    ]


def label(slot: str, name: str, options: dict) -> str:
    """`slot/part(option=value)`."""
    said = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"{slot}/{name}({said})"


def image_geometry(kinds: tuple[int, ...], num_objects: int) -> ImageGeometry:
    """One image: a global view, and of each other kind a square of whole views."""
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    whole = (SIDE, SIDE, 0, SIDE, 0, SIDE)
    others = ((kind, GRID, GRID, *cell, *whole) for kind in kinds for cell in cells)
    return ImageGeometry(0, ((int(Kind.GLOBAL), GRID, GRID, 0, 0, *whole), *others), BUDGET, num_objects)


def surroundings(config: Any, name: str, width: int, text_width: int) -> PartContext:
    """What is around a part: nothing known of grids, or those of a second tower beside the main one."""
    grids = {}
    if name in ("mean_global", "region_pack"):
        grids = {(int(kind), MAIN_TOWER): Grid(SIDE, SIDE) for kind in (Kind.GLOBAL, Kind.FRAME)}
    if name in BESIDE:
        grids = {(int(kind), MAIN_TOWER): Grid(SIDE, SIDE) for kind in (Kind.GLOBAL, Kind.CROP)}
        grids[int(Kind.DETAIL), SECOND] = Grid(SIDE, SIDE, None, whole=True, source=int(Kind.GLOBAL))
    widths = tuple(stage[1] for stage in STAGES)
    return PartContext(
        config,
        width,
        text_width,
        grids,
        (SIDE, SIDE),
        tower_widths={SECOND: widths[-1]},
        tower_levels={SECOND: widths},
    )


def second_tower(device: str, dtype: torch.dtype) -> ViewGroup:
    """The maps of all stages of the second tower for one image."""
    maps = [torch.randn(1, side * side, width, device=device, dtype=dtype) for side, width in STAGES]
    hidden = dict(zip(range(-len(maps), -1), maps, strict=False))
    return ViewGroup(int(Kind.DETAIL), maps[-1], (SIDE, SIDE), (0,), SECOND, hidden=hidden)


def part_call(slot: str, name: str, options: dict, device: str, shapes: str = "cuda") -> Callable[[], Any]:
    """Build one part inside a connector, with what goes into it.

    Args:
        slot, name (`str`): Of the registry.
        options (`dict`): Options of the part.
        device (`str`): Where; on `meta` the call computes nothing.
        shapes (`str`): Key of `SHAPES`: widths and number format.

    Returns:
        A call that runs the part alone.
    """
    sizes = SHAPES[shapes]
    width, text_width, dtype = sizes.tower[0], sizes.text[0], sizes.dtype
    spec: dict[str, Any] = {"part": name, **options}
    chain = {**AROUND.get(name, {}), **({"adapter": spec} if slot == "adapter" else {slot: [spec]})}
    if slot == "adapter" and name == "identity":
        text_width = width
    with torch.device(device):
        config = HiResLmmConnectorConfig(**chain)
        connector = HiResLmmConnector(config, surroundings(config, name, width, text_width)).to(dtype).eval()
    kinds = tuple(map(int, KINDS.get(name, (Kind.CROP,))))
    counts = [1, *(GRID * GRID for _ in kinds)]
    features = torch.randn(sum(counts), SIDE * SIDE, width, device=device, dtype=dtype)
    groups, end = [], 0
    for kind, count in zip((int(Kind.GLOBAL), *kinds), counts, strict=True):
        rows, own = tuple(range(end, end + count)), features[end : end + count]
        scores = {score: torch.rand(own.shape[:2], device=device) for score in connector.needs.scores}
        groups.append(ViewGroup(kind, own, (SIDE, SIDE), rows, scores=scores))
        end += count
    if name in BESIDE:
        groups.append(second_tower(device, dtype))
    num_objects = NUM_OBJECTS if connector.reads_objects else 0
    boxes = (
        torch.tensor([[[0, 0, BOX_SIDE // 2, BOX_SIDE // 3]] * num_objects], device=device) if num_objects else None
    )
    views = ViewFeatures(groups, [image_geometry(kinds, num_objects)], boxes=boxes)
    if slot == "view_ops":
        return _without_gradients(lambda: connector.view_ops[0](views))
    if slot == "map_ops":
        wide = [
            replace(group, features=group.features.new_zeros(1).expand(*group.features.shape[:2], text_width))
            for group in groups
        ]
        return _without_gradients(lambda: connector.map_ops[0](ViewFeatures(wide, views.images)))
    if slot == "adapter":
        return _without_gradients(
            lambda: (connector.adapter(features[:1], Kind.GLOBAL), connector.adapter(features[1:], Kind.CROP))
        )
    with torch.no_grad():
        tokens = connector.layout(connector.adapt(views), lambda ids: torch.zeros(text_width, device=device))
    one = torch.ones(1, QUESTION_TOKENS, dtype=torch.long, device=device)
    embeds = torch.randn(1, QUESTION_TOKENS, text_width, device=device, dtype=dtype)
    asked = Question(embeds, None, one, torch.zeros_like(one[0, :1]), one[0, :1])
    question = None if name in READS_IMAGE_ALONE else asked
    return _without_gradients(lambda: connector.token_ops[0](tokens, question))


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run
