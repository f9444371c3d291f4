"""The evaluator against one question at a time through processor and `generate`; resuming; the command."""

import json
from contextlib import nullcontext

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from typer.testing import CliRunner

from builders.tiny import random_image, tiny_config, tiny_model, tiny_processor
from builders.training import COMPRESS
from hires_lmm.cli import app
from hires_lmm.evaluation import AnswerStore, SweepSetting, evaluate
from hires_lmm.processing.chat_templates_hires_lmm import answer_prefix_ids, question_prefix_ids


IMAGES = {"a": random_image(90, 120, 1), "b": random_image(150, 60, 2)}
QUESTIONS = [
    ("a", "What is it?"),
    ("a", "Which boat is near the shore?"),
    ("b", "Where?"),
    ("a", "How many cats are there on the table?"),
    ("b", "Is it a boat or a cat?"),
]


def build(rule: str, score: str = "cosine"):
    """A tiny SliME model that ends answers early (many ids count as ends), and its processor."""
    router = {"part": "router", "on": "crops", "score": score, "keep": {"rule": rule}, "noise": 0.0}
    connector = {"view_ops": [COMPRESS], "token_ops": [router]}
    config = tiny_config("slime", connector_config=connector, planner={"name": "slime", "max_crops": 4})
    processor = tiny_processor(config, "chatml")
    config.answer_prefix_ids, config.question_prefix_ids = answer_prefix_ids(processor), question_prefix_ids(processor)
    model = tiny_model(config)
    model.generation_config.eos_token_id = list(range(0, config.text_config.vocab_size, 4))
    return model, processor


@pytest.fixture(scope="module", params=["threshold", "budget"])
def parts(request):
    return build(request.param)


def rows(answers=None) -> list[dict]:
    """Rows of the collator."""
    found = []
    for index, (name, question) in enumerate(QUESTIONS):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        reply = "a b c d" if answers is None else answers[index]
        found.append(
            {
                "messages": [{"role": "user", "content": content}],
                "images": [IMAGES[name]],
                "answer": reply,
                "kind": "k",
            }
        )
    return found


@torch.inference_mode()
def reference(model, processor, name, question, limit, views="all", **options) -> tuple[str, bool, int]:
    """One question through the processor and `generate`: text, whether an end came, visual tokens kept."""
    content = [{"type": "text", "text": question}]
    if views != "none":
        content.insert(0, {"type": "image", "image": IMAGES[name]})
        options["views"] = views
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options if views != "none" else {},
    )
    output = model.generate(**inputs, max_new_tokens=limit, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    ends = [place for place, token in enumerate(new) if token in model.generation_config.eos_token_id]
    kept = 0
    if views != "none":
        mask = model(**inputs).kept_mask
        kept = int((mask & (inputs["input_ids"] == processor.image_token_id)).sum())
    text = processor.tokenizer.decode(new[: ends[0]] if ends else new, skip_special_tokens=True)
    return text, bool(ends), kept


def limit_of(model, processor, asked) -> int:
    lengths = [len(processor.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]) for row in asked]
    return max(lengths) + 2


OPTIONS = {
    SweepSetting(): {},
    SweepSetting(tokens=20): {"max_image_tokens": 20},
    SweepSetting(max_crops=1): {"max_crops": 1},
    SweepSetting(views="global"): {"views": "global"},
    SweepSetting(views="crops"): {"views": "crops"},
    SweepSetting(views="none"): {"views": "none"},
}


def test_answers_are_those_of_generate_one_by_one(parts):
    model, processor = parts
    asked = rows()
    limit = limit_of(model, processor, asked)
    result = evaluate(model, processor, asked, list(OPTIONS), batch_size=2)
    found = {answer.key: answer for answer in result.answers}
    texts, ended = set(), set()
    for setting, options in OPTIONS.items():
        for row, (name, question) in enumerate(QUESTIONS):
            answer = found[setting, row]
            expected = reference(model, processor, name, question, limit, **options)
            assert (answer.prediction, answer.ended, answer.tokens) == expected, (setting.label, row)
            texts.add(expected[0])
            ended.add(expected[1])
    assert len(texts) > 10 and ended == {True, False}  # the comparison can fail


