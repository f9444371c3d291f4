"""A checkpoint in VLMEvalKit: `hires-lmm vlmeval CHECKPOINT --name NAME -- --data MMBench_DEV_EN`."""

import logging
import os
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..extras import import_extra
from .harness import HarnessAsker, HarnessOptions, generation_options
from .task_prompts import LETTER_FORMAT, LETTER_FORMAT_CN, ask_choices, ask_word


import_extra("vlmeval.vlm.base", "vlmeval")

from vlmeval.dataset import DATASET_TYPE  # noqa: E402
from vlmeval.vlm.base import BaseModel  # noqa: E402


PROMPTS = ("harness", "slime")
CACHED_IMAGES = 32
WORD_DATASETS = ("MathVision", "MathVision_MINI")
"""Of type VQA, which the harness asks with the question alone."""

UNSET = 1 << 30
"""A number of frames that no data set wants, so that the harness says which it does."""


class HiResLmm(BaseModel):
    """The class of a model of VLMEvalKit; it is asked one question at a time.

    Args:
        model_path (`str`): Folder or Hub id of a checkpoint.
        prompt (`str`): `"harness"`: the harness' own prompts; `"slime"`: those of SliME's Table 6.
        options: See `HarnessOptions`.

    Raises:
        ValueError: If an option is unknown or wrong.
    """

    INTERLEAVE = True
    INSTALL_REQ = False
    VIDEO_LLM = True
    allowed_types = ("text", "image", "video")

    def __init__(self, model_path: str, prompt: str = "harness", **options: Any) -> None:
        super().__init__()
        _check_prompt(prompt)
        self.prompt = prompt
        self.options = HarnessOptions.read({"cached_images": CACHED_IMAGES, **options})
        self.asker = HarnessAsker(model_path, self.options, int(os.environ.get("RANK", "0")))

    @property
    def nframe(self) -> int | None:
        """Frames of a video; the harness sets it where a data set wants another number."""
        return None if self.options.fps is not None else self.options.num_frames or UNSET

    @nframe.setter
    def nframe(self, wanted: int) -> None:
        _refuse_frames("num_frames", wanted, self.options.num_frames)

    @property
    def fps(self) -> float:
        """Frames a second, likewise."""
        return self.options.fps or 0

    @fps.setter
    def fps(self, wanted: float) -> None:
        _refuse_frames("fps", wanted, self.options.fps)

    def use_custom_prompt(self, dataset: str) -> bool:
        """Whether `build_prompt` asks the questions of a data set."""
        return self.prompt == "slime" and (DATASET_TYPE(dataset) in ("MCQ", "Y/N") or dataset in WORD_DATASETS)

    def build_prompt(self, line: Any, dataset: str) -> list[dict]:
        """A question of a data set, with its images."""
        paths = self.dump_image(line, dataset)
        if DATASET_TYPE(dataset) == "MCQ":
            text = ask_choices(line, LETTER_FORMAT_CN if "CN" in dataset.upper().split("_") else LETTER_FORMAT)
        else:
            text = ask_word(line["question"])
        paths = paths if isinstance(paths, list) else [paths]
        message = [*({"type": "image", "value": path} for path in paths), {"type": "text", "value": text}]
        if not dataset.startswith("MMMU"):
            return message
        from vlmeval.dataset import MMMUDataset

        return MMMUDataset.split_MMMU(message)

    def generate_inner(self, message: list[dict], dataset: str | None = None) -> str:
        """Answer a question."""
        content = [{"type": part["type"], part["type"]: part["value"]} for part in message]
        options = generation_options({}, self.options.max_new_tokens)
        return self.asker.answer([lambda: [{"role": "user", "content": content}]], [options])[0].text


def run_vlmeval(checkpoint: str, name: str, prompt: str, options: dict[str, Any], arguments: Sequence[str]) -> None:
    """Run VLMEvalKit's own command line with a checkpoint as its model.

    Args:
        checkpoint (`str`): Folder or Hub id.
        name (`str`): What the harness calls the model; its results stand in a folder of this name.
        prompt (`str`): See `HiResLmm`; `options` likewise.
        arguments (sequence of `str`): Arguments of VLMEvalKit, such as `--data MMBench_DEV_EN --reuse`.

    Raises:
        ValueError: If an option is wrong, or if the harness left something out because it failed.
    """
    if "--model" in arguments or "--config" in arguments:
        raise ValueError("The model is the checkpoint; leave out --model and --config.")
    _check_prompt(prompt)
    HarnessOptions.read(options)
    from vlmeval import run
    from vlmeval.config import supported_VLM

    supported_VLM[name] = partial(HiResLmm, model_path=checkpoint, prompt=prompt, **options)
    failures = _Failures(logging.ERROR)
    run.logger.addHandler(failures)
    given, sys.argv = sys.argv, ["hires-lmm vlmeval", *arguments, "--model", name]
    try:
        run.load_env()
        run.main()
    finally:
        sys.argv = given
        run.logger.removeHandler(failures)
    if failures.texts:
        raise ValueError(f"VLMEvalKit went on without what failed: {'; '.join(failures.texts)}")


def _refuse_frames(name: str, wanted: float, given: float | None) -> None:
    raise ValueError(
        f"The data set takes {name}={wanted} of a video, the model has {name}={given}; pass --option {name}={wanted}."
    )


def _check_prompt(prompt: str) -> None:
    if prompt not in PROMPTS:
        raise ValueError(f"prompt={prompt!r} is unknown; choose one of {', '.join(PROMPTS)}.")


class _Failures(logging.Handler):
    """What the harness logs as an error: it goes on to the next data set and ends with status 0."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())
