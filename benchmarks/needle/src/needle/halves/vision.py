"""The vision half: a small CLIP tower that learns to read single views, crops and global views, patch by patch."""

import random
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from ..backgrounds import BACKGROUNDS
from ..patch_labels import (
    COLOUR_INDEX,
    IGNORED,
    KIND_INDEX,
    VALUE_INDEX,
    Box,
    PatchLabels,
    crop_boxes,
    cut_view,
    global_box,
    label_patches,
)
from ..scenes import NeedleOptions, Scene, render_scene, sample_scene
from .loop import Clock, LoopOptions, run_loop


FEATURE_LAYER = -1
"""Hidden state of the tower that the heads read, and that a model built on it should use."""

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's numbers, which the processor uses for towers of this type."""

MOST_COUNTED = 8
BACKGROUND_INDEX = {name: index for index, name in enumerate(BACKGROUNDS)}
VIEW_PATCHES = NeedleOptions.view_size // NeedleOptions.patch_size
HEADS = {
    "kind": len(KIND_INDEX) + 1,
    "value": len(VALUE_INDEX),
    "colour": len(COLOUR_INDEX),
    "background": len(BACKGROUNDS),
    "count": MOST_COUNTED + 1,
    "row": VIEW_PATCHES,
    "column": VIEW_PATCHES,
}
"""Name -> classes. `count` reads the mean of the patches, the others each patch. `row` and `column` are those of the
patch in its view: without them the tower forgets where the object that a patch shows stands."""

SCENES = NeedleOptions()
CROWDED = replace(
    SCENES, scene_size=192, grid=3, object_height=(4.0, 4.34), view_size=64, num_objects=(12, 45), distinct=False
)
"""Three by three crops with many objects: dense supervision."""

CROWDED_GLOBAL = replace(SCENES, num_objects=(8, 24), distinct=False)


@dataclass(frozen=True)
class VisionPlan:
    """Length and curriculum.

    Args:
        steps (`int`): Steps of 36 views.
        aligned (`int`): Steps with objects on the patch lattice.
        jittered (`int`): Steps after those, over which the offset from the lattice grows; then placement is free.
        peak_rate (`float`): Learning rate.
        restarts (`tuple` of `int`): Steps at which the learning rate, having fallen, starts again at its peak.
    """

    steps: int = 11000
    aligned: int = 1200
    jittered: int = 1500
    peak_rate: float = 1e-3
    restarts: tuple[int, ...] = (5000, 9000)


@dataclass(frozen=True)
class LabelledView:
    """A view (view_size, view_size, 3) uint8, its patch labels, its background and number of objects."""

    pixels: np.ndarray
    labels: PatchLabels
    background: int
    count: int


