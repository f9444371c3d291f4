"""Runs the fenced code of Markdown files: `python` blocks, and `console` blocks with their expected output."""

import doctest
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner


ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)
TITLE = re.compile(r'python title="([\w.]+)"')
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """One fenced block: its language and words after it, its text, its line in the file."""

    info: str
    text: str
    line: int


def read_blocks(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text."""
    blocks = []
    for found in FENCE.finditer(text):
        indent = len(found["indent"])
        body = "".join(line[indent:] if line.strip() else "\n" for line in found["body"].splitlines(keepends=True))
        blocks.append(Block(found["info"].strip(), body, text.count("\n", 0, found.start()) + 2))
    return blocks


def run_page(text: str, name: str) -> dict:
    """Run the `python` and `console` blocks of a page in order, in one namespace; a `python title="x.py"` becomes the
    file x.py; other blocks are left alone."""
    namespace: dict = {"__name__": "__page__"}
    for block in read_blocks(text):
        if block.info == "python":
            code = compile("\n" * (block.line - 1) + block.text, name, "exec")
            exec(code, namespace)
        elif title := TITLE.fullmatch(block.info):
            Path(title[1]).write_text(block.text, encoding="utf-8")
        elif block.info == "console":
            for command, expected in read_session(block.text):
                check_command(command, expected, f"{name}:{block.line}")
    return namespace


def read_session(text: str) -> list[tuple[str, str]]:
    """Commands (after `$ `) with the lines that follow them."""
    pieces = re.split(r"^\$ ", text, flags=re.MULTILINE)
    if pieces[0].strip():
        raise ValueError(f"A console block must open with a command: {pieces[0]!r}")
    return [(piece.partition("\n")[0], piece.partition("\n")[2]) for piece in pieces[1:]]


def check_command(command: str, expected: str, where: str) -> None:
    """Run one command in this process and compare its standard output, where the page shows any."""
    words = shlex.split(command)
    if words[0] == "hires-lmm":
        from hires_lmm.cli import app

        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, f"{where}: {command}\n{result.output}"
        got = result.stdout
    else:
        raise ValueError(f"{where}: no rule for the command {command!r}")
    if expected.strip():
        same = doctest.OutputChecker().check_output(expected, got, FLAGS)
        assert same, f"{where}: {command}\nexpected:\n{expected}\ngot:\n{got}"
