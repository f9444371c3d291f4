"""The commands `hires-lmm convert …` and `scale-adapter`; nothing heavy is imported here."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_shared import Destination, SaveDtype, Source, escape, output, quiet_work


Tower = Annotated[str | None, typer.Option(help="Tower: folder, config file or Hub id.")]
Base = Annotated[str | None, typer.Option(help="Language model under a LoRA or stage folder.")]

RELEASED = {
    "slime": "SliME",
    "mqt": "MQT-LLaVA",
    "llava-uhd": "LLaVA-UHD v1",
    "inf-llava": "INF-LLaVA",
    "llava-mini": "LLaVA-Mini",
}
"""Formats of the LLaVA code by the name of their command, and what they are called."""


def add_convert_commands(app: typer.Typer, convert: Callable[..., Any]) -> None:
    """Add all commands; `convert` calls a function of `hires_lmm.conversion`, by its name."""
    for name, title in RELEASED.items():
        app.command(name, help=f"Convert a released {title} checkpoint.")(_released(convert, name))

    @app.command("mg-llava")
    def mg_llava(
        source: Annotated[str, typer.Argument(help="The .pth file, or its folder.", show_default=False)],
        destination: Destination,
        base: Annotated[str, typer.Option(help="Language model: folder or Hub id.", show_default=False)],
        vision_config: Annotated[
            str | None, typer.Option(help="CLIP: folder or Hub id. [default: as published]")
        ] = None,
        extra_tower: Annotated[
            str | None, typer.Option(help="ConvNeXt: folder or Hub id. [default: as published]")
        ] = None,
        chat_template: Annotated[
            str | None, typer.Option(help="llama3, vicuna, chatml, plain or a Jinja text. [default: xtuner's]")
        ] = None,
        dtype: SaveDtype = None,
    ) -> None:
        """Convert a released MG-LLaVA checkpoint."""
        options = {"base": base, "vision_config": vision_config, "extra_tower": extra_tower}
        options |= {"chat_template": chat_template, "dtype": dtype}
        convert("convert_released", "mg-llava", source, destination=destination, **options)

    @app.command("llava-next")
    def llava_next(source: Source, destination: Destination, dtype: SaveDtype = None) -> None:
        """Convert a LLaVA-NeXT checkpoint in transformers' format."""
        convert("convert_llava_next", source, destination=destination, dtype=dtype)

    @app.command("fast-vlm")
    def fast_vlm(source: Source, destination: Destination, dtype: SaveDtype = None) -> None:
        """Convert a FastVLM checkpoint in transformers' format."""
        convert("convert_fast_vlm", source, destination=destination, dtype=dtype)

    @app.command("fusion")
    def fusion(source: Source, destination: Destination, dtype: SaveDtype = None) -> None:
        """Convert a released checkpoint of the token-scaling paper."""
        convert("convert_fusion", source, destination=destination, dtype=dtype)

    for name, title in {**RELEASED, "mg-llava": "MG-LLaVA"}.items():
        app.command(f"to-{name}", help=f"Convert a checkpoint back to {title}'s released format.")(
            _back(convert, name)
        )


def _released(convert: Callable[..., Any], name: str) -> Callable[..., None]:
    """The command of a format of the LLaVA code."""

    def command(
        source: Source,
        destination: Destination,
        vision_config: Tower = None,
        base: Base = None,
        dtype: SaveDtype = None,
    ) -> None:
        options = {"vision_config": vision_config, "base": base, "dtype": dtype}
        convert("convert_released", name, source, destination=destination, **options)

    return command


def _back(convert: Callable[..., Any], name: str) -> Callable[..., None]:
    """The command of the way back to a format."""

    def command(source: Source, destination: Destination) -> None:
        convert("convert_to_released", name, source, destination=destination)

    return command


def scale_adapter(
    adapter: Annotated[Path, typer.Argument(help="Folder of a saved LoRA adapter.", show_default=False)],
    destination: Destination,
    factor: Annotated[float, typer.Option(min=0, help="0: the base model; PLLaVA: 0.125.", show_default=False)],
) -> None:
    """Weigh what LoRA learnt after training.

    Writes the adapter with another alpha, so that its model is W_base + FACTOR x what LoRA added.
    """
    with quiet_work():
        from hires_lmm.training.lora import scale_adapter

        scale_adapter(adapter, factor, destination)
        output.print(f"wrote {escape(str(destination))}")