class VisionHalf(nn.Module):
    """The tower and the linear heads that are thrown away after pretraining.

    Args:
        config (`CLIPVisionConfig`): Size of the tower.
    """

    def __init__(self, config: CLIPVisionConfig):
        super().__init__()
        self.tower = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.heads = nn.ModuleDict({name: nn.Linear(config.hidden_size, size) for name, size in HEADS.items()})

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views (V, 3, S, S) -> logits by head, (V, patches, classes); `count` (V, classes)."""
        hidden = self.tower(pixel_values, output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
        features = self.norm(hidden)
        logits = {name: head(features) for name, head in self.heads.items() if name != "count"}
        return {**logits, "count": self.heads["count"](features.mean(1))}


def vision_config() -> CLIPVisionConfig:
    """The size of the tower: 4 layers of 128 on 64 patches of 8 x 8 pixels.

    Returns:
        The configuration, with eager attention (several times faster than the fused one at this size on a CPU).
    """
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SCENES.view_size,
        patch_size=SCENES.patch_size,
        hidden_act="gelu_pytorch_tanh",
    )
    config._attn_implementation = "eager"
    return config


def normalise(views: np.ndarray) -> torch.Tensor:
    """Views (V, S, S, 3) uint8 -> what the tower takes.

    Args:
        views (`np.ndarray`): The views.

    Returns:
        `torch.Tensor` (V, 3, S, S): float32.
    """
    pixels = torch.from_numpy(views).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]


def labelled_view(scene: Scene, image: np.ndarray, box: Box) -> LabelledView:
    """Cut a view from a rendered scene and label it.

    Args:
        scene (`Scene`): The scene.
        image (`np.ndarray`): Its picture.
        box (`tuple`): The view, scene pixels.

    Returns:
        The view with its labels.
    """
    options = scene.options
    count = len(scene.objects) if box == global_box(scene) else IGNORED
    return LabelledView(
        cut_view(image, box, options.view_size),
        label_patches(scene, box, options.view_size // options.patch_size),
        BACKGROUND_INDEX[scene.background],
        count if count <= MOST_COUNTED else IGNORED,
    )


def placement_at(step: int, plan: VisionPlan) -> tuple[str, int]:
    """The curriculum.

    Args:
        step (`int`): From 0.
        plan (`VisionPlan`): Lengths of the phases.

    Returns:
        Placement and jitter in pixels.
    """
    if step < plan.aligned:
        return "aligned", 0
    if step < plan.aligned + plan.jittered:
        return "jitter", 1 + 7 * (step - plan.aligned) // plan.jittered
    return "free", 0


@lru_cache(maxsize=256)
def _crowded_crops(key: str, placement: str, jitter: int, small: bool) -> list[LabelledView]:
    height = (3.0, 3.99) if small else CROWDED.object_height
    options = replace(CROWDED, placement=placement, jitter=jitter, crowded=True, object_height=height)
    scene = sample_scene(options, "train", key)
    image = render_scene(scene)
    return [labelled_view(scene, image, box) for box in crop_boxes(scene)]


@lru_cache(maxsize=512)
def _scene_views(key: str, crowded: bool) -> tuple[LabelledView, list[LabelledView]]:
    """The global view, and the crops that show objects plus one that may not."""
    scene = sample_scene(CROWDED_GLOBAL if crowded else SCENES, "train", key)
    image = render_scene(scene)
    views = [labelled_view(scene, image, box) for box in crop_boxes(scene)]
    shown = [view for view in views if (view.labels.kind != 0).any()]
    return labelled_view(scene, image, global_box(scene)), [*shown[:6], views[0]]


def training_views(seed: int, step: int, plan: VisionPlan) -> list[LabelledView]:
    """The 36 views of a training step: 27 crowded crops, 4 global views, 5 crops of ordinary scenes.

    Args:
        seed (`int`): Seed of the run.
        step (`int`): From 0; the batch depends on nothing else.
        plan (`VisionPlan`): Curriculum.

    Returns:
        The views. Crowded scenes are used about twice, ordinary ones, which cost more, about eight times.
    """
    rng = random.Random(f"views/{seed}/{step}")
    placement, jitter = placement_at(step, plan)
    crops: list[LabelledView] = []
    for index in range(4):
        number = 2 * step + (index if index < 2 else -rng.randrange(64))
        crops += _crowded_crops(f"{seed}/crowded/{number}", placement, jitter, number % 8 == 0)
    newest = step // 2
    picked = [newest] + [newest - rng.randrange(min(newest + 1, 256)) for _ in range(3)]
    ordinary = [_scene_views(f"{seed}/scene/{number}", number % 2 == 0) for number in picked]
    sparse = [view for _, views in ordinary for view in views]
    return rng.sample(crops, 27) + [view for view, _ in ordinary] + rng.sample(sparse, min(5, len(sparse)))


def _loss(logits: dict[str, torch.Tensor], views: list[LabelledView]) -> tuple[torch.Tensor, dict[str, float]]:
    kind, value, colour = (
        torch.from_numpy(np.stack([getattr(view.labels, name) for view in views]))
        for name in ("kind", "value", "colour")
    )
    background = torch.tensor([view.background for view in views])[:, None].expand_as(kind)
    count = torch.tensor([view.count for view in views])
    weight = torch.ones(HEADS["kind"])
    weight[0] = 0.3
    losses = {
        "kind": F.cross_entropy(logits["kind"].flatten(0, 1), kind.flatten(), weight, ignore_index=IGNORED),
        "value": _mean_loss(logits["value"], value),
        "colour": _mean_loss(logits["colour"], colour),
        "background": _mean_loss(logits["background"], background),
        "count": _mean_loss(logits["count"], count),
    }
    patches = torch.arange(kind.shape[1]).expand_as(kind)
    losses["row"] = _mean_loss(logits["row"], patches // VIEW_PATCHES)
    losses["column"] = _mean_loss(logits["column"], patches % VIEW_PATCHES)
    total = (
        2 * losses["kind"] + 2 * losses["value"] + losses["colour"] + 0.1 * (losses["background"] + losses["count"])
    )
    total = total + 0.3 * (losses["row"] + losses["column"])
    known = value != IGNORED
    right = (logits["value"].argmax(-1) == value)[known].float().mean().item()
    return total, {"value_accuracy": right, **{name: loss.item() for name, loss in losses.items()}}


def _mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labelled places; 0 where there are none."""
    known = (labels != IGNORED).sum().clamp(min=1)
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum") / known


def train_vision(seed: int, plan: VisionPlan, folder: Path) -> tuple[VisionHalf, Clock]:
    """Pretrain the vision half.

    Args:
        seed (`int`): Decides weights and data.
        plan (`VisionPlan`): Length and curriculum.
        folder (`Path`): For checkpoints and log.

    Returns:
        The half and the time spent.
    """
    torch.manual_seed(seed)
    model = VisionHalf(vision_config())

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        views = training_views(seed, step, plan)
        return _loss(model(normalise(np.stack([view.pixels for view in views]))), views)

    options = LoopOptions(plan.steps, plan.peak_rate, restarts=plan.restarts)
    return model, run_loop("vision half", model, step_loss, options, folder)
