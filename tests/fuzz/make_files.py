"""Single files of checkpoints gone wrong: tensors, pickles, templates, code."""

import io
import json
import os
import pickle
import random
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from fuzz.wild import mutate_bytes, wild


# ---- safetensors whose header lies

NUMBERS = [-1, 0, 1, 2, 3, 63, 64, 65, 4096, 1 << 31, 1 << 40, 1 << 62, (1 << 64) - 1, 1 << 64, 2.5, "4", None, []]
DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "U8", "BOOL", "C64", "F4", "X", "", None, 3]


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Header and tensors of a sound file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_safetensors(header: Any, body: bytes) -> bytes:
    """The file of a header that may say anything."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


def lying_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Names, shapes, dtypes, offsets and lengths that do not fit the bytes."""
    header, body = split_safetensors(data)
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.randrange(14)
    if kind < 2:
        shape = entry["shape"]
        entry["shape"] = rng.choice([[rng.choice(NUMBERS)] * len(shape), shape[::-1], [], [*shape, 1], [0], wild(rng)])
    elif kind == 2:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind < 5:
        start, end = entry["data_offsets"]
        pairs = [[end, start], [start, end + 1], [0, end - start], [start, len(body) + 9], [rng.choice(NUMBERS), end]]
        entry["data_offsets"] = rng.choice([*pairs, [start], [], wild(rng)])
    elif kind == 5:
        del header[name]
    elif kind == 6:
        other = rng.choice(
            [f"{name}x", "", "../x", "a" * 5000, name.replace("weight", "bias"), "\0", "lm_head.weight"]
        )
        header[other] = header.pop(name)
    elif kind == 7:
        header[rng.choice(["extra", "model.extra.weight", "lm_head.weight"])] = dict(entry)
    elif kind == 8:
        header["__metadata__"] = rng.choice([{"format": 3}, {"format": "tf"}, {}, None, [], "x", {"a": "b" * 10_000}])
    elif kind == 9:
        header = rng.choice([{}, [], None, "x", wild(rng)])
    elif kind == 10:
        lengths = [0, 1, 7, 1 << 20, 100_000_001, 1 << 40, (1 << 63) - 1, (1 << 64) - 1]
        return rng.choice(lengths).to_bytes(8, "little") + data[8:]
    elif kind == 11:
        body = rng.choice([body[:-1], body + b"\0", body[: len(body) // 2], b""])
    elif kind == 12:
        first, second = (rng.choice([key for key in header if key != "__metadata__"]) for _ in range(2))
        header[first], header[second] = header[second], header[first]
    else:
        text = b'{"a":' * 2000 + b"1" + b"}" * 2000
        return len(text).to_bytes(8, "little") + text + body
    return join_safetensors(header, body)


def harm_safetensors(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """A lie in the header, or damage anywhere."""
    if rng.random() < 0.75:
        return "header lies", lying_safetensors(data, rng)
    return mutate_bytes(data, rng)


# ---- pickles


class Payload:
    """What unpickling must never run; every form of it makes the marker."""

    def __init__(self, marker: Path, form: int):
        self.marker, self.form = str(marker), form

    def __reduce__(self) -> tuple:
        text = f"import os; os.mkdir({self.marker!r})"
        forms: list[tuple] = [
            (os.mkdir, (self.marker,)),
            (os.system, (f"mkdir '{self.marker}'",)),
            (exec, (text,)),
            (eval, (f"__import__('os').mkdir({self.marker!r})",)),
            (os.makedirs, (self.marker, 0o755, True)),
        ]
        if self.form < len(forms):
            return forms[self.form]
        inner = pickle.dumps(Payload(Path(self.marker), 0))
        return (torch.storage._load_from_bytes if self.form % 2 else pickle.loads), (inner,)


def _saved(value: Any, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _packed(data: bytes, filling: bytes = b"") -> bytes:
    """The same archive, compressed, with a part that unpacks to megabytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
        if filling:
            target.writestr("archive/data/999", filling)
    return buffer.getvalue()


def hostile_pickle(tensors: dict[str, torch.Tensor], rng: random.Random, marker: Path) -> tuple[str, bytes]:
    """A `.bin` file: with code, with tensors that are none, with other things, or damaged.

    Args:
        tensors (`dict`): What the sound file holds.
        rng: Of the case.
        marker (`Path`): What code must not make.
    """
    name, legacy = rng.choice([*tensors]), rng.random() < 0.4
    trap, first = Payload(marker, rng.randrange(7)), tensors[name]
    forms: dict[str, Any] = {
        "code beside tensors": {**tensors, "model.extra": trap},
        "code alone": trap,
        "code as a key": {**tensors, "x": {1: trap}},
        "code in a subclass": OrderedDict(tensors, x=trap),
        "expanded": {**tensors, name: torch.zeros(1).expand(1 << 20, 1 << 12)},
        "meta": {**tensors, name: torch.empty(first.shape, device="meta")},
        "sparse": {**tensors, name: torch.eye(8).to_sparse()},
        "complex": {**tensors, name: first.to(torch.complex64)},
        "number as a key": {**tensors, 7: first},
        "nested": {"state_dict": tensors},
        "list": list(tensors.values()),
        "text": {**tensors, name: "text"},
        "parameter": {**tensors, name: torch.nn.Parameter(first, requires_grad=first.is_floating_point())},
        "scalar": {**tensors, name: first.flatten()[0].clone()},
        "transposed": {**tensors, name: first.T if first.ndim == 2 else first},
        "empty": {},
    }
    kind = rng.choice([*forms, "bare code", "compressed", "bomb", "damaged", "damaged"])
    if kind == "bare code":
        return kind, pickle.dumps(trap, protocol=rng.choice([0, 2, 4]))
    if kind == "compressed":
        return kind, _packed(_saved(tensors))
    if kind == "bomb":
        return kind, _packed(_saved(tensors), b"\0" * (64 << 20))
    if kind == "damaged":
        how, data = mutate_bytes(_saved(tensors, legacy), rng)
        return f"damaged: {how}", data
    return kind, _saved(forms[kind], legacy)


# ---- chat templates

_LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
_MESSAGES = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
_REACH = "{{ cycler.__init__.__globals__.os.mkdir('MARKER') }}"
TEMPLATES = [
    _LOOP,
    _MESSAGES + _LOOP,
    "{{ 'a' * 10**11 }}",
    "{{ 'a' * 10**7 }}",
    "{% set x = namespace(t='a') %}{% for i in range(60) %}{% set x.t = x.t ~ x.t %}{% endfor %}{{ x.t }}",
    "{{ 2 ** 10 ** 10 }}",
    "{{ '%1000000000d' % 3 }}",
    "{{ [0] * 10**9 | list }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{{ range(10**12) | list }}",
    _REACH,
    _MESSAGES + _REACH,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].mkdir('MARKER') }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.mkdir('MARKER') }}",
    "{{ raise_exception('no') }}",
    "{{ undefined.attribute.attribute }}",
    "{{ 1 / 0 }}",
    "{% for",
    "{{",
    "{% generation %}x",
    "",
    "plain text",
    "\0",
    "{{ strftime_now('%' * 100000) }}",
    "{# 'image' #}" + _LOOP,
    "{# 'image' #}" + _MESSAGES,
    _MESSAGES,
    "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "{{ 'x' }}" * 20_000,
]


def hostile_template(rng: random.Random, marker: Path) -> str:
    """A chat template that loops, grows, recurses, reaches out of its sandbox, or is none."""
    return rng.choice(TEMPLATES).replace("MARKER", str(marker))


# ---- code


def hostile_code(marker: Path) -> str:
    """A module that shows when it is imported, with the classes that configurations could name."""
    names = ["Config", "Model", "Processor", "ImageProcessor", "Tokenizer"]
    classes = "\n".join(f"class {name}:\n    pass\n" for name in names)
    return f"import os\n\nos.makedirs({str(marker)!r}, exist_ok=True)\n\n{classes}"
