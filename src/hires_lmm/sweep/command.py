"""The command `hires-lmm sweep`: from a checkpoint and the name of a data set to files."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from ..inference import load_model, load_processor
from ..scaling.plots import plot_laws
from .evaluator import Progress, SweepResult, evaluate
from .laws import fit_budgets
from .report import ANSWERS_FILE, LAWS_FILE, build_record, write_report
from .rows import needle_rows, read_rows
from .settings import SweepSetting
from .store import AnswerStore


WEIGHT_FILES = ("*.safetensors", "*.bin")
SAMPLED_BYTES = 1 << 20
NEEDLE = re.compile(r"needle(?::(?P<split>\w+))?")


@dataclass(frozen=True)
class DataOptions:
    """Which questions are asked.

    Args:
        scenes (`int`): Scenes of the needle task.
        questions (`int`): Most questions a needle scene.
        data_seed (`int`): Of the needle scenes.
        scene_size (`int`, *optional*): Side of the needle scenes, pixels.
        placement (`str`): How needle objects are placed: `free`, `jitter` or `aligned`.
        limit (`int`, *optional*): Only the first questions.
    """

    scenes: int = 100
    questions: int = 8
    data_seed: int = 0
    scene_size: int | None = None
    placement: str = "free"
    limit: int | None = None


def load_rows(dataset: str, options: DataOptions) -> list[dict[str, Any]]:
    """The questions that a name stands for.

    Args:
        dataset (`str`): `needle`, `needle:validation`, `needle:test`, `needle:train`, or a `.json` or `.jsonl` file.
        options (`DataOptions`): Which and how many.

    Returns:
        The rows.

    Raises:
        ValueError: If there is no such data set.
    """
    found = NEEDLE.fullmatch(dataset)
    if found:
        from ..training.data.scenes import NeedleOptions

        drawn = NeedleOptions(placement=options.placement)
        drawn = drawn if options.scene_size is None else replace(drawn, scene_size=options.scene_size)
        split = found["split"] or "validation"
        rows = needle_rows(split, options.scenes, options.data_seed, options.questions, drawn)
    elif Path(dataset).suffix in (".json", ".jsonl"):
        rows = read_rows(dataset)
    else:
        raise ValueError(
            f"{dataset!r} is no data set of this command; name a .json or .jsonl file, or needle:validation."
        )
    return rows[: options.limit]


def checkpoint_fingerprint(checkpoint: str) -> str:
    """A short name of the weights and configuration of a folder; for a Hub id, the id.

    Args:
        checkpoint (`str`): Folder or Hub id.

    Returns:
        A hash of `config.json`, and of name, size and both ends of every weight file.
    """
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
    data: DataOptions,
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
        data (`DataOptions`): Which questions.
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
    rows = load_rows(dataset, data)
    processor = load_processor(checkpoint, trust_remote_code)
    model: Any = load_model(checkpoint, dtype, device, trust_remote_code)
    identity = {
        "checkpoint": checkpoint_fingerprint(checkpoint),
        "dataset": dataset,
        "data_options": asdict(data),
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
