"""Answers on disk: one line each, appended as they come, so that an interrupted sweep goes on where it stopped."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .settings import SweepSetting


FORMAT = 1


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


class AnswerStore:
    """A JSON-lines file of answers whose first line says what they belong to.

    Args:
        file (`str` or `Path`): The file; made when the first answer comes.
        identity (`dict`): JSON values that must be the same when a sweep goes on: checkpoint, data, ...
    """

    def __init__(self, file: str | Path, identity: dict[str, Any]):
        self.file = Path(file)
        self.identity = json.loads(json.dumps(identity))

    def begin(self, **more: Any) -> list[Answer]:
        """The answers so far; `more` belongs to the identity too. A last line that was cut off is removed."""
        self.identity = {**self.identity, **json.loads(json.dumps(more))}
        if not self.file.exists():
            return []
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(self.file, "r+b") as stream:
                stream.truncate(len(whole))
        lines = whole.decode("utf-8").splitlines()
        if not lines:
            self.file.unlink()
            return []
        self._check(lines[0])
        return [self._read(line) for line in lines[1:]]

    def append(self, answers: Iterable[Answer]) -> None:
        """Write new answers."""
        lines = [json.dumps(asdict(answer), ensure_ascii=False) for answer in answers]
        if not self.file.exists():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            lines.insert(0, json.dumps({"format": FORMAT, "identity": self.identity}, ensure_ascii=False))
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))

    def _read(self, line: str) -> Answer:
        values = json.loads(line)
        return Answer(**{**values, "setting": SweepSetting(**values["setting"])})

    def _check(self, line: str) -> None:
        try:
            head = json.loads(line)
            found = head["identity"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{str(self.file)!r} holds no answers of a sweep; name another folder.") from error
        if head["format"] != FORMAT:
            raise ValueError(f"{str(self.file)!r} has the format {head['format']}; name another folder.")
        for name in dict.fromkeys([*self.identity, *found]):
            if found.get(name) != self.identity.get(name):
                raise ValueError(
                    f"{str(self.file)!r} was made with {name}={found.get(name)!r}, but now {name} is "
                    f"{self.identity.get(name)!r}: answers of different sweeps do not mix. Name another folder, or "
                    "delete the file to start anew."
                )
