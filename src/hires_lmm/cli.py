"""The command line. Exit status: 0 done, 1 the work failed, 2 wrong usage.

Nothing heavy is imported before a command runs: `hires_lmm_command` loads this file without the package's `__init__`.
So imports inside commands are absolute, but for what needs no torch, which is imported from beside this file.
"""

import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table


app = typer.Typer(
    help="High-resolution multimodal models: ask about images, count and see their tokens, convert checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels cut the names of options at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert to and from other formats.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(convert_app, name="convert")

output, notes = Console(highlight=False, soft_wrap=True), Console(stderr=True, highlight=False, soft_wrap=True)


def _show_versions(wanted: bool) -> None:
    if wanted:
        named = ", ".join(f"{name} {version(name)}" for name in ("hires-lmm", "transformers", "torch"))
        output.print(f"{named}, Python {sys.version.split()[0]}")
        raise typer.Exit


@app.callback()
def _main(
    wanted: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_show_versions, is_eager=True)
    ] = False,
) -> None:
    pass


def _checked_question(text: str) -> str:
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
DtypeOption = Annotated[Dtype, typer.Option(help="Number format of the weights; auto = as saved.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... [default: CUDA where there is one]")]
Trust = Annotated[bool, typer.Option(help="Run code of the checkpoint that hires_lmm does not have.")]
Json = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]
Question = Annotated[
    str, typer.Option("--question", "-q", help="The question.", show_default=False, callback=_checked_question)
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
        _fail(error)
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        _fail(f"{str(error).splitlines()[0]} Lower --max-crops or --max-image-tokens, or use --dtype bfloat16.")
    except KeyboardInterrupt:
        notes.print("stopped")
        raise typer.Exit(130) from None


def _fail(reason: object) -> None:
    notes.print(f"[bold red]error:[/] {_escape(' '.join(str(reason).split()))}")
    raise typer.Exit(1)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def _quiet_work() -> Iterator[None]:
    """`one_line_errors`, with the library's own bars and notes kept off the terminal."""
    with one_line_errors():
        from huggingface_hub.utils import logging as hub_logging
        from transformers.utils import logging

        hub_logging.set_verbosity_error()
        logging.set_verbosity_error()
        if not sys.stderr.isatty():
            logging.disable_progress_bar()
        yield


def _existing(checkpoint: str, presets: Iterable[str] = ()) -> str:
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
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar on standard error, as a function of (done, total, description)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as progress:
        task = progress.add_task("starting", total=None)

        def update(done: int, total: int, description: str) -> None:
            progress.update(task, completed=done, total=total, description=description)

        yield update


def _images_kwargs(max_crops: int | None, max_image_tokens: int | None) -> dict[str, int]:
    options = {"max_crops": max_crops, "max_image_tokens": max_image_tokens}
    return {name: value for name, value in options.items() if value is not None}


def _warn_unknown(words: list[str]) -> None:
    from hires_lmm.inference import describe_unknown

    if words:
        notes.print(f"[bold yellow]warning:[/] {_escape(describe_unknown(words))}")


@app.command("ask")
def _ask(
    checkpoint: Checkpoint,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Files or URLs.", show_default=False)],
    question: Question,
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    decoding: Annotated[
        Literal["m3id", "damro"] | None, typer.Option(help="Against the same prompt that sees less.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask about images.

    The answer streams to standard output; what was kept goes to standard error.
    """
    with _quiet_work():
        from hires_lmm.inference import AnswerStream, load_model, load_processor, prepare
        from hires_lmm.visualize import count_kept

        processor = load_processor(_existing(checkpoint), trust_remote_code)
        prepared = prepare(processor, images, question, **_images_kwargs(max_crops, max_image_tokens))
        _warn_unknown(prepared.unknown_words)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        pieces, answer = AnswerStream(model, processor, prepared, max_new_tokens, decoding), ""
        for piece in pieces:
            answer += piece
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        records: list[dict[str, Any]] = []
        for index, (name, image) in enumerate(zip(images, prepared.images, strict=True)):
            used, total = count_kept(pieces.token_map, index)
            sizes = {"height": image.height, "width": image.width, "visual_tokens": total, "kept_tokens": used}
            records.append({"image": name, **sizes})
        if as_json:
            said = {"question": question, "unknown_words": prepared.unknown_words, "answer": answer}
            _write_json({**said, "images": records})
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        for each in records:
            size = f"{each['width']} x {each['height']} pixels (width x height)"
            kept = f"{each['kept_tokens']} of {each['visual_tokens']} visual tokens kept"
            notes.print(f"[dim]{_escape(str(each['image']))}: {size}, {kept}[/]")


def _write_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _parse_size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,6})[xX×](\d{1,6})", text.strip())
    if not found or not all(int(side) for side in found.groups()):
        raise typer.BadParameter(f"{text!r} is no size; write HEIGHTxWIDTH in pixels, for instance 2000x3000.")
    return int(found[1]), int(found[2])


@app.command("tokens")
def _tokens(
    checkpoint: Annotated[
        str, typer.Argument(help="Folder, Hub id, or the name of a preset.", show_default=False, metavar="CHECKPOINT")
    ],
    sizes: Annotated[
        list[str], typer.Argument(metavar="HEIGHTxWIDTH", help="Image sizes, pixels.", show_default=False)
    ],
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    as_json: Json = False,
) -> None:
    """Count views and visual tokens from image sizes.

    Needs neither images nor weights. The last column is LLaVA-NeXT's count of the same image, settings as released.
    """
    pairs = [_parse_size(size) for size in sizes]
    with one_line_errors():
        from .accounting import PRESET_SETTINGS, account_image
        from .folders import check_planner, read_image_settings

        if checkpoint in PRESET_SETTINGS and not Path(checkpoint).exists():
            settings = PRESET_SETTINGS[checkpoint]
        else:
            settings = read_image_settings(_existing(checkpoint, PRESET_SETTINGS))
            check_planner(checkpoint, settings["planner"])
        options = _images_kwargs(max_crops, None)
        accounts = [account_image(settings, *pair, max_image_tokens, **options) for pair in pairs]
        if as_json:
            _write_json([{**account.to_dict(), **options} for account in accounts])
            return
        output.print(_token_table(accounts), crop=False, overflow="ignore")


def _token_table(accounts: list[Any]) -> Table:
    table = Table(title_justify="left")
    has_budget = accounts[0].kept_tokens is not None
    columns = ["height x width", "views", "crops", "patches", "visual tokens", *(["kept"] if has_budget else [])]
    for column in [*columns, "LLaVA-NeXT"]:
        table.add_column(column, justify="right", no_wrap=True)
    for account in accounts:
        cells = [
            f"{account.height} x {account.width}",
            str(account.views),
            f"{account.crop_rows} x {account.crop_cols}",
            str(account.patches),
            str(account.visual_tokens),
            *([str(account.kept_tokens)] if has_budget else []),
        ]
        table.add_row(*cells, str(account.llava_next))
    return table


@app.command("show")
def _show(
    checkpoint: Checkpoint,
    image: Annotated[str, typer.Argument(help="File or URL.", show_default=False)],
    question: Question,
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.", show_default=False)],
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    width: Annotated[int, typer.Option(min=600, max=10000, help="Width of the picture, pixels.")] = 1500,
    layers: Annotated[bool, typer.Option("--layers", help="Draw where tokens left, not their scores.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Draw which tokens were kept.

    The image with the grid of crops: kept tokens bright, dropped ones dim, scores as heat.
    """
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} must end in .png.", param_hint="--out")
    with _quiet_work():
        if not out.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {out.parent}; create it first.")
        from hires_lmm.inference import load_model, load_processor, map_tokens, prepare
        from hires_lmm.visualize import count_kept, draw_token_map

        processor = load_processor(_existing(checkpoint), trust_remote_code)
        prepared = prepare(processor, [image], question, **_images_kwargs(max_crops, max_image_tokens))
        _warn_unknown(prepared.unknown_words)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        token_map = map_tokens(model, prepared)
        draw_token_map(prepared.images[0], token_map, title=question, width=width, layers=layers).save(out)
        kept, total = count_kept(token_map)
        if as_json:
            record = {"picture": str(out), "visual_tokens": total, "kept_tokens": kept}
            _write_json({**record, "unknown_words": prepared.unknown_words})
            return
        output.print(f"{_escape(str(out))}: {kept} of {total} visual tokens kept")


@app.command("export")
def _export(checkpoint: Checkpoint, destination: Destination, trust_remote_code: Trust = False) -> None:
    """Write a self-contained folder.

    It holds weights, code, processor and model card, and loads where this package is not installed.
    """
    with _quiet_work():
        from hires_lmm.conversion import export

        with _progress() as progress:
            export(_existing(checkpoint), destination, progress=progress, trust_remote_code=trust_remote_code)
        output.print(f"wrote {_escape(str(destination))}")


@app.command("compose")
def _compose(
    destination: Destination,
    vision: Annotated[str | None, typer.Option(help="Folder or Hub id of a CLIP or SigLIP tower.")] = None,
    text: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model.")] = None,
    preset: Annotated[str, typer.Option(help="How the parts between them are put together.")] = "slime",
    dtype: SaveDtype = None,
    chat_template: Annotated[str | None, typer.Option(help="llama3, vicuna, chatml, plain or a Jinja text.")] = None,
    extra_tower: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A further tower, by a name of its own.")
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="A small model with random weights instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Join a vision tower and a language model.

    Both are pretrained; the parts between them are new and untrained.
    """
    if random != (vision is None and text is None) or (vision is None) != (text is None):
        raise typer.BadParameter(
            "give --vision and --text, or --random alone.", param_hint="--vision, --text, --random"
        )
    if random and (dtype is not None or chat_template is not None):
        raise typer.BadParameter("a random model is float32 and speaks chatml.", param_hint="--dtype, --chat-template")
    towers = dict(each.partition("=")[::2] for each in extra_tower or [])
    if not all(towers.values()) or (random and towers):
        raise typer.BadParameter("write NAME=SOURCE, and no --random.", param_hint="--extra-tower")
    with _quiet_work():
        from hires_lmm import PRESETS
        from hires_lmm.conversion import compose, compose_random

        if preset not in PRESETS:
            raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}.", param_hint="--preset")
        if vision is None or text is None:
            compose_random(destination, preset, seed)
            output.print(f"wrote {_escape(str(destination))}; its weights are random")
            return
        build = partial(compose, vision, text, preset, destination, dtype=dtype, chat_template=chat_template)
        with _progress() as progress:
            build(extra_towers=towers, progress=progress)
        output.print(f"wrote {_escape(str(destination))}; its new parts are untrained")
        _show_choices(destination)


def _show_choices(folder: Path) -> None:
    """What a conversion chose, and what the folder lacks."""
    from hires_lmm.conversion.cards import describe_choices
    from hires_lmm.folders import check_tokenizer

    for name, choice in describe_choices(folder).items():
        notes.print(f"{name}: {_escape(choice)}")
    try:
        check_tokenizer(str(folder))
    except ValueError as error:
        notes.print(f"[bold yellow]warning:[/] {_escape(str(error))}")


def _convert(function: str, source: str, destination: Path, **options: str | None) -> None:
    """Call a function of `hires_lmm.conversion`."""
    with _quiet_work():
        import hires_lmm.conversion

        with _progress() as progress:
            getattr(hires_lmm.conversion, function)(source, destination, **options, progress=progress)
        output.print(f"wrote {_escape(str(destination))}")
        if function != "convert_to_slime":
            _show_choices(destination)


@convert_app.command("slime")
def _convert_slime(
    source: Source,
    destination: Destination,
    vision_config: Annotated[str | None, typer.Option(help="Tower: folder, config file or Hub id.")] = None,
    base: Annotated[str | None, typer.Option(help="Language model under a LoRA or stage folder.")] = None,
    dtype: SaveDtype = None,
) -> None:
    """Convert a released SliME checkpoint."""
    _convert("convert_slime", source, destination, vision_config=vision_config, base=base, dtype=dtype)


@convert_app.command("llava-next")
def _convert_llava_next(source: Source, destination: Destination, dtype: SaveDtype = None) -> None:
    """Convert a LLaVA-NeXT checkpoint in transformers' format."""
    _convert("convert_llava_next", source, destination, dtype=dtype)


@convert_app.command("fusion")
def _convert_fusion(source: Source, destination: Destination, dtype: SaveDtype = None) -> None:
    """Convert a released checkpoint of the token-scaling paper."""
    _convert("convert_fusion", source, destination, dtype=dtype)


@convert_app.command("to-slime")
def _convert_to_slime(source: Source, destination: Destination) -> None:
    """Convert a checkpoint back to SliME's released format."""
    _convert("convert_to_slime", source, destination)


def _parse_list(text: str | None, kind: Callable[[str], Any], name: str) -> list[Any]:
    """Values between commas; `default` leaves the choice to the checkpoint."""
    values = []
    for word in (text or "default").split(","):
        try:
            values.append(None if word.strip() == "default" else kind(word.strip()))
        except ValueError:
            raise typer.BadParameter(
                f"{word!r} is no value; write numbers between commas, such as 8,64,default.", param_hint=name
            ) from None
    return values


def _parse_option(text: str) -> tuple[str, Any]:
    """`scenes=300` -> `("scenes", 300)`; what is no JSON stays text."""
    name, sign, value = text.partition("=")
    if not name or not sign:
        raise typer.BadParameter(f"{text!r} is no option; write KEY=VALUE, such as scenes=300.", param_hint="--data")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _parse_names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


@app.command("sweep")
def _sweep(
    checkpoint: Checkpoint,
    dataset: Annotated[
        str,
        typer.Argument(help="A .json or .jsonl file, or NAME[:SPLIT] of a registered set.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="Folder of answers and results; goes on there.", show_default=False)],
    tokens: Annotated[str | None, typer.Option(help="Budgets, such as 100,150,default (default = no budget).")] = None,
    gamma: Annotated[str | None, typer.Option(help="Thresholds of the router, such as 0.5,0.75,1.")] = None,
    max_crops: Annotated[str | None, typer.Option(help="Most crops, such as 4,16,default.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Longest sides of images, pixels.")] = None,
    views: Annotated[str, typer.Option(help="Of all,global,crops,none.")] = "all",
    response_format: Annotated[str, typer.Option("--format", help="Of plain,word,letter.")] = "plain",
    data: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of a registered data set; may be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first questions.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of options to choose from and of the intervals.")] = 0,
    plot: Annotated[bool, typer.Option(help="Draw pictures (needs matplotlib).")] = True,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy over a grid of settings.

    Accuracy by kind of question with 95 % intervals, for all combinations of the lists given. Run again, it goes on.
    """
    data_options = dict(_parse_option(text) for text in data or ())
    grid: dict[str, list[Any]] = {
        "tokens": _parse_list(tokens, int, "--tokens"),
        "gamma": _parse_list(gamma, float, "--gamma"),
        "max_crops": _parse_list(max_crops, int, "--max-crops"),
        "image_size": _parse_list(image_size, int, "--image-size"),
        "views": _parse_names(views),
        "format": _parse_names(response_format),
    }
    with _quiet_work():
        from hires_lmm.evaluation import build_tables, expand_grid
        from hires_lmm.evaluation.command import SweepRun, run_sweep
        from hires_lmm.evaluation.laws import build_law_table, fit_budgets

        run = SweepRun(
            checkpoint=_existing(checkpoint),
            dataset=dataset,
            folder=out,
            settings=expand_grid(**grid),
            data_options=data_options,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            dtype=dtype.value,
            device=device,
            trust_remote_code=trust_remote_code,
            command=shlex.join(["hires-lmm", *sys.argv[1:]]),
            plot=plot,
        )
        with _progress() as progress:
            result, record, files = run_sweep(run, progress)
        if as_json:
            _write_json(record)
        else:
            wide = Console(highlight=False, width=max(output.width, 200))  # a table is as wide as it needs to be
            for table in build_tables(result):
                wide.print(table, crop=False, overflow="ignore")
            if laws := fit_budgets(result):
                wide.print(build_law_table(laws), crop=False, overflow="ignore")
        notes.print(f"wrote {_escape(', '.join(map(str, files)))}")


@app.command("reconstruct")
def _reconstruct(
    checkpoint: Checkpoint,
    image: Annotated[str, typer.Argument(help="File or URL.", show_default=False)],
    out: Annotated[Path, typer.Option(help="PNG to write.", show_default=False)],
    objectives: Annotated[
        Path | None, typer.Option(help="Folder of the run's objectives. [default: in or beside CHECKPOINT]")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 28,
    seed: Annotated[int, typer.Option(help="Of the noise that it starts from.")] = 0,
    max_crops: MaxCrops = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Paint an image back from the tokens that the language model is given.

    For checkpoints of training with the objective 'reconstruction'; needs the extra 'reconstruction'.
    """
    with _quiet_work():
        from hires_lmm.inference import load_model, load_processor
        from hires_lmm.training.objectives.painting import find_reconstruction, paint, write_png

        objective = find_reconstruction(_existing(checkpoint), objectives)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        processor = load_processor(checkpoint, trust_remote_code)
        kwargs = _images_kwargs(max_crops, None)
        with _progress() as progress:
            painted = paint(model, processor, objective, image, steps, seed, images_kwargs=kwargs, progress=progress)
        write_png(painted, out)
    notes.print(f"wrote {_escape(str(out))}")


@app.command("demo")
def _demo(
    checkpoint: Checkpoint,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Open a page for trying a checkpoint.

    Image, question and budget go in; answer and picture of the kept tokens come out. Needs the extra `demo`.
    """
    with _quiet_work():
        from hires_lmm.inference import load_model, load_processor
        from hires_lmm.page import build_page

        processor = load_processor(_existing(checkpoint), trust_remote_code)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        page = build_page(model, processor, Path(checkpoint).name)
        notes.print(f"the page is at http://{host}:{port} (stop with Ctrl-C)")
        page.launch(server_name=host, server_port=port, quiet=True, show_error=True)


if __name__ == "__main__":
    app()
