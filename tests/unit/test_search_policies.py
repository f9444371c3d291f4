"""Policies with an oracle that says what it is told to; options, prompts and pictures."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from transformers import LlamaForCausalLM, pipeline

from builders import random_image, tiny_text_config
from builders.text import tiny_tokenizer
from hires_lmm.search import (
    POLICIES,
    DescribeThenAnswer,
    Prompt,
    ReasonThenSummarise,
    Step,
    StepByStep,
    ZoomEye,
    build_policy,
    draw_walk,
)
from hires_lmm.search.base import Ask
from hires_lmm.search.tree import Showing, merge


class Scripted:
    """Says its lines in turn; sees whatever lies on the side of a point."""

    side = 101  # boxes of 100 are not cut

    def __init__(self, *lines: str, point: tuple[int, int] = (0, 0)):
        self.lines, self.point, self.heard, self.asked = list(lines), point, [], []

    def answer(self, images, turns, **options):
        self.heard.append((list(images), list(turns), options))
        return self.lines.pop(0)

    def confidences(self, asks):
        self.asked += asks
        return [self.sees(ask) for ask in asks]

    def sees(self, ask: Ask) -> float:
        left, top, width, height = ask.box
        inside = 0 <= self.point[0] - left < width and 0 <= self.point[1] - top < height
        if ask.kind == "answering":
            return 0.9 if inside and max(width, height) <= 100 else -0.5
        return 0.8 if inside else -0.8


IMAGE = random_image(400, 400)


# ---- zoom eye


def test_the_walk_goes_straight_to_what_it_looks_for():
    oracle = Scripted("Objects: a red cup", "blue", point=(310, 120))
    result = ZoomEye().run([IMAGE], "What colour is it?", oracle)
    assert result.answer == "blue"
    assert result.boxes == [(300, 100, 100, 100)]
    visits = [step.box for step in result.steps if step.kind == "answering"]
    assert visits == [(0, 0, 400, 400), (200, 0, 200, 200), (300, 100, 100, 100)]
    (shown, turns, _) = oracle.heard[0]
    assert shown == [IMAGE] and "What colour is it?" in turns[0]
    assert [view.size for view in oracle.heard[1][0]] == [
        (101, 101),
        (113, 127),
    ]  # 121, cut at the right, and 3 of frame
    assert {ask.text for ask in oracle.asked if ask.kind == "answering"} == {
        "Question: What colour is it?\nDoes the image show clearly enough what the answer needs? Answer Yes or No."
    }


def test_what_an_oracle_is_shown_of_a_place_is_that_place():
    oracle = Scripted("x", point=(310, 120))
    ZoomEye(cues=["cup"], crop_only=True).run([IMAGE], "Where?", oracle)
    for ask in oracle.asked:
        (view,) = ask.views()
        if ask.depth == 2:  # smaller than a view
            assert max(view.size) == 101
            continue
        left, top, width, height = ask.box
        np.testing.assert_array_equal(view, IMAGE.crop((left, top, left + width, top + height)))
        assert ask.views()[0] is view  # one object a place: oracles know it by its identity


def test_cues_may_be_given_by_a_function_of_the_question():
    oracle = Scripted("x", point=(10, 10))
    result = ZoomEye(cues=lambda question: question.split()[-1:]).run([IMAGE], "Where is Waldo", oracle)
    assert {step.asked for step in result.steps if step.kind == "existence"} == {"Waldo"}


def test_without_cues_the_image_is_asked_about_as_it_is():
    oracle = Scripted("nothing to name", "yes")
    result = ZoomEye().run([IMAGE], "Is it day?", oracle)
    assert (result.answer, result.boxes, oracle.asked) == ("yes", [], [])
    assert oracle.heard[1][:2] == ([IMAGE], ["Is it day?"])


def test_an_answerable_place_ends_a_walk_with_several_cues_at_the_bottom_only():
    class Sure(Scripted):
        def sees(self, ask):
            seen = super().sees(ask)
            return seen if ask.kind != "answering" or ask.depth else -1.0

    oracle = Sure("x", point=(310, 120))
    oracle.sees = lambda ask: 0.7 if ask.kind == "answering" and ask.depth == 1 else Sure.sees(oracle, ask)
    result = ZoomEye(cues=["cup", "hat"], patience=9).run([IMAGE], "Is the cup left of the hat?", oracle)
    first = [step for step in result.steps if step.asked == "What is the appearance of the cup?"]
    assert [step.depth for step in first if step.kind == "answering"] == [0, 1, 2]
    assert result.boxes == [(300, 100, 100, 100)] * 2


def test_the_deepest_of_several_answerable_places_is_taken_with_several_cues():
    oracle = Scripted("x", point=(310, 120))
    deep = {0: -1.0, 1: 0.7, 2: -0.4}
    oracle.sees = lambda ask: deep[ask.depth] if ask.kind == "answering" else Scripted.sees(oracle, ask)
    result = ZoomEye(cues=["cup", "hat"]).run([IMAGE], "?", oracle)
    assert [box[2] for box in result.boxes] == [200, 200]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"split": 5}, "split=5"),
        ({"floor": 0.7}, "floor=0.7"),
        ({"decreases": (0.0,)}, "decreases"),
        ({"decreases": ()}, "decreases"),
        ({"depth_limit": 0}, "depth_limit=0"),
        ({"cues": "dog"}, r"\['dog'\]"),
        ({"cues": 3}, "cues=3 must be a list"),
        ({"cues": [3]}, r"cues=\[3\]"),
        ({"cues": [" "]}, r"cues=\[' '\]"),
        ({"side": 0}, "side=0 must lie between 1"),
        ({"patch_scale": 0.5}, "patch_scale=0.5"),
        ({"bias": 5.0}, "bias=5.0"),
    ],
)
def test_options_out_of_range_are_refused_with_their_value(changes, words):
    with pytest.raises(ValueError, match=words):
        ZoomEye(**changes)


def test_several_images_are_refused():
    with pytest.raises(ValueError, match="2 were given"):
        ZoomEye().run([IMAGE, IMAGE], "?", Scripted())


def test_boxes_near_each_other_are_joined_again_and_again():
    near = [(0, 0, 10, 10), (205, 0, 215, 10), (107, 0, 117, 10)]
    assert merge(near) == [(0, 0, 215, 10)]
    assert merge([(0, 0, 10, 10), (110, 0, 120, 10)]) == [(0, 0, 10, 10), (110, 0, 120, 10)]
    assert Showing(10).views(IMAGE, []) == [IMAGE]


# ---- those that talk


def test_a_description_is_all_that_the_reader_gets():
    oracle = Scripted("a red boat")
    heard = []
    policy = DescribeThenAnswer(reader=lambda text: heard.append(text) or "red")
    result = policy.run([IMAGE], "Which {colour}?", oracle)
    assert result.answer == "red" and result.boxes == []
    assert "a red boat" in heard[0] and heard[0].endswith("Question: Which {colour}?")
    assert [step.said for step in result.steps] == ["a red boat", "red"]
    assert oracle.heard[0][0] == [IMAGE]


def test_without_a_reader_the_model_reads_without_the_image():
    oracle = Scripted("a red boat", "red")
    assert DescribeThenAnswer().run([IMAGE], "Which?", oracle).answer == "red"
    assert [images for images, _, _ in oracle.heard] == [[IMAGE], []]


@pytest.mark.parametrize("template", ["chatml", None])
def test_a_reader_may_be_a_pipeline(template):
    model = LlamaForCausalLM(tiny_text_config("llama", num_hidden_layers=1)).eval()
    reader = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(template), max_new_tokens=3)
    result = DescribeThenAnswer(reader=reader).run([IMAGE], "Which?", Scripted("a boat"))
    assert result.answer == result.answer.strip() and "a boat" not in result.answer
    assert "a boat" in result.steps[1].asked


@pytest.mark.parametrize("said", ["<thoughts> it is red </thoughts> blue", "it is red", "<thoughts>it is red"])
def test_the_summariser_sees_images_question_and_thoughts(said):
    reasoner, summariser = Scripted(said), Scripted("red")
    result = ReasonThenSummarise(summariser=summariser).run([IMAGE], "Which?", reasoner)
    images, (asked,), _ = summariser.heard[0]
    assert result.answer == "red" and images == [IMAGE]
    assert "Question: Which?" in asked and "\nit is red\n" in asked and "blue" not in asked
    both = Scripted(said, "red")
    assert ReasonThenSummarise().run([IMAGE], "Which?", both).answer == "red"


def test_steps_are_turns_of_one_conversation_by_beams():
    oracle = Scripted("plan", "caption", "reasons", "red")
    result = StepByStep(num_beams=3).run([IMAGE], "Which?", oracle)
    assert result.answer == "red" and [step.said for step in result.steps] == ["plan", "caption", "reasons", "red"]
    turns = oracle.heard[-1][1]
    assert turns[1::2] == ["plan", "caption", "reasons"] and turns[0].startswith("Which?\n") and len(turns) == 7
    assert all(options == {"num_beams": 3} and images == [IMAGE] for images, _, options in oracle.heard)
    with pytest.raises(ValueError, match="num_beams=0"):
        StepByStep(num_beams=0)


# ---- by name


def test_policies_are_built_from_json(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(
        json.dumps({"existence": {"text": "is {} here ?", "yes": ["yes"], "no": ["no"]}, "template": "{}"})
    )
    policy = build_policy("zoom_eye", cues=["a", "b"], decreases=[0.2], prompts=str(file))
    assert policy.cues == ("a", "b") and policy.decreases == (0.2,)
    assert policy.prompts.existence == Prompt("is {} here ?", ("yes",), ("no",)) and policy.prompts.template == "{}"
    assert policy.prompts.latent == ZoomEye().prompts.latent
    assert [type(build_policy(name)) for name in POLICIES] == list(POLICIES.values())


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("zoom", {}, "search='zoom' is unknown; choose one of zoom_eye"),
        ("zoom_eye", {"beams": 1}, "has no option 'beams'"),
        ("zoom_eye", {"prompts": {"existence": {"words": 1}}}, "words"),
        ("zoom_eye", {"prompts": {"existing": "x"}}, "existing"),
        ("zoom_eye", {"prompts": [1]}, "prompts"),
        ("zoom_eye", {"threshold": "high"}, "threshold"),
        ("zoom_eye", {"prompts": {"existence": "is {} here"}}, "existence='is {} here' must be a Prompt"),
        ("zoom_eye", {"prompts": {"existence": {"text": "is {cue} here"}}}, "prompt='is {cue} here'"),
        ("zoom_eye", {"prompts": {"existence": {"text": 3}}}, "prompt=3 must be a text"),
        ("zoom_eye", {"prompts": {"template": "{cue}"}}, "template='{cue}'"),
        ("zoom_eye", {"prompts": {"latent": {"text": "{}", "yes": "Yes"}}}, "yes='Yes' is one text"),
        ("zoom_eye", {"prompts": {"latent": {"text": "{}", "no": []}}}, "words on both sides"),
        ("zoom_eye", {"prompts": {"latent": {"text": "{}", "yes": [""]}}}, "empty word"),
        ("zoom_eye", {"prompts": "missing.json"}, "prompts='missing.json' cannot be read"),
        ("describe_then_answer", {"reader": "gpt2"}, "reader='gpt2' cannot be called"),
        ("describe_then_answer", {"ask": "{text}"}, "ask='{text}' must be a text with {description}, {question}"),
        ("reason_then_summarise", {"summariser": "gpt2"}, "summariser='gpt2'"),
        ("reason_then_summarise", {"summarise": "{thought}"}, "summarise='{thought}'"),
        ("step_by_step", {"turns": "{question}"}, "turns='{question}'"),
        ("step_by_step", {"turns": ["{q}"]}, "turn='{q}'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        build_policy(name, **options)


@pytest.mark.parametrize("images", [IMAGE, "photo.jpg", np.asarray(IMAGE)])
@pytest.mark.parametrize("name", POLICIES)
def test_one_image_is_no_list_of_images(name, images):
    with pytest.raises(ValueError, match=r"must be a list of images, not .*; write \[image\]"):
        build_policy(name).run(images, "What?", Scripted())


def test_words_may_name_the_subject_and_stand_on_one_side():
    ask = Ask("existence", "red", Prompt("a {} cup?", ("{}",), ("red", "blue")), (0, 0, 1, 1), 0, list)
    assert (ask.text, ask.words) == ("a red cup?", (("red",), ("blue",)))
    with pytest.raises(ValueError, match="Every word against 'it' speaks for it too"):
        _ = Ask("existence", "it", Prompt("{}?", ("yes", "no"), ("no",)), (0, 0, 1, 1), 0, list).words
    assert Prompt("{{}} is {}?").text.format("it") == "{} is it?"


# ---- the picture


def test_the_walk_is_drawn_where_it_went():
    steps = [
        Step("answering", "q", (0, 0, 400, 400), 0, -1.0),
        Step("existence", "c", (200, 0, 200, 200), 1, 0.5),
        Step("answering", "q", (200, 200, 200, 200), 1, 1.0),
    ]
    plain = Image.new("RGB", (400, 400), (0, 128, 0))
    picture = np.asarray(draw_walk(plain, steps, [(200, 200, 200, 200)], width=664))
    inside = picture[:, 32:632]
    top = int(np.flatnonzero((inside[:, 150] == (0, 128, 0)).all(axis=-1))[0]) - 3  # below the frame of the root
    corner, thick = picture[top + 300 + 3, 32 + 300 + 100], picture[top + 300 - 2 : top + 300, 332 + 100]
    assert corner.tolist() == [255, 196, 0] and not (thick == (255, 196, 0)).all()
    white = (picture[top + 10 : top + 290, 32 + 300] == 255).all(axis=-1)
    assert white.mean() > 0.9  # the left border of what was considered
    with pytest.raises(ValueError, match="no walk to draw"):
        draw_walk(plain, [Step("answer", "q", said="x")], [])
    with pytest.raises(ValueError, match="width=10"):
        draw_walk(plain, steps, [], width=10)
