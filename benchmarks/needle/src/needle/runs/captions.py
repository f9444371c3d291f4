"""Token by token captions of needle scenes: what stages that train the connector alone may learn, as a faster teacher
than questions.

The language half reads a token as the sum of the embeddings of its words (`text_scenes`). A caption names these
words for each visual token; the loss draws what the adapter makes to their sum. The language model is not run.
"""

import random
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from hires_lmm.modeling.bases_hires_lmm import HiResLmmViewOp
from hires_lmm.modeling.carriers_hires_lmm import ViewFeatures, ViewGroup
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.training.parameters import find_base

from ..scenes import Scene
from .collator import Near
from .scenes import SceneFeatures, SceneSet


MOST_WORDS = 12
"""Words of a token: enough for two objects."""

NO_WORD = -1


class SceneCaptions:
    """Writes captions of scenes.

    The token of the global view where the middle of an object lies says that there is an object, its colour and its
    place; the token of the crop that shows the middle says colour, kind and value; all others say the background.
    Where a scene is one view (see `near_options`), the token of the global view says everything, and the view may
    stand for a crop, too.

    Args:
        tokenizer: Of the language half, one word a token.
        global_grid, crop_grid (`tuple[int, int]`): Rows and columns of the tokens of a view.
    """

    def __init__(self, tokenizer: Any, global_grid: tuple[int, int], crop_grid: tuple[int, int]):
        self.tokenizer, self.global_grid, self.crop_grid = tokenizer, global_grid, crop_grid

    def __call__(self, scene: Scene) -> tuple[torch.Tensor, torch.Tensor]:
        """The captions.

        Args:
            scene (`Scene`): The scene.

        Returns:
            Ids of words for the global view `(1, L, W)` and for the crops `(grid * grid, L', W)`.
        """
        side, grid = scene.options.scene_size, scene.options.grid
        far: dict[tuple[int, int, int], list[str]] = {}
        near: dict[tuple[int, int, int], list[str]] = {}
        for item in scene.objects:
            down, right = (item.top + item.height / 2) / side, (item.left + item.width / 2) / side
            details = [item.colour, item.kind, item.value]
            shown = details if grid == 1 else [item.colour]
            far.setdefault((0, *_cell(down, right, self.global_grid)), []).extend(
                ["object", *shown, *item.place.split()]
            )
            crop = int(down * grid) * grid + int(right * grid)
            near.setdefault((crop, *_cell(down * grid % 1, right * grid % 1, self.crop_grid)), []).extend(details)
        crops = self._ids(near, grid * grid, self.crop_grid, scene.background)
        return self._ids(far, 1, self.global_grid, scene.background), crops

    def _ids(
        self, words: dict[tuple[int, int, int], list[str]], views: int, grid: tuple[int, int], background: str
    ) -> torch.Tensor:
        """Ids `(views, L, W)` of what the cells say."""
        ids = torch.full((views, *grid, MOST_WORDS), NO_WORD)
        ids[..., 0] = self.tokenizer.convert_tokens_to_ids(background)
        for cell, said in words.items():
            kept = said[:MOST_WORDS]
            ids[cell][: len(kept)] = torch.tensor(self.tokenizer.convert_tokens_to_ids(kept))
        return ids.flatten(1, 2)


