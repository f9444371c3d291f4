"""Install packages at the versions of constraints.txt and say how far it is; run by the Makefile.

    python scripts/install.py ARGUMENT ...            as for `pip install`
    python scripts/install.py --torch [--index URL]   torch alone, without what it requires

Without an index torch is what pip finds by its own settings, such as a build for CPUs; where it finds the plain build
alone, which on Linux brings gigabytes of CUDA along, the build for CPUs comes from PyTorch's index.
"""

import json
import re
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path


LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
PIP += ["--constraint", str(LOCK), "--build-constraint", str(LOCK)]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
LOCKED_TORCH = re.findall(r"^torch==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)[0]


class Progress:
    """Tells from the lines of pip how far it is: one line, rewritten in place on a terminal."""

    def __init__(self) -> None:
        self.start, self.shown = time.monotonic(), 0.0
        self.packages, self.megabytes = 0, 0.0
        self.now = ""

    def read(self, line: str) -> None:
        """Take in one line of `pip install --progress-bar raw`."""
        if found := re.match(r"Progress (\d+) of (\d+)", line):
            self.now = f"{self.now.split(':')[0]}: {int(found[1]) / 1e6:.0f} of {int(found[2]) / 1e6:.0f} MB"
        elif found := re.match(r"(?:Collecting|Processing) (\S+)", line):
            self.packages, self.now = self.packages + 1, Path(found[1]).name
            self.megabytes += Path(found[1]).stat().st_size / 1e6 if Path(found[1]).is_file() else 0
        elif found := re.match(r"\s+(?:Downloading|Using cached) \S+ \((\S+) (kB|MB|GB)\)", line):
            self.megabytes += float(found[1]) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[found[2]]
        elif found := re.match(r"Installing collected packages: (.*)", line):
            self.packages = len(found[1].split(", "))
            plural = "s" if self.packages > 1 else ""
            self.say(f"   unpacking {self.packages} package{plural}, {self.megabytes:.0f} MB")
            self.now = ""
        if self.now and sys.stdout.isatty() and time.monotonic() - self.shown > 0.2:
            self.shown = time.monotonic()
            sys.stdout.write(f"\r\033[K   {self.packages} packages, {self.megabytes:.0f} MB; {self.now}")
            sys.stdout.flush()

    def say(self, line: str) -> None:
        """Write a line that stays."""
        sys.stdout.write(("\r\033[K" if sys.stdout.isatty() else "") + line + "\n")
        sys.stdout.flush()


def install(arguments: list[str]) -> int:
    """Run `pip install`; what it wrote is shown where it fails. Returns its exit status."""
    progress, lines = Progress(), []
    command = [*PIP, "--progress-bar", "raw", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout or ():
            progress.read(line)
            if not line.startswith("Progress "):
                lines.append(line)
    if pip.returncode:
        progress.say("".join(lines[-40:]))
    else:
        progress.say(f"   done in {time.monotonic() - progress.start:.0f} s")
    return pip.returncode


def chosen_index() -> str:
    """An index for torch where pip's own has the plain build alone, which on Linux is the one with CUDA; else none."""
    command = [sys.executable, "-m", "pip", "index", "versions", "torch", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    known = json.loads(done.stdout)["versions"] if done.returncode == 0 else []
    is_plain = LOCKED_TORCH in known and not any(name.startswith(f"{LOCKED_TORCH}+") for name in known)
    return CPU_INDEX if is_plain and sys.platform == "linux" else ""


def install_torch(index: str) -> int:
    """Install torch alone: an index of torch need not have the locked versions of the rest."""
    installed = {each.version.split("+")[0] for each in distributions(name="torch")}
    if not index and LOCKED_TORCH in installed:
        return 0
    index = index or chosen_index()
    if index:
        sys.stdout.write(f"   from {index}\n")
    status = install(["--no-deps", *(["--force-reinstall", "--index-url", index] if index else []), "torch"])
    if status:
        sys.stdout.write("Name an index that has torch for this machine: make setup TORCH_INDEX=URL\n")
    return status


def main(arguments: list[str]) -> int:
    """Install; returns the exit status."""
    if arguments[:1] != ["--torch"]:
        return install(arguments)
    return install_torch(arguments[2] if arguments[1:2] == ["--index"] else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
