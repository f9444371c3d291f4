"""Chat templates that come with a checkpoint are programs: they run in a process of their own, with limits."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from typing import Any

from .errors import ConversionError


SECONDS = 10
"""Processor time of a template for all chats that are rendered with it."""

MEMORY = 1 << 30
"""Address space of the process, bytes."""

PATIENCE = 60
"""Seconds on the clock until the process is ended, however busy the machine is."""

PROGRAM = Path(__file__).with_name("template_process.py")


class ForeignTemplate:
    """A chat template in a process of its own.

    Args:
        process (`subprocess.Popen`): Runs `template_process`.
    """

    def __init__(self, process: Any):
        self._process = process

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """Render one chat.

        Args:
            messages (`list[dict]`): The messages.
            add_generation_prompt (`bool`): Whether the opening of an answer follows.

        Returns:
            The text.

        Raises:
            ValueError: If the template refuses the chat.
            ConversionError: If it wants more time, memory or text than a chat template may have.
        """
        found = self._ask({"messages": messages, "add_generation_prompt": add_generation_prompt})
        if "limit" in found:
            raise ConversionError(
                f"The chat template of the checkpoint wants {found['limit']} for a short chat; replace it (in "
                "chat_template.jinja, processor_config.json or tokenizer_config.json), or name another one."
            )
        if "error" in found:
            raise ValueError(f"The chat template cannot write this chat: {found['error']}")
        return found["text"]

    def _ask(self, chat: dict) -> dict[str, str]:
        try:
            self._process.stdin.write(json.dumps(chat) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        return json.loads(line) if line else {"limit": f"more than {SECONDS} seconds"}


@contextmanager
def foreign_template(text: str, special: dict[str, Any]) -> Iterator[ForeignTemplate]:
    """Start a process for a chat template and end it again.

    Args:
        text (`str`): Jinja text of unknown origin.
        special (`dict`): Special tokens by name, as the tokenizer hands them to templates.

    Yields:
        The template.
    """
    settings = {
        "path": [entry for entry in sys.path if entry],
        "seconds": SECONDS,
        "bytes": MEMORY,
        "template": text,
        "special": {name: value for name, value in special.items() if isinstance(value, str)},
    }
    with tempfile.TemporaryDirectory() as empty:
        process = subprocess.Popen(
            [sys.executable, "-I", str(PROGRAM)],
            cwd=empty,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        timer = Timer(PATIENCE, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(settings) + "\n")  # type: ignore[union-attr]
            yield ForeignTemplate(process)
        finally:
            timer.cancel()
            process.kill()
            process.communicate()
