"""Runs in a process that cannot import the package: `python -I remote_checks.py FOLDER EXPECTED OUT CHECK...`.

FOLDER holds a checkpoint, EXPECTED images, tensors and texts that the package gave, OUT is written. A check prints one
line `name: {json}`; an exception is part of the JSON and ends the check only.
"""

import contextlib
import json
import sys
import traceback
from pathlib import Path


class Blocker:
    """Makes `import hires_lmm` fail, however the package may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hires_lmm":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


sys.meta_path.insert(0, Blocker())

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)


TRUST = {"trust_remote_code": True}
TEXT_INPUTS = ("input_ids", "attention_mask")


def module_of(thing) -> str:
    return type(thing).__module__


def images_of(expected: Path) -> list:
    return [Image.open(path) for path in sorted(expected.glob("image_*.png"))]


def saved(expected: Path) -> dict:
    return torch.load(expected / "tensors.pt", weights_only=True)


def texts_of(expected: Path) -> dict:
    return json.loads((expected / "texts.json").read_text())


def equal_batches(got, wanted) -> list[str]:
    """Names whose tensors differ."""
    names = set(got) ^ set(wanted)
    return sorted(names | {name for name in set(got) & set(wanted) if not torch.equal(got[name], wanted[name])})


def check_config(folder, expected, out):
    config = AutoConfig.from_pretrained(folder, **TRUST)
    return {"module": module_of(config), "auto_map": json.loads((folder / "config.json").read_text())["auto_map"]}


def check_refused(folder, expected, out):
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def check_processors(folder, expected, out):
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    image_processor = AutoImageProcessor.from_pretrained(folder, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
    tensors, texts = saved(expected), texts_of(expected)
    images = images_of(expected)
    batch = processor(text=texts["prompts"], images=images, padding=True, return_tensors="pt", **texts["options"])
    alone = image_processor(images=images, return_tensors="pt", **texts["options"])
    wanted = {name: tensors["batch"][name] for name in alone}
    video = processor(text=texts["video_prompt"], videos=images[0:1] * 5, num_frames=3, return_tensors="pt")
    chat = processor.apply_chat_template(texts["messages"], add_generation_prompt=True, tokenize=False)
    return {
        "modules": [module_of(processor), module_of(image_processor), module_of(processor.image_processor)],
        "different": equal_batches(batch, tensors["batch"]),
        "different_alone": equal_batches(alone, wanted),
        "different_video": equal_batches(video, tensors["video"]),
        "same_chat": chat == texts["chat"],
        "same_ids": tokenizer(texts["prompts"][0]).input_ids == texts["first_ids"],
        "image_tokens": processor.image_tokens(100, 180),
    }


def outputs(model, batch) -> dict:
    with torch.no_grad():
        logits = model(**batch).logits
    sequences = model.generate(**batch, max_new_tokens=6, do_sample=False)
    return {"logits": logits, "sequences": sequences}


def check_models(folder, expected, out):
    tensors = saved(expected)
    result = {}
    for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model, info = auto.from_pretrained(folder, **TRUST, output_loading_info=True)
        got = outputs(model, tensors["batch"])
        result[auto.__name__] = {
            "module": module_of(model),
            "class": type(model).__name__,
            "same": [torch.equal(got[name], tensors[name]) for name in ("logits", "sequences")],
            "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
        }
    base, info = AutoModel.from_pretrained(folder, **TRUST, output_loading_info=True)
    with torch.no_grad():
        hidden = base(**tensors["batch"]).last_hidden_state
    result["AutoModel"] = {
        "module": module_of(base),
        "class": type(base).__name__,
        "same": [torch.equal(hidden, tensors["hidden"])],
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value and "unexpected" not in key},
    }
    judge, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, **TRUST, output_loading_info=True
    )
    with torch.no_grad():
        hidden = judge.model(**tensors["batch"]).last_hidden_state
    result["AutoModelForSequenceClassification"] = {
        "module": module_of(judge),
        "class": type(judge).__name__,
        "same": [torch.equal(hidden, tensors["hidden"])],
        "info": {key: sorted(map(str, value)) for key, value in info.items() if value},
    }
    return result


def check_resave(folder, expected, out):
    """Load, save, load, save from here; the second generation must load too (a later process does)."""
    model = AutoModelForImageTextToText.from_pretrained(folder, **TRUST)
    processor = AutoProcessor.from_pretrained(folder, **TRUST)
    for target in (out / "again", out / "third"):
        model.save_pretrained(target)
        processor.save_pretrained(target)
        model = AutoModelForImageTextToText.from_pretrained(target, **TRUST)
        processor = AutoProcessor.from_pretrained(target, **TRUST)
    base = AutoModel.from_pretrained(folder, **TRUST)
    base.save_pretrained(out / "base")
    tensors = saved(expected)
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(out / "base", **TRUST)(**tensors["batch"]).last_hidden_state
    return {"files": sorted(p.name for p in (out / "third").iterdir()), "base": torch.equal(hidden, tensors["hidden"])}


def check_pipeline(folder, expected, out):
    texts, images = texts_of(expected), images_of(expected)
    pipe = pipeline("image-text-to-text", model=str(folder), **TRUST)
    chats = []
    for question, image in zip(texts["questions"], images, strict=False):
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        chats.append([{"role": "user", "content": content}])
    options = {"return_full_text": False, "generate_kwargs": {"do_sample": False, "max_new_tokens": 6}}

    def answers(outs):
        outs = [out[0] if isinstance(out, list) else out for out in outs]
        return [out["generated_text"] for out in outs]

    single = answers([pipe(text=chat, **options) for chat in chats])
    batched = answers(pipe(text=chats, batch_size=2, **options))
    plain = answers([pipe(images=images[0], text=texts["prompts"][0], **options)])
    return {"module": module_of(pipe.model), "single": single, "batched": batched, "plain": plain}


def check_unimported(folder, expected, out):
    """Last: after all loads, nothing of the package and no optional dependency was imported by the shipped code."""
    blocked = False
    try:
        import hires_lmm  # noqa: F401
    except ModuleNotFoundError:
        blocked = True
    return {
        "blocked": blocked,
        "modules": sorted(name for name in sys.modules if name.partition(".")[0] == "hires_lmm"),
    }


def main() -> None:
    torch.set_num_threads(1)
    folder, expected, out = (Path(path) for path in sys.argv[1:4])
    out.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[4:]:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                result = globals()[f"check_{name}"](folder, expected, out)
        except Exception:
            result = {"exception": traceback.format_exc()}
        sys.stdout.write(f"{name}: {json.dumps(result)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
