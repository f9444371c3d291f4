"""The command `hires-lmm sweep`: from a checkpoint and the name of a data set to files."""

from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..inference import load_model, load_processor
from ..scaling.plots import plot_laws
from .evaluator import Progress, SweepResult, evaluate
from .laws import fit_budgets
from .report import ANSWERS_FILE, LAWS_FILE, build_record, write_report
from .rows import load_rows
from .settings import SweepSetting
from .store import AnswerStore


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


def run_sweep(
    checkpoint: str,
    dataset: str,
    folder: str | Path,
    settings: Sequence[SweepSetting],
    options: dict[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    command: str = "",
    plot: bool = True,
    progress: Progress | None = None,
) -> tuple[SweepResult, dict[str, Any], list[Path]]:
    """Ask a checkpoint all questions under all settings and write what came out.

    Args:
        checkpoint (`str`): Folder or Hub id.
        dataset (`str`): See `load_rows`.
        folder (`str` or `Path`): Where answers and results go; a sweep that stopped goes on there.
        settings (sequence of `SweepSetting`): How to ask.
        options (`dict`, *optional*): Of the data set.
        limit (`int`, *optional*): Only the first questions.
        batch_size (`int`): Questions that are answered at once.
        seed (`int`): Of options to choose from and of the bootstrap.
        dtype, device, trust_remote_code: As in `load_model`.
        command (`str`): The command line, for the record.
        plot (`bool`): Whether to draw pictures.
        progress (`Callable`, *optional*): Called with answers done, answers in all and a description.

    Returns:
        The result, the record and the files written.

    Raises:
        ValueError: If anything does not fit together, or the folder holds the answers of another sweep.
        ImportError: If a picture is wanted and matplotlib is missing.
    """
    rows = load_rows(dataset, options)[:limit]
    processor = load_processor(checkpoint, trust_remote_code)
    model: Any = load_model(checkpoint, dtype, device, trust_remote_code)
    identity = {
        "checkpoint": checkpoint_fingerprint(checkpoint),
        "dataset": dataset,
        "data_options": {**(options or {}), "limit": limit},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    store = AnswerStore(Path(folder) / ANSWERS_FILE, identity)
    result = evaluate(model, processor, rows, settings, batch_size, seed, store, progress)
    facts = {"checkpoint_name": checkpoint, **identity, "device": str(model.device), "command": command}
    laws = fit_budgets(result)
    record = build_record(result, **facts, laws={name: fit.to_dict() for name, fit in laws.items()})
    files = write_report(folder, result, record, plot)
    if laws and plot:
        files.append(plot_laws(laws, Path(folder) / LAWS_FILE))
    return result, record, files
