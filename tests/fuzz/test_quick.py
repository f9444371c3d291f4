"""A few hundred cases of six areas, the same on each run; the thousands are in `tests/slow/test_fuzz.py`."""

import contextlib
import os
import random
import socket
import subprocess
import time

import pytest

from fuzz.areas import AREAS
from fuzz.harness import Area, Case, Fault, Place, Subject, run_case, run_cases


CASES = {"images": 300, "calls": 150, "load": 5, "commands": 6, "convert slime": 10, "convert llava_next": 8}


@pytest.mark.parametrize("name", CASES)
def test_no_case_does_harm(name, tmp_path):
    first = 5 * [*AREAS].index(name)  # so that areas with few cases have other kinds of them
    found = run_cases(name, AREAS[name], tmp_path, seed=0, cases=CASES[name], first=first)
    assert sum(found.values()) == CASES[name]


# ---- the harness finds what it should


def faulty(check) -> Area:
    return Area(lambda rng, number, place: Subject("a kind", rng.random()), check, seconds=1, megabytes=100)


def reads_secret(subject: Subject, place: Place) -> str:
    return (place.outside / "secret.txt").read_text()


def writes_outside(subject: Subject, place: Place) -> str:
    (place.outside / "secret.txt").write_text("changed")
    return "result"


def removes_outside(subject: Subject, place: Place) -> str:
    (place.outside / "secret.bin").unlink()
    return "result"


def renames_through_a_link(subject: Subject, place: Place) -> str:
    (place.folder / "link").symlink_to(place.outside)
    (place.folder / "link" / "secret.json").rename(place.folder / "taken")
    return "result"


def starts_a_program(subject: Subject, place: Place) -> str:
    subprocess.run(["true"], check=True)
    return "result"


def runs_a_payload(subject: Subject, place: Place) -> str:
    os.system(f"mkdir '{place.marker}'")
    return "result"


def looks_up_a_host(subject: Subject, place: Place) -> str:
    with contextlib.suppress(OSError):
        socket.getaddrinfo("localhost", 80)
    return "result"


def takes_memory(subject: Subject, place: Place) -> str:
    return f"result{len(bytearray(300 << 20)) * 0}"


def takes_time(subject: Subject, place: Place) -> str:
    begin = time.process_time()
    while time.process_time() - begin < 1.2:
        pass
    return "result"


def raises_another_error(subject: Subject, place: Place) -> str:
    raise KeyError("x")


def leaves_a_file(subject: Subject, place: Place) -> str:
    (place.temporary / "left").write_text("x")
    return "result"


@pytest.mark.parametrize(
    "check, text",
    [
        (reads_secret, "reads .*secret.txt"),
        (writes_outside, "open changes .*secret.txt"),
        (removes_outside, "os.remove changes .*secret.bin"),
        (renames_through_a_link, "os.rename changes .*secret.json"),
        (starts_a_program, "subprocess.Popen"),
        (runs_a_payload, "os.system"),
        (looks_up_a_host, "socket.getaddrinfo"),
        (takes_memory, r"resident memory grew by \d{3} MB"),
        (takes_time, "of processor time, 1 are allowed"),
        (raises_another_error, "KeyError: 'x'"),
        (leaves_a_file, "temporary files stay"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_harness_notices(tmp_path, check, text):
    with pytest.raises(Fault, match=rf"python tests/fuzz area --seed 3 --case 5 \(a kind\): (?s:.*){text}"):
        run_case(Case("area", 3, 5), faulty(check), tmp_path)


def test_a_case_is_the_same_every_time(tmp_path):
    for name in ("images", "calls"):
        place = Place(tmp_path / name)
        place.prepare()
        first, second = (
            [repr(AREAS[name].generate(Case(name, 1, number).rng(), number, place)) for number in range(40)]
            for _ in range(2)
        )
        different = [number for number in range(40) if first[number] != second[number]]
        assert all("object at" in first[number] or "Image" in first[number] for number in different)
    assert Case("images", 1, 2).rng().random() != Case("images", 1, 3).rng().random()
    assert Case("images", 1, 2).rng().random() == random.Random("images/1/2").random()
