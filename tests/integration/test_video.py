"""Videos through whole models: counts, batches that mix them with images and text, chats, saving, commands, page."""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from builders import random_image, tiny_config, tiny_model, tiny_processor
from builders.clips import counting_frames, write_clip
from hires_lmm.cli import app
from hires_lmm.inference import AnswerStream, map_tokens, prepare
from hires_lmm.page import answer_question
from hires_lmm.processing.chat_templates_hires_lmm import CHAT_TEMPLATES
from hires_lmm.training import HiResLmmCollator
from hires_lmm.visualize import draw_token_map


LAYOUT = {
    "order": ["global", "crops", "frames"],
    "separators": {
        "newline": {"place": "token_row_end", "on": "crops"},
        "comma": {"place": "between_frames", "value": [7, 8]},
    },
}
PLANNERS = {
    "frames": {"name": "frames"},
    "overview": {"name": "frames", "grid": [3, 4], "overview": True},
    "repeated": {"name": "frames", "min_frames": 5, "global_view": "pad", "unpad": True},
    "thumbnail": {"name": "thumbnail", "collage": 3},
}
FRAMES = counting_frames(12)
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8))


@functools.cache
def build(chat_template: str = "chatml"):
    """Model and processor that have a place for frames; shared, do not change them."""
    config = tiny_config("llava_next", connector_config={"layout": LAYOUT})
    return tiny_model(config), tiny_processor(config, chat_template)


def placeholders(batch) -> list[int]:
    """Lengths of the runs of image tokens, which marks part in these texts."""
    token, runs = build()[1].image_token_id, []
    for row in batch["input_ids"].tolist():
        for before, here in zip([None, *row[:-1]], row, strict=True):
            if here == token:
                runs = [*runs, 1] if before != token else [*runs[:-1], runs[-1] + 1]
    return runs


# ---- counts


@settings(max_examples=200, deadline=None)
@given(
    frames=st.integers(1, 12),
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    planner=st.sampled_from(sorted(PLANNERS)),
    num_frames=st.none() | st.integers(3, 9),
    share=st.none() | st.floats(0, 1),
)
def test_counts_from_sizes_are_the_placeholders(frames, size, planner, num_frames, share):
    processor = build()[1]
    frames = max(frames, 3) if planner == "thumbnail" else frames
    options = {"video_planner": PLANNERS[planner], "num_frames": num_frames}
    full = processor.video_tokens(frames, *size, **options)
    least = processor.min_video_tokens(frames, *size, **options)
    if share is not None:
        options["max_image_tokens"] = round(least + share * (full - least))
    count = processor.video_tokens(frames, *size, **options)
    assert count == (full if share is None else options["max_image_tokens"])
    video = np.zeros((frames, *size, 3), np.uint8)
    options["input_data_format"] = "channels_last"
    batch = processor(text="<video> what", videos=video, return_tensors="pt", **options)
    assert placeholders(batch) == [count]
    assert batch["view_positions"][0, 5] == count
    tokens = processor._get_num_multimodal_tokens(video_sizes=[(frames, *size)], **options)
    assert tokens["num_video_tokens"] == [count] and tokens["num_image_tokens"] is None
    assert len(batch["pixel_values"]) == len(processor.image_processor.plan_video(frames, *size, **options).views)


def test_a_budget_below_the_smallest_names_it():
    processor = build()[1]
    least = processor.min_video_tokens(4, 30, 40)  # three separators of two tokens, and one
    assert least == 7
    with pytest.raises(ValueError, match=f"the smallest value for this image is {least}, its full count is 70"):
        processor(text="<video>", videos=FRAMES[:4], max_image_tokens=6)


# ---- batches


