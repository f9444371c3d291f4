"""What the commands share: consoles, options, errors of one line, progress. Nothing heavy is imported here."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


output, notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def checked_question(text: str) -> str:
    """The text of a question, which is not empty."""
    if not text.strip():
        raise typer.BadParameter("The question is empty.")
    return text


class Dtype(str, Enum):
    """Number formats of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Checkpoint = Annotated[str, typer.Argument(help="Folder or Hub id of a hires_lmm checkpoint.", show_default=False)]
Budget = Annotated[int | None, typer.Option(min=1, help="Budget: visual tokens kept of one image, exactly.")]
MaxCrops = Annotated[
    int | None, typer.Option(min=1, help="Most crops of one image. [default: as the checkpoint has it]")
]
NumFrames = Annotated[
    int | None, typer.Option(min=1, help="Most frames of a video. [default: as the checkpoint has it, else 16]")
]
VideoFlag = Annotated[bool, typer.Option("--video", help="Take each file for a video, whatever its name ends in.")]
Fps = Annotated[float | None, typer.Option(min=0.001, help="Frames a second of a video, in place of --num-frames.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights; auto = as saved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: CUDA where there is one]")]
Trust = Annotated[bool, typer.Option(help="Run code of the checkpoint that hires_lmm does not have.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
Question = Annotated[
    str, typer.Option("--question", "-q", help="The question.", show_default=False, callback=checked_question)
]
SaveDtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: as in the source]")]
Source = Annotated[str, typer.Argument(help="Folder or Hub id.", show_default=False)]
Destination = Annotated[Path, typer.Argument(help="A new folder.", show_default=False)]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can mend into one line on standard error and exit status 1; a bug keeps its traceback."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, StrictDataclassError
    from jinja2 import TemplateError

    library = (HfHubHTTPError, HFValidationError, StrictDataclassError, TemplateError)
    try:
        yield
    except (ValueError, OSError, ImportError, *library) as error:
        fail(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        fail(f"{str(error).splitlines()[0]} Lower --max-crops or --max-image-tokens, or use --dtype bfloat16.")
    except KeyboardInterrupt:
        notes.print("stopped")
        raise typer.Exit(130) from None


def fail(reason: object) -> None:
    """One line on standard error, and exit status 1."""
    notes.print(f"[bold red]error:[/] {escape(' '.join(str(reason).split()))}")
    raise typer.Exit(1)


def escape(text: str) -> str:
    """A text that rich shows as it stands."""
    return text.replace("[", r"\[")


@contextmanager
def quiet_work() -> Iterator[None]:
    """`one_line_errors`, with the library's own bars and notes kept off the terminal."""
    with one_line_errors():
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        hub_logging.set_verbosity_error()
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        yield


def existing(checkpoint: str, presets: Iterable[str] = ()) -> str:
    """A folder that exists, or something that may be a Hub id."""
    path = Path(checkpoint)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{checkpoint} has no config.json, so it is no checkpoint; name another folder.")
        return checkpoint
    if path.exists() or path.is_absolute() or checkpoint.count("/") > 1 or checkpoint.startswith((".", "~")):
        raise ValueError(f"There is no folder {checkpoint}; name a checkpoint folder or a Hub id (owner/name).")
    if "/" not in checkpoint:
        hint = f"; known presets: {', '.join(presets)}" if presets else ""
        raise ValueError(f"There is no folder {checkpoint}, and a Hub id has the form owner/name{hint}.")
    return checkpoint


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, as a function of (done, total, description)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as progress:
        task = progress.add_task("starting", total=None)

        def update(done: int, total: int, description: str) -> None:
            progress.update(task, completed=done, total=total, description=description)

        yield update


VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv", ".wmv", ".flv")


def split_sources(sources: list[str], are_videos: bool) -> tuple[list[str], list[str]]:
    """Images and videos among files and addresses: all are videos, or those of a video's ending."""
    videos = [each for each in sources if are_videos or each.partition("?")[0].lower().endswith(VIDEO_ENDINGS)]
    return [each for each in sources if each not in videos], videos


def images_kwargs(max_crops: int | None, max_image_tokens: int | None, **more: Any) -> dict[str, Any]:
    """Options of the image processor that were given."""
    options = {"max_crops": max_crops, "max_image_tokens": max_image_tokens, **more}
    return {name: value for name, value in options.items() if value is not None}


def warn_unknown(words: list[str]) -> None:
    """Name the words that the tokenizer does not know."""
    from hires_lmm.inference import describe_unknown

    if words:
        notes.print(f"[bold yellow]warning:[/] {escape(describe_unknown(words))}")


def parse_option(text: str, hint: str = "--data", example: str = "scenes=300") -> tuple[str, Any]:
    """`scenes=300` -> `("scenes", 300)`; what is no JSON stays text."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise typer.BadParameter(f"{text!r} is no option; write KEY=VALUE, such as {example}.", param_hint=hint)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def write_json(value: Any) -> None:
    """A value as JSON on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
