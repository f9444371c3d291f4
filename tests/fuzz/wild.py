"""Values that nobody expects, and the same done to JSON files and to bytes."""

import json
import math
import random
from collections.abc import Callable
from typing import Any


LONG = "a" * 10_000
WILD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 255, 65_536, 2**31, 2**63, 10**12, 10**400, -(10**12), 0.0, 0.5, -0.5,
    1e-320, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf, "", " ", "x", "2", "0.5", "true", "auto",
    "none", "float16", "llama", "<image>", "../outside/secret.json", "/etc/passwd", "~nobody-here/x", "a/b",
    "owner/name", "a\0b", "\ud800", LONG, [], [1], [0, 0], [-1, 2], [1, 2, 3], ["a"], [None], [[]],
    [[1, 2], [3]], [1e308, math.nan, 0], {}, {"a": 1}, {"part": "mlp"}, {"on": "all"},
    {"height": 28, "width": 28}, {"": None}, {"model_type": "llama"}, [1] * 5000,
]  # fmt: skip
DEEP = 250


def wild(rng: random.Random) -> Any:
    """Any value; now and then a deeply nested one."""
    if rng.random() < 0.03:
        value: Any = rng.choice([1, "x", None])
        for _ in range(DEEP):
            value = [value] if rng.random() < 0.5 else {"a": value}
        return value
    return rng.choice(WILD)


def paths_of(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, entry in inner for place in paths_of(entry, (*path, key)))]


def mutate_json(value: Any, rng: random.Random) -> Any:
    """One to three changes anywhere in a JSON value: replaced, removed, renamed, doubled, exchanged."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [path for path in paths_of(value) if path]
        if not places:
            return wild(rng)
        # shallow places first: long lists would take nearly all of them
        depth = min(len(rng.choice(places)), len(rng.choice(places)))
        path = rng.choice([each for each in places if len(each) == depth])
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        _change(holder, path[-1], value, rng)
    return value


def _change(holder: Any, key: Any, root: Any, rng: random.Random) -> None:
    kind = rng.choice(["wild"] * 6 + ["remove", "rename", "extra", "swap"])
    if kind == "wild":
        holder[key] = wild(rng)
    elif kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == "swap" and len(holder) > 1:
        other = rng.choice([each for each, _ in (holder.items() if isinstance(holder, dict) else enumerate(holder))])
        holder[key], holder[other] = holder[other], holder[key]
    elif isinstance(holder, dict):
        holder[rng.choice(["unknown", "auto_map", "mm_new", "model_type", "quantization_config"])] = wild(rng)
    else:
        holder.append(wild(rng))


def _truncate(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
        if changed:
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _flip_head(data: bytes, rng: random.Random) -> bytes:
    return _flip(data[:64], rng) + data[64:]


def _cut(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 2, 4, 17, 300]) :]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice([1, 2, 4, 17, 300])) + data[start:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 400])
    filling = rng.choice([b"\0", b"\xff", b"\x7f", b"\x80"]) * length
    return data[:start] + filling[: max(len(data) - start, 0)] + data[start + length :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    return data * rng.choice([2, 3])


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice([1, 100, 5000]))


BYTE_CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": _flip,
    "flip head": _flip_head,
    "truncate": _truncate,
    "cut": _cut,
    "insert": _insert,
    "overwrite": _overwrite,
    "repeat": _repeat,
    "append": _append,
    "empty": lambda data, rng: b"",
    "noise": lambda data, rng: rng.randbytes(rng.choice([1, 10, 1000])),
}


def mutate_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Name of a change, and the changed bytes."""
    name = rng.choice(["flip", "flip", "flip head", "truncate", *BYTE_CHANGES])
    return name, BYTE_CHANGES[name](data, rng)


def broken_json(text: str, rng: random.Random) -> bytes:
    """A JSON file whose text is wrong, or right in a way that is hard to bear."""
    kind = rng.randrange(9)
    if kind == 0:
        return mutate_bytes(text.encode(), rng)[1]
    return [
        b"",
        b"\xff\xfe\x00 no text",
        b"\xef\xbb\xbf" + text.encode(),
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"a": ' + b"9" * 10_000 + b"}",
        text.encode() + text.encode(),
        json.dumps(rng.choice([[], "text", 3, None, [json.loads(text)]])).encode(),
    ][kind - 1]
