"""Install packages at the versions of constraints.txt and say how far it is; run by the Makefile.

    python scripts/install.py ARGUMENT ...            as for `pip install`
    python scripts/install.py --torch [--index URL]   torch alone, without what it requires

Without an index torch comes from pip's own, unless its torch brings CUDA along, gigabytes of it, as on Linux it does:
then the build for CPUs comes from PyTorch's index.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path


LOCK = Path(__file__).resolve().parents[1] / "constraints.txt"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
PIP += ["--constraint", str(LOCK), "--build-constraint", str(LOCK)]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
REMEDY = "Name an index that has torch for this machine: TORCH_INDEX=URL of the Makefile, --index here."


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


def brings_cuda() -> bool:
    """Whether torch of pip's own index would bring packages of CUDA along; found without downloading any."""
    done = subprocess.run([*PIP, "--quiet", "--dry-run", "--report", "-", "torch"], capture_output=True, text=True)
    if done.returncode:  # installing fails in the same way, and says so
        return False
    names = [package["metadata"]["name"] for package in json.loads(done.stdout)["install"]]
    return any(name.startswith(("nvidia-", "cuda-")) for name in names)


def install_torch(index: str) -> int:
    """Install torch alone: an index of torch need not have the locked versions of the rest."""
    if not index and brings_cuda():
        index = CPU_INDEX
        sys.stdout.write(f"   the build for CPUs, from {index} (another: TORCH_INDEX=URL)\n")
    chosen = ["--force-reinstall", "--index-url", index] if index else []
    status = install(["--no-deps", *chosen, "torch"])
    if status:
        sys.stdout.write(REMEDY + "\n")
    return status


def main(arguments: list[str]) -> int:
    """Install; returns the exit status."""
    if arguments[:1] != ["--torch"]:
        return install(arguments)
    return install_torch(arguments[2] if arguments[1:2] == ["--index"] else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
