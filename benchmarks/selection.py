"""What GlobalCom²'s selection costs beside the prefill: 2,304 tokens of width 4,096 in, a quarter of them out.

    python benchmarks/selection.py                  a minute on two idle cores
    python benchmarks/selection.py --device cuda

A global view and three crops of CLIP ViT-L/14-336, a language model of Llama-3-8B's sizes. The selection is the
product of the class token's query with all keys of the tower's last layer, the choice, and the copy of what stays. The
prefill is too large to run on a CPU: its operations are counted on `meta` and taken at the rate of a matrix product in
the same run, which it cannot beat, so the share that is shown is at least the true one.
"""

import argparse
from typing import Any

import torch
from cases import GLOBALCOM2, OURS, Shared, ours
from measure import count_work, interleave, matrix_rate, median, print_table, report_path
from prefill import picture
from record import write_result
from shapes import SHAPES, build
from transformers import CLIPVisionConfig, CLIPVisionModel

from hires_lmm.modeling.bases_hires_lmm import PartContext
from hires_lmm.modeling.carriers_hires_lmm import ImageGeometry, ViewFeatures, ViewGroup, drop
from hires_lmm.modeling.configuration_hires_lmm import HiResLmmConnectorConfig
from hires_lmm.modeling.connector_hires_lmm import HiResLmmConnector
from hires_lmm.modeling.geometry_hires_lmm import Kind
from hires_lmm.modeling.towers_hires_lmm import cls_logits


SIZE, SIDE, CROPS = (336, 1008), 24, 3
TOKENS = (1 + CROPS) * SIDE * SIDE
BUDGET = TOKENS // 4
COLUMNS = {"what": "what", "selection": "selection", "prefill": "prefill", "share": "share"}


def selection(device: str, dtype: torch.dtype) -> Any:
    """The selection of one image, as a call."""
    shapes = SHAPES["cuda"]
    values = {**shapes.clip().to_dict(), "num_hidden_layers": 1}
    tower = build(CLIPVisionModel, CLIPVisionConfig(**values), dtype, device)
    states = torch.randn(1 + CROPS, 1 + SIDE * SIDE, shapes.tower[0], device=device, dtype=dtype)
    with torch.device(device):
        config = HiResLmmConnectorConfig(adapter={"part": "identity"}, **GLOBALCOM2["connector_config"])
        context = PartContext(config, shapes.text[0], shapes.text[0], {}, (SIDE, SIDE))
        connector = HiResLmmConnector(config, context).to(dtype).eval()
    whole = (SIDE, SIDE, 0, SIDE, 0, SIDE)
    crops = ((int(Kind.CROP), 1, CROPS, 0, col, *whole) for col in range(CROPS))
    image = ImageGeometry(0, ((int(Kind.GLOBAL), 1, CROPS, 0, 0, *whole), *crops), BUDGET)
    features = torch.randn(1 + CROPS, SIDE * SIDE, shapes.text[0], device=device, dtype=dtype)

    def tokens_of(scores: torch.Tensor) -> Any:
        groups = [
            ViewGroup(kind, features[part], (SIDE, SIDE), rows, scores={"cls_logits": scores[part]})
            for kind, part, rows in ((0, slice(0, 1), (0,)), (1, slice(1, None), (1, 2, 3)))
        ]
        return connector.layout(ViewFeatures(groups, [image]), lambda ids: ids)

    with torch.no_grad():
        tokens = tokens_of(cls_logits(tower, (states, states)))

    def call() -> torch.Tensor:
        with torch.no_grad():
            cls_logits(tower, (states, states))
            return drop(connector.token_ops[0](tokens, None)[0])[0]

    return call


def count_prefill(max_image_tokens: int | None) -> int:
    """Operations of a prefill at true sizes."""
    OURS["selected"] = ("llava_next", GLOBALCOM2, {"max_image_tokens": max_image_tokens})
    case = ours("selected", Shared(SHAPES["cuda"], "meta")).take([picture(*SIZE)])
    return case.survey().operations


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device, dtype = arguments.device, torch.bfloat16 if arguments.device == "cuda" else torch.float32
    call, prefill = selection(device, dtype), count_prefill(BUDGET + SIDE)
    operations = count_work(call)[0]
    seconds = median(interleave({"selection": call}, arguments.repeats, 2, device)["selection"])
    rate = matrix_rate(device, dtype, 8192 if device == "cuda" else 1536)
    rows = [
        {
            "what": "counted giga-operations",
            "selection": operations / 1e9,
            "prefill": prefill / 1e9,
            "share": operations / prefill,
        },
        {
            "what": "milliseconds, the prefill at the rate of a matrix product",
            "selection": seconds * 1e3,
            "prefill": prefill / rate * 1e3,
            "share": seconds * rate / prefill,
        },
    ]
    print_table(rows, COLUMNS, f"{TOKENS} tokens, {BUDGET} stay, {device}")
    report_path(write_result(f"selection_{device}", rows, [0]))


if __name__ == "__main__":
    main()
