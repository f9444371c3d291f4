"""Checkpoint and processor folders in which one thing is wrong, by hand or by hostile intent."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from fuzz.harness import Place, Subject
from fuzz.make_files import harm_safetensors, hostile_code, hostile_pickle, hostile_template
from fuzz.sources import copy_sound, read_values, replace
from fuzz.wild import broken_json, mutate_bytes, mutate_json


HUGE = 1_200_000_000
"""Bytes of an oversized file; sparse, so that the disk does not notice."""


def _files(folder: Path, *suffixes: str) -> list[Path]:
    """Files in a stable order; code is left to the cases about code."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".py")
    return [path for path in found if not suffixes or path.suffix in suffixes]


def json_value(folder: Path, rng: random.Random, place: Place) -> str:
    """One to three values of one JSON file, most often of a configuration."""
    found = _files(folder, ".json")
    small = [path for path in found if path.name not in ("tokenizer.json", "model.safetensors.index.json")]
    path = rng.choice(small * 4 + found)
    replace(path, json.dumps(mutate_json(read_values(path), rng)))
    return f"value in {path.name}"


def json_text(folder: Path, rng: random.Random, place: Place) -> str:
    """A JSON file that is none, or hardly."""
    path = rng.choice(_files(folder, ".json"))
    replace(path, broken_json(path.read_text(), rng))
    return f"text of {path.name}"


def tensors(folder: Path, rng: random.Random, place: Place) -> str:
    """A file of weights."""
    found = _files(folder, ".safetensors")
    if not found:
        return pickles(folder, rng, place)
    path = rng.choice(found)
    kind, data = harm_safetensors(path.read_bytes(), rng)
    replace(path, data)
    return f"{path.name}: {kind}"


def pickles(folder: Path, rng: random.Random, place: Place) -> str:
    """A pickle instead of a sound one, or where safetensors were."""
    found = _files(folder, ".bin")
    if found:
        path = rng.choice(found)
        content = torch.load(path, weights_only=True)
    else:
        for path in _files(folder, ".safetensors") + [path for path in _files(folder) if "index.json" in path.name]:
            path.unlink()
        path, content = (
            folder / "pytorch_model.bin",
            {"model.norm.weight": torch.ones(64), "lm_head.weight": torch.eye(8)},
        )
    kind, data = hostile_pickle(content, rng, place.marker)
    replace(path, data)
    return f"pickle, {kind}"


def _exchange(folder: Path, rng: random.Random, place: Place) -> None:
    first, second = (rng.choice(_files(folder)) for _ in range(2))
    one, other = first.read_bytes(), second.read_bytes()
    replace(first, other)
    replace(second, one)


def _special(folder: Path, rng: random.Random, place: Place) -> None:
    path = rng.choice(_files(folder))
    path.unlink()
    os.mkfifo(path)


def _link(folder: Path, rng: random.Random, place: Place) -> None:
    path = rng.choice(_files(folder))
    secret = {".json": "secret.json", ".safetensors": "secret.safetensors", ".bin": "secret.bin"}
    targets = [
        place.outside / secret.get(path.suffix, "secret.txt"),
        path,
        Path("/dev/zero"),
        folder / "nothing",
        folder,
    ]
    path.unlink()
    path.symlink_to(rng.choice([targets[0], targets[0], *targets]))


def _oversized(folder: Path, rng: random.Random, place: Place) -> None:
    path = rng.choice(_files(folder))
    data = path.read_bytes()
    path.unlink()
    with path.open("wb") as file:
        file.write(data)
        file.truncate(HUGE)


def _directory(folder: Path, rng: random.Random, place: Place) -> None:
    path = rng.choice(_files(folder))
    path.unlink()
    path.mkdir()


def _any_bytes(folder: Path, rng: random.Random, place: Place) -> None:
    path = rng.choice(_files(folder))
    replace(path, mutate_bytes(path.read_bytes(), rng)[1])


FILE_CHANGES: dict[str, Callable[[Path, random.Random, Place], None]] = {
    "missing": lambda folder, rng, place: rng.choice(_files(folder)).unlink(),
    "exchanged": _exchange,
    "fifo": _special,
    "link": _link,
    "oversized": _oversized,
    "directory": _directory,
    "bytes": _any_bytes,
}


def files(folder: Path, rng: random.Random, place: Place) -> str:
    """Files that are missing, exchanged, enormous, links, folders or pipes."""
    kind = rng.choice([*FILE_CHANGES, "link", "missing"])
    FILE_CHANGES[kind](folder, rng, place)
    return f"file {kind}"


