"""Model cards: the template filled with what is known; what is not known is left out."""

import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from PIL import Image

from ..folders import read_image_settings
from ..modeling.configuration_hires_lmm import HiResLmmConfig
from ..processing.chat_templates_hires_lmm import CHAT_TEMPLATES, add_queries
from .llava_templates import RELEASED_TEMPLATES


TEMPLATE = Path(__file__).with_name("model_card_template.md")
CARD_SIZES = ((336, 336), (480, 640), (720, 1280), (1080, 1920), (2048, 2048))
"""Height and width of the images in the token table, pixels."""

CODE = re.compile(r"^```python\n.*?^```$", re.MULTILINE | re.DOTALL)
WIDGET = re.compile(r"^widget:\n *- text: [\"']?(.+?)[\"']?$", re.MULTILINE)
"""The example of a card on the Hub, in its front matter."""
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def token_table(image_processor: Any) -> list[dict[str, int]]:
    """Views, tokens and the smallest budget of images of several sizes."""
    rows = []
    for height, width in CARD_SIZES:
        (tokens,), (views,) = image_processor.count_images([(height, width)])
        smallest = image_processor.min_image_tokens(height, width)
        rows.append({"height": height, "width": width, "views": views, "tokens": tokens, "smallest": smallest})
    return rows


def unsupported(config: Any) -> list[str]:
    """What a model of this configuration cannot do, in sentences."""
    lines = []
    if any(step.traits.reads_question for step in config.fitted_chain().steps):
        lines.append("Selection by the question in servers that never show the question to the image branch.")
    lines.append("Chunked prefill and continuous batching while tokens are dropped by their content.")
    lines.append("Videos and audio.")
    return lines


def code_hash(folder: Path) -> str:
    """SHA-256 over the Python files of a checkpoint, by name."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def describe_choices(folder: Path) -> dict[str, str]:
    """Chat template, layer of the tower and numbers of the pixels that were chosen for a checkpoint, each in words."""
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    known = {text: name for name, plain in CHAT_TEMPLATES.items() for text in (plain, add_queries(plain))}
    released = RELEASED_TEMPLATES.get(text or "", "none" if text is None else "the source's own")
    named = f"`{known[text]}`" if text in known else released
    settings = read_image_settings(str(folder))
    mean, std = ([round(number, 4) for number in settings[name]] for name in ("image_mean", "image_std"))
    resample = settings.get("resample")
    filtered = "the planner's filters" if resample is None else Image.Resampling(resample).name.lower()
    return {
        "chat template": named,
        "layer of the vision tower": str(HiResLmmConfig.from_pretrained(folder).vision_feature_layer),
        "pixels": f"mean {mean}, deviation {std}, {filtered}",
    }


def carry_card(card: str, fresh: str, folder: Path) -> str:
    """A card that somebody wrote, with code and versions of a fresh one; links to absent files become text."""
    new = {section.partition("\n")[0]: section for section in _sections(fresh)}
    code = CODE.search(new["## Use"])
    sections = _sections(card)
    for index, section in enumerate(sections):
        title = section.partition("\n")[0]
        if title == "## Use" and code is not None:
            sections[index] = CODE.sub(lambda _: code[0], section, count=1)
        elif title == "## Versions":
            sections[index] = new[title]

    def linked(found: re.Match) -> str:
        target = found[2].partition("#")[0]
        leads = not target or "://" in target or (".." not in target and (folder / target).exists())
        return found[0] if leads else found[1]

    return LINK.sub(linked, "".join(sections))


def _sections(card: str) -> list[str]:
    return re.split(r"^(?=## )", card, flags=re.MULTILINE)


def write_card(
    folder: Path, config: Any, image_processor: Any, facts: dict[str, Any], earlier: Path | None = None
) -> None:
    """Write `README.md`. `facts`: `title`, `summary`, `bases` (part, name, licence), `training`, `chat`, `versions`,
    `repository`, as far as known; an earlier card is carried over, and its `widget` is the question of the example."""
    connector = config.connector_config
    card = earlier.read_text(encoding="utf-8") if earlier is not None else None
    asked = WIDGET.search(card or "")

    def listed(ops: list[dict]) -> str:
        return ", ".join(f"`{op}`" for op in ops) or "none"

    bases = [{"licence": "", **base} for base in facts.get("bases", [])]
    values = {
        "title": "A hires_lmm model",
        "summary": "A high-resolution multimodal model for transformers.",
        "training": "",
        "chat": True,
        "repository": "",
        "question": asked[1] if asked else "What is in the picture?",
        **facts,
        "bases": bases,
        "has_licences": any(base["licence"] for base in bases),
        "sizes": token_table(image_processor),
        "planner": config.planner,
        "view_ops": listed(connector.view_ops),
        "adapter": f"`{connector.adapter}`",
        "token_ops": listed(connector.token_ops),
        "layer_ops": listed(connector.layer_ops),
        "position_plan": connector.position_plan,
        "heads": connector.heads,
        "choices": describe_choices(folder),
        "unsupported": unsupported(config),
        "code_hash": code_hash(folder),
    }
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)
    text = text if card is None else carry_card(card, text, folder)
    (folder / "README.md").write_text(text, encoding="utf-8")
