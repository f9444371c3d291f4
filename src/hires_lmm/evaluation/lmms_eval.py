"""A checkpoint as a chat model of lmms-eval: `lmms-eval --model hires_lmm --model_args pretrained=FOLDER,...`."""

from functools import partial
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from hires_lmm_command import stop_at_errors

from ..extras import import_extra
from .harness import HarnessAsker, HarnessOptions, generation_options


import_extra("lmms_eval", "lmms-eval")

from lmms_eval.api.instance import GenerationResult, TokenCounts  # noqa: E402
from lmms_eval.api.model import lmms  # noqa: E402
from lmms_eval.models.model_utils.gen_metrics import log_metrics  # noqa: E402
from lmms_eval.protocol import ChatMessages  # noqa: E402
from loguru import logger  # noqa: E402


class HiResLmm(lmms):
    """The model that the name `hires_lmm` stands for.

    Args:
        pretrained (`str`): Folder or Hub id of a checkpoint.
        batch_size (`int`): Questions that are answered at once.
        options: See `HarnessOptions`; `system_prompt` may name a file.

    Raises:
        ValueError: If an option is unknown or wrong, or `device_map` is passed to several ranks.
    """

    is_simple = False

    def __init__(self, pretrained: str, batch_size: int | str = 1, **options: Any) -> None:
        stop_at_errors()
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and options.get("device_map") is not None:
            raise ValueError(
                f"device_map={options['device_map']!r} spreads one model over devices, but {self._world_size} ranks "
                "hold one each; leave it out, or start one process."
            )
        if self._world_size > 1:
            options["device"] = str(self.accelerator.device)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r} must be a whole number of at least 1.")
        self.batch_size = int(batch_size)
        if options.get("system_prompt") is not None:
            options["system_prompt"] = self._resolve_system_prompt(str(options["system_prompt"]))
        self.options = HarnessOptions.read(options)
        self.asker = HarnessAsker(str(pretrained), self.options, self._rank)
        self.device = self.asker.model.device  # the harness gathers there, also when the model is gone

    def generate_until(self, requests: list) -> list:
        """Answer the requests of this rank."""
        questions, options = [], []
        for _, to_messages, chosen, doc_id, task, split in (request.args for request in requests):
            questions.append(partial(self._conversation, to_messages, task, split, doc_id))
            options.append(generation_options(chosen or {}, self.options.max_new_tokens))
        with tqdm(total=len(requests), disable=self.rank != 0, desc="hires_lmm") as bar:
            answers = self.asker.answer(questions, options, self.batch_size, bar.update)
            elapsed = bar.format_dict["elapsed"]
        total = sum(answer.num_tokens for answer in answers)
        counts = {"rank": self.rank, **self.asker.counts}
        log_metrics(
            total_gen_tokens=total,
            total_elapsed_time=elapsed,
            avg_speed=total / max(elapsed, 1e-9),
            additional_metrics=counts,
        )
        logger.info(f"hires_lmm: {', '.join(f'{name} {count}' for name, count in counts.items())}")
        return [GenerationResult(each.text, TokenCounts(output_tokens=each.num_tokens)) for each in answers]

    def _conversation(self, to_messages: Any, task: str, split: str, doc_id: int) -> list[dict]:
        messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc_id])).messages
        return [{"role": each.role, "content": [_part(part) for part in each.content]} for each in messages]

    def loglikelihood(self, requests: list) -> list:
        """Refused: tasks of this kind compare texts by their probability."""
        raise NotImplementedError("hires_lmm answers by generation; choose a task with output_type generate_until.")

    def generate_until_multi_round(self, requests: list) -> list:
        """Refused: tasks of this kind answer in several turns."""
        raise NotImplementedError("hires_lmm answers one turn; choose a task with output_type generate_until.")

    def clean(self) -> None:
        """Free the memory of the model, which the harness asks for before it scores."""
        del self.asker
        super().clean()


def _part(part: Any) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if getattr(part, "start_time", None) is not None or getattr(part, "end_time", None) is not None:
        raise ValueError(
            f"The task asks about {part.start_time} s to {part.end_time} s of {part.url!r}; hires_lmm reads videos "
            "whole. Cut the file, or choose another task."
        )
    return {"type": part.type, part.type: part.url}
