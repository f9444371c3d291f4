"""A second model that an objective or a policy reads, frozen and with a processor of its own."""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from ...modeling.logits_hires_lmm import IGNORED_LABEL
from ...processing.chat_templates_hires_lmm import marks_answers
from ..columns import BatchColumn


class SecondModel:
    """A frozen model with its own processor or tokenizer: a teacher, a reference, a reward model.

    It is no module, so whoever holds one neither trains nor saves it, and neither DDP nor FSDP sees it. Every process
    holds it whole; it moves to the device of its inputs and computes in its own number format, whatever autocast says.

    Args:
        name (`str`): Folder or Hub id.
        dtype (`str`): Number format: `"auto"` (as saved), `"float32"`, `"bfloat16"` or `"float16"`.
        model_class (`str`): The class of transformers that loads it, such as `"AutoModelForImageTextToText"`.
        processor_class (`str`): The same for its processor, such as `"AutoProcessor"`.

    Raises:
        ValueError: If transformers has no such class.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        model_class: str = "AutoModelForCausalLM",
        processor_class: str = "AutoTokenizer",
    ):
        for given in (model_class, processor_class):
            if not hasattr(transformers, given):
                raise ValueError(f"transformers has no class {given!r}; name one that loads the second model.")
        self._settings = {
            "name": name,
            "dtype": dtype,
            "model_class": model_class,
            "processor_class": processor_class,
        }
        self.processor = getattr(transformers, processor_class).from_pretrained(name)
        self.model = getattr(transformers, model_class).from_pretrained(name, dtype=dtype).eval().requires_grad_(False)

    def settings(self) -> dict[str, str]:
        """The arguments that load it anew, for `Objective.settings`."""
        return dict(self._settings)

    def column(
        self, name: str, select: Callable[[list[dict]], list[dict]] | None = None, labels: bool = False
    ) -> "SecondModelColumn":
        """The column of its inputs, for `Objective.columns`; see `SecondModelColumn`."""
        return SecondModelColumn(name, self.processor, select, labels)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Any], **options: Any) -> Any:
        """Run it, without gradients, on what its column holds in `StepValues.columns`."""
        device = next(value for value in inputs.values() if isinstance(value, torch.Tensor)).device
        if self.model.device != device:
            self.model.to(device)
        with torch.autocast(device.type, enabled=False):
            return self.model(**inputs, **options)


class SecondModelColumn(BatchColumn):
    """What the processor of a second model makes of every row of a batch, with images or without: a dict of tensors.

    Args:
        name (`str`): Name in the batch.
        processor: A processor or a tokenizer, which reads the text parts alone.
        select (`Callable`, *optional*): Messages -> those that are read.
        labels (`bool`): Add `labels`: the answers, as the chat template marks them; -100 elsewhere, and in rows whose
            answers are empty.

    Raises:
        ValueError: If there are to be labels, but the chat template marks no answers.
    """

    def __init__(
        self,
        name: str,
        processor: Any,
        select: Callable[[list[dict]], list[dict]] | None = None,
        labels: bool = False,
    ):
        super().__init__(name)
        if labels and not marks_answers(processor.chat_template):
            raise ValueError(
                f"The chat template of the {type(processor).__name__} of a second model does not mark answers with "
                "{% generation %}, so nobody knows where they stand; set processor.chat_template to one that does."
            )
        self.processor, self.select, self.labels = processor, select, labels

    def encode(self, messages: list[dict]) -> list[dict]:
        """The messages that are read; the processor pads whole batches."""
        return messages if self.select is None else self.select(messages)

    def join(self, values: list[list[dict]]) -> dict[str, torch.Tensor]:
        """The inputs of the second model, one row a sample."""
        options = {"return_dict": True, "return_tensors": "pt", "return_assistant_tokens_mask": self.labels}
        if hasattr(self.processor, "image_processor"):
            batch = self.processor.apply_chat_template(
                values, tokenize=True, processor_kwargs={"padding": True}, **options
            )
            return self._with_labels(dict(batch), values)
        plain = [[{"role": message["role"], "content": _text(message)} for message in messages] for messages in values]
        if self.processor.chat_template is None:
            texts = ["\n".join(message["content"] for message in messages) for messages in plain]
            return dict(self.processor(texts, padding=True, return_tensors="pt"))
        batch = self.processor.apply_chat_template(plain, padding=True, **options)
        return self._with_labels(dict(batch), values)

    def _with_labels(self, batch: dict[str, Any], values: list[list[dict]]) -> dict[str, torch.Tensor]:
        """Put labels in place of the mask of answers."""
        marks = batch.pop("assistant_masks", None)
        if self.labels:
            said = [any(_text(m) for m in messages if m["role"] == "assistant") for messages in values]
            is_answer = torch.as_tensor(marks).bool() & torch.tensor(said)[:, None]
            batch["labels"] = torch.where(is_answer, batch["input_ids"], IGNORED_LABEL)
        return batch


def _text(message: dict) -> str:
    """The text parts of a message."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
