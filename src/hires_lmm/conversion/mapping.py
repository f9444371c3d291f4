"""Applying a key table to entries: what becomes of every tensor, without reading it yet."""

from dataclasses import dataclass, field, replace

import torch

from .errors import ConversionError, problem_table
from .keys import Constant, KeyMatch, Rule, Unused, match_sources, match_targets
from .tensors import Entries, Entry


ROWS = 16384
"""Rows of a table of embeddings that are copied at a time."""


@dataclass
class Mapped:
    """A key table applied to a checkpoint: its tensors, those it has no use for, and what report and error say."""

    entries: Entries = field(default_factory=dict)
    unused: Entries = field(default_factory=dict)
    records: list[dict] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)


def map_forward(rules: list[Rule], entries: Entries) -> Mapped:
    """Apply a table to a foreign checkpoint; what does not fit becomes a problem. Our tensors keep its order."""
    matches, unknown = match_sources(rules, entries)
    mapped = Mapped(problems=[("unexpected", key, _describe(entries[key])) for key in unknown])
    for match in matches:
        source = entries[match.source]
        if isinstance(match.rule, Unused):
            mapped.unused[match.source] = source
        checked = source.read() if isinstance(match.rule, Constant) else source.meta()
        try:
            parts = match.rule.forward(checked)
        except ValueError as error:
            mapped.problems.append(("unfit", match.source, str(error)))
            continue
        for index, (target, part) in enumerate(zip(match.targets, parts, strict=True)):
            if target in mapped.entries:
                mapped.problems.append(("twice", match.source, f"{target} has a source already"))
            mapped.entries[target] = _part(match, source, index, part)
        mapped.records.append(record(match.source, source, match.targets, match.rule.kind))
    return mapped


def map_backward(rules: list[Rule], entries: Entries) -> Mapped:
    """Apply a table to our checkpoint; what does not fit becomes a problem. Constants are made anew."""
    matches, unknown = match_targets(rules, entries)
    matches += [KeyMatch(rule.source, (), rule) for rule in rules if isinstance(rule, Constant)]
    mapped = Mapped(problems=[("unexpected", key, _describe(entries[key])) for key in unknown])
    for match in matches:
        absent = [target for target in match.targets if target not in entries]
        if absent:
            mapped.problems += [("missing", target, f"needed for {match.source}") for target in absent]
            continue
        entry = _joined(match, entries)
        mapped.entries[match.source] = entry
        mapped.records.append(record(match.source, entry, match.targets, match.rule.kind))
    return mapped


def check_complete(
    mapped: Mapped, expected: dict[str, tuple[int, ...]], rules: list[Rule], what: str = "the checkpoint"
) -> None:
    """Refuse tensors that are not those of the model; the rules tell which source tensor is missing."""
    problems = list(mapped.problems)
    sources, unknown = match_targets(rules, [name for name in expected if name not in mapped.entries])
    problems += [
        ("missing", match.source, " + ".join(f"for {target}" for target in match.targets)) for match in sources
    ]
    problems += [("missing", name, "") for name in unknown]
    for name, entry in mapped.entries.items():
        if name not in expected:
            problems.append(("unexpected", name, _describe(entry)))
        elif entry.shape != expected[name]:
            wanted = " x ".join(map(str, expected[name]))
            problems.append(("mis-shaped", name, f"{_describe(entry)}; the configuration asks for {wanted}"))
    if problems:
        raise ConversionError(problem_table(f"The tensors of {what} do not fit its configuration:", problems))


def cast(entries: Entries, dtype: torch.dtype | None) -> Entries:
    """Give all floating-point tensors one dtype; None leaves everything as it is."""

    def one(entry: Entry) -> Entry:
        if dtype is None or entry.dtype == dtype or not entry.dtype.is_floating_point:
            return entry
        return replace(entry, dtype=dtype, read=lambda: entry.read().to(dtype))

    return {name: one(entry) for name, entry in entries.items()}


def grow_rows(entry: Entry, rows: int) -> Entry:
    """Add rows to a table of embeddings, each the mean of the old ones."""
    old = entry.shape[0] if entry.shape else rows
    if old >= rows:
        return entry

    def read() -> torch.Tensor:
        grown = torch.empty((rows, *entry.shape[1:]), dtype=entry.dtype)
        total = torch.zeros(entry.shape[1:])
        for start in range(0, old, ROWS):  # read anew each time, so that no other rows of the file stay in memory
            part = entry.read()[start : start + ROWS]
            grown[start : start + len(part)] = part
            total += part.float().sum(dim=0)
        grown[old:] = total / old
        return grown

    note = "; ".join(filter(None, [entry.note, f"{rows - old} row(s) added for the image token"]))
    return replace(entry, shape=(rows, *entry.shape[1:]), read=read, note=note)


def cut_rows(entry: Entry, rows: int) -> Entry:
    """Keep the first rows of a table of embeddings."""
    return replace(entry, shape=(rows, *entry.shape[1:]), read=lambda: entry.read()[:rows])


def record(source: str | None, entry: Entry, targets: tuple[str, ...], kind: str) -> dict:
    """What the report says of one source tensor; `source` is None for a tensor that the source does not have."""
    return {
        "source": source,
        "file": entry.origin,
        "shape": list(entry.shape),
        "dtype": str(entry.dtype).removeprefix("torch."),
        "targets": list(targets),
        "transformation": "; ".join(filter(None, [kind, entry.note])),
    }


def _part(match: KeyMatch, source: Entry, index: int, part: torch.Tensor) -> Entry:
    """Our tensor number `index` of a match."""

    def read() -> torch.Tensor:
        return match.rule.forward(source.read())[index]

    return Entry(tuple(part.shape), part.dtype, read, source.origin, source.note)


def _joined(match: KeyMatch, entries: Entries) -> Entry:
    """The foreign tensor of a match backwards."""
    parts = [entries[target] for target in match.targets]
    meta = match.rule.backward([part.meta() for part in parts])

    def read() -> torch.Tensor:
        return match.rule.backward([part.read() for part in parts])

    origin, note = (parts[0].origin, parts[0].note) if parts else ("", "")
    return Entry(tuple(meta.shape), meta.dtype, read, origin, note)


def _describe(entry: Entry) -> str:
    shape = " x ".join(map(str, entry.shape)) or "scalar"
    where = f" in {entry.origin}" if entry.origin else ""
    return f"{shape} {str(entry.dtype).removeprefix('torch.')}{where}"
