"""Runs in a process without the package: `python -I slime_worker.py CHECKPOINT SET`; prints one JSON a case.

What a converted checkpoint gives through its own code, compared with the set: see `test_slime.py`.
"""

import json
import sys
from pathlib import Path


class Blocker:
    """Makes `import hires_lmm` fail, however the package may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hires_lmm":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoImageProcessor, AutoModelForImageTextToText  # noqa: E402


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return (found.float() - wanted.float()).abs().max().item()


def forced_steps(model, ids: torch.Tensor, views: dict, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of forced tokens: through `generate` with a cache, and without a cache from the whole sequence."""

    def force(_, sequence):
        return [int(steps[min(len(sequence) - ids.shape[1], len(steps) - 1)])]

    rows = []
    for use_cache in (True, False):
        out = model.generate(
            input_ids=ids,
            **views,
            max_new_tokens=len(steps),
            do_sample=False,
            prefix_allowed_tokens_fn=force,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
        assert out.sequences[0, ids.shape[1] :].tolist() == steps.tolist()
        rows.append(torch.cat(out.logits))
    return rows[0], rows[1]


@torch.no_grad()
def main(folder: Path, golden: Path) -> None:
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    assert not any(info.values()), info
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    expected = load_file(golden / "expected.safetensors")
    image_id = model.config.image_token_id
    for number, case in enumerate(json.loads((golden / "cases.json").read_text())):
        views = processor(Image.open(golden / case["image"]), return_tensors="pt", resize_backend="pillow")
        placeholders = [image_id] * int(views["view_positions"][0, 5])
        ids = torch.tensor([[i for token in case["input_ids"] for i in (placeholders if token == -200 else [token])]])
        want = {name.removeprefix(f"case{number}."): v for name, v in expected.items() if f"case{number}." in name}
        output = model(input_ids=ids, **views, output_token_map=True)
        local = output.token_map.kind == 1
        vocabulary = want["logits_last"].shape[-1]
        logits = output.logits[0, :, :vocabulary]
        steps = (torch.arange(12) * 37 + 11 * number + 3) % vocabulary
        cached, plain = forced_steps(model, ids, views, steps)
        greedy = case["generated"][1:]
        generated = model.generate(
            input_ids=ids, **views, max_new_tokens=len(greedy), do_sample=False, eos_token_id=None
        )
        result = {
            "pixels": difference(views["pixel_values"].mean((2, 3)), want["pixel_values_mean"]),
            "scores": difference(output.token_map.score[local], want["router_scores"]),
            "selected": torch.equal(output.token_map.kept[local].nonzero()[:, 0], want["selected"]),
            "last": difference(logits[-1], want["logits_last"].reshape(-1)),
            "text": difference(logits[-len(want["logits_text"]) :], want["logits_text"]),
            "first_step": difference(cached[0, :vocabulary], want["logits_last"].reshape(-1)),
            "cache": difference(cached, plain),
            "moves": (cached[1:] - cached[:-1]).abs().max().item(),
            "greedy": generated[0, ids.shape[1] :].tolist() == greedy,
        }
        sys.stdout.write(json.dumps(result) + "\n")


main(Path(sys.argv[1]), Path(sys.argv[2]))
