"""Golden sets: folders of numbers, below the folder that `HIRES_GOLDEN` names (default: the repository's fixtures).

A test takes sizes, settings and seeds from its set alone, and compares what the set holds, so another set of the same
form can stand in its place. `python -m tests.golden.remake DIR` writes such sets.
"""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


FOLDER = Path(os.environ.get("HIRES_GOLDEN") or Path(__file__).parents[1] / "fixtures")


class GoldenSet:
    """One set.

    Args:
        name (`str`): Its folder; where that is absent, the tests of the module are skipped.
        tensors (`str`): The file with its tensors.
    """

    def __init__(self, name: str, tensors: str = "tensors.safetensors"):
        self.folder, self.file = FOLDER / name, tensors
        if not self.folder.is_dir():
            pytest.skip(f"{FOLDER} has no set {name}", allow_module_level=True)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    @cached_property
    def cases(self) -> Any:
        return self.json("cases.json")

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / self.file)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names begin so, without that beginning."""
        return {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}

    def close(self, found: torch.Tensor, name: str, atol: float = 1e-4, rtol: float = 1e-4) -> None:
        """Compare with a tensor of the set, in the precision of what was found."""
        wanted = self.tensors[name].to(found.dtype)
        torch.testing.assert_close(found, wanted, atol=atol, rtol=rtol, msg=lambda text: f"{name}: {text}")


def write_set(folder: Path, cases: Any, tensors: dict[str, torch.Tensor], file: str = "tensors.safetensors") -> None:
    """Write what `GoldenSet` reads."""
    (folder / "cases.json").write_text(json.dumps(cases))
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, folder / file)


def split_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of torch's attention, `in_proj_weight` and so on, by the names of ours."""
    found = {f"o_proj.{kind}": tensors[f"out_proj.{kind}"] for kind in ("weight", "bias")}
    for kind in ("weight", "bias"):
        parts = tensors[f"in_proj_{kind}"].chunk(3)
        found |= {f"{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return found


def fuse_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The way back, for sets made anew."""
    found = {f"out_proj.{kind}": tensors[f"o_proj.{kind}"] for kind in ("weight", "bias")}
    return found | {
        f"in_proj_{k}": torch.cat([tensors[f"{name}_proj.{k}"] for name in "qkv"]) for k in ("weight", "bias")
    }
