"""The commands about accuracy: `sweep`, and the two harnesses `vlmeval` and `harness-tasks`; `cli` adds them."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .cli_shared import (
    Checkpoint,
    Device,
    Dtype,
    DtypeOption,
    Json,
    Trust,
    escape,
    existing,
    notes,
    one_line_errors,
    output,
    parse_option,
    progress_bar,
    quiet_work,
    write_json,
)


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


def _parse_names(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def sweep(
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
    data_options = dict(parse_option(text) for text in data or ())
    grid: dict[str, list[Any]] = {
        "tokens": _parse_list(tokens, int, "--tokens"),
        "gamma": _parse_list(gamma, float, "--gamma"),
        "max_crops": _parse_list(max_crops, int, "--max-crops"),
        "image_size": _parse_list(image_size, int, "--image-size"),
        "views": _parse_names(views),
        "format": _parse_names(response_format),
    }
    with quiet_work():
        from hires_lmm.evaluation import build_tables, expand_grid
        from hires_lmm.evaluation.command import SweepRun, run_sweep
        from hires_lmm.evaluation.laws import build_law_table, fit_budgets

        run = SweepRun(
            checkpoint=existing(checkpoint),
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
        with progress_bar() as progress:
            result, record, files = run_sweep(run, progress)
        if as_json:
            write_json(record)
        else:
            wide = Console(highlight=False, width=max(output.width, 200))  # a table is as wide as it needs to be
            for table in build_tables(result):
                wide.print(table, crop=False, overflow="ignore")
            if laws := fit_budgets(result):
                wide.print(build_law_table(laws), crop=False, overflow="ignore")
        notes.print(f"wrote {escape(', '.join(map(str, files)))}")


def vlmeval(
    checkpoint: Checkpoint,
    arguments: Annotated[
        list[str],
        typer.Argument(metavar="-- ARGUMENT...", help="Of VLMEvalKit: --data NAME... --reuse ...", show_default=False),
    ],
    name: Annotated[str, typer.Option(help="Name of the model in the harness' results.")] = "hires_lmm",
    prompt: Annotated[str, typer.Option(help="harness: its own; slime: those of the SliME paper.")] = "harness",
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="max_image_tokens=600, ...; may be repeated.")
    ] = None,
    answers: Annotated[Path | None, typer.Option(help="Folder where answers are kept; goes on there.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Run a benchmark of VLMEvalKit.

    Arguments behind `--` go to VLMEvalKit's own command line. Status 1 also where it went on without what failed.
    """
    options = dict(parse_option(text, "--option", "max_image_tokens=600") for text in option or ())
    given = {"answers": answers and str(answers), "dtype": dtype.value, "device": device}
    with one_line_errors():
        from hires_lmm.evaluation.vlmeval import run_vlmeval

        options |= {**given, "trust_remote_code": trust_remote_code}
        run_vlmeval(existing(checkpoint), name, prompt, options, arguments)


def harness_tasks(
    folder: Annotated[Path, typer.Argument(help="Folder to write to, made if missing.", show_default=False)],
) -> None:
    """Write tasks for lmms-eval with the papers' prompts.

    `lmms-eval --include_path FOLDER --tasks NAME` finds them.
    """
    with quiet_work():
        from hires_lmm.evaluation.harness_tasks import write_tasks

        for variant in write_tasks(folder):
            output.print(f"{variant.name}: {escape(variant.why)}")