def _cell(down: float, right: float, grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the cell that holds a place, given as shares of the view."""
    return min(int(down * grid[0]), grid[0] - 1), min(int(right * grid[1]), grid[1] - 1)


def can_learn_captions(connector: Any) -> bool:
    """Whether each token of a connector stands for a place of one view and is as wide as a word embedding.

    Args:
        connector (`HiResLmmConnector`): The connector.
    """
    alone = all(type(op).forward is HiResLmmViewOp.forward for op in connector.view_ops)
    projects = any(True for _ in connector.adapter.parameters())
    return alone and projects and not connector.makes_tokens and Kind.CROP in connector.layout.grids


class CaptionCollator:
    """Turns rows `{"scene": number, "visit": number}` into views with captions.

    Of the crops, those with objects are taken and as many without, drawn anew at each visit.

    Args:
        captions (`SceneCaptions`): Writes the captions.
        scenes (`SceneSet`): The scenes.
        store (`SceneFeatures`): Their tower features.
        views (`str`): `"all"`, `"global"` or `"crops"`, that of the stage.
        near (`Near`, *optional*): Scenes of one view for a share of the rows, as global views and as crops.
    """

    def __init__(
        self, captions: SceneCaptions, scenes: SceneSet, store: SceneFeatures, views: str, near: Near | None = None
    ):
        self.captions, self.scenes, self.store, self.views, self.near = captions, scenes, store, views, near
        self._written: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        """Build a batch of rows `{"scene", "visit"}`.

        Args:
            examples (`list[dict]`): The rows.

        Returns:
            `global_views` `(G, L, C)` and `crop_views` `(K, L, C)`, features of the tower, with `global_captions` and
            `crop_captions`.
        """
        columns: dict[str, list[torch.Tensor]] = {}
        for row in examples:
            rng = random.Random(f"captions/{row['scene']}/{row['visit']}")
            if self.near is not None and rng.random() < self.near.share:
                values = self._row(self.near.scenes, self.near.store, rng.randrange(self.near.scenes.count), rng)
            else:
                values = self._row(self.scenes, self.store, row["scene"], rng)
            for name, value in values.items():
                columns.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in columns.items()}

    def _row(self, scenes: SceneSet, store: Any, number: int, rng: random.Random) -> dict[str, torch.Tensor]:
        """Views of one scene."""
        key = (scenes.options.scene_size, number)
        if key not in self._written:
            self._written[key] = self.captions(scenes.scene(number))
        whole, crops = self._written[key]
        row: dict[str, torch.Tensor] = {}
        if self.views != "crops":
            row |= {"global_views": store.pick(number, [0]), "global_captions": whole}
        if self.views != "global":
            first = min(1, len(crops) - 1)  # a scene of one view has no crops behind its global view
            speaks = (crops != NO_WORD).sum((1, 2)) > crops.shape[1]
            shown, empty = speaks.nonzero().flatten().tolist(), (~speaks).nonzero().flatten().tolist()
            chosen = sorted(shown + rng.sample(empty, min(len(empty), max(1, len(shown)))))
            row |= {
                "crop_views": store.pick(number, [first + crop for crop in chosen]),
                "crop_captions": crops[chosen],
            }
        return row


class CaptionTrainer(Trainer):
    """A Trainer whose loss is `caption_loss`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch of `CaptionCollator`."""
        loss = caption_loss(find_base(model), inputs)
        return (loss, {}) if return_outputs else loss


def caption_loss(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Squared distance between adapted tokens and the summed embeddings of their words, relative to those.

    Tokens with one word (the background) and with several (an object) weigh the same as groups.

    Args:
        model (`HiResLmmModel`): The model.
        inputs (`dict`): A batch of `CaptionCollator`.

    Returns:
        A scalar: the mean over global views and crops of 0 for the right tokens, 1 for tokens of zeros.
    """
    connector = model.connector
    kinds = {"global_views": Kind.GLOBAL, "crop_views": Kind.CROP}
    given = {int(kind): inputs[name] for name, kind in kinds.items() if name in inputs}
    groups = [
        ViewGroup(kind, views, model.config.patch_grid, tuple(range(len(views)))) for kind, views in given.items()
    ]
    adapted = connector.adapt(ViewFeatures(groups, []))
    words = model.get_input_embeddings().weight.detach()
    captions = {int(Kind.GLOBAL): "global_captions", int(Kind.CROP): "crop_captions"}
    losses = [
        _distance(group.features, inputs[captions[group.kind]], words)
        for group in adapted.groups
        if captions[group.kind] in inputs
    ]
    return torch.stack(losses).mean()


def _distance(tokens: torch.Tensor, captions: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """Relative squared distance of tokens `(V, L, D)` from the words `(V, L, W)` that they should say."""
    said = captions != NO_WORD
    target = (words[captions.clamp(min=0)].float() * said[..., None]).sum(-2)
    error = (tokens.float() - target).square().mean(-1)
    groups = [said.sum(-1) > 1, said.sum(-1) == 1]
    losses = [error[group].mean() / target[group].square().mean() for group in groups if group.any()]
    return torch.stack(losses).mean()
