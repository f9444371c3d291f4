"""What ZoomEye's oracle saves: questions in batches with shared beginnings, against one `generate` a question.

    python benchmarks/search.py                  small models on the CPU, about 3 minutes on two idle cores
    python benchmarks/search.py --device cuda    CLIP ViT-L/14-336 with Llama-3-8B shapes, bfloat16, random weights

Both are asked the same questions about the same places in the same order, which is compared; a script decides where
the walk goes, so that no random weight does. Its 19 questions are about nine places: the image, its quarters, a
quarter's; the answer is one token. Preparing pixels counts on both sides.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from cases import OURS, PEERS, Shared, llava_next_processor, ours
from measure import interleave, median, median_ratio, plot_bars, print_table, report_path
from PIL import Image
from prefill import picture
from record import write_result
from shapes import PATCH, SHAPES, VIEW
from transformers import LlavaNextProcessor

from hires_lmm import HiResLmmProcessor
from hires_lmm.conversion.random_model import build_byte_tokenizer
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from hires_lmm.search import Ask, ModelOracle, SearchResult, ZoomEye
from hires_lmm.search.oracle import confidence_of, first_ids


MODELS = ("llava_next", "slime, 4 crops", "transformers llava_next")
COLUMNS = {
    "model": "model",
    "questions": "questions",
    "tower_views": "views encoded",
    "tower_views_alone": "one by one",
    "ratio": "times as fast as one generate a question",
    "difference": "largest difference of a confidence",
}
FOUND = (1000, 300)
"""What the script looks for."""


class Alone:
    """One `generate` a question: what somebody writes first."""

    def __init__(self, model: Any, processor: Any, options: dict[str, Any]):
        self.model, self.processor, self.options = model, processor, options
        self.tokenizer, self.side = processor.tokenizer, VIEW

    def confidences(self, asks: Sequence[Ask]) -> list[float]:
        """One after another."""
        return [self.confidence(ask) for ask in asks]

    @torch.inference_mode()
    def confidence(self, ask: Ask) -> float:
        """From a prompt of its own."""
        logits = self.generate(list(ask.views()), ask.text, max_new_tokens=1).logits[0][0].float()
        yes, no = (first_ids(self.tokenizer, words) for words in ask.words)
        return confidence_of(logits, yes, no)

    def answer(self, images: Sequence[Image.Image], turns: Sequence[str], **options: Any) -> str:
        """One token, which no comparison needs."""
        output = self.generate(list(images), turns[0], max_new_tokens=1)
        return str(self.tokenizer.decode(output.sequences[0, -1:]))

    def generate(self, images: list[Image.Image], text: str, **options: Any) -> Any:
        """The stock call."""
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=dict(self.options),
        ).to(self.model.device, self.model.dtype)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **options}
        return self.model.generate(**inputs, **options)


class Decided:
    """Has an oracle answer every question, notes it, and lets the script decide."""

    def __init__(self, oracle: Any):
        self.oracle, self.side = oracle, oracle.side
        self.order: list[tuple] = []
        self.values: list[float] = []

    def confidences(self, asks: Sequence[Ask]) -> list[float]:
        """The script's."""
        self.values += self.oracle.confidences(asks)
        self.order += [(ask.kind, ask.subject, ask.box) for ask in asks]
        return [self.decide(ask) for ask in asks]

    def decide(self, ask: Ask) -> float:
        """Looks for `FOUND`, and sees it in two steps."""
        left, top, width, height = ask.box
        inside = left <= FOUND[0] < left + width and top <= FOUND[1] < top + height
        return (0.9 if ask.kind != "answering" or ask.depth == 2 else 0.0) * (1 if inside else -1)

    def answer(self, *arguments: Any, **options: Any) -> str:
        """The oracle's."""
        return self.oracle.answer(*arguments, **options)


def build(name: str, shared: Shared) -> tuple[Any, Any, dict[str, Any]]:
    """Model, processor and options of the processor."""
    tokenizer = build_byte_tokenizer()
    if name in OURS:
        model = ours(name, shared).model
        options = {key: value for key, value in OURS[name][2].items() if key != "max_image_tokens"}
        return model, HiResLmmProcessor.from_config(model.config, tokenizer), options
    template = CHAT_TEMPLATES["chatml"]
    strategy = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaNextProcessor(llava_next_processor(), tokenizer, chat_template=template, **strategy)
    return PEERS["llava_next"](shared).model, processor, {}


def walk(oracle: Any, image: Image.Image) -> tuple[Decided, SearchResult]:
    """One search."""
    decided = Decided(oracle)
    return decided, ZoomEye(cues=["a cup"], crop_only=True).run([image], "Which colour is the cup?", decided)


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="by default those of the device")
    parser.add_argument("--side", type=int, default=2048, help="pixels of the square image")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.manual_seed(0)
    shared, rows = Shared(SHAPES[given.shapes or given.device], given.device), []
    image = picture(given.side, given.side)
    for name in MODELS:
        model, processor, options = build(name, shared)
        views: list[int] = []
        hook = model.model.vision_tower.register_forward_hook(
            lambda module, args, output, views=views: views.append(len(output.last_hidden_state))
        )
        ends: dict[str, Decided] = {}

        def run(kind: str, oracle: Any, ends: dict[str, Decided] = ends) -> None:
            ends[kind] = walk(oracle, image)[0]

        cases = {
            "alone": lambda: run("alone", Alone(model, processor, options)),  # noqa: B023
            "oracle": lambda: run(
                "oracle", ModelOracle(model, processor, max_new_tokens=1, progress=False, **options)  # noqa: B023
            ),
        }  # fmt: skip
        counted = {}
        for kind, call in cases.items():
            views.clear()
            call()
            counted[kind] = sum(views)
        seconds = interleave(cases, given.repeats, 0, given.device)
        hook.remove()
        if ends["alone"].order != ends["oracle"].order:
            raise SystemExit(f"{name}: the two were asked different questions.")
        pairs = zip(ends["alone"].values, ends["oracle"].values, strict=True)
        rows.append(
            {
                "model": name,
                "questions": len(ends["oracle"].order),
                "tower_views": counted["oracle"],
                "tower_views_alone": counted["alone"],
                "ratio": median_ratio(seconds["alone"], seconds["oracle"]),
                "ratio_of_medians": median(seconds["alone"]) / median(seconds["oracle"]),
                "difference": max(abs(one - other) for one, other in pairs),
                "seconds": seconds,
            }
        )
    stem = f"search_{given.device}"
    print_table(rows, COLUMNS, f"ZoomEye over a {given.side} x {given.side} image, {given.device}")
    path = write_result(stem, rows, [0])
    plot_bars(stem, rows, "model", "ratio", "times as fast", f"a batched oracle with shared prompts, {given.device}")
    report_path(path)


if __name__ == "__main__":
    main()
