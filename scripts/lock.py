"""Write constraints.txt, every package that the Makefile installs with its version; run by `make lock`.

    python scripts/lock.py [--upgrade]

Versions that stand there stay unless a requirement changed; `--upgrade` takes the newest of all but `PINNED`. uv
resolves from metadata alone, in an environment of its own. The builds of torch differ in packages of CUDA only, which
stay out of the lock: where such a build is installed, torch itself names their versions.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "constraints.txt"
TOOLS = ROOT / ".cache" / "lock"
EXTRAS = "dev,docs,mutation"
PINNED = ("torch==2.13.0",)
INSTALLERS = ("pip", "hatchling", "editables")  # what installs the rest
HEAD = "# Every package that the Makefile installs. Written by `make lock`; not for editing.\n"
LEFT_OUT = re.compile(r"-e |nvidia-|cuda-")  # this project itself, packages of CUDA


def requirements() -> str:
    """What uv resolves: this project, the projects within it, and what stands in no pyproject.toml."""
    within = [f"-e {file.parent}" for file in sorted(ROOT.glob("benchmarks/*/pyproject.toml"))]
    return "\n".join([f"-e {ROOT}[{EXTRAS}]", *within, *PINNED, *INSTALLERS])


def resolve(source: str, arguments: list[str]) -> list[str]:
    """The lines of a lock for every supported Python; versions of today's lock are kept where they can be."""
    if not (TOOLS / "bin" / "uv").is_file():
        venv.create(TOOLS, with_pip=True)
        subprocess.run([TOOLS / "bin" / "python", "-m", "pip", "install", "--quiet", "uv"], check=True)
    draft = TOOLS / "constraints.txt"
    draft.write_text(LOCK.read_text(encoding="utf-8"), encoding="utf-8")
    command = [TOOLS / "bin" / "uv", "pip", "compile", "-", "--output-file", draft, "--quiet", "--universal"]
    command += ["--python-version", "3.10", "--no-header", "--no-annotate", "--no-emit-index-url", *arguments]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    subprocess.run(command, input=source, text=True, check=True, cwd=ROOT, env=environment)
    return draft.read_text(encoding="utf-8").splitlines()


def main(arguments: list[str]) -> int:
    """Write the lock; returns the exit status."""
    lines = [line for line in resolve(requirements(), arguments) if not LEFT_OUT.match(line)]
    LOCK.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write(f"{LOCK.name}: {len(lines)} lines\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
