"""How many tokens the cosine router keeps, against prompt length, text padding and black image borders.

    python benchmarks/kept_share.py            about a minute on two CPU cores

The released router sums the cosines over the text tokens before its softmax, so a longer prompt sharpens the
distribution and fewer tokens reach the mass gamma. The vectors are synthetic: unit Gaussian plus a shared direction,
as token embeddings of language models have; with trained weights the numbers differ, the shape does not. The last part
uses random weights and an image with black borders, and asks whether border tokens are kept less.
"""

import argparse

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from record import RESULTS, write_result
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig

from hires_lmm import HiResLmmConfig, HiResLmmForConditionalGeneration, HiResLmmImageProcessor
from hires_lmm.modeling.routers_hires_lmm import cosine_scores, keep_threshold


WIDTH, NUM_TOKENS = 1024, 864
LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PADDINGS = (0, 64, 256, 1024)


def vectors(count: int, shared: torch.Tensor, strength: float, generator: torch.Generator) -> torch.Tensor:
    """Gaussian vectors that share a direction."""
    return torch.randn(count, WIDTH, generator=generator) + strength * shared * WIDTH**0.5


def share(length: int, padding: int, reduce: str, gamma: float, seed: int) -> float:
    """Kept share of one synthetic image and prompt."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    strengths = torch.rand(NUM_TOKENS, 1, generator=generator) * 0.2
    image = torch.randn(NUM_TOKENS, WIDTH, generator=generator) + strengths * shared * WIDTH**0.5
    text = vectors(length, shared, 0.2, generator)
    text = torch.cat([torch.randn(padding, WIDTH, generator=generator), text])
    weights = torch.cat([torch.zeros(padding), torch.ones(length)])
    if reduce == "mean":
        weights = weights / length
    return float(keep_threshold(cosine_scores(image, text, weights), gamma, 1.0).float().mean())


def border_shares(seed: int) -> list[dict]:
    """Kept share of tokens on the picture and on its black borders, random weights, by aspect ratio."""
    torch.manual_seed(seed)
    config = HiResLmmConfig.from_preset(
        "slime_release",
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=336,
            patch_size=14,
        ),
        LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, vocab_size=2048
        ),
        image_token_id=2047,
    )
    model = HiResLmmForConditionalGeneration(config).eval()
    processor = HiResLmmImageProcessor(planner="slime_release", token_layout=config.token_layout())
    rows = []
    for height, width in ((672, 672), (900, 900), (500, 1200), (1100, 1200), (400, 640)):
        noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
        views = processor(Image.fromarray(noise), return_tensors="pt")
        count = int(views["view_positions"][0, 5])
        prompt = torch.randint(3, 2000, (1, 24))
        ids = torch.cat([torch.full((1, count), config.image_token_id), prompt], dim=1)
        with torch.no_grad():
            records = model(input_ids=ids, **views, output_token_map=True).token_map
        local, box = records.kind == 1, records.box
        border = (box[:, 0] >= height) | (box[:, 2] <= 0) | (box[:, 1] >= width) | (box[:, 3] <= 0)
        for name, chosen in (("picture", local & ~border), ("border", local & border)):
            kept = float(records.kept[chosen].float().mean()) if bool(chosen.any()) else None
            rows.append(
                {"part": "border", "size": [height, width], "where": name, "tokens": int(chosen.sum()), "kept": kept}
            )
    return rows


def main() -> None:
    """Measure, print, write JSON and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="synthetic images per point")
    parser.add_argument("--gamma", type=float, default=0.95)
    arguments = parser.parse_args()
    seeds = list(range(arguments.seeds))
    rows: list[dict] = []
    for reduce in ("sum", "mean"):
        for length in track(LENGTHS, description=f"prompt length, {reduce}"):
            kept = [share(length, 0, reduce, arguments.gamma, seed) for seed in seeds]
            rows.append({"part": "length", "reduce": reduce, "text_tokens": length, "kept": sum(kept) / len(kept)})
    for padding in PADDINGS:
        kept = [share(64, padding, "sum", arguments.gamma, seed) for seed in seeds]
        rows.append(
            {"part": "padding", "reduce": "sum", "text_tokens": 64, "padding": padding, "kept": sum(kept) / len(kept)}
        )
    rows += border_shares(0)
    console = Console()
    table = Table("part", "setting", "kept share")
    for row in rows:
        setting = ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("part", "kept"))
        table.add_row(row["part"], setting, "-" if row["kept"] is None else f"{row['kept']:.3f}")
    console.print(table)
    console.print(f"written: {write_result('kept_share', rows, seeds)}")
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axis = figure.subplots()
    for reduce, style in (("sum", "o-"), ("mean", "s--")):
        points = [row for row in rows if row["part"] == "length" and row["reduce"] == reduce]
        axis.plot(
            [p["text_tokens"] for p in points], [p["kept"] for p in points], style, label=f"{reduce} over the text"
        )
    axis.set(xscale="log", xlabel="text tokens read by the router", ylabel="kept share", ylim=(0, 1))
    axis.set_title(f"cosine router, threshold {arguments.gamma}, {NUM_TOKENS} tokens (synthetic vectors)", fontsize=10)
    axis.legend()
    axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "kept_share.png", dpi=120)


if __name__ == "__main__":
    main()
