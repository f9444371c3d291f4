"""Key tables: which tensor of one checkpoint becomes which tensor of another, in both directions.

A table is a list of rules, each from a `source`, the name in the foreign checkpoint, to names in ours. In a name, `{}`
stands for one piece between dots and `**` for the rest of the key; both are carried over to the other side.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rename:
    """One tensor, other name."""

    source: str
    target: str

    kind = "rename"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor]

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0]


@dataclass(frozen=True)
class SplitRows:
    """One tensor whose rows are several tensors of equal size stacked, such as a fused attention projection."""

    source: str
    targets: tuple[str, ...]

    kind = "split rows"

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        rows = tensor.shape[0] if tensor.ndim else 0
        if not rows or rows % len(self.targets):
            raise ValueError(f"{self.source} has {rows} rows, which {len(self.targets)} does not divide.")
        return list(tensor.chunk(len(self.targets)))

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(tensors)


@dataclass(frozen=True)
class Squeeze:
    """One tensor without its leading axes of length one."""

    source: str
    target: str
    axes: int

    kind = "leading axes removed"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.ndim < self.axes or any(size != 1 for size in tensor.shape[: self.axes]):
            raise ValueError(f"{self.source} has the shape {tuple(tensor.shape)}; its first {self.axes} must be 1.")
        return [tensor.reshape(tensor.shape[self.axes :])]

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0][(None,) * self.axes]


@dataclass(frozen=True)
class Unsqueeze:
    """One tensor with further axes of length one behind its own, as a linear layer that is a convolution."""

    source: str
    target: str
    axes: int

    kind = "axes of length one added"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[(..., *(None,) * self.axes)]]

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].reshape(tensors[0].shape[: -self.axes])


@dataclass(frozen=True)
class Transpose:
    """One matrix, rows and columns exchanged."""

    source: str
    target: str

    kind = "transposed"

    @property
    def targets(self) -> tuple[str, ...]:
        return (self.target,)

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if tensor.ndim != 2:
            raise ValueError(f"{self.source} has the shape {tuple(tensor.shape)}, but a matrix is expected.")
        return [tensor.T]

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return tensors[0].T


@dataclass(frozen=True)
class TakeRows:
    """One table that becomes a table and a second one of some of its rows; backwards these are written over it."""

    source: str
    targets: tuple[str, str]
    rows: tuple[int, ...]

    kind = "table and chosen rows"

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        rows = tensor.shape[0] if tensor.ndim else 0
        if max(self.rows) >= rows:
            raise ValueError(f"{self.source} has {rows} rows, so no row {max(self.rows)}.")
        return [tensor, tensor[list(self.rows)]]

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        table = tensors[0].clone()
        table[list(self.rows)] = tensors[1]
        return table


@dataclass(frozen=True)
class Constant:
    """A tensor that every foreign checkpoint holds with the same value and that ours does not need."""

    source: str
    value: tuple[float, ...]
    dtype: torch.dtype

    kind = "constant"
    targets = ()

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        if not tensor.is_meta and tensor.float().flatten().tolist() != list(self.value):
            raise ValueError(f"{self.source} holds {tensor.tolist()}, expected {list(self.value)}.")
        return []

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.tensor(self.value, dtype=self.dtype)


@dataclass(frozen=True)
class Unused:
    """A tensor that our model does not use; where there is a way back, a side file keeps it.

    `required`: the released code wants it, so there is no way back without the file.
    """

    source: str
    required: bool = False

    kind = "not used"
    targets = ()

    def forward(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return []

    def backward(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        raise ValueError(f"{self.source} can only come from the side file of a conversion.")


Rule = Rename | SplitRows | Squeeze | Unsqueeze | Transpose | TakeRows | Constant | Unused
"""`targets` are names in ours; `forward` makes our tensors of a foreign one, or raises a ValueError where they do
not fit, `backward` the foreign one of ours; both run on meta tensors too."""


@dataclass(frozen=True)
class KeyMatch:
    """A rule applied to one concrete key: its names without wildcards."""

    source: str
    targets: tuple[str, ...]
    rule: Rule


def match_sources(rules: list[Rule], keys: Iterable[str]) -> tuple[list[KeyMatch], list[str]]:
    """Apply a table to foreign keys (the first rule that fits wins); returns matches, and keys that no rule knows."""
    patterns = [(_pattern(rule.source), rule) for rule in rules]
    matches, unknown = [], []
    for key in keys:
        for pattern, rule in patterns:
            if found := pattern.match(key):
                targets = tuple(_fill(target, found.groups()) for target in rule.targets)
                matches.append(KeyMatch(key, targets, rule))
                break
        else:
            unknown.append(key)
    return matches, unknown


def match_targets(rules: list[Rule], keys: Iterable[str]) -> tuple[list[KeyMatch], list[str]]:
    """Apply a table backwards to our keys; returns one match a foreign tensor, and keys that no rule knows."""
    patterns = [(_pattern(name), rule) for rule in rules for name in rule.targets]
    matches: dict[str, KeyMatch] = {}
    unknown = []
    for key in keys:
        for pattern, rule in patterns:
            if found := pattern.match(key):
                values = found.groups()
                source = _fill(rule.source, values)
                targets = tuple(_fill(target, values) for target in rule.targets)
                matches.setdefault(source, KeyMatch(source, targets, rule))
                break
        else:
            unknown.append(key)
    return list(matches.values()), unknown


def _pattern(name: str) -> re.Pattern:
    """A regular expression with one group a wildcard."""
    pieces = re.split(r"(\{\}|\*\*)", name)
    return re.compile(
        "".join({"{}": r"([^.]+)", "**": r"(.+)"}.get(piece, re.escape(piece)) for piece in pieces) + r"\Z"
    )


def _fill(name: str, values: Iterable[str]) -> str:
    """Put the values of wildcards into a name."""
    iterator = iter(values)
    return re.sub(r"\{\}|\*\*", lambda _: next(iterator), name)