@pytest.mark.parametrize(
    "preset, ops", [("llava_next", [{"part": "globalcom2"}]), ("mg_llava", []), ("hires_llava", [])]
)
def test_parts_that_read_more_of_the_towers_see_pixels(preset, ops):
    """Scores of the class token, a second tower, a layer op of the tower."""
    config = tiny_config(preset, connector_config={"token_ops": ops} if ops else {})
    model, processor = tiny_model(config), tiny_processor(config, "chatml")
    model.generation_config.eos_token_id = list(range(0, config.text_config.vocab_size, 4))
    asked, options = rows()[:3], {SweepSetting(tokens=20): {"max_image_tokens": 20}} if ops else {SweepSetting(): {}}
    result = evaluate(model, processor, asked, list(options))
    for answer, (name, question) in zip(result.answers, QUESTIONS, strict=False):
        expected = reference(
            model, processor, name, question, limit_of(model, processor, asked), **options[answer.setting]
        )
        assert (answer.prediction, answer.ended, answer.tokens) == expected


def test_batches_of_any_size_give_the_same_answers(parts):
    model, processor = parts
    settings = [SweepSetting(), SweepSetting(tokens=20), SweepSetting(views="none")]
    first = evaluate(model, processor, rows(), settings, batch_size=1)
    assert evaluate(model, processor, rows(), settings, batch_size=50).answers == first.answers


@pytest.mark.parametrize(
    "said, end, right",
    [("a b", True, True), (" A  b.", True, True), ("a b", False, False), ("a b c", True, False), ("a", True, False)],
)
def test_right_means_the_same_text_and_an_end(monkeypatch, said, end, right):
    model, processor = build("budget")
    tail = processor.tokenizer(said, add_special_tokens=False)["input_ids"]
    ends = [processor.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends

    def generate(input_ids, **options):
        new = torch.tensor([tail + ends * (2 * end)]).expand(len(input_ids), -1)
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(
        "hires_lmm.evaluation.evaluator._count_tokens", lambda *args: nullcontext([0] * len(QUESTIONS))
    )
    answers = evaluate(model, processor, rows(["a b"] * len(QUESTIONS))).answers
    assert {(answer.right, answer.ended) for answer in answers} == {(right, end)}


def test_without_an_image_the_prompt_is_the_question_alone(monkeypatch):
    model, processor = build("budget")
    prompts = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **o: prompts.append(o["input_ids"]) or generate(**o))
    turn = {"role": "user", "content": "<image>\nWhich boat?"}
    row = {"messages": [turn], "images": [IMAGES["a"]], "answer": "this"}
    evaluate(model, processor, [row], [SweepSetting(views="none")])
    alone = [{"role": "user", "content": "Which boat?"}]
    assert prompts[0].tolist() == processor.apply_chat_template(alone, add_generation_prompt=True, tokenize=True)