def test_a_mixed_batch_equals_its_samples_alone():
    model, processor = build()
    texts = ["<image> a <video> b <video>", "only text", "<video> c <image>"]
    images, videos = [IMAGE, IMAGE.rotate(90)], [FRAMES[:3], list(FRAMES[3:8]), FRAMES[8:]]
    budgets = [40, 30, 25, 20, 35]  # in the order of images and videos
    batch = processor(
        text=texts, images=images, videos=videos, max_image_tokens=budgets, padding=True, return_tensors="pt"
    )
    assert placeholders(batch) == budgets
    own = [
        {"images": images[0], "videos": videos[:2], "max_image_tokens": budgets[:3]},
        {},
        {"images": images[1], "videos": videos[2:], "max_image_tokens": budgets[3:]},
    ]
    rows = [processor(text=text, **each, return_tensors="pt") for text, each in zip(texts, own, strict=True)]
    for name in ("pixel_values", "view_positions", "view_boxes", "view_spans"):
        torch.testing.assert_close(batch[name], torch.cat([row[name] for row in rows if name in row]))
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        alone = torch.cat([model(**row).logits[:, -1] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    nested = processor(
        text=texts,
        images=[[images[0]], [], [images[1]]],
        videos=[videos[:2], None, videos[2:]],
        max_image_tokens=[budgets[:3], [], budgets[3:]],
        padding=True,
        return_tensors="pt",
        image_layout="flat",
    )
    assert all(torch.equal(nested[name], batch[name]) for name in batch)


def test_time_is_seen():
    """The same frames in another order are another video."""
    model, processor = build()
    with torch.no_grad():
        logits = [
            model(**processor(text="<video> what", videos=video, return_tensors="pt")).logits[0, -1]
            for video in (FRAMES, FRAMES[::-1].copy())
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-2


def test_dense_rows_hold_what_the_flat_ones_hold():
    model, processor = build()
    given = {"text": ["<video> a", "b <image>"], "images": [[], [IMAGE]], "videos": [[FRAMES[:3]], []]}
    options = {"padding": True, "return_tensors": "pt"}
    flat, dense = (processor(**given, **options, image_layout=layout) for layout in ("flat", "dense"))
    assert dense["pixel_values"].shape[:2] == (2, max(3, len(flat["pixel_values"]) - 3))
    with torch.no_grad():
        torch.testing.assert_close(model(**dense).logits, model(**flat).logits)


def test_token_types_and_text_masks_know_a_video():
    processor = build()[1]
    batch = processor(text="a <video> b", videos=FRAMES[:2], return_mm_token_type_ids=True)
    ids, kinds = batch["input_ids"][0], batch["mm_token_type_ids"][0]
    assert [bool(kind) for kind in kinds] == [token == processor.image_token_id for token in ids]
    chat = [
        {"role": "user", "content": [{"type": "video", "video": FRAMES[:2]}, {"type": "text", "text": "a <video>?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    ]
    encoded = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = encoded["input_ids"][0][encoded["assistant_masks"][0].bool()]
    assert processor.tokenizer.decode(said).startswith("red")
    assert "a <video>?" in processor.tokenizer.decode(encoded["input_ids"][0])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "no mark", "videos": FRAMES}, "has 0 <video> placeholders, but 1 videos were passed"),
        ({"text": ["<video>", "<video>"], "videos": [FRAMES]}, "has 2 <video> placeholders, but 1 videos"),
        ({"text": ["<video>", "x"], "videos": [[], [FRAMES]]}, "Sample 0 has 1 <video> placeholders, but 0 videos"),
        (
            {"text": ["<image> <video>", "x"], "images": [[], [IMAGE]], "videos": [[FRAMES], []]},
            "Sample 0 has 1 <image> placeholders, but 0 images",
        ),
    ],
    ids=["no mark", "one too few", "another sample", "another sample's image"],
)
def test_numbers_that_do_not_match_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        build()[1](**given)


def test_without_videos_the_mark_is_text():
    processor = build()[1]
    text = "the tag <video> of HTML"
    assert processor.tokenizer.decode(processor(text=text)["input_ids"][0], skip_special_tokens=True) == text


# ---- chats


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_video_part_stands_where_an_image_part_would(name):
    processor = build(name)[1]

    def chat(kind):
        content = [{"type": kind, kind: "x"}, {"type": "text", "text": "what is red"}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    assert "<video>" in chat("video")
    assert chat("video").replace("<video>", "<image>") == chat("image")


def test_a_chat_gives_what_the_call_gives():
    processor = build()[1]
    content = [
        {"type": "video", "video": list(FRAMES)},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": "what is red"},
    ]
    options = {"num_frames": 4, "max_image_tokens": 30}
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    chat = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )
    options |= {"add_special_tokens": False, "return_tensors": "pt"}
    called = processor(text=text, images=IMAGE, videos=FRAMES, **options)
    assert set(chat) == set(called) and all(torch.equal(chat[name], called[name]) for name in called)


def test_frames_are_sampled_by_num_frames_alone():
    processor = build()[1]
    call = {"text": "<video> what is red", "videos": FRAMES, "num_frames": 4, "return_tensors": "pt"}
    said = processor(**call, do_sample_frames=True)
    assert torch.equal(said["pixel_values"], processor(**call)["pixel_values"])
    with pytest.raises(ValueError, match=r"Unknown options \['do_sample_frames'\]"):
        processor(**call, do_sample_frames=False)


# ---- saving, commands, the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint whose processor samples videos, and a clip beside it."""
    model, processor = build()
    path = tmp_path_factory.mktemp("video") / "model"
    model.save_pretrained(path)
    processor.save_pretrained(path)
    saved = json.loads((path / "processor_config.json").read_text())
    saved["image_processor"].update(num_frames=5, frame_sampling="linspace", video_planner=PLANNERS["overview"])
    (path / "processor_config.json").write_text(json.dumps(saved))
    return path


@pytest.fixture(scope="module")
def clip(folder):
    pytest.importorskip("av")
    return write_clip(folder.parent / "clip.mp4", counting_frames(12, 64, 96))


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_saved_processor_reads_videos_alike(folder, tmp_path):
    from hires_lmm.inference import load_processor

    first = load_processor(str(folder))
    first.save_pretrained(tmp_path)
    build()[0].config.save_pretrained(tmp_path)
    wanted = build()[1](
        text="<video>",
        videos=FRAMES,
        num_frames=5,
        frame_sampling="linspace",
        video_planner=PLANNERS["overview"],
        return_tensors="pt",
    )
    for processor in (first, load_processor(str(tmp_path))):
        found = processor(text="<video>", videos=FRAMES, return_tensors="pt")
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ask_takes_a_clip_by_its_ending_or_by_the_flag(folder, clip, tmp_path):
    nameless = shutil.copy(clip, tmp_path / "clip")
    words = ["-q", "what is red", "--max-new-tokens", 2, "--max-image-tokens", 40]
    for arguments in ((clip,), (nameless, "--video")):
        result = run("ask", folder, *arguments, *words)
        assert result.exit_code == 0, result.output
        assert "5 frames of 96 x 64 pixels (width x height), 40 of " in result.stderr
    asked = run("ask", folder, clip, *words, "--num-frames", 3, "--json")
    record = json.loads(asked.stdout)["images"][0]
    assert (record["frames"], record["height"], record["width"]) == (3, 64, 96) and record["video"] == str(clip)
    asked = run("ask", folder, clip, *words, "--fps", 2.5, "--json")
    assert json.loads(asked.stdout)["images"][0]["frames"] == 3  # of 1.2 seconds
    assert run("ask", folder, nameless, *words).exit_code == 1
    assert run("ask", folder, clip, *words, "--search", "zoom_eye").exit_code == 2


def test_tokens_are_counted_of_frames(folder):
    found = run("tokens", folder, "64x96", "--frames", 12, "--max-image-tokens", 50, "--json")
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)[0]
    processor = build()[1]
    wanted = processor.video_tokens(12, 64, 96, num_frames=5, video_planner=PLANNERS["overview"])
    assert (record["frames"], record["visual_tokens"], record["kept_tokens"]) == (12, wanted, 50)
    assert record["views"] == 6 and "llava_next" not in record
    table = run("tokens", folder, "64x96", "--frames", 12)
    assert "frames" in table.stdout and "LLaVA-NeXT" not in table.stdout
    assert "places no frames" in run("tokens", "slime", "64x96", "--frames", 12).stderr


def test_show_draws_a_strip_of_frames(folder, clip, tmp_path):
    out = tmp_path / "kept.png"
    result = run("show", folder, clip, "-q", "what is red", "--out", out, "--max-image-tokens", 40, "--width", 800)
    assert result.exit_code == 0, result.output
    assert Image.open(out).width == pytest.approx(800, abs=4)


def test_a_strip_shows_what_was_kept_in_each_frame():
    """Frames of one colour: the share of bright pixels of a panel is that of its kept tokens."""
    model, processor = build()
    frames = [Image.new("RGB", (56, 56), color) for color in ((230, 140, 40), (40, 120, 230))]
    prepared = prepare(processor, [], "what", [frames], max_image_tokens=20)
    token_map = map_tokens(model, prepared)
    picture = np.asarray(draw_token_map(frames, token_map, width=800), dtype=int)
    for view, color in enumerate(((230, 140, 40), (40, 120, 230))):
        kept = int(token_map.kept[token_map.view == view].sum())
        bright = int((np.abs(picture - color).max(axis=-1) <= 12).sum())
        side = (800 - 64 - 28) // 2
        assert bright == pytest.approx(kept / 16 * side**2, abs=0.09 * side**2)


def test_the_page_takes_a_clip(clip):
    model, processor = build()
    *_, (_, picture, account) = answer_question(model, processor, None, "what is red", 40, 0, 2, str(clip), 4)
    assert picture.width > 600 and account.startswith("4 frames of 96 x 64 pixels, 40 of 70 visual tokens kept")
    with pytest.raises(ValueError, match="an image and a clip; take one of them away"):
        list(answer_question(model, processor, IMAGE, "x", 0, 0, 2, str(clip)))


def test_an_answer_about_an_image_and_a_video_streams():
    model, processor = build()
    prepared = prepare(processor, [IMAGE], "what is red", [FRAMES], num_frames=3)
    pieces = AnswerStream(model, processor, prepared, 2)
    list(pieces)
    assert len(prepared.images[1]) == 3 and pieces.token_map.image.unique().tolist() == [0, 1]


IMAGES_ONLY = (
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def test_a_template_that_knows_images_alone_takes_videos():
    processor = build()[1]
    parts = [
        {"type": "video", "video": FRAMES[:3]},
        {"type": "image", "image": IMAGE},
        {"type": "text", "text": "a <video>"},
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    chat = processor.apply_chat_template([{"role": "user", "content": parts}], chat_template=IMAGES_ONLY, **options)
    called = processor(text="<video>\n<image>\na", videos=FRAMES[:3], images=IMAGE, return_tensors="pt")
    assert torch.equal(chat["view_positions"], called["view_positions"])
    assert placeholders(chat) == placeholders(called)
    assert processor.tokenizer.decode(chat["input_ids"][0]).endswith("a <video>")


def test_a_video_part_without_a_video_is_refused():
    chat = [{"role": "user", "content": [{"type": "video", "video": None}, {"type": "text", "text": "What?"}]}]
    processor = build()[1]
    with pytest.raises(ValueError, match="holds no video"):
        processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert "<video>" in processor.apply_chat_template(chat)


def test_rows_of_training_hold_videos_in_a_column(tmp_path):
    processor = build()[1]
    frames = [random_image(60, 80, seed) for seed in range(3)]
    row = {"messages": [{"role": "user", "content": "<video>\nwhat ?"}, {"role": "assistant", "content": "3"}]}
    given = HiResLmmCollator(processor)([{**row, "videos": [frames]}])
    part = {"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "\nwhat ?"}]}
    wanted = HiResLmmCollator(processor)([{"messages": [part, row["messages"][1]]}])
    assert torch.equal(given["input_ids"], wanted["input_ids"])
    assert torch.equal(given["pixel_values"], wanted["pixel_values"])
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for frame, file in zip(frames, files, strict=True):
        frame.save(file)
    assert torch.equal(
        HiResLmmCollator(processor)([{**row, "videos": [files]}])["pixel_values"], given["pixel_values"]
    )
