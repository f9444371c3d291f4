"""The OpenAI-compatible server of `hires-lmm serve`, asked as clients do."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest


pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm installs it")

from transformers import AutoProcessor

from builders.serving import NEEDLE, ROOT, SCENES, chat, expected


BUDGET = 150
PORT = 8123
URL = f"http://127.0.0.1:{PORT}"
SCENE_LIST = json.loads((SCENES / "needle_scenes.json").read_text())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """`hires-lmm serve` on the shipped checkpoint; yields what it wrote before it was ready."""
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", "from hires_lmm.cli import app; app()", "serve", str(NEEDLE)]
    command += ["--max-image-tokens", str(BUDGET), "--port", str(PORT), "--dtype", "float32", "--request-options"]
    command += ["--", "--max-model-len", "2048", "--enforce-eager"]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **own}, stdout=stream, stderr=stream, start_new_session=True
        )
    end = time.monotonic() + 300
    while "curl" not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(1)
    yield log.read_text()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)


def ask(scene: dict, stream: bool = False, **options) -> str:
    """The answer about a scene, sent as a data URL; streamed pieces are joined."""
    picture = base64.b64encode((SCENES / scene["image"]).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{picture}"}},
        {"type": "text", "text": scene["question"]},
    ]
    body = {"model": str(NEEDLE), "messages": [{"role": "user", "content": content}], "temperature": 0}
    body |= {"max_tokens": 8, "stream": stream, **options}
    request = Request(f"{URL}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as answer:
        text = answer.read().decode()
    if not stream:
        return json.loads(text)["choices"][0]["message"]["content"].strip()
    pieces = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    return "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"]).strip()


def test_the_command_says_where_the_server_is_and_how_to_ask(server):
    assert URL in server and re.search(r"curl \S+/v1/chat/completions", server)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_server_answers_the_scenes(server, stream):
    assert [ask(scene, stream) for scene in SCENE_LIST] == [scene["answer"] for scene in SCENE_LIST]


def test_the_example_asks_and_the_answer_streams(server):
    scene = SCENE_LIST[0]
    command = [sys.executable, "examples/ask_server.py", f"examples/images/{scene['image']}", scene["question"]]
    done = subprocess.run(
        [*command, "--url", f"{URL}/v1", "--budget", "120"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == scene["answer"], done.stderr


def test_thirty_two_requests_at_once_get_each_its_own_answer(server):
    scenes = [SCENE_LIST[number % 5] for number in range(32)]
    start = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, scenes))
    assert answers == [scene["answer"] for scene in scenes]
    assert time.monotonic() - start < 120


def test_a_request_has_a_budget_of_its_own(server, tmp_path):
    processor = AutoProcessor.from_pretrained(NEEDLE)
    scene = SCENE_LIST[0]
    requests = [
        {"text": chat(processor, scene["question"], 1), "images": [str(SCENES / scene["image"])], "options": own}
        for own in ({"max_image_tokens": 110}, {"max_image_tokens": 400})
    ]
    wanted = [
        processor.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected(NEEDLE, requests, 8)
    ]
    assert [ask(scene, mm_processor_kwargs=request["options"]) for request in requests] == wanted


@pytest.mark.parametrize(
    "options, words",
    [
        ({"max_image_tokens": 3}, "too small"),
        ({"max_image_tokens": "many"}, "max_image_tokens"),
        ({"crops": 3}, "crops"),
    ],
)
def test_a_wrong_option_is_an_error_of_the_request_and_the_server_goes_on(server, options, words):
    with pytest.raises(HTTPError) as caught:
        ask(SCENE_LIST[0], mm_processor_kwargs=options)
    assert caught.value.code == 400, caught.value.read()
    assert words in caught.value.read().decode()
    assert ask(SCENE_LIST[0]) == SCENE_LIST[0]["answer"]
