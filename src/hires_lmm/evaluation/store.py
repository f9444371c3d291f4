"""Answers on disk: one line each, appended as they come, so that an interrupted sweep goes on where it stopped."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Generic, TypeVar

from .settings import SweepSetting


FORMAT = 1
WEIGHT_FILES = ("*.safetensors", "*.bin")
SAMPLED_BYTES = 1 << 20


def checkpoint_fingerprint(checkpoint: str) -> str:
    """A hash of `config.json` and of name, size and both ends of every weight file; for a Hub id, the id."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        return checkpoint
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for file in sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern)):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as stream:
            digest.update(stream.read(SAMPLED_BYTES))
            stream.seek(max(0, size - SAMPLED_BYTES))
            digest.update(stream.read(SAMPLED_BYTES))
    return digest.hexdigest()


@dataclass(frozen=True)
class Answer:
    """One question (see `SweepRow`) under one setting. `right`: the texts are equal, normalised, and ended."""

    setting: SweepSetting
    row: int
    kind: str | None
    group: str
    fine: bool | None
    cut: bool | None
    answer: str
    prediction: str
    ended: bool
    right: bool
    tokens: int
    chance: float | None = None
    constant: float | None = None

    @property
    def key(self) -> tuple[SweepSetting, int]:
        """What tells answers apart."""
        return self.setting, self.row

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Answer":
        """An answer from a line of a store."""
        return cls(**{**values, "setting": SweepSetting(**values["setting"])})


@dataclass(frozen=True)
class HarnessAnswer:
    """What was said to one prompt of a harness; `key` stands for its text, images and options of generation."""

    key: str
    text: str
    num_tokens: int

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HarnessAnswer":
        """An answer from a line of a store."""
        return cls(**values)


Kept = TypeVar("Kept", Answer, HarnessAnswer)


class AnswerStore(Generic[Kept]):
    """A JSON-lines file of answers whose first line says what they belong to.

    Args:
        file (`str` or `Path`): The file; made when the first answer comes.
        identity (`dict`): JSON values that must be the same when a run goes on: checkpoint, data, ...
        kind (`type`): The class of its answers.
    """

    def __init__(self, file: str | Path, identity: dict[str, Any], kind: type[Kept] = Answer):  # type: ignore[assignment]
        self.file = Path(file)
        self.identity = json.loads(json.dumps(identity))
        self.kind: type[Kept] = kind

    def begin(self, **more: Any) -> list[Kept]:
        """The answers so far; `more` belongs to the identity too. A last line that was cut off is removed."""
        self.identity = {**self.identity, **json.loads(json.dumps(more))}
        if not self.file.exists():
            return []
        whole = self._whole_lines()
        if len(whole) < self.file.stat().st_size:
            with open(self.file, "r+b") as stream:
                stream.truncate(len(whole))
        if not whole:
            self.file.unlink()
        return self.read()

    def read(self) -> list[Kept]:
        """The answers so far, of a file that another process may be writing."""
        lines = self._whole_lines().decode("utf-8").split("\n")[:-1] if self.file.exists() else []
        if not lines:
            return []
        self._check(lines[0])
        return [self.kind.from_dict(json.loads(line)) for line in lines[1:]]

    def append(self, answers: Iterable[Kept]) -> None:
        """Write new answers."""
        lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in answers]
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines.insert(0, json.dumps({"format": FORMAT, "identity": self.identity}, ensure_ascii=False))
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))

    def _whole_lines(self) -> bytes:
        content = self.file.read_bytes()
        return content[: content.rfind(b"\n") + 1]

    def _check(self, line: str) -> None:
        try:
            head = json.loads(line)
            found: dict[str, Any] = head["identity"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(self.file)!r} holds no answers; name another folder.") from error
        if head["format"] != FORMAT:
            raise ValueError(f"{str(self.file)!r} has the format {head['format']}; name another folder.")
        for name in dict.fromkeys([*self.identity, *found]):
            if found.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{str(self.file)!r} was made with {name}={found.get(name)!r}, but now {name} is "
                    f"{self.identity.get(name)!r}: answers of different runs do not mix. Name another folder, or "
                    "delete the file to start anew."
                )
