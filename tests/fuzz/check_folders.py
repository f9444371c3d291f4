"""What conversions, the command line and `from_pretrained` must make of any folder."""

import hashlib
import json
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from typer.testing import CliRunner

from fuzz.harness import Fault, Place, Subject, error_chain, expect_clear
from fuzz.make_files import split_safetensors
from fuzz.sources import sound
from hires_lmm.cli import app
from hires_lmm.conversion import (
    compose,
    convert_fusion,
    convert_llava_next,
    convert_slime,
    convert_to_slime,
    export,
    rendering,
)
from hires_lmm.conversion.errors import is_panic
from hires_lmm.folders import read_image_settings
from hires_lmm.inference import load_model, load_processor


CONVERSIONS: dict[str, Callable[[Path, Path], Any]] = {
    "slime": convert_slime,
    "pickles": convert_slime,
    "lora": lambda source, out: convert_slime(
        source / "lora", out, base=source / "base", vision_config=source / "tower"
    ),
    "fusion": convert_fusion,
    "llava_next": convert_llava_next,
    "compose": lambda source, out: compose(source / "vision", source / "text", "llava_next", out),
    "ours": export,
    "ours_slime": convert_to_slime,
}
VARIABLE = {"lm_head.weight", "model.language_model.embed_tokens.weight", "model.embed_tokens.weight"}
"""Tensors whose rows, or whose presence, the configuration decides."""

CHOSEN = {"model.connector.token_ops.0.queries"}
"""Tensors of which the configuration says where in the files they are: `append_special_padding` of fusion."""

LIBRARY_SEEN: Counter = Counter()
"""What `from_pretrained` let through that is neither ValueError nor OSError, by type and place."""


def tensors_in(folder: Path) -> dict[str, tuple]:
    """Name -> dtype, shape and digest of the bytes, of all weights in a folder."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        header, body = split_safetensors(path.read_bytes())
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                digest = hashlib.sha256(body[start:end]).hexdigest()
                found[name] = (entry["dtype"], tuple(entry["shape"]), digest)
    return found


def reference(source: str, place: Place) -> dict[str, tuple]:
    """The weights that the sound checkpoint becomes; converted once."""
    folder = place.root / "references" / source
    if not folder.exists():
        folder.parent.mkdir(exist_ok=True)
        CONVERSIONS[source](sound(source, place.root), folder)
    return tensors_in(folder)


def prepare(source: str, place: Place) -> None:
    """Build what is built once, before anything is measured or watched."""
    reference(source, place)


def check_conversion(subject: Subject, place: Place) -> str:
    """A whole checkpoint with the right weights, or an error and nothing left."""
    source, out = subject.notes["source"], place.folder / "made" / "out"
    try:
        with mock.patch.object(rendering, "SECONDS", 1):
            CONVERSIONS[source](subject.value, out)
    except Exception as error:
        expect_clear(error)
        left = [path.name for path in out.parent.iterdir()]
        if left or subject.notes["sound"]:
            raise Fault(f"{left} left after, or a sound checkpoint refused: {error}") from error
        return "error"
    if subject.refused:
        raise Fault("nothing was converted to something")
    check_made(subject, out, reference(source, place))
    return "result"


def check_made(subject: Subject, out: Path, wanted: dict[str, tuple]) -> None:
    """The folder holds the right tensors, no foreign code, and no word of this machine."""
    found = tensors_in(out)
    odd = {name for name in {*found, *wanted} - VARIABLE if found.get(name, ("",))[:2] != wanted.get(name, ("",))[:2]}
    if odd:
        raise Fault(f"names, dtypes or shapes are not those of the model: {sorted(odd)[:5]}")
    if "safetensors" not in subject.kind and "pickle" not in subject.kind and "file" not in subject.kind:
        changed = [name for name in found if name not in VARIABLE | CHOSEN and found[name] != wanted[name]]
        if changed:
            raise Fault(f"other weights than in the files: {changed[:5]}")
    for path in out.rglob("*"):
        if path.is_symlink():
            raise Fault(f"{path.name} is a link")
    for path in out.glob("*.json"):
        text = path.read_text()
        values = json.loads(text)
        named = json.dumps([values.get("auto_map"), values.get("custom_pipelines")])
        if "evil" in named or "--" in named:
            raise Fault(f"{path.name} names foreign code: {named[:200]}")
        if "canary" in text:
            raise Fault(f"{path.name} holds the content of a file outside")
    if subject.notes["source"] != "ours_slime":
        AutoConfig.from_pretrained(out, trust_remote_code=False)


# ---- loading with the library


def _last_of_ours(error: BaseException) -> str:
    """The line of this package that raised, if the last one is of this package."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f"{last.filename}:{last.lineno}" if last and "/hires_lmm/" in last.filename else ""


