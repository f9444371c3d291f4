"""What an exit saves: prefill of the language model, cache and decoding with visual tokens in the first k layers.

    python benchmarks/layer_ops.py --shapes deep     32 layers, all widths / 16, on the CPU; minutes on two idle cores
    python benchmarks/layer_ops.py --device cuda     Llama-3-8B shapes, bfloat16, random weights

llava_next's 2,928 visual tokens of an image of 1024 x 1024 and 64 of text. The unpruned prefill is the language model
alone; ours is the model behind its tower, with the exit told to the layer op `dyvte`. A point holds if its time is at
most (k + (L - k) x share of text) / L + 0.03 of unpruned, its cache has exactly the bytes that this means, and
decoding takes no longer than in the same model with all tokens.
"""

import argparse
import sys
from typing import Any

import torch
from measure import interleave, median, median_ratio, print_table, report_path
from record import write_result
from shapes import IMAGE_TOKEN, SHAPES, Shapes, build

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration
from hires_lmm.modeling.compat_hires_lmm import CACHE
from hires_lmm.modeling.outputs_hires_lmm import HiResLmmImageFeatures


VISUAL, TEXT, SLACK = 2928, 64, 0.03
STEPS = 16
COLUMNS = {
    "layers": "layers with visual tokens",
    "milliseconds": "ms",
    "ratio": "of unpruned",
    "most": "at most",
    "cache_mib": "cache MiB",
    "bytes_as_counted": "as counted",
    "step_ratio": "decoding step, of unpruned",
}


def cache_bytes(cache: Any) -> int:
    """Bytes of keys and values of all layers."""
    return sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in cache.layers)


def measure(device: str, shapes: Shapes, exits: list[int], repeats: int, visual: int = VISUAL) -> list[dict[str, Any]]:
    """One row for the unpruned language model and one an exit.

    Args:
        device (`str`): Where.
        shapes (`Shapes`): Sizes.
        exits (`list[int]`): Layers that have visual tokens.
        repeats (`int`): Rounds.
        visual (`int`): Visual tokens.
    """
    depth = shapes.llama().num_hidden_layers
    layer_op = {"part": "dyvte", "layers": [k - 1 for k in exits]}
    config = HiResLmmConfig.from_preset(
        "llava_next",
        shapes.clip(),
        shapes.llama(),
        image_token_id=IMAGE_TOKEN,
        connector_config={"layer_ops": [layer_op]},
    )
    model = build(HiResLmmForConditionalGeneration, config, shapes.dtype, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 200, (1, visual + TEXT), generator=generator)
    ids[:, 4 : 4 + visual] = IMAGE_TOKEN
    ids = ids.to(device)
    features = torch.randn(visual, config.text_config.hidden_size, generator=generator).to(device, shapes.dtype)
    given = {"input_ids": ids, "mm_encoder_outputs": {"image": HiResLmmImageFeatures(pooler_output=[features])}}
    embeds = model.get_input_embeddings()(ids)
    embeds[:, 4 : 4 + visual] = features
    caches: dict[str, Any] = {}

    def keep(name: str, output: Any) -> None:
        caches[name] = output.get(CACHE)

    def unpruned() -> None:
        keep("unpruned", model.model.language_model(inputs_embeds=embeds, use_cache=True))

    def leave(k: int) -> None:
        keep(str(k), model.model(**given, use_cache=True, layer_options={"exit_after": k - 1}))

    names = {"unpruned": unpruned, **{str(k): (lambda k=k: leave(k)) for k in exits}}
    seconds = interleave(names, repeats, device=device)
    token, size = ids[:, -1:], cache_bytes(caches["unpruned"]) / (visual + TEXT) / depth
    held = {name: cache_bytes(cache) for name, cache in caches.items()}

    keep("unpruned", model.model(**given, use_cache=True, layer_options={"exit_after": None}))

    def step(name: str) -> None:
        for _ in range(STEPS):
            model.model(input_ids=token, **{CACHE: caches[name]})

    steps = interleave({name: (lambda name=name: step(name)) for name in names}, repeats, device=device)
    rows = []
    for name in names:
        k = depth if name == "unpruned" else int(name)
        rows.append(
            {
                "layers": k,
                "milliseconds": 1e3 * median(seconds[name]),
                "ratio": median_ratio(seconds[name], seconds["unpruned"]),
                "most": (k + (depth - k) * TEXT / (visual + TEXT)) / depth + SLACK,
                "cache_mib": held[name] / 2**20,
                "bytes_as_counted": held[name] == size * (k * (visual + TEXT) + (depth - k) * TEXT),
                "step_ratio": median_ratio(steps[name], steps["unpruned"]),
            }
        )
    return rows


@torch.no_grad()
def main() -> int:
    """Measure, print and write JSON; the exit status is 1 where a point does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="deep on the CPU by default")
    parser.add_argument("--exits", nargs="*", type=int, default=[4, 8, 16], help="layers with visual tokens")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    name = arguments.shapes or ("cuda" if arguments.device == "cuda" else "deep")
    rows = measure(arguments.device, SHAPES[name], arguments.exits, arguments.repeats)
    print_table(rows, COLUMNS, f"llava_next, {VISUAL} visual tokens and {TEXT} of text, {name}, {arguments.device}")
    report_path(write_result(f"layer_ops_{name}_{arguments.device}", rows, [0]))
    holds = [row["ratio"] <= row["most"] and row["bytes_as_counted"] and row["step_ratio"] <= 1 for row in rows[1:]]
    return 0 if all(holds) else 1


if __name__ == "__main__":
    sys.exit(main())
