"""Get the tests of the installed transformers from its source distribution into `.cache/upstream`."""

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path


CACHE = Path(__file__).resolve().parents[3] / ".cache" / "upstream"
SITE = CACHE / "site"  # what the tests import and neither transformers nor this project installs
NEEDED = "parameterized==0.9.0"


def suite_folder() -> Path:
    """The folder of the unpacked test files that belong to the installed transformers; it may not exist yet."""
    return CACHE / f"transformers-{version('transformers')}"


def run_pip(*arguments: str) -> None:
    """Run pip of this environment; end with what it said if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        wanted = " ".join(argument for argument in arguments if "==" in argument)
        raise SystemExit(
            f"pip could not get {wanted}. `make test-upstream` needs a package index once for each version of "
            f"transformers; without a network, run it where {CACHE} is filled. pip said:\n{done.stderr.strip()}"
        )


def unpack(archive: Path, target: Path) -> None:
    """Take `tests/*.py` out of a source distribution, after looking that it is of the wanted version."""
    with tarfile.open(archive) as files:
        roots = {name.split("/")[0] for name in files.getnames()}
        if roots != {target.name}:
            raise SystemExit(f"{archive.name} holds {sorted(roots)}, expected {target.name}; is the index in order?")
        wanted = [member for member in files.getmembers() if Path(member.name).match(f"{target.name}/tests/*.py")]
        if not wanted:
            raise SystemExit(f"{archive.name} has no tests; run with a version of transformers that ships them.")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            files.extractall(folder, wanted, filter="data")
            (Path(folder) / target.name / "tests").rename(target)


def fetch() -> Path:
    """Download and unpack what is missing; returns the folder of test files."""
    CACHE.mkdir(parents=True, exist_ok=True)
    if not (SITE / "parameterized").is_dir():
        run_pip("install", "--no-deps", "--target", str(SITE), NEEDED)
    target = suite_folder()
    if not target.is_dir():
        print(f"getting the source distribution of {target.name}")
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            wanted = f"transformers=={version('transformers')}"
            run_pip("download", "--no-deps", "--no-binary", "transformers", "--dest", folder, wanted)
            unpack(next(Path(folder).glob("transformers-*.tar.gz")), target)
    return target


if __name__ == "__main__":
    fetch()
