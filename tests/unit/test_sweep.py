"""Settings, formats, rows, intervals and the store of a sweep."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from builders.tiny import random_image
from hires_lmm.evaluation import (
    Answer,
    AnswerStore,
    SweepResult,
    SweepSetting,
    expand_grid,
    load_rows,
    prepare_rows,
    read_rows,
)
from hires_lmm.evaluation.command import checkpoint_fingerprint
from hires_lmm.evaluation.laws import build_law_table, fit_budgets
from hires_lmm.evaluation.prompts import LETTER_FORMAT, WORD_FORMAT, ask, draw_options, normalise_answer
from hires_lmm.evaluation.report import build_record, build_tables, write_report
from hires_lmm.evaluation.settings import swept_axes
from hires_lmm.evaluation.statistics import cluster_bootstrap, score, wilson_interval
from hires_lmm.scaling import fit_scaling_law


# --- settings


def test_grid_is_the_product_and_asks_without_image_once_a_format():
    settings = expand_grid(tokens=[8, None], views=["all", "none"], format=["plain", "word"])
    assert [setting.label for setting in settings] == [
        "tokens=8",
        "tokens=8, format=word",
        "default",
        "format=word",
        "views=none",
        "views=none, format=word",
    ]
    assert swept_axes(settings) == ["tokens", "views", "format"]
    assert swept_axes([SweepSetting(), SweepSetting(views="none")]) == ["views"]


@pytest.mark.parametrize(
    "axes, words",
    [
        ({"tokens": [0]}, "tokens=0 must be an integer"),
        ({"gamma": [1.5]}, r"gamma=1.5 must lie in \(0, 1\]"),
        ({"views": ["left"]}, "views='left' is unknown; choose one of all, global, crops, none"),
        ({"format": ["essay"]}, "format='essay'"),
        ({"tokens": [8], "gamma": [0.5]}, "exclude each other"),
        ({"colour": ["red"]}, "no axis 'colour'"),
        ({"tokens": []}, "'tokens' has no values"),
    ],
)
def test_wrong_settings(axes: dict, words: str):
    with pytest.raises(ValueError, match=words):
        expand_grid(**axes)


# --- formats


def test_response_formats_are_those_of_the_paper():
    assert ask("red", "plain").suffix == ""
    assert ask("red", "word").suffix == "\nAnswer the question using a single word or phrase."
    asked = ask("red", "letter", ["blue", "red", "pink"])
    assert asked.suffix == (
        "\nA. blue\nB. red\nC. pink\nAnswer with the option's letter from the given choices directly."
    )
    assert (asked.answer, asked.num_options) == ("B", 3)
    assert WORD_FORMAT in ask("x", "word").suffix and LETTER_FORMAT in asked.suffix


def test_options_hold_the_answer_once_differ_and_spread_over_the_letters():
    answers = ["red", "blue", "Red.", "pink", "green", "white", "cyan"]
    places = Counter()
    for index in range(400):
        options = draw_options("red", "colour", answers, f"0/{index}")
        assert len(options) == 4 and options.count("red") == 1
        assert len({normalise_answer(option) for option in options}) == 4
        places[options.index("red")] += 1
    assert min(places[letter] for letter in range(4)) > 70  # 100 expected, standard deviation 9
    assert draw_options("red", "colour", answers, "0/3") == draw_options("red", "colour", answers, "0/3")
    assert draw_options("left", "bar", ["left", "right"], "0/0") in (["left", "right"], ["right", "left"])
    with pytest.raises(ValueError, match="'bar' have the answer 'left'"):
        draw_options("left", "bar", ["left", "Left ."], "0/0")


# --- rows


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}]


def test_rows_of_the_collator_are_questions():
    image = random_image(20, 30)
    rows = prepare_rows(
        [
            {"messages": conversation("which?", "red"), "images": [image], "kind": "colour", "scene": 7, "fine": True},
            {"messages": conversation("which?", "blue"), "images": [image], "answer": "Blue", "kind": "colour"},
            {"messages": conversation("which?", "blue "), "images": [image], "kind": "colour"},
            {"messages": [{"role": "user", "content": "why?"}], "answer": "so"},
        ]
    )
    assert [row.answer for row in rows] == ["red", "Blue", "blue", "so"]
    assert rows[0].messages == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "\nwhich?"}]}]
    assert rows[0].images == [image] and rows[3].images == []
    assert [row.group for row in rows] == ["scene 7", "images 0", "images 0", "row 3"]
    assert [row.constant for row in rows] == [2 / 3, 2 / 3, 2 / 3, 1.0]
    assert (rows[0].fine, rows[0].cut, rows[1].fine) == (True, None, None)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"messages": conversation("which?", "red")}, "1 places for images"),
        ({"messages": [{"role": "user", "content": "which?"}]}, "Row 0 has the answer None"),
        ({"messages": [{"role": "assistant", "content": "red"}]}, "Row 0 asks nothing"),
    ],
)
def test_wrong_rows(row: dict, words: str):
    with pytest.raises(ValueError, match=words):
        prepare_rows([row])
    with pytest.raises(ValueError, match="no questions"):
        prepare_rows([])


def test_files_in_both_formats(tmp_path):
    random_image(20, 30).save(tmp_path / "a.png")
    llava = {"id": 1, "image": "a.png", "kind": "k", "conversations": [
        {"from": "human", "value": "<image>\nwhich?"}, {"from": "gpt", "value": "red"}]}  # fmt: skip
    own = {"messages": conversation("which?", "red"), "images": ["a.png"], "kind": "k"}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(llava)}\n\n{json.dumps(own)}\n")
    (tmp_path / "rows.json").write_text(json.dumps([llava, own]))
    for name in ("rows.jsonl", "rows.json"):
        first, second = prepare_rows(read_rows(tmp_path / name))
        assert first.images == second.images == [str(tmp_path / "a.png")]
        assert first.messages == second.messages and first.kind == second.kind == "k"
        assert first.group == second.group
    assert load_rows(str(tmp_path / "rows.json"))[0]["id"] == 1


@pytest.mark.parametrize("text, words", [("{", "is no JSON"), ("{}", "list of records"), ("[]", "list of records")])
def test_wrong_files(tmp_path, text: str, words: str):
    file = tmp_path / "rows.json"
    with pytest.raises(ValueError, match="There is no file"):
        read_rows(file)
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_rows(file)


COLOURS = """
def rows(split="train", count=1):
    question = [{"type": "text", "text": f"{split}?"}]
    return ({"messages": [{"role": "user", "content": question}], "answer": str(n)} for n in range(count))