@pytest.mark.parametrize("template", ["llama3", "chatml"])
def test_prompts_open_once_with_tokenizers_that_add_a_token(monkeypatch, template):
    config = tiny_config("llava_next")
    model, processor = tiny_model(config), tiny_processor(config, template)
    bos = processor.tokenizer.bos_token
    opening = TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, processor.tokenizer.bos_token_id)])
    processor.tokenizer.backend_tokenizer.post_processor = opening
    prompts = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **o: prompts.append(o["input_ids"]) or generate(**o))
    evaluate(model, processor, rows()[:1])
    turn = [{"type": "image", "image": IMAGES["a"]}, {"type": "text", "text": QUESTIONS[0][1]}]
    expected = processor.apply_chat_template(
        [{"role": "user", "content": turn}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompts[0].tolist() == expected["input_ids"]
    assert prompts[0][0].tolist().count(processor.tokenizer.bos_token_id) == 1


def test_the_tower_runs_once_an_image_for_all_budgets_and_thresholds():
    model, processor = build("threshold")
    views = []
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: views.append(len(args[0])))
    settings = [SweepSetting(), SweepSetting(tokens=20), SweepSetting(gamma=0.3), SweepSetting(views="crops")]
    evaluate(model, processor, rows(), settings, batch_size=9)
    plans = [len(processor.image_processor.plan(image.height, image.width).views) for image in IMAGES.values()]
    assert sum(views) == sum(plans)
    views.clear()
    about_one = [row for row, (name, _) in zip(rows(), QUESTIONS, strict=True) if name == "a"]
    evaluate(model, processor, about_one, settings, batch_size=2)  # three neighbours stay together
    hook.remove()
    assert sum(views) == plans[0]


# --- thresholds


def test_gamma_is_that_of_a_router_built_with_it():
    model, processor = build("threshold")
    router = model.model.connector.token_ops[0]
    before = router.keep
    result = evaluate(model, processor, rows(), [SweepSetting(gamma=0.2), SweepSetting(gamma=1.0), SweepSetting()])
    assert router.keep is before
    means = [result.mean_tokens(setting) for setting in result.settings]
    assert means[0] < means[2] < means[1]
    full = [processor.image_tokens(IMAGES[name].height, IMAGES[name].width) for name, _ in QUESTIONS]
    assert means[1] == pytest.approx(sum(full) / len(full))
    config = model.config.to_dict()
    config["connector_config"]["token_ops"][0]["keep"] = {"rule": "threshold", "gamma": 0.2}
    other = type(model)(type(model.config).from_dict(config)).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    built = evaluate(other, processor, rows(), [SweepSetting()])
    low = [answer for answer in result.answers if answer.setting.gamma == 0.2]
    assert [(a.prediction, a.tokens) for a in low] == [(a.prediction, a.tokens) for a in built.answers]


def test_gamma_needs_a_threshold():
    model, processor = build("budget")
    with pytest.raises(ValueError, match=r"gamma=0.5, but no part .* keeps tokens by a threshold; set budgets"):
        evaluate(model, processor, rows(), [SweepSetting(gamma=0.5)])


# --- formats, sizes, errors


def test_letters_and_sizes_reach_the_model(parts, monkeypatch):
    model, processor = parts
    prompts = []
    tokenizer = processor.tokenizer
    plain = type(tokenizer).__call__

    def spy(self, text, *args, **kwargs):
        prompts.extend([text] if isinstance(text, str) else text)
        return plain(self, text, *args, **kwargs)

    monkeypatch.setattr(type(tokenizer), "__call__", spy)
    answers = ["red", "blue", "pink", "green", "white"]
    settings = [SweepSetting(format="letter"), SweepSetting(format="word"), SweepSetting(image_size=30)]
    result = evaluate(model, processor, rows(answers), settings, seed=3)
    letters = [answer for answer in result.answers if answer.setting.format == "letter"]
    assert {answer.answer for answer in letters} <= set("ABCD") and {answer.chance for answer in letters} == {0.25}
    for answer, truth, (_, question) in zip(letters, answers, QUESTIONS, strict=True):
        own = [prompt for prompt in prompts if f"{question}\nA. " in prompt]
        assert f"{answer.answer}. {truth}\n" in own[0]
        assert own[0].count("option's letter from the given choices directly.<|im_end|>") == 1
    assert sum("single word or phrase.<|im_end|>" in prompt for prompt in prompts) == len(QUESTIONS)
    small = [answer.tokens for answer in result.answers if answer.setting.image_size == 30]
    planned = [processor.image_tokens(*{"a": (22, 30), "b": (30, 12)}[name]) for name, _ in QUESTIONS]
    assert all(kept <= full for kept, full in zip(small, planned, strict=True))


def test_wrong_calls(parts):
    model, processor = parts
    with pytest.raises(ValueError, match="the smallest value"):
        evaluate(model, processor, rows(), [SweepSetting(tokens=1)])
    with pytest.raises(ValueError, match="batch_size=0"):
        evaluate(model, processor, rows(), batch_size=0)
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        evaluate(model, processor, rows())
    model.eval()


# --- resume


def test_a_stopped_sweep_goes_on_and_gives_the_same(parts, tmp_path):
    model, processor = parts
    settings = [SweepSetting(), SweepSetting(views="none")]
    whole = evaluate(model, processor, rows(), settings, batch_size=2)
    file = tmp_path / "answers.jsonl"

    class Stop(Exception):
        pass

    def stop(done: int, total: int, description: str) -> None:
        assert total == 10
        if done >= 5:
            raise Stop

    with pytest.raises(Stop):
        evaluate(model, processor, rows(), settings, batch_size=2, store=AnswerStore(file, {}), progress=stop)
    kept = len(file.read_text().splitlines()) - 1
    assert 5 <= kept < 10
    asked = []
    generate = model.generate
    model.generate = lambda **options: asked.append(len(options["input_ids"])) or generate(**options)
    try:
        result = evaluate(model, processor, rows(), settings, batch_size=2, store=AnswerStore(file, {}))
    finally:
        del model.generate
    assert sum(asked) == 10 - kept
    assert result == whole
    with pytest.raises(ValueError, match="made with rows="):
        evaluate(model, processor, rows()[:3], settings, store=AnswerStore(file, {}))
    with pytest.raises(ValueError, match="made with seed=0, but now seed is 1"):
        evaluate(model, processor, rows(), settings, seed=1, store=AnswerStore(file, {}))


# --- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model, processor = build("threshold")
    folder = tmp_path_factory.mktemp("sweep") / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, image in IMAGES.items():
        image.save(folder.parent / f"{name}.png")
    lines = [
        {"messages": row["messages"], "images": [f"{name}.png"], "answer": answer, "kind": "colour"}
        for row, (name, _), answer in zip(rows(), QUESTIONS, ["red", "blue", "red", "pink", "red"], strict=True)
    ]
    (folder.parent / "rows.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def run(*arguments: object):
    """Result of one command."""
    return CliRunner().invoke(app, ["sweep", *(str(argument) for argument in arguments)])


def test_the_command_sweeps_a_file_and_goes_on(checkpoint, tmp_path):
    data = checkpoint.parent / "rows.jsonl"
    options = (checkpoint, data, "--out", tmp_path, "--no-plot", "--views", "all,none")
    first = run(*options, "--tokens", "20,24")
    assert first.exit_code == 0, first.output
    assert "colour" in first.stdout and "tokens=20" in first.stdout and "views=none" in first.stdout
    assert "15/15" in first.stderr
    result = run(*options, "--tokens", "20,24,28", "--format", "plain,letter", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "sweep.json").read_text())
    assert [entry["setting"]["tokens"] for entry in record["settings"]] == [20, 20, 24, 24, 28, 28, None, None]
    assert record["settings"][0]["scores"]["all"]["constant"] == 0.6
    assert record["checkpoint_name"] == str(checkpoint) and record["device"] == "cpu"
    assert "sweep" in record["command"] or record["command"].startswith("hires-lmm")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1 + 5 * 8


def test_the_command_asks_about_needle_scenes(checkpoint, tmp_path):
    options = ("--out", tmp_path, "--tokens", "20,22,24", "--json")
    data = ("scenes=2", "questions=2", "scene_size=192", "placement=aligned")
    result = run(checkpoint, "needle:test", *options, *(word for option in data for word in ("--data", option)))
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    expected = {"scenes": 2, "questions": 2, "scene_size": 192, "placement": "aligned", "limit": None}
    assert record["dataset"] == "needle:test" and record["data_options"] == expected
    assert all(entry["questions"] == 4 for entry in record["settings"])
    assert {entry["setting"]["tokens"]: entry["tokens"] for entry in record["settings"]} == {20: 20, 22: 22, 24: 24}
    assert (tmp_path / "sweep.png").stat().st_size > 5000


def test_budgets_that_are_too_small_are_all_named_before_the_first_answer(parts, tmp_path):
    """4 x 4 patches of the global view are protected, so 17 is the smallest."""
    model, processor = parts
    store = AnswerStore(tmp_path / "answers.jsonl", {})
    settings = [SweepSetting(), *(SweepSetting(tokens=tokens) for tokens in (20, 16, 3))]
    with pytest.raises(ValueError, match=r"Leave out tokens=3,16\. .* the smallest value for this image is 17"):
        evaluate(model, processor, rows(), settings, store=store)
    assert not (tmp_path / "answers.jsonl").exists()
    evaluate(model, processor, rows(), [SweepSetting(tokens=17)])


@pytest.mark.parametrize(
    "options, status, words",
    [
        (("--tokens", "many"), 2, "'many' is no value"),
        (("--views", "left"), 1, "views='left' is unknown"),
        (("--tokens", "20", "--gamma", "0.5"), 1, "exclude each other"),
        (("--tokens", "1"), 1, "Image 0"),
        (("--data", "scenes"), 2, "'scenes' is no option; write KEY=VALUE"),
        (("--data", "scenes=2"), 1, "is a file, which has no option 'scenes'"),
    ],
)
def test_wrong_commands(checkpoint, tmp_path, options, status, words):
    result = run(checkpoint, checkpoint.parent / "rows.jsonl", "--out", tmp_path, *options)
    assert result.exit_code == status
    assert words in " ".join(result.stderr.replace("│", " ").split())
