"""Loads many folders in one fresh process: `python -I reload_worker.py SRC JOBS OUT`; SRC is `-` for "no package".

JOBS is a JSON list; each job names a `folder`, how to load it (`how`), a `reference` folder that holds the batch and
the logits that the saved model gave, and options. OUT receives a JSON object: name of the job -> what was found.
"""

import json
import sys
import traceback
from pathlib import Path


class Blocker:
    """Makes `import hires_lmm` fail, however the package may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hires_lmm":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


SRC, JOBS, OUT = sys.argv[1:4]
if SRC == "-":
    sys.meta_path.insert(0, Blocker())
    TRUST = {"trust_remote_code": True}
else:
    sys.path.insert(0, SRC)
    TRUST = {}

import torch  # noqa: E402
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor  # noqa: E402


if SRC != "-":
    import hires_lmm  # noqa: F401


def module_map(place: str, tied: bool) -> dict:
    """Where each part goes; the head stays, unless its weights are those of the word embeddings."""
    return {"model": place, "lm_head": place if tied else "cpu"}


def load(job: dict):
    """The model of one job, and transformers' lists of what did not fit."""
    how, options = job["how"], {**TRUST}
    if "dtype" in job:
        options["dtype"] = job["dtype"]
    if how == "disk":
        options.update(device_map=module_map("disk", job["tied"]), offload_folder=job["offload"])
    auto = AutoModel if how == "base" else AutoModelForImageTextToText
    if how == "peft":
        from peft import PeftModel

        base, info = auto.from_pretrained(job["folder"], output_loading_info=True, **options)
        return PeftModel.from_pretrained(base, job["adapter"]), info
    model, info = auto.from_pretrained(job["folder"], output_loading_info=True, **options)
    if how == "cpu_offload":
        from accelerate import cpu_offload

        model = cpu_offload(model, execution_device=torch.device("cpu"))
    return model, info


@torch.no_grad()
def check_model(job: dict) -> dict:
    """Compare logits (hidden states of a base model) with the reference, bit for bit."""
    reference = torch.load(Path(job["reference"]) / "tensors.pt", weights_only=True)
    model, info = load(job)
    outputs = model(**reference["batch"])
    found = outputs.last_hidden_state if job["how"] == "base" else outputs.logits
    wanted = reference["hidden" if job["how"] == "base" else "logits"]
    return {
        "same": torch.equal(found, wanted) and found.dtype == wanted.dtype,
        "difference": float((found.float() - wanted.float()).abs().max()),
        "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
        "module": type(model.get_base_model() if job["how"] == "peft" else model).__module__,
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "generation": model.generation_config.to_dict() if hasattr(model, "generation_config") else None,
        "config": model.config.to_dict(),
        "answer": model.generate(**reference["batch"], max_new_tokens=5).tolist() if job["how"] == "model" else None,
        "tied": model.get_output_embeddings() is not None
        and model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }


def check_processor(job: dict) -> dict:
    """Compare a batch, its settings and a rendered chat with the reference."""
    from PIL import Image

    folder = Path(job["reference"])
    texts = json.loads((folder / "texts.json").read_text())
    processor = AutoProcessor.from_pretrained(job["folder"], **TRUST)
    batch = processor(text=texts["texts"], images=[Image.open(folder / "image.png")], return_tensors="pt")
    wanted = torch.load(folder / "tensors.pt", weights_only=True)["batch"]
    return {
        "different": sorted(
            name
            for name in set(batch) | set(wanted)
            if name not in batch or name not in wanted or not torch.equal(batch[name], wanted[name])
        ),
        "chat": processor.apply_chat_template(texts["messages"], add_generation_prompt=True),
        "image_tokens": [processor.image_tokens(*size) for size in texts["sizes"]],
        "settings": processor.image_processor.to_dict(),
        "template": processor.chat_template,
        "module": type(processor).__module__,
    }


def main() -> None:
    """Run all jobs; an exception is the result of its job."""
    torch.set_num_threads(1)
    results = {}
    for job in json.loads(Path(JOBS).read_text()):
        try:
            result = {"model": check_model(job)}
            if (Path(job["folder"]) / "processor_config.json").is_file():
                result["processor"] = check_processor(job)
        except Exception:
            result = {"exception": traceback.format_exc()}
        results[job["name"]] = result
    Path(OUT).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main()
