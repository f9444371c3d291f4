"""The command line. Exit status: 0 done, 1 the work failed, 2 wrong usage.

Nothing heavy is imported before a command runs: `hires_lmm_command` loads this file without the package's `__init__`.
So imports inside commands are absolute, but for what needs no torch, which is imported from beside this file.
"""

import re
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import cli_evaluation
from .cli_convert import add_convert_commands, scale_adapter
from .cli_shared import (
    Budget,
    Checkpoint,
    Destination,
    Device,
    Dtype,
    DtypeOption,
    Fps,
    Json,
    MaxCrops,
    NumFrames,
    Question,
    SaveDtype,
    Trust,
    VideoFlag,
    escape,
    existing,
    images_kwargs,
    notes,
    one_line_errors,
    output,
    parse_option,
    progress_bar,
    quiet_work,
    split_sources,
    warn_unknown,
    write_json,
)


app = typer.Typer(
    help="High-resolution multimodal models: ask about images, count and see their tokens, convert checkpoints.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # panels cut the names of options at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert_app = typer.Typer(help="Convert to and from other formats.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(convert_app, name="convert")


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


@app.command("ask")
def _ask(
    checkpoint: Checkpoint,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE", help="Files or URLs of images and videos.", show_default=False)
    ],
    question: Question,
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    video: VideoFlag = False,
    num_frames: NumFrames = None,
    fps: Fps = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 128,
    search: Annotated[
        str | None, typer.Option(help="zoom_eye, describe_then_answer, reason_then_summarise or step_by_step.")
    ] = None,
    search_option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Option of the search; may be repeated.")
    ] = None,
    show: Annotated[Path | None, typer.Option(help="PNG of where zoom_eye looked and what it found.")] = None,
    decoding: Annotated[
        Literal["m3id", "damro"] | None, typer.Option(help="Against the same prompt that sees less.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Ask about images and videos.

    The answer streams to standard output; what was kept goes to standard error.
    """
    if search is None and (search_option or show is not None):
        raise typer.BadParameter("they need --search.", param_hint="--search-option, --show")
    if search is not None and decoding is not None:
        raise typer.BadParameter("a search asks without it; leave one of the two out.", param_hint="--decoding")
    options = dict(parse_option(text, "--search-option", "max_calls=60") for text in search_option or ())
    images, videos = split_sources(images, video)
    if search is not None and videos:
        raise typer.BadParameter("a search looks at images, not at videos.", param_hint="--search")
    limits = images_kwargs(max_crops, max_image_tokens, num_frames=num_frames, fps=fps)
    with quiet_work():
        from hires_lmm.inference import AnswerStream, load_model, load_processor, prepare
        from hires_lmm.visualize import count_kept

        processor = load_processor(existing(checkpoint), trust_remote_code)
        if search is not None:
            from hires_lmm.search.command import answer_by_search

            model = load_model(checkpoint, dtype.value, device, trust_remote_code)
            limits = {"max_new_tokens": max_new_tokens, **limits}
            record = answer_by_search(model, processor, (search, options), images, question, show, **limits)
            warn_unknown(record["unknown_words"])
            if as_json:
                write_json(record)
            else:
                sys.stdout.write(record["answer"] + "\n")
                sys.stdout.flush()
                notes.print(f"[dim]{record['calls']} questions and answers, boxes: {record['boxes'] or 'none'}[/]")
            return
        prepared = prepare(processor, images, question, videos, **limits)
        warn_unknown(prepared.unknown_words)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        pieces, answer = AnswerStream(model, processor, prepared, max_new_tokens, decoding), ""
        for piece in pieces:
            answer += piece
            if not as_json:
                sys.stdout.write(piece)
                sys.stdout.flush()
        records: list[dict[str, Any]] = []
        for index, (name, image) in enumerate(zip([*images, *videos], prepared.images, strict=True)):
            used, total = count_kept(pieces.token_map, index)
            named = {"video": name, "frames": len(image)} if index >= len(images) else {"image": name}
            height, width = image.size if index >= len(images) else image.size[::-1]
            sizes = {"height": height, "width": width, "visual_tokens": total, "kept_tokens": used}
            records.append({**named, **sizes})
        if as_json:
            said = {"question": question, "unknown_words": prepared.unknown_words, "answer": answer}
            write_json({**said, "images": records})
            return
        sys.stdout.write("\n")
        sys.stdout.flush()
        for each in records:
            size = f"{each['width']} x {each['height']} pixels (width x height)"
            size = f"{each['frames']} frames of {size}" if "video" in each else size
            kept = f"{each['kept_tokens']} of {each['visual_tokens']} visual tokens kept"
            name = each["video"] if "video" in each else each["image"]
            notes.print(f"[dim]{escape(str(name))}: {size}, {kept}[/]")


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
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of videos of these sizes.")] = None,
    as_json: Json = False,
) -> None:
    """Count views and visual tokens from image sizes, or of videos.

    Needs neither images nor weights. The last column is LLaVA-NeXT's count of the same image, settings as released.
    """
    pairs = [_parse_size(size) for size in sizes]
    with one_line_errors():
        from .accounting import PRESET_SETTINGS, account_image, build_token_table
        from .folders import check_planner, read_image_settings

        if checkpoint in PRESET_SETTINGS and not Path(checkpoint).exists():
            settings = PRESET_SETTINGS[checkpoint]
        else:
            settings = read_image_settings(existing(checkpoint, PRESET_SETTINGS))
            check_planner(checkpoint, settings["planner"] if frames is None else settings.get("video_planner"))
        options = images_kwargs(max_crops, None)
        accounts = [account_image(settings, *pair, max_image_tokens, frames, **options) for pair in pairs]
        if as_json:
            write_json([{**account.to_dict(), **options} for account in accounts])
            return
        output.print(build_token_table(accounts), crop=False, overflow="ignore")


@app.command("show")
def _show(
    checkpoint: Checkpoint,
    image: Annotated[str, typer.Argument(help="File or URL of an image or a video.", show_default=False)],
    question: Question,
    out: Annotated[Path, typer.Option(help="The picture to write, PNG.", show_default=False)],
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    video: VideoFlag = False,
    num_frames: NumFrames = None,
    fps: Fps = None,
    width: Annotated[int, typer.Option(min=600, max=10000, help="Width of the picture, pixels.")] = 1500,
    layers: Annotated[bool, typer.Option("--layers", help="Draw where tokens left, not their scores.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Draw which tokens were kept.

    The image with the grid of crops, or the frames of a video: kept tokens bright, dropped ones dim, scores as heat.
    """
    if out.suffix.lower() != ".png":
        raise typer.BadParameter(f"{out} must end in .png.", param_hint="--out")
    with quiet_work():
        if not out.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {out.parent}; create it first.")
        from hires_lmm.inference import load_model, load_processor, map_tokens, prepare
        from hires_lmm.visualize import count_kept, draw_token_map

        processor = load_processor(existing(checkpoint), trust_remote_code)
        limits = images_kwargs(max_crops, max_image_tokens, num_frames=num_frames, fps=fps)
        images, videos = split_sources([image], video)
        prepared = prepare(processor, images, question, videos, **limits)
        warn_unknown(prepared.unknown_words)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        token_map = map_tokens(model, prepared)
        draw_token_map(prepared.images[0], token_map, title=question, width=width, layers=layers).save(out)
        kept, total = count_kept(token_map)
        if as_json:
            record = {"picture": str(out), "visual_tokens": total, "kept_tokens": kept}
            write_json({**record, "unknown_words": prepared.unknown_words})
            return
        output.print(f"{escape(str(out))}: {kept} of {total} visual tokens kept")


@app.command("export")
def _export(checkpoint: Checkpoint, destination: Destination, trust_remote_code: Trust = False) -> None:
    """Write a self-contained folder.

    It holds weights, code, processor and model card, and loads where this package is not installed.
    """
    with quiet_work():
        from hires_lmm.conversion import export

        with progress_bar() as progress:
            export(existing(checkpoint), destination, progress=progress, trust_remote_code=trust_remote_code)
        output.print(f"wrote {escape(str(destination))}")


@app.command("compose")
def _compose(
    destination: Destination,
    vision: Annotated[str | None, typer.Option(help="Folder or Hub id of a vision tower, see docs/towers.md.")] = None,
    text: Annotated[str | None, typer.Option(help="Folder or Hub id of a causal language model.")] = None,
    preset: Annotated[str, typer.Option(help="How the parts between them are put together.")] = "slime",
    dtype: SaveDtype = None,
    chat_template: Annotated[str | None, typer.Option(help="llama3, vicuna, chatml, plain or a Jinja text.")] = None,
    extra_tower: Annotated[
        list[str] | None, typer.Option(metavar="NAME=SOURCE", help="A further tower, by a name of its own.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Such as connector.view_ops.0.num_queries=64."),
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
    if random and settings:
        raise typer.BadParameter("a random model is as its preset says.", param_hint="--set")
    if not all(towers.values()) or (random and towers):
        raise typer.BadParameter("write NAME=SOURCE, and no --random.", param_hint="--extra-tower")
    with quiet_work():
        from hires_lmm import PRESETS
        from hires_lmm.conversion import compose, compose_random, read_settings

        if preset not in PRESETS:
            raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}.", param_hint="--preset")
        if vision is None or text is None:
            compose_random(destination, preset, seed)
            output.print(f"wrote {escape(str(destination))}; its weights are random")
            return
        build = partial(compose, vision, text, preset, destination, dtype=dtype, chat_template=chat_template)
        with progress_bar() as progress:
            report = build(extra_towers=towers, progress=progress, **read_settings(preset, settings or []))
        output.print(f"wrote {escape(str(destination))}; its new parts are untrained")
        for choice in report["choices"]:
            notes.print(f"[bold yellow]{escape(choice)}[/]")
        _show_choices(destination)


@app.command("upcycle")
def _upcycle(
    dense: Annotated[str, typer.Argument(help="A checkpoint or a text model: folder or Hub id.", show_default=False)],
    destination: Destination,
    experts: Annotated[int, typer.Option(min=2, help="Experts of a layer.")] = 4,
    top_k: Annotated[int, typer.Option(min=1, help="Experts that a token passes.")] = 2,
    every: Annotated[int, typer.Option(min=1, help="Layers from one with experts to the next.")] = 1,
    trust_remote_code: Trust = False,
) -> None:
    """Give a dense language model experts.

    Each is a copy of its feed-forward, so answers stay the same.
    """
    with quiet_work():
        from hires_lmm.conversion import upcycle

        with progress_bar() as progress:
            options: dict[str, Any] = {
                "experts": experts,
                "top_k": top_k,
                "every": every,
                "trust_remote_code": trust_remote_code,
            }
            report = upcycle(dense, destination, progress=progress, **options)
        output.print(f"wrote {escape(str(destination))}; its language model is {report['family']}")


def _show_choices(folder: Path) -> None:
    """What a conversion chose, and what the folder lacks."""
    from hires_lmm.conversion.cards import describe_choices
    from hires_lmm.folders import check_tokenizer

    for name, choice in describe_choices(folder).items():
        notes.print(f"{name}: {escape(choice)}")
    try:
        check_tokenizer(str(folder))
    except ValueError as error:
        notes.print(f"[bold yellow]warning:[/] {escape(str(error))}")


def _convert(function: str, *arguments: str, destination: Path, **options: str | None) -> None:
    """Call a function of `hires_lmm.conversion`."""
    with quiet_work():
        import hires_lmm.conversion

        with progress_bar() as progress:
            call = getattr(hires_lmm.conversion, function)
            report = call(*arguments, destination, **options, progress=progress)
        output.print(f"wrote {escape(str(destination))}")
        if unused := report["unused"]:
            notes.print(f"not used: {escape(', '.join(unused))}")
        if report["conversion"].partition("-")[0] != "to":
            _show_choices(destination)


add_convert_commands(convert_app, _convert)
app.command("scale-adapter")(scale_adapter)


app.command("sweep")(cli_evaluation.sweep)
app.command("vlmeval")(cli_evaluation.vlmeval)
app.command("harness-tasks")(cli_evaluation.harness_tasks)


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
    with quiet_work():
        from hires_lmm.inference import load_model, load_processor
        from hires_lmm.training.objectives.painting import find_reconstruction, paint, write_png

        objective = find_reconstruction(existing(checkpoint), objectives)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        processor = load_processor(checkpoint, trust_remote_code)
        kwargs = images_kwargs(max_crops, None)
        with progress_bar() as progress:
            painted = paint(model, processor, objective, image, steps, seed, images_kwargs=kwargs, progress=progress)
        write_png(painted, out)
    notes.print(f"wrote {escape(str(out))}")


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
    with quiet_work():
        from hires_lmm.inference import load_model, load_processor
        from hires_lmm.page import build_page

        processor = load_processor(existing(checkpoint), trust_remote_code)
        model = load_model(checkpoint, dtype.value, device, trust_remote_code)
        page = build_page(model, processor, Path(checkpoint).name)
        notes.print(f"the page is at http://{host}:{port} (stop with Ctrl-C)")
        page.launch(server_name=host, server_port=port, quiet=True, show_error=True)


@app.command("serve")
def _serve(
    checkpoint: Checkpoint,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="-- OPTIONS", help="Further arguments of vLLM.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    max_image_tokens: Budget = None,
    max_crops: MaxCrops = None,
    images: Annotated[int, typer.Option(min=1, help="Most images of a request.")] = 4,
    request_options: Annotated[bool, typer.Option(help="Let requests have budgets and views of their own.")] = False,
    dtype: DtypeOption = Dtype.auto,
    trust_remote_code: Trust = False,
) -> None:
    """Serve a checkpoint with vLLM, by the OpenAI API.

    Needs the extra `vllm`. Stop with Ctrl-C.
    """
    with one_line_errors():
        from .serving.command import curl_line, run_server, server_command

        command = server_command(
            existing(checkpoint),
            host,
            port,
            max_image_tokens=max_image_tokens,
            max_crops=max_crops,
            images=images,
            dtype=dtype.value,
            request_options=request_options,
            trust_remote_code=trust_remote_code,
            more=more or (),
        )
        url = f"http://{host}:{port}"
        ready = f"the server is at {url} (stop with Ctrl-C); ask it:\n{curl_line(checkpoint, url)}"
        raise typer.Exit(run_server(command, url, lambda: notes.print(escape(ready))))


if __name__ == "__main__":
    app()
