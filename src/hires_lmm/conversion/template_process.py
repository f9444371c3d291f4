"""Renders one foreign chat template; run as a program of its own by `rendering`, under limits of time and memory.

Standard input: a line of settings (`path`, `seconds`, `bytes`, `template`, `special`), then one chat a line
(`messages`, `add_generation_prompt`). Standard output: a line an answer: `text`, or `error` where the template refuses
the chat, or `limit` where it wants too much. Needs the standard library and jinja2 only, so it starts fast.
"""

import json
import resource
import sys
from datetime import datetime
from typing import Any


TEXT_LIMIT = 1_000_000
"""Most characters of a rendered chat."""


def set_limits(seconds: int, num_bytes: int) -> None:
    """Let this process use so much and write no file.

    Args:
        seconds (`int`): Processor time; the system ends the process after it.
        num_bytes (`int`): Address space.
    """
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes, num_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def build_template(text: str) -> Any:
    """Compile a chat template in the sandbox that transformers uses, with the names it may read.

    Args:
        text (`str`): Jinja text.

    Returns:
        The template.
    """
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def answer(template: Any, special: dict, chat: dict) -> dict[str, str]:
    """Render one chat.

    Args:
        template: From `build_template`.
        special (`dict`): Special tokens by name.
        chat (`dict`): `messages` and `add_generation_prompt`.

    Returns:
        `text`, `error` or `limit`.
    """
    try:
        text = template.render(**special, **chat)
    except MemoryError:
        return {"limit": "more memory than it may have"}
    except Exception as error:  # a template may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:1000]}
    if len(text) > TEXT_LIMIT:
        return {"limit": f"{len(text)} characters, more than {TEXT_LIMIT}"}
    return {"text": text}


def main() -> None:
    """Answer line by line until the input ends."""
    settings = json.loads(sys.stdin.readline())
    sys.path[:] = settings["path"]
    import jinja2.ext  # before the limits, since importing may write a cache
    import jinja2.sandbox  # noqa: F401

    set_limits(settings["seconds"], settings["bytes"])
    template, problem = None, {}
    try:
        template = build_template(settings["template"])
    except MemoryError:
        problem = {"limit": "more memory than it may have"}
    except Exception as error:  # syntax errors, recursion
        problem = {"error": f"{type(error).__name__}: {error}"[:1000]}
    for line in sys.stdin:
        found = problem or answer(template, settings["special"], json.loads(line))
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
