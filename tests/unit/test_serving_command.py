"""The command line that `hires-lmm serve` builds, and what it does with a server."""

import json
import sys

from typer.testing import CliRunner

from hires_lmm.cli import app
from hires_lmm.serving import command


def value_of(line: list[str], flag: str) -> str:
    return line[line.index(flag) + 1]


def test_the_flags_of_the_server(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    line = command.server_command("folder", port=9, max_image_tokens=150, images=2, request_options=True, more=["--x"])
    assert line[:3] == [sys.executable, "-m", command.SERVER] and line[-1] == "--x"
    assert value_of(line, "--model") == "folder" and value_of(line, "--port") == "9"
    assert json.loads(value_of(line, "--mm-processor-kwargs")) == {"max_image_tokens": 150}
    assert json.loads(value_of(line, "--limit-mm-per-prompt")) == {"image": 2}
    assert "--trust-request-mm-kwargs" in line and "--trust-remote-code" not in line
    plain = command.server_command("folder", trust_remote_code=True)
    assert "--trust-remote-code" in plain
    assert not {"--mm-processor-kwargs", "--trust-request-mm-kwargs"} & set(plain)


def test_without_vllm_the_error_says_what_to_install(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    done = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert done.exit_code == 1 and "pip install 'hires-lmm[vllm]'" in done.output


SERVER = """
import http.server, sys
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
        if self.path == "/health": self.server.asked = True
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
print(server.server_port, flush=True)
server.asked = False
while not server.asked: server.handle_request()
sys.exit(7)
"""


def test_ready_is_called_once_the_server_answers_and_its_status_is_returned(monkeypatch):
    monkeypatch.setattr(command, "POLL_SECONDS", 0.05)
    started = []
    popen = command.subprocess.Popen

    def start(line):
        process = popen(line, stdout=-1, text=True)
        started.append(f"http://127.0.0.1:{process.stdout.readline().strip()}")
        return process

    monkeypatch.setattr(command.subprocess, "Popen", start)
    answers = command._answers
    monkeypatch.setattr(command, "_answers", lambda url: answers(started[0]))
    ready = []
    assert command.run_server([sys.executable, "-c", SERVER], "", lambda: ready.append(True)) == 7
    assert ready == [True]
    assert command.run_server([sys.executable, "-c", "print(); raise SystemExit(3)"], "", lambda: ready.append(2)) == 3
    assert ready == [True]
