"""Every view op, adapter and token op of the registry on one image of true size, ready to be called alone."""

from collections.abc import Callable
from typing import Any

import torch
from shapes import SHAPES

from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, Question, ViewFeatures, ViewGroup
from hires_lmm.modeling.configuration_hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.parts_hires_lmm import SLOTS


SIDE, GRID = 24, 2
"""Patches along a view, crops along the image: a global view and 2 x 2 crops of CLIP ViT-L/14-336."""

QUESTION_TOKENS, BUDGET = 64, 720
VARIANTS: dict[str, list[dict]] = {
    "query_compressor": [{"num_queries": 144}, {"on": "all", "num_queries": 256}],
    "query_former": [{"num_queries": 576}],
    "fusion": [{"num_layers": 1, "vocab_size": 32064}],  # one of its 20 layers
    "router": [{"score": score, "on": "crops"} for score in ("cosine", "attention", "saliency")],
}
"""Options worth measuring; a part that is not named here runs with its defaults."""

CALLED = ("view_ops", "adapter", "map_ops", "token_ops")
"""Slots whose parts are called on views or tokens; what runs inside the language model is no call of its own."""

OTHERWISE = {"conv_gate", "dual_enhancement", "prompt_fuser"}
"""Parts that need a second tower, other kinds of views, or another part before them."""

AROUND: dict[str, dict] = {
    "fusion": {"adapter": {"part": "identity"}},
    "mqt": {"layout": {"crop_order": "views"}},
    "mini_compressor": {"layout": {"order": ["global", "crops", "detail"]}},
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


def image_geometry() -> ImageGeometry:
    """One image: a global view and a square of crops, whole."""
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    whole = (SIDE, SIDE, 0, SIDE, 0, SIDE)
    crops = ((int(Kind.CROP), GRID, GRID, *cell, *whole) for cell in cells)
    return ImageGeometry(0, ((int(Kind.GLOBAL), GRID, GRID, 0, 0, *whole), *crops), BUDGET)


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
        connector = (
            HiResLmmConnector(config, PartContext(config, width, text_width, {}, (SIDE, SIDE))).to(dtype).eval()
        )
    features = torch.randn(1 + GRID * GRID, SIDE * SIDE, width, device=device, dtype=dtype)
    groups = []
    for kind, part in ((Kind.GLOBAL, slice(0, 1)), (Kind.CROP, slice(1, len(features)))):
        scores = {score: torch.rand(features[part].shape[:2], device=device) for score in connector.needs.scores}
        rows = tuple(range(len(features)))[part]
        groups.append(ViewGroup(kind, features[part], (SIDE, SIDE), rows, scores=scores))
    views = ViewFeatures(groups, [image_geometry()])
    if slot == "view_ops":
        return _without_gradients(lambda: connector.view_ops[0](views))
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
