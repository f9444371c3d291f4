"""A page for trying a model: image or clip, question and budget in; answer and picture of the kept tokens out."""

from collections.abc import Iterator
from typing import Any

from PIL import Image

from .extras import import_extra
from .inference import AnswerStream, describe_unknown, prepare
from .visualize import count_kept, draw_token_map


MOST_CROPS = 36
MOST_FRAMES = 128
HIGHEST_BUDGET = 4096
MAX_NEW_TOKENS = 256
PICTURE_WIDTH = 1400

Shown = tuple[str, Image.Image | None, str]


def answer_question(
    model: Any,
    processor: Any,
    image: Image.Image | None,
    question: str,
    budget: int,
    max_crops: int,
    length: int,
    clip: str | None = None,
    num_frames: int = 0,
) -> Iterator[Shown]:
    """Answer a question about an image or the file of a clip, then draw what was kept: (answer so far, picture,
    account of tokens), the last with all three. A budget, `max_crops` or `num_frames` of 0 means none."""
    if image is None and clip is None:
        raise ValueError("There is no image yet; drop one, or a clip, into the field on the left.")
    if image is not None and clip is not None:
        raise ValueError("There are an image and a clip; take one of them away.")
    if not question.strip():
        raise ValueError("There is no question yet; write one below the image.")
    limits = {"max_crops": int(max_crops), "max_image_tokens": int(budget), "num_frames": int(num_frames)}
    options: dict[str, Any] = {name: value for name, value in limits.items() if value}
    prepared = prepare(processor, [image] if clip is None else [], question, [] if clip is None else [clip], **options)
    note = describe_unknown(prepared.unknown_words)
    answer = ""
    pieces = AnswerStream(model, processor, prepared, int(length))
    for piece in pieces:
        answer += piece
        yield answer, None, note
    kept, total = count_kept(pieces.token_map)
    shown = prepared.images[0]
    height, width = shown.size[::-1] if clip is None else shown.size
    frames = "" if clip is None else f"{len(shown)} frames of "
    account = f"{frames}{width} x {height} pixels, {kept} of {total} visual tokens kept. {note}"
    picture = draw_token_map(shown, pieces.token_map, title=question, width=PICTURE_WIDTH)
    yield answer, picture, account.strip()


def build_page(model: Any, processor: Any, name: str, note: str | None = None) -> Any:
    """Build the page, `gradio.Blocks`, to be launched; `note` is a line below the title."""
    gradio = import_extra("gradio", "demo")

    def answer(
        image: Image.Image | None,
        question: str,
        budget: int,
        max_crops: int,
        length: int,
        clip: str | None,
        num_frames: int,
    ) -> Iterator[Shown]:
        try:
            yield from answer_question(model, processor, image, question, budget, max_crops, length, clip, num_frames)
        except ValueError as error:
            raise gradio.Error(str(error), print_exception=False) from error

    with gradio.Blocks(title="hires_lmm", analytics_enabled=False) as page:
        gradio.Markdown(f"# hires_lmm\n`{name}`" + (f"\n\n{note}" if note else ""))
        with gradio.Row():
            with gradio.Column(scale=2):
                image = gradio.Image(type="pil", label="Image", sources=["upload", "clipboard"], height=320)
                clip = gradio.Video(label="Or a clip", sources=["upload"], height=200)
                question = gradio.Textbox(label="Question", placeholder="What do you want to know?", lines=2)
                budget = gradio.Slider(
                    0, HIGHEST_BUDGET, value=0, step=1, label="Budget: visual tokens kept (0 = no budget)"
                )
                max_crops = gradio.Slider(0, MOST_CROPS, value=0, step=1, label="Most crops (0 = the checkpoint's)")
                num_frames = gradio.Slider(
                    0, MOST_FRAMES, value=0, step=1, label="Frames of a clip (0 = the checkpoint's)"
                )
                length = gradio.Slider(1, MAX_NEW_TOKENS, value=64, step=1, label="Most tokens of the answer")
                button = gradio.Button("Ask", variant="primary", elem_id="ask")
            with gradio.Column(scale=5):
                text = gradio.Textbox(label="Answer", lines=3, elem_id="answer")
                account = gradio.Textbox(label="Tokens", elem_id="account")
                picture = gradio.Image(
                    show_label=False, format="png", elem_id="picture", buttons=["download", "fullscreen"]
                )
        inputs, outputs = [image, question, budget, max_crops, length, clip, num_frames], [text, picture, account]
        for trigger in (button.click, question.submit):
            trigger(answer, inputs, outputs, api_name="answer", concurrency_limit=1)
    return page


__all__ = ["answer_question", "build_page"]