def escape(folder: Path, rng: random.Random, place: Place) -> str:
    """Names in the index of shards, and in configurations, that lead out of the folder."""
    names = [
        "../outside/secret.safetensors", "../../outside/secret.safetensors", "a/../../outside/secret.safetensors",
        str(place.outside / "secret.safetensors"), "..\\outside\\secret.safetensors", "/dev/zero", "", ".", "a\0b",
        "x" * 300, "~/x.safetensors", "file:///etc/passwd", "model.safetensors/", "link/secret.safetensors",
        "config.json",
    ]  # fmt: skip
    (folder / "link").symlink_to(place.outside)
    name, indexes = rng.choice(names), [path for path in _files(folder) if path.name.endswith("index.json")]
    if indexes:
        table = read_values(indexes[0])
        table["weight_map"][rng.choice([*table["weight_map"]])] = name
        replace(indexes[0], json.dumps(table))
        return "index names another file"
    config = rng.choice([path for path in _files(folder) if path.name in ("config.json", "adapter_config.json")])
    values = read_values(config)
    values[rng.choice(["_name_or_path", "mm_vision_tower", "base_model_name_or_path", "name_or_path"])] = name
    replace(config, json.dumps(values))
    return "config names another folder"


def template(folder: Path, rng: random.Random, place: Place) -> str:
    """A chat template that loops, grows or reaches out."""
    text, homes = hostile_template(rng, place.marker), [folder, *(path for path in folder.iterdir() if path.is_dir())]
    home = rng.choice([path for path in homes if (path / "tokenizer_config.json").is_file()] or homes)
    if rng.random() < 0.7 or not (home / "tokenizer_config.json").is_file():
        replace(home / "chat_template.jinja", text)
    else:
        (home / "chat_template.jinja").unlink(missing_ok=True)
        values = read_values(home / "tokenizer_config.json")
        value = rng.choice([text, text, [{"name": "default", "template": text}], {"default": text}])
        replace(home / "tokenizer_config.json", json.dumps({**values, "chat_template": value}))
    return "chat template"


def code(folder: Path, rng: random.Random, place: Place) -> str:
    """Modules beside the weights, and every file that can name one names it."""
    module = rng.choice(["evil", "modeling_hires_lmm", "configuration_hires_lmm", "processing_hires_lmm", "jinja2"])
    for path in _files(folder, ".json"):
        values = read_values(path)
        if path.name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
            prefix = rng.choice(["", "", "owner/name--"])
            kinds = {"AutoConfig": "Config", "AutoModel": "Model", "AutoProcessor": "Processor"}
            kinds |= {"AutoModelForImageTextToText": "Model", "AutoImageProcessor": "ImageProcessor"}
            values["auto_map"] = {key: f"{prefix}{module}.{name}" for key, name in kinds.items()}
            values["auto_map"]["AutoTokenizer"] = [f"{prefix}{module}.Tokenizer", f"{prefix}{module}.Tokenizer"]
            if rng.random() < 0.4:
                key = rng.choice(["model_type", "tokenizer_class", "processor_class", "image_processor_type"])
                values[key] = rng.choice(["evil", "Tokenizer", "PreTrainedTokenizerFast", "hires_lmm"])
            replace(path, json.dumps(values))
    for home in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        replace(home / f"{module}.py", hostile_code(place.marker))
        replace(home / "__init__.py", hostile_code(place.marker))
        replace(home / "requirements.txt", "evil\n")
    return "code"


def nothing(folder: Path, rng: random.Random, place: Place) -> str:
    """A sound checkpoint, which must convert: the checks see a right result now and then."""
    return "sound"


def emptied(folder: Path, rng: random.Random, place: Place) -> str:
    """No folder, an empty one, or a file in its place."""
    shutil.rmtree(folder)
    kind = rng.randrange(3)
    if kind == 1:
        folder.mkdir()
    if kind == 2:
        folder.write_text("no folder")
    return "no folder"


HARMS: list[Callable[[Path, random.Random, Place], str]] = [
    json_value, tensors, json_value, files, json_value, json_text, tensors, pickles, json_value, escape, json_value,
    template, json_value, code, files, json_value, tensors, json_value,
]  # fmt: skip
RARE = {53: nothing, 71: emptied}


def make_folder(source: str) -> Callable[[random.Random, int, Place], Subject]:
    """The generator of an area: a sound checkpoint of a kind with one harm done to it.

    Args:
        source (`str`): A name in `sources.BUILDERS`.
    """

    def generate(rng: random.Random, number: int, place: Place) -> Subject:
        folder = copy_sound(source, place.root, place.folder / "source")
        rare = [harm for every, harm in RARE.items() if number % every == every - 1]
        harm = (rare or [HARMS[number % len(HARMS)]])[0]
        kind = harm(folder, rng, place)
        (place.folder / "made").mkdir()
        return Subject(kind, folder, refused=harm is emptied, notes={"source": source, "sound": harm is nothing})

    return generate
