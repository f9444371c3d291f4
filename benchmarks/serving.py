"""Requests a second in vLLM: ours against transformers' llava_next on one language model and one backend.

    make test-vllm PYTEST_ARGS='-k nothing'          makes the environment .cache/vllm
    .cache/vllm/bin/python benchmarks/serving.py     10 minutes on two idle cores; --images 8 for a look

All widths / 16 at true depth (`deep` of `shapes.py`), random weights. Each request is one picture of 2048 x 2048, all
different, and a question; one token is made. Caches of images and prefixes are off. Every engine is a process of its
own and takes its turn in each round. Time in image processors is taken out and stands beside.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image
from record import write_result
from rich.console import Console


SIDE = 2048
WORDS = (
    "describe what the sign on the left of the door says and name the colour of the car that stands before it "
    "now please"
)
BASELINE = "transformers llava_next"
ROUTER = {"part": "router", "on": "all", "score": "cosine", "keep": {"rule": "budget"}}
CASES: dict[str, tuple[str, dict]] = {
    BASELINE: ("", {}),
    "llava_next": ("llava_next", {}),
    "slime, 4 crops": ("slime", {}),
    "slime, 4 crops, budget of 300": ("slime", {"max_image_tokens": 300}),
}
"""Name -> preset and options of the image processor; no preset: transformers' own model."""


def picture(seed: int) -> Image.Image:
    """A picture that no other request has."""
    coarse = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BILINEAR)


def save_checkpoint(name: str, folder: Path) -> None:
    """Write a random checkpoint of a case."""
    import torch
    from shapes import SHAPES, VIEW, build
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmProcessor
    from hires_lmm.conversion.random_model import build_byte_tokenizer
    from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES

    torch.manual_seed(0)
    shapes, preset = SHAPES["deep"], CASES[name][0]
    tokenizer = build_byte_tokenizer()
    token = tokenizer.convert_tokens_to_ids("<image>")
    if preset:
        connector = {"token_ops": [ROUTER]} if preset == "slime" else {}
        config = HiResLmmConfig.from_preset(
            preset, shapes.clip(), shapes.llama(), image_token_id=token, connector_config=connector
        )
        changes = {"max_crops": 4} if preset == "slime" else {}
        model: Any = build(HiResLmmForConditionalGeneration, config, torch.float32, "cpu")
        processor: Any = HiResLmmProcessor.from_config(config, tokenizer, chat_template="plain", **changes)
    else:
        config = LlavaNextConfig(vision_config=shapes.clip(), text_config=shapes.llama(), image_token_index=token)
        model = build(LlavaNextForConditionalGeneration, config, torch.float32, "cpu")
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(size={"shortest_edge": VIEW}, crop_size={"height": VIEW, "width": VIEW}),
            tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            chat_template=CHAT_TEMPLATES["plain"],
            num_additional_image_tokens=1,
        )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def run_engine(name: str, folder: Path, images: int) -> dict[str, Any]:
    """One pass over all pictures in this process: seconds without and within image processors, tokens of a picture."""
    from vllm import LLM, SamplingParams
    from vllm.multimodal.processing import BaseMultiModalProcessor

    spent, inner = [0.0], BaseMultiModalProcessor.apply

    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return inner(self, *args, **kwargs)
        finally:
            spent[0] += time.perf_counter() - start

    BaseMultiModalProcessor.apply = timed
    engine = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=4096,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 1},
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        mm_processor_kwargs=CASES[name][1] or None,
        **({} if CASES[name][0] else {"model_impl": "transformers"}),
    )
    prompts = [
        {"prompt": f"<image>\n{WORDS}", "multi_modal_data": {"image": picture(seed)}} for seed in range(images + 1)
    ]
    sampling = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    engine.generate(prompts[-1:], sampling, use_tqdm=False)
    spent[0], start = 0.0, time.perf_counter()
    answers = engine.generate(prompts[:images], sampling, use_tqdm=False)
    total = time.perf_counter() - start
    return {"seconds": total - spent[0], "preprocessing": spent[0], "tokens": len(answers[0].prompt_token_ids)}


def main() -> int:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("CASE", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, folder, out = arguments.one
        Path(out).write_text(json.dumps(run_engine(name, Path(folder), arguments.images)))
        return 0
    own = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    found: dict[str, list[dict]] = {name: [] for name in CASES}
    say = Console(stderr=True, highlight=False).print
    with tempfile.TemporaryDirectory() as work:
        for number, name in enumerate(CASES):
            save_checkpoint(name, Path(work, str(number)))
        for turn in range(arguments.rounds):
            for number, name in enumerate(CASES):
                out = Path(work, "out.json")
                command = [
                    sys.executable,
                    __file__,
                    "--images",
                    str(arguments.images),
                    "--one",
                    name,
                    f"{work}/{number}",
                    str(out),
                ]
                subprocess.run(command, env={**os.environ, **own}, check=True)
                found[name].append(json.loads(out.read_text()))
                say(f"  round {turn + 1} of {arguments.rounds}, {name}: {found[name][-1]['seconds']:.1f} s")
    rows = []
    for name, passes in found.items():
        ratios = [base["seconds"] / own["seconds"] for base, own in zip(found[BASELINE], passes, strict=True)]
        share = [own["preprocessing"] / own["seconds"] for own in passes]
        rows.append(
            {
                "model": name,
                "prompt_tokens": passes[0]["tokens"],
                "requests_per_second_of_llava_next": median(ratios),
                "rounds": ratios,
                "preprocessing_of_the_rest": median(share),
            }
        )
        Console(highlight=False).print(
            f"{name}: {passes[0]['tokens']} tokens, {median(ratios):.2f} x the requests a second"
        )
    path = write_result("serving_cpu", rows, [0])
    say(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