"""


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """An installed package that registers the data set `colours`."""
    (tmp_path / "colours_of_a_test.py").write_text(COLOURS)
    folder = tmp_path / "colours-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: colours\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[hires_lmm.rows]\ncolours = colours_of_a_test:rows\n")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_registered_data_set_gets_its_split_and_options(registered):
    rows = prepare_rows(load_rows("colours:test", {"count": 2}))
    assert [(row.messages[0]["content"][0]["text"], row.answer) for row in rows] == [("test?", "0"), ("test?", "1")]
    assert [row.messages[0]["content"][0]["text"] for row in prepare_rows(load_rows("colours"))] == ["train?"]


@pytest.mark.parametrize(
    "dataset, options, words",
    [
        ("pets", {}, r"'pets' is no data set; name a .json or .jsonl file, or a registered one: .*colours"),
        ("colours", {"size": 3}, r"'colours': got an unexpected keyword argument 'size'; its options are .*count=1"),
        ("rows.json", {"count": 3}, "'rows.json' is a file, which has no option 'count'"),
    ],
)
def test_unknown_data_sets_and_options(registered, dataset, options, words):
    with pytest.raises(ValueError, match=words):
        load_rows(dataset, options)


# --- intervals


def test_wilson_interval_by_hand():
    # the two shares p that lie z standard errors (of p itself) from the observed one
    for right, count in ((7, 20), (1, 9), (200, 210)):
        low, high = wilson_interval(right, count)
        for p in (low, high):
            assert abs(right / count - p) == pytest.approx(1.959964 * (p * (1 - p) / count) ** 0.5, rel=1e-6)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == 1
    assert wilson_interval(0, 10)[1] == pytest.approx(1.959964**2 / (10 + 1.959964**2), rel=1e-6)


def test_bootstrap_over_scenes_knows_that_questions_depend():
    rng = np.random.default_rng(0)
    scenes = rng.random(60) < 0.5
    right = np.repeat(scenes, 10)  # all ten questions of a scene fall together
    groups = np.repeat([f"scene {index}" for index in range(60)], 10)
    low, high = cluster_bootstrap(right.tolist(), groups.tolist())
    share = scenes.mean()
    half = 1.96 * (share * (1 - share) / 60) ** 0.5
    assert low == pytest.approx(share - half, abs=0.02) and high == pytest.approx(share + half, abs=0.02)
    assert cluster_bootstrap(right.tolist(), groups.tolist()) == (low, high)
    independent = wilson_interval(int(right.sum()), 600)
    assert (high - low) > 2.5 * (independent[1] - independent[0])
    assert cluster_bootstrap([True, False], ["a", "b"]) is None


def test_a_score_shows_the_wider_ends():
    alone = score([True] * 8, [str(index) for index in range(8)])
    assert alone.bootstrap is None and alone.interval == alone.wilson
    shared = score([True] * 8, ["a"] * 5 + ["b"] * 3, [0.5] * 8, [0.25] * 4 + [0.75] * 4)
    assert shared.bootstrap == (1.0, 1.0)  # it sees no doubt
    assert shared.interval == alone.wilson
    assert (shared.chance, shared.constant) == (0.5, 0.5)
    assert score([True], ["a"], [None]).chance is None


# --- results


def answer(setting: SweepSetting, row: int, right: bool, kind="k", fine=None, cut=None, tokens=4) -> Answer:
    return Answer(setting, row, kind, f"scene {row // 2}", fine, cut, "red", "red", True, right, tokens, 0.1, 0.2)


def test_answers_are_grouped_as_they_say():
    setting = SweepSetting()
    answers = [
        answer(setting, 0, True, "digit", True, False),
        answer(setting, 1, False, "digit", True, True),
        answer(setting, 2, True, "count", False, True, tokens=8),
        answer(setting, 3, True, "word", True, False, tokens=8),
    ]
    result = SweepResult([setting], answers)
    record = result.summary()[0]
    shares = {name: (entry["right"], entry["questions"]) for name, entry in record["scores"].items()}
    assert shares == {
        "all": (3, 4),
        "fine": (2, 3),
        "scene": (1, 1),
        "fine_whole": (2, 2),
        "fine_cut": (0, 1),
        "count": (1, 1),
        "digit": (1, 2),
        "word": (1, 1),
    }
    assert record["tokens"] == 6 and record["setting"] == setting.to_dict()
    bare = SweepResult([setting], [answer(setting, 0, True, None)])
    assert list(bare.scores(setting)) == ["all"]


def sweep_over_budgets(shares: dict[int, int], questions: int = 100) -> SweepResult:
    """A sweep in which `shares[n]` of the questions are right under a budget of n tokens."""
    settings = [SweepSetting(tokens=tokens) for tokens in shares] + [SweepSetting(), SweepSetting(views="none")]
    answers = [
        answer(setting, row, row < shares.get(setting.tokens or 0, 3), tokens=setting.tokens or 0)
        for setting in settings
        for row in range(questions)
    ]
    return SweepResult(settings, answers)


def test_budgets_feed_the_scaling_law():
    shares = {1: 20, 8: 33, 64: 50}
    fits = fit_budgets(sweep_over_budgets(shares))
    assert list(fits) == ["all"]
    expected = fit_scaling_law([1, 8, 64], [20, 33, 50])
    assert fits["all"] == expected
    assert fit_budgets(sweep_over_budgets({1: 20, 8: 33})) == {}
    assert fit_budgets(sweep_over_budgets({1: 0, 8: 33, 64: 50})) == {}
    assert build_law_table(fits).row_count == 1


def test_report_writes_everything(tmp_path):
    pytest.importorskip("matplotlib")
    result = sweep_over_budgets({1: 20, 8: 33, 64: 50})
    record = build_record(result, checkpoint="somewhere", command="hires-lmm sweep")
    files = write_report(tmp_path / "new", result, record)
    written = json.loads(files[0].read_text())
    assert written == record
    assert {"checkpoint", "command", "date", "seed", "versions", "settings"} <= set(written)
    assert written["settings"][1]["scores"]["all"]["accuracy"] == 0.33
    with Image.open(files[1]) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) > 20
    tables = list(build_tables(result))
    assert [len(table.columns) for table in tables] == [4 + 4, 4 + 1]
    assert write_report(tmp_path, result, record, plot=False) == [tmp_path / "sweep.json"]


@pytest.mark.parametrize(
    "axes", [{"gamma": [0.5, 1.0]}, {"views": ["all", "crops", "none"]}, {"max_crops": [1, None], "format": ["word"]}]
)
def test_every_axis_can_be_drawn(tmp_path, axes: dict):
    pytest.importorskip("matplotlib")
    from hires_lmm.evaluation.plots import plot_sweep

    settings = expand_grid(**axes)
    answers = [answer(setting, row, row < 3) for setting in settings for row in range(6)]
    assert plot_sweep(SweepResult(settings, answers), tmp_path / "a.svg").read_text().startswith("<?xml")


# --- store


def test_store_goes_on_and_drops_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "deep" / "answers.jsonl"
    first = AnswerStore(file, {"checkpoint": "a"})
    assert first.begin(rows="r") == []
    assert not file.exists()
    answers = [answer(SweepSetting(tokens=8), row, row == 0) for row in range(3)]
    first.append(answers[:2])
    first.append(answers[2:])
    assert AnswerStore(file, {"checkpoint": "a"}).begin(rows="r") == answers
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert AnswerStore(file, {"checkpoint": "a"}).begin(rows="r") == answers[:2]
    again = AnswerStore(file, {"checkpoint": "a"})
    again.begin(rows="r")
    again.append(answers[2:])
    assert file.read_bytes() == content


def test_store_of_another_sweep_is_refused(tmp_path):
    file = tmp_path / "answers.jsonl"
    store = AnswerStore(file, {"checkpoint": "a", "seeds": (1, 2)})
    store.begin(rows="r")
    store.append([answer(SweepSetting(), 0, True)])
    assert len(AnswerStore(file, {"checkpoint": "a", "seeds": (1, 2)}).begin(rows="r")) == 1
    with pytest.raises(ValueError, match=r"checkpoint='a', but now checkpoint is 'b'.*Name another folder"):
        AnswerStore(file, {"checkpoint": "b", "seeds": (1, 2)}).begin(rows="r")
    with pytest.raises(ValueError, match="made with rows='r', but now rows is None"):
        AnswerStore(file, {"checkpoint": "a", "seeds": (1, 2)}).begin()
    file.write_text('{"something": "else"}\n')
    with pytest.raises(ValueError, match="holds no answers"):
        AnswerStore(file, {}).begin()
    file.write_text('{"cut off')
    assert AnswerStore(file, {}).begin() == []


def test_fingerprint_follows_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"a" * 10)
    first = checkpoint_fingerprint(str(tmp_path))
    assert checkpoint_fingerprint(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"a" * 9 + b"b")
    assert checkpoint_fingerprint(str(tmp_path)) != first
    large = bytes(3 << 20)
    (tmp_path / "model.safetensors").write_bytes(large)
    second = checkpoint_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(large[:-1] + b"b")  # another last byte behind the first mebibyte
    assert checkpoint_fingerprint(str(tmp_path)) != second
    assert checkpoint_fingerprint("owner/name") == "owner/name"
