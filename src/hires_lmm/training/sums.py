"""Sums for the log of a run, over steps and processes."""

from typing import Any

import torch


class Sums:
    """Adds numbers up until they are taken."""

    def __init__(self, names: list[str]):
        self.names = list(names)
        self._values: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Add a number."""
        self._values[name] = self._values.get(name, 0) + value

    def take(self, device: torch.device) -> dict[str, float]:
        """Sums over all processes since the last call. To be called by all of them."""
        values = [torch.as_tensor(self._values.get(n, 0), dtype=torch.float64, device="cpu") for n in self.names]
        self._values = {}
        sums = torch.stack(values)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            sums = sums.to(device)
            torch.distributed.all_reduce(sums)
        return dict(zip(self.names, sums.tolist(), strict=True))
