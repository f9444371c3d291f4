"""Model cards: the template filled with what is known; what is not known is left out."""

import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_SIZES = ((336, 336), (480, 640), (720, 1280), (1080, 1920), (2048, 2048))
"""Height and width of the images in the token table, pixels."""


def token_table(image_processor: Any) -> list[dict[str, int]]:
    """Tokens of images of several sizes.

    Args:
        image_processor (`HiResLmmImageProcessor`): The processor of the checkpoint.

    Returns:
        Height, width, views, tokens and the smallest budget of each size.
    """
    rows = []
    for height, width in CARD_SIZES:
        (tokens,), (views,) = image_processor.count_images([(height, width)])
        smallest = _smallest_budget(image_processor, height, width, tokens)
        rows.append({"height": height, "width": width, "views": views, "tokens": tokens, "smallest": smallest})
    return rows


def _smallest_budget(image_processor: Any, height: int, width: int, tokens: int) -> int:
    """The smallest accepted `max_image_tokens`, by bisection: what is accepted is an interval up to the full count."""
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        try:
            image_processor.image_tokens(height, width, max_image_tokens=middle)
            high = middle
        except ValueError:
            low = middle + 1
    return low


def unsupported(config: Any) -> list[str]:
    """What a model of this configuration cannot do.

    Args:
        config (`HiResLmmConfig`): The configuration.

    Returns:
        Sentences.
    """
    lines = []
    if any(step.traits.reads_question for step in config.fitted_chain().steps):
        lines.append("Selection by the question in servers that never show the question to the image branch.")
    lines.append("Chunked prefill and continuous batching while tokens are dropped by their content.")
    lines.append("Videos and audio.")
    return lines


def code_hash(folder: Path) -> str:
    """SHA-256 over the Python files of a checkpoint, by name.

    Args:
        folder (`Path`): The checkpoint.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_card(folder: Path, config: Any, image_processor: Any, facts: dict[str, Any]) -> None:
    """Write `README.md`.

    Args:
        folder (`Path`): The checkpoint, with its code.
        config (`HiResLmmConfig`): Its configuration.
        image_processor (`HiResLmmImageProcessor`): Its image processor.
        facts (`dict`): `title`, `summary`, `bases` (part, name, optionally licence), `training`, `chat`, `versions`,
            `repository`; absent ones are left out of the card.
    """
    connector = config.connector_config

    def listed(ops: list[dict]) -> str:
        return ", ".join(f"`{op}`" for op in ops) or "none"

    bases = [{"licence": "", **base} for base in facts.get("bases", [])]
    values = {
        "title": "A hires_lmm model",
        "summary": "A high-resolution multimodal model for transformers.",
        "training": "",
        "chat": True,
        "repository": "path/or/repository",
        **facts,
        "bases": bases,
        "has_licences": any(base["licence"] for base in bases),
        "sizes": token_table(image_processor),
        "planner": config.planner,
        "view_ops": listed(connector.view_ops),
        "adapter": f"`{connector.adapter}`",
        "token_ops": listed(connector.token_ops),
        "unsupported": unsupported(config),
        "code_hash": code_hash(folder),
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
    (folder / "README.md").write_text(text, encoding="utf-8")
