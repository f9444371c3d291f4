"""The command `hires-lmm sweep`: from a checkpoint and the name of a data set to files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..inference import load_model, load_processor
from ..scaling.plots import plot_laws
from .evaluator import Progress, SweepResult, evaluate
from .laws import fit_budgets
from .report import ANSWERS_FILE, LAWS_FILE, build_record, write_report
from .rows import load_rows
from .settings import SweepSetting
from .store import AnswerStore, checkpoint_fingerprint


@dataclass(frozen=True)
class SweepRun:
    """A sweep from names.

    Args:
        checkpoint (`str`): Folder or Hub id; `dtype`, `device` and `trust_remote_code` as in `load_model`.
        dataset (`str`): See `load_rows`; `data_options` are its options; the first `limit` questions, if given.
        folder (`str` or `Path`): Where answers and results go; a sweep that stopped goes on there.
        settings (sequence of `SweepSetting`): How to ask, `batch_size` questions at once.
        seed (`int`): Of options to choose from and of the bootstrap.
        command (`str`): The command line, for the record.
        plot (`bool`): Whether to draw pictures.
    """

    checkpoint: str
    dataset: str
    folder: str | Path
    settings: Sequence[SweepSetting]
    data_options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int = 16
    seed: int = 0
    dtype: str = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    command: str = ""
    plot: bool = True


def run_sweep(run: SweepRun, progress: Progress | None = None) -> tuple[SweepResult, dict[str, Any], list[Path]]:
    """Ask a checkpoint all questions under all settings: the result, the record and the files written.

    `progress` is called with answers done, answers in all and a description. What does not fit together, or a folder
    with the answers of another sweep, is a ValueError.
    """
    rows = load_rows(run.dataset, run.data_options)[: run.limit]
    processor = load_processor(run.checkpoint, run.trust_remote_code)
    model: Any = load_model(run.checkpoint, run.dtype, run.device, run.trust_remote_code)
    identity = {
        "checkpoint": checkpoint_fingerprint(run.checkpoint),
        "dataset": run.dataset,
        "data_options": {**run.data_options, "limit": run.limit},
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    store: AnswerStore = AnswerStore(Path(run.folder) / ANSWERS_FILE, identity)
    result = evaluate(model, processor, rows, run.settings, run.batch_size, run.seed, store, progress)
    facts = {"checkpoint_name": run.checkpoint, **identity, "device": str(model.device), "command": run.command}
    laws = fit_budgets(result)
    record = build_record(result, **facts, laws={name: fit.to_dict() for name, fit in laws.items()})
    files = write_report(run.folder, result, record, run.plot)
    if laws and run.plot:
        files.append(plot_laws(laws, Path(run.folder) / LAWS_FILE))
    return result, record, files