LOADERS: dict[str, Callable[[Path], Any]] = {
    "config": lambda folder: AutoConfig.from_pretrained(folder, trust_remote_code=False),
    "image processor": lambda folder: AutoImageProcessor.from_pretrained(folder, trust_remote_code=False),
    "tokenizer": lambda folder: AutoTokenizer.from_pretrained(folder, trust_remote_code=False),
    "processor": lambda folder: AutoProcessor.from_pretrained(folder, trust_remote_code=False),
    "model": lambda folder: AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False),
}
OUR_LOADERS: dict[str, Callable[[str], Any]] = {
    "load_processor": load_processor,
    "read_image_settings": read_image_settings,
    "load_model": lambda folder: load_model(folder, device="cpu"),
}


def check_load(subject: Subject, place: Place) -> str:
    """Everything that `from_pretrained` loads, then our own loaders; a loaded model has the weights of its file."""
    outcome = "error"
    by_library = {} if "oversized" in subject.kind else LOADERS  # the library reads whole what it is given
    for name, loader in by_library.items():
        try:
            loaded = loader(subject.value)
        except BaseException as error:
            if not isinstance(error, Exception) and not is_panic(error):
                raise
            _check_library_error(name, error, subject)
        else:
            outcome = "result"
            if name == "model":
                _check_weights(loaded, subject.value)
    for loader in OUR_LOADERS.values():
        try:
            loaded = loader(str(subject.value))
        except Exception as error:
            expect_clear(error, (ValueError, OSError, ImportError))
        else:
            if isinstance(loaded, torch.nn.Module):
                _check_weights(loaded, subject.value)
    return outcome


def _check_library_error(name: str, error: BaseException, subject: Subject) -> None:
    if subject.notes["sound"]:
        raise Fault(f"a sound checkpoint is refused by {name}: {error}") from error
    if isinstance(error, (ValueError, OSError, StrictDataclassError)):
        return
    if ours := _last_of_ours(error):
        raise Fault(f"{type(error).__name__} of our own at {ours}: {str(error)[:300]}") from error
    if any("memory" in str(each) or isinstance(each, MemoryError) for each in error_chain(error)):
        raise Fault(f"only the limit of this test stopped {name}: {str(error)[:300]}") from error
    LIBRARY_SEEN[f"{name}: {type(error).__name__}"] += 1


def _check_weights(model: torch.nn.Module, folder: Path) -> None:
    """No tensor of a model that was loaded is drawn at random."""
    path = folder / "model.safetensors"
    saved = load_file(path) if path.is_file() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    for name, tensor in model.state_dict().items():
        if name not in saved and name != "lm_head.weight":
            raise Fault(f"{name} is in no file, and the model was loaded")
        if name in saved and not torch.equal(saved[name].to(tensor.dtype).nan_to_num(), tensor.nan_to_num()):
            raise Fault(f"{name} is not what the file holds")


# ---- the command line


def check_command(subject: Subject, place: Place) -> str:
    """A command over a folder: exit status 0, or 1 with one line that says why."""
    folder, made = str(subject.value), str(place.folder / "made" / "out")
    commands = {
        "tokens": ["tokens", folder, "300x400", "--json"],
        "export": ["export", folder, made],
        "to-slime": ["convert", "to-slime", folder, made],
        "llava-next": ["convert", "llava-next", folder, made],
    }
    command = subject.notes["command"]
    with mock.patch.object(rendering, "SECONDS", 1):
        result = CliRunner().invoke(app, commands[command])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise Fault(f"{command}: {type(result.exception).__name__}: {result.exception}") from result.exception
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    if result.exit_code not in (0, 1) or "Traceback" in result.output:
        raise Fault(f"{command}: exit status {result.exit_code}, {result.output[-300:]}")
    if result.exit_code == 1 and not (lines and lines[-1].startswith("error: ")):
        raise Fault(f"{command}: no line says what is wrong: {lines[-3:]}")
    return "error" if result.exit_code else "result"
