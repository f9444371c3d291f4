"""What both harnesses share: options, batches, images encoded once, kept answers, tasks; no harness is needed."""

import json
import shutil
from functools import partial
from importlib.util import find_spec
from itertools import takewhile

import pytest
from PIL import Image
from typer.testing import CliRunner

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from builders.training import COMPRESS
from hires_lmm.cli import app
from hires_lmm.evaluation.batching import Prompt, plan_batches
from hires_lmm.evaluation.harness import HarnessAsker, HarnessOptions, generation_options
from hires_lmm.evaluation.harness_tasks import VARIANTS, write_tasks
from hires_lmm.evaluation.store import AnswerStore, HarnessAnswer
from hires_lmm.evaluation.task_prompts import ask_choices, ask_word, math_vision, mmbench_cn
from hires_lmm.inference import load_model, load_processor, prepare
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


NEW_TOKENS = 6
OPTIONS = generation_options({}, NEW_TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A tiny SliME checkpoint whose router keeps by a threshold; many ids end its answers."""
    router = {"part": "router", "on": "crops", "score": "cosine", "keep": {"rule": "threshold"}, "noise": 0.0}
    config = tiny_config(
        "slime",
        connector_config={
            "view_ops": [COMPRESS],
            "token_ops": [router],
            "layout": {"order": ["global", "crops", "frames"]},
        },
        planner={"name": "slime", "max_crops": 4},
    )
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    model = tiny_model(config)
    model.generation_config.eos_token_id = list(range(0, config.text_config.vocab_size, 23))
    folder = tmp_path_factory.mktemp("harness")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


PICTURES = [random_image(60 + 20 * number, 100, number) for number in range(4)]
WORDS = ("What is it?", "Which boat is near the shore of the lake?", "Where?")


def ask(pictures, text, before="") -> list[dict]:
    content = [{"type": "text", "text": before}] * bool(before)
    content += [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def questions() -> list:
    """Three questions on each of four images, one without an image and one on two."""
    asked = [partial(ask, [picture], text) for text in WORDS for picture in PICTURES]
    return [*asked, partial(ask, [], "What is a boat?"), partial(ask, PICTURES[:2], "Which is a boat?", "Look")]


def answers(checkpoint, batch_size=1, **options) -> list[str]:
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", **options))
    return [each.text for each in asker.answer(questions(), [OPTIONS] * len(questions()), batch_size)]


@pytest.fixture(scope="module")
def alone(checkpoint) -> list[str]:
    """One question at a time through the processor and `generate`."""
    model, processor = load_model(checkpoint, device="cpu"), load_processor(checkpoint)
    ends, found = set(model.generation_config.eos_token_id), []
    for question in questions()[:12]:
        image, text = question()[0]["content"]
        inputs = prepare(processor, [image["image"]], text["text"]).inputs
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        found.append(processor.decode(list(takewhile(lambda one: one not in ends, new)), skip_special_tokens=True))
    return found


@pytest.mark.parametrize("options", [{}, {"batch_size": 3}, {"batch_size": 5, "share_images": False}])
def test_answers_are_those_of_one_question_at_a_time(checkpoint, alone, options):
    found = answers(checkpoint, **options)
    assert found[:12] == alone
    assert len(set(alone)) > 5
    assert found[12:] == answers(checkpoint)[12:]


def test_limits_of_images_reach_the_model(checkpoint, alone):
    small = answers(checkpoint, max_image_tokens=18)
    assert small[:12] != alone
    assert answers(checkpoint, views="global")[:12] != alone
    assert answers(checkpoint, gamma=0.1)[:12] != alone


def test_a_system_turn_is_read(checkpoint, alone):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", system_prompt="Say boat."))
    prompt, _ = asker.read(questions()[0](), OPTIONS)
    assert "Say boat." in prompt.text.split("What is it?")[0]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_no_image_passes_the_tower_twice(checkpoint, batch_size):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu"))
    views = []
    asker.model.model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: views.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    texts = [f"{text} {number}" for number in range(2) for text in WORDS]
    many = [partial(ask, [picture], text) for text in texts for picture in PICTURES]
    asker.answer(many, [OPTIONS] * 24, batch_size)
    plans = [asker.processor.image_processor.plan(picture.height, picture.width) for picture in PICTURES]
    assert sum(views) == sum(len(plan.views) for plan in plans)
    assert asker.counts["encoded_images"] == 4
    assert 0 <= asker.counts["model_calls"] - 24 / batch_size < 2  # a chunk ends with a smaller batch


def test_equal_questions_are_asked_once_and_equal_pixels_are_one_image(checkpoint):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu"))
    copies = [partial(ask, [PICTURES[0].copy()], WORDS[0]) for _ in range(3)]
    found = asker.answer([*copies, partial(ask, [PICTURES[0].copy()], WORDS[1])], [OPTIONS] * 4, 2)
    assert found[0] == found[1] == found[2] != found[3]
    assert asker.counts["encoded_images"] == 1 and asker.counts["model_calls"] == 1


def test_remembered_images_are_not_encoded_again(checkpoint):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", cached_images=3))
    for picture in [*PICTURES[:3], *PICTURES[:3], PICTURES[3], PICTURES[0], PICTURES[3]]:
        asker.answer([partial(ask, [picture], f"Where {asker.counts['model_calls']}?")], [OPTIONS])
    assert asker.counts["encoded_images"] == 5  # the fourth took the place of the first


# --- kept answers


def test_a_run_that_stopped_goes_on(checkpoint, tmp_path, monkeypatch):
    folder = str(tmp_path / "answers")
    whole = answers(checkpoint, 2)
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", answers=folder))

    def stop(done: int) -> None:
        if asker.counts["model_calls"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asker.answer(questions(), [OPTIONS] * 14, 2, stop)
    (file,) = (tmp_path / "answers").iterdir()
    file.write_bytes(file.read_bytes()[:-5])  # a line that was being written
    again = HarnessAsker(checkpoint, HarnessOptions(device="cpu", answers=folder), rank=1)
    assert [each.text for each in again.answer(questions(), [OPTIONS] * 14, 2)] == whole
    assert again.counts["known_answers"] == 5
    last = HarnessAsker(checkpoint, HarnessOptions(device="cpu", answers=folder, share_images=False))
    assert [each.text for each in last.answer(questions(), [OPTIONS] * 14, 4)] == whole
    assert last.counts == {"known_answers": 14}


def test_answers_of_other_weights_options_and_prompts_are_not_taken(checkpoint, tmp_path):
    asked = [partial(ask, [PICTURES[0]], WORDS[0])]

    def known(options=OPTIONS, questions=asked, **changes) -> int:
        asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", answers=str(tmp_path), **changes))
        asker.answer(questions, [options])
        return asker.counts["known_answers"]

    assert [known(), known()] == [0, 1]
    for changes in ({"max_image_tokens": 18}, {"max_crops": 1}, {"views": "global"}, {"dtype": "bfloat16"}):
        assert known(**changes) == 0
    assert known(system_prompt="Say boat.") == 0
    assert known(generation_options({}, 2)) == 0
    assert known(questions=[partial(ask, [PICTURES[1]], WORDS[0])]) == 0
    assert known(questions=[partial(ask, [PICTURES[0]], WORDS[1])]) == 0
    assert known() == 1


def test_answers_of_other_settings_of_the_image_processor_are_not_taken(checkpoint, tmp_path):
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    file = copied / "processor_config.json"
    options = HarnessOptions(device="cpu", answers=str(tmp_path / "answers"))
    asked = [partial(ask, [PICTURES[0]], WORDS[0])]
    counts = []
    for text in (file.read_text(), file.read_text().replace('"max_crops": 4', '"max_crops": 2')):
        file.write_text(text)
        asker = HarnessAsker(str(copied), options)
        asker.answer(asked, [OPTIONS])
        counts.append((asker.processor.image_processor.max_crops, asker.counts["known_answers"]))
    assert counts == [(4, 0), (2, 0)]


def test_an_answer_may_hold_any_character(tmp_path):
    said = [HarnessAnswer("a", "one\u2028two\x85three\nfour", 3), HarnessAnswer("b", "", 0)]
    AnswerStore(tmp_path / "answers.jsonl", {}, HarnessAnswer).append(said)
    assert AnswerStore(tmp_path / "answers.jsonl", {}, HarnessAnswer).begin() == said


# --- batches


def prompts(*specs) -> list[Prompt]:
    return [Prompt(f"text {n}", tuple(images), tokens, options) for n, (images, tokens, options) in enumerate(specs)]


def test_the_longest_are_asked_first_and_options_do_not_mix():
    asked = prompts(("a", 5, "x"), ("b", 9, "x"), ("c", 7, "y"), ("d", 8, "x"))
    assert plan_batches(asked, 2, share_images=False) == [[[1, 3]], [[0]], [[2]]]


def test_questions_of_one_image_stay_in_one_chunk():
    asked = prompts(("a", 9, ""), ("b", 8, ""), ("a", 2, ""), ("c", 7, ""), ("cb", 3, ""), ("", 6, ""))
    assert plan_batches(asked, 1, share_images=True) == [[[0], [2], [1], [3], [4]], [[5]]]
    assert plan_batches(asked[1:], 2, share_images=True) == [[[0, 2], [3, 4], [1]]]
    assert plan_batches(asked, 1, share_images=False) == [[[0]], [[1]], [[3]], [[5]], [[4]], [[2]]]


def test_questions_that_hang_together_by_very_many_images_are_parted():
    chain = prompts(*(((f"i{n}", f"i{n + 1}"), 5, "") for n in range(100)))
    chunks = plan_batches(chain, 2, share_images=True)
    assert sorted(index for chunk in chunks for batch in chunk for index in batch) == list(range(100))
    assert (
        max(len({image for batch in chunk for index in batch for image in chain[index].images}) for chunk in chunks)
        < 8
    )


def test_the_count_of_a_prompt_is_exact(checkpoint):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu"))
    for question in questions()[:12]:
        image, text = question()[0]["content"]
        inputs = prepare(asker.processor, [image["image"]], text["text"]).inputs
        assert asker.read(question(), OPTIONS)[0].num_tokens == inputs["input_ids"].shape[1]


# --- options


@pytest.mark.parametrize(
    "given, words",
    [
        ({"max_tokens": 3}, "no option 'max_tokens'; its options are revision, dtype"),
        ({"max_image_tokens": 0}, "max_image_tokens=0 must be at least 1"),
        ({"max_image_tokens": 2.5}, "max_image_tokens=2.5 is of type float; it must be of type int"),
        ({"max_crops": True}, "max_crops=True is of type bool"),
        ({"share_images": "yes"}, "share_images='yes' is of type str; it must be of type bool"),
        ({"views": "none"}, "views='none' is unknown; choose one of all, global, crops"),
        ({"gamma": 0}, r"gamma=0 must lie in \(0, 1\]"),
        ({"gamma": 2}, r"gamma=2 must lie in \(0, 1\]"),
        ({"gamma": 0.5, "max_image_tokens": 9}, "exclude each other"),
    ],
)
def test_wrong_options_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        HarnessOptions.read(given)


def test_none_leaves_an_option_out():
    assert HarnessOptions.read({"views": None, "dtype": None, "gamma": 1}) == HarnessOptions(gamma=1)
    assert HarnessOptions.read({"revision": 12}) == HarnessOptions(revision="12")


def test_a_device_and_a_map_of_devices_exclude_each_other(checkpoint):
    with pytest.raises(ValueError, match="device='cpu' and device_map='auto' exclude each other"):
        HarnessAsker(checkpoint, HarnessOptions(device="cpu", device_map="auto"))


def test_loading_options_are_used(checkpoint):
    asker = HarnessAsker(checkpoint, HarnessOptions(device_map="cpu", attn_implementation="eager", dtype="bfloat16"))
    assert asker.model.config.text_config._attn_implementation == "eager"
    assert str(asker.model.dtype) == "torch.bfloat16"
    assert asker.answer([questions()[0]], [OPTIONS])[0].num_tokens <= NEW_TOKENS


def test_a_threshold_that_nothing_reads_is_refused_before_a_question(tmp_path):
    config = tiny_config("llava_next")
    tiny_processor(config, "chatml").save_pretrained(tmp_path)
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"gamma=0.5, but no part of this checkpoint keeps tokens by a threshold"):
        HarnessAsker(str(tmp_path), HarnessOptions(device="cpu", gamma=0.5))


CLIPS = [[random_image(50, 70, 10 * clip + number) for number in range(6 + clip)] for clip in range(3)]


def ask_video(video, text, picture=None) -> list[dict]:
    content = [{"type": "image", "image": picture}] * (picture is not None)
    content += [{"type": "video", "video": video}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def video_questions() -> list:
    """Three questions on each of three videos, the last one beside an image, and one on an image alone."""
    asked = [partial(ask_video, clip, text) for text in WORDS[:2] for clip in CLIPS]
    return [*asked, *(partial(ask_video, list(clip), WORDS[2], PICTURES[0]) for clip in CLIPS), questions()[0]]


@pytest.mark.parametrize("batch_size, share_images", [(1, True), (4, True), (4, False)])
def test_videos_are_answered_as_one_at_a_time_and_encoded_once(checkpoint, batch_size, share_images):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", num_frames=4, share_images=share_images))
    ends, alone = set(asker.model.generation_config.eos_token_id), []
    for question in video_questions():
        inputs = asker.processor.apply_chat_template(
            [question()],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"images_kwargs": {"num_frames": 4}},
        )
        output = asker.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        alone.append(
            asker.processor.decode(list(takewhile(lambda one: one not in ends, new)), skip_special_tokens=True)
        )
    found = asker.answer(video_questions(), [OPTIONS] * 10, batch_size)
    assert [each.text for each in found] == alone
    assert len(set(alone)) > 4
    assert asker.counts["encoded_images"] == (4 if share_images else 13)


def test_frames_of_a_video_are_an_option_that_its_tokens_and_answers_follow(checkpoint, tmp_path):
    lengths, files = [], set()
    for options in ({"num_frames": 2}, {"num_frames": 5}, {}):
        asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", answers=str(tmp_path), **options))
        prompt, _ = asker.read(ask_video(CLIPS[0], "What?"), OPTIONS)
        lengths.append(prompt.num_tokens)
        files.add(asker.store.file.name)
    a_frame = (lengths[1] - lengths[0]) / 3
    assert a_frame > 1 and lengths[2] == lengths[1] + a_frame
    assert len(files) == 3
    with pytest.raises(ValueError, match=r"num_frames=2 and fps=1\.0 exclude each other"):
        HarnessOptions(num_frames=2, fps=1.0)
    with pytest.raises(ValueError, match="frame_sampling='all' is unknown"):
        HarnessOptions(frame_sampling="all")


def test_a_video_that_was_changed_is_another_one(checkpoint, tmp_path):
    pytest.importorskip("av")
    from needle.demo_clips import FOLDER

    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu", num_frames=2))
    first, second = (FOLDER / f"needle_clip_{kind}.mp4" for kind in ("way", "total"))
    file = tmp_path / "clip.mp4"
    names = []
    for source in (first, first, second):
        shutil.copy(source, file)
        names += asker.read(ask_video(str(file), "What?"), OPTIONS)[0].images
    assert names[0] == names[1] != names[2]


def test_what_is_no_image_and_no_text_is_an_error(checkpoint):
    asker = HarnessAsker(checkpoint, HarnessOptions(device="cpu"))
    for part, words in (
        ({"type": "audio", "audio": "song.wav"}, "holds a audio, but this model reads images, videos and text"),
        ({"type": "video", "video": "film.mp4"}, "'film.mp4' is no existing file"),
    ):
        with pytest.raises(ValueError, match=words):
            asker.answer([lambda part=part: [{"role": "user", "content": [part]}]], [OPTIONS])
    with pytest.raises(ValueError, match="Image 0"):
        asker.answer([partial(ask, ["no such file.png"], "What?")], [OPTIONS])
    assert asker.known == {}


def test_generation_is_greedy_unless_it_samples_at_a_temperature():
    greedy = {"max_new_tokens": 16, "num_beams": 1, "do_sample": False}
    task = {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False}
    assert generation_options({**task, "until": ["\n\n"], "image_aspect_ratio": "pad"}) == greedy
    assert generation_options({**task, "temperature": 0.2}) == greedy  # as transformers reads do_sample=False
    assert generation_options({}) == {**greedy, "max_new_tokens": 1024}
    assert generation_options({"max_new_tokens": 16}, 64) == {**greedy, "max_new_tokens": 64}
    sampled = generation_options({"temperature": 0.7, "top_p": 0.9, "do_sample": True})
    assert sampled == {**greedy, "max_new_tokens": 1024, "do_sample": True, "temperature": 0.7, "top_p": 0.9}


# --- prompts and tasks


def test_choices_are_asked_one_a_line():
    row = {"question": "Which?", "hint": "Look.", "A": "a cat", "B": 3, "C": float("nan"), "D": "nan", "E": None}
    letter = "Answer with the option's letter from the given choices directly."
    assert ask_choices(row) == f"Look.\nWhich?\nA. a cat\nB. 3\n{letter}"
    assert mmbench_cn({**row, "hint": "nan"}) == "Which?\nA. a cat\nB. 3\n请直接回答选项字母。"
    word = "Answer the question using a single word or phrase."
    assert ask_choices({"question": "Which?"}) == f"Which?\n{word}"
    assert ask_word("Is it red? Please answer yes or no.") == f"Is it red?\n{word}"
    assert math_vision({"question": "How many?", "options": ["1", "2"]}) == f"How many?\nA. 1\nB. 2\n{word}"


def test_tasks_include_those_of_the_harness(tmp_path):
    stock = tmp_path / "stock"
    for variant in VARIANTS:
        (stock / variant.stock).parent.mkdir(parents=True, exist_ok=True)
        (stock / variant.stock).write_text("task: x\n")
    assert write_tasks(tmp_path / "mine", stock) == list(VARIANTS)
    lines = (tmp_path / "mine" / "mmbench_cn_dev_slime.yaml").read_text().splitlines()
    assert lines[1:] == [
        f"include: {json.dumps(str(stock / 'mmbench' / 'mmbench_cn_dev.yaml'))}",
        'task: "mmbench_cn_dev_slime"',
        "doc_to_text: !function hires_lmm.evaluation.task_prompts.mmbench_cn",
        'generation_kwargs: {"max_new_tokens": 1024, "do_sample": false}',
    ]
    (stock / "mmvet" / "mmvet.yaml").unlink()
    with pytest.raises(ValueError, match=r"has no mmvet/mmvet.yaml; install lmms-eval"):
        write_tasks(tmp_path / "mine", stock)


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="the harnesses are installed")
def test_without_the_harnesses_the_commands_say_what_to_install(tmp_path):
    asked = CliRunner().invoke(app, ["harness-tasks", str(tmp_path)])
    assert asked.exit_code == 1 and "pip install lmms-eval==0.7.3" in asked.stderr
    asked = CliRunner().invoke(app, ["vlmeval", str(tmp_path), "--", "--data", "MME"])
    assert asked.exit_code == 1 and "pip install 'hires-lmm[vlmeval]'" in " ".join(asked.stderr.split())


def test_an_option_of_vlmeval_has_a_key_and_a_value(tmp_path):
    asked = CliRunner().invoke(app, ["vlmeval", str(tmp_path), "--option", "fast", "--", "--data", "MME"])
    assert asked.exit_code == 2 and "write KEY=VALUE, such as max_image_tokens=600" in asked.stderr


# --- the processor


def test_empty_lists_of_what_it_does_not_read_mean_none(checkpoint):
    processor = load_processor(checkpoint)
    picture = Image.new("RGB", (64, 64), "red")
    plain = processor(text="<image> boat", images=[picture], return_tensors="pt")
    given = processor(text="<image> boat", images=[picture], videos=[], audios=[], return_tensors="pt")
    assert {name: value.tolist() for name, value in given.items()} == {n: v.tolist() for n, v in plain.items()}
    with pytest.raises(ValueError, match="0 <video> placeholders, but 1 videos were passed"):
        processor(text="boat", videos=[[picture]])
    with pytest.raises(ValueError, match="audio=list was passed"):
        processor(text="boat", audios=["song.wav"])
