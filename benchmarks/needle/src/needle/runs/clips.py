"""Runs on needle clips: a model from the shipped weights, trained for minutes, and its answers."""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, Trainer

from hires_lmm.files import write_text
from hires_lmm.processing.video_input_hires_lmm import Video
from hires_lmm.training.callbacks import StageCallback
from hires_lmm.training.checkpoints import last_checkpoint
from hires_lmm.training.features import encode_picture, evaluating
from hires_lmm.training.stages import Stage

from ..clips import CLIP_KINDS, CLIP_WORDS, STEPS, Clip, clip_options, needle_clip, render_clip
from ..halves.files import load_halves
from ..questions import Question
from .collator import SceneCollator
from .evaluate import Graded, can_pack, grade
from .join import join_halves
from .run import DONE, MODEL, Clock, Rates, RunOptions, Visits, _arguments
from .scenes import VIEWS_PER_PASS


@dataclass(frozen=True)
class ClipSet:
    """A numbered set of clips.

    Args:
        split (`str`): `train`, `validation` or `test`.
        count (`int`): How many.
        seed (`int`): Another seed, other clips.
        frame (`int`, *optional*): Show this frame alone, as an image.
    """

    split: str
    count: int
    seed: int = 0
    frame: int | None = None
    options = clip_options()

    def clip(self, index: int) -> Clip:
        """A clip without its pixels."""
        return needle_clip(index, self.split, self.seed)

    def picture(self, index: int) -> Any:
        """The clip as the image processor takes it: a video, or its one frame."""
        if self.frame is not None:
            return Image.fromarray(render_clip(self.clip(index), range(self.frame, self.frame + 1))[0])
        return Video(render_clip(self.clip(index)))

    def questions(self, index: int, kinds: Sequence[str], most: int, visit: int = 0) -> list[Question]:
        """All that is asked about a clip."""
        return [question for question in self.clip(index).questions if question.kind in kinds][:most]


class ClipFeatures:
    """Tower features of a set of clips, in memory and half precision."""

    def __init__(self, model: Any, processor: Any, clips: ClipSet):
        base = model.model
        numbers = tqdm(range(clips.count), f"tower features, {clips.split}", disable=None)
        with evaluating(base.vision_tower):
            self.features = torch.stack(
                [encode_picture(base, processor, clips.picture(n), VIEWS_PER_PASS, torch.float16) for n in numbers]
            )

    def first_views(self, numbers: Sequence[int], num_views: int) -> torch.Tensor:
        """Features `(clips * views, L, C)`, float32."""
        return self.features[list(numbers), :num_views].flatten(0, 1).float()


class ClipCollator(SceneCollator):
    """A `SceneCollator` whose pictures are clips."""

    scenes: Any

    def _sample(self, question: Question, views: str, side: int, budget: int | None = None) -> dict[str, torch.Tensor]:
        shown = Image.new("RGB", (side, side))
        media = {"type": "image", "image": shown}
        if self.scenes.frame is None:
            media = {"type": "video", "video": [shown] * STEPS}
        content = [media, {"type": "text", "text": question.text}]
        answer = [{"type": "text", "text": question.answer}]
        messages: list[dict] = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return self._encode(messages, budget)


