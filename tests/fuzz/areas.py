"""The areas by name."""

import random
from collections.abc import Callable

from fuzz.check_folders import check_command, check_conversion, check_load, prepare
from fuzz.check_images import check_image
from fuzz.check_texts import check_call
from fuzz.harness import Area, Place, Subject
from fuzz.make_folders import make_folder
from fuzz.make_images import make_image
from fuzz.make_texts import make_call
from fuzz.sources import sound


COMMANDS = ("tokens", "export", "to-slime", "llava-next")


def _made(place: Place) -> list:
    """Conversions may write where they were told to, and nowhere else: not into their source."""
    return [place.folder / "made", place.temporary]


def _nowhere(place: Place) -> list:
    return [place.temporary]


def _conversion(source: str) -> Area:
    generate = make_folder(source)

    def ready(rng: random.Random, number: int, place: Place) -> Subject:
        prepare(source, place)
        return generate(rng, number, place)

    return Area(ready, check_conversion, may_write=_made)


def _commands(rng: random.Random, number: int, place: Place) -> Subject:
    subject = make_folder("ours")(rng, number, place)
    subject.notes["command"] = COMMANDS[number // 7 % len(COMMANDS)]
    return subject


def _loading(rng: random.Random, number: int, place: Place) -> Subject:
    sound("ours", place.root)
    return make_folder("ours")(rng, number, place)


CONVERTED = ("slime", "pickles", "lora", "fusion", "llava_next", "compose", "ours", "ours_slime")
AREAS: dict[str, Area] = {
    "images": Area(make_image, check_image),
    "calls": Area(make_call, check_call, may_write=_nowhere),
    **{f"convert {source}": _conversion(source) for source in CONVERTED},
    "load": Area(_loading, check_load, seconds=15, may_write=_nowhere, reads_outside=True),
    "commands": Area(_commands, check_command, seconds=10, may_write=_made, reads_outside=True),
}
Generator = Callable[[random.Random, int, Place], Subject]