def join_clips(
    checkpoint: str | Path,
    halves: str | Path,
    preset: str,
    num_queries: int | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[Any, Any]:
    """A model of a preset with the words of clips and all that a trained checkpoint of the needle task knows.

    Args:
        checkpoint (`str` or `Path`): Such as `checkpoints/needle-slime`: its language model, and of its connector what
            the preset has.
        halves (`str` or `Path`): The halves: tower and vocabulary.
        preset, num_queries, seed, changes: As of `join_halves`.

    Returns:
        The model in evaluation mode, and its processor.
    """
    parts = load_halves(halves)
    parts.tokenizer.add_tokens(list(CLIP_WORDS))
    torch.manual_seed(seed)
    parts.language.resize_token_embeddings(len(parts.tokenizer))
    model, processor = join_halves(parts, preset, num_queries, seed=seed, **changes)
    own = model.state_dict()
    for name, value in AutoModelForImageTextToText.from_pretrained(checkpoint).state_dict().items():
        name = _name_in(model, name)
        if name in own and own[name].shape[1:] == value.shape[1:] and len(own[name]) >= len(value):
            own[name][: len(value)] = value
    model.load_state_dict(own)
    return model, processor


def _name_in(model: Any, name: str) -> str:
    """What a weight of a `slime` checkpoint is called in a model with other parts."""
    for number, op in enumerate(model.model.connector.view_ops):
        if hasattr(op, "query_former"):
            name = name.replace("connector.view_ops.0.", f"connector.view_ops.{number}.")
    return name


def train_clips(model: Any, processor: Any, clips: ClipSet, folder: Path, options: RunOptions) -> Any:
    """Train connector and language model on clips, or load what a finished run learnt; the tower stays as it is.

    Args:
        model, processor: From `join_clips`; the model is trained in place.
        clips (`ClipSet`): What it sees.
        folder (`Path`): Gets `done.json` and `model/`; an interrupted run goes on there.
        options (`RunOptions`): `visits` (one number), `batch_size`, `seed` and the like; the rest is not read.

    Returns:
        The model, in evaluation mode.
    """
    if not (folder / DONE).is_file():
        rates = Rates(language=4e-4)
        parts = {"connector": rates.connector, "language_model": rates.language, "lm_head": rates.language}
        stage = Stage("clips", parts, views="all" if clips.frame is None else "global")
        collator = clip_collator(model, processor, clips, ClipFeatures(model, processor, clips))
        visits = Visits(clips.count, options.visits[0], options.seed)
        args = _arguments(folder / "checkpoints", len(visits), options.batch_size, options)
        clock = Clock(folder / "clock.json")
        trainer = Trainer(
            model,
            args,
            train_dataset=visits,
            data_collator=collator,
            processing_class=processor,
            callbacks=[StageCallback(stage), clock],
            optimizer_cls_and_kwargs=stage.optimizer_cls_and_kwargs(args),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "checkpoints"))
        model.save_pretrained(folder / MODEL)
        processor.save_pretrained(folder / MODEL)
        loss = [[entry["step"], round(entry["loss"], 4)] for entry in trainer.state.log_history if "loss" in entry]
        write_text(
            folder / DONE, json.dumps({"seconds": clock.total(), "steps": trainer.state.global_step, "loss": loss})
        )
    return AutoModelForImageTextToText.from_pretrained(folder / MODEL).eval()


def clip_collator(model: Any, processor: Any, clips: ClipSet, store: ClipFeatures | None) -> ClipCollator:
    """The collator of a set of clips."""
    views = "all" if clips.frame is None else "global"  # a frame alone needs no crops
    known: dict[str, Any] = {"scenes": clips, "store": store}
    return ClipCollator(processor, **known, views=views, packed=can_pack(model), kinds={views: CLIP_KINDS})


@torch.inference_mode()
def answer_clips(model: Any, processor: Any, clips: ClipSet, batch_size: int = 8) -> list[Graded]:
    """Ask all questions about some clips, as `answer_scenes` asks about scenes."""
    collator = clip_collator(model.eval(), processor, clips, None)
    found = []
    for start in range(0, clips.count, batch_size):
        batch = collator.build([{"scene": number} for number in range(start, min(start + batch_size, clips.count))])
        inputs = deepcopy(batch.inputs)
        labels = inputs.pop("labels")
        rights = grade(batch, labels, model(**inputs).logits)
        for number, group, right in zip(batch.scenes, batch.questions, rights, strict=True):
            found += [Graded(number, *pair) for pair in zip(group, right, strict=True)]
    return found
