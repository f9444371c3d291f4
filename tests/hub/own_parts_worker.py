"""Loads checkpoints with parts of a user's own in one fresh process: `python -I own_parts_worker.py SRC ROOT`.

SRC is `-` for "no package". ROOT holds the folders of `test_own_parts.py`; a JSON object goes into `ROOT/SRC-or-out`.
"""

import builtins
import json
import sys
from pathlib import Path


class Blocker:
    """Makes `import hires_lmm` fail, however the package may be installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hires_lmm":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by the test)", name=name)


SRC, ROOT, OUT = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
if SRC == "-":
    sys.meta_path.insert(0, Blocker())
else:
    sys.path.insert(0, SRC)

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    pipeline,
)


if SRC != "-":
    import hires_lmm

TRUST = {"trust_remote_code": True}
load = AutoModelForImageTextToText.from_pretrained


def attempt(call) -> str:
    """What came out, or the error."""
    try:
        return str(call())
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def own_modules(model) -> list:
    return [module for module in model.modules() if type(module).__module__.endswith("my_parts")]


@torch.no_grad()
def logits_of(model, case: str) -> torch.Tensor:
    return model(**torch.load(ROOT / f"{case}.pt", weights_only=True)["batch"]).logits


def check_case(case: str, folder: Path) -> dict:
    """Numbers, a step of training, and the folder that is saved here."""
    reference = torch.load(ROOT / f"{case}.pt", weights_only=True)
    model, processor = load(folder, **TRUST), AutoProcessor.from_pretrained(folder, **TRUST)
    found = {
        "same": torch.equal(logits_of(model, case), reference["logits"]),
        "tokens": processor.image_tokens(100, 180) == reference["image_tokens"],
        "modules": sorted({type(module).__module__ for module in own_modules(model)}),
        "planner": str(processor.image_processor.planner),
    }
    model.save_pretrained(OUT / case)
    processor.save_pretrained(OUT / case)
    found["files"] = sorted(path.name for path in (OUT / case).iterdir())
    parameters = [parameter for module in own_modules(model) for parameter in module.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    model.train()(**reference["batch"], labels=reference["batch"]["input_ids"]).loss.backward()
    torch.optim.SGD(parameters or model.parameters(), lr=1.0).step()
    found["trained"] = all(not torch.equal(*pair) for pair in zip(before, parameters, strict=True))
    return found


def check_two_folders() -> list[bool]:
    """Two folders of one name with different code, in turn."""
    first, second = load(ROOT / "view_op", **TRUST), load(ROOT / "other" / "view_op", **TRUST)
    numbers = [logits_of(model, "view_op") for model in (first, second, load(ROOT / "view_op", **TRUST))]
    wanted = torch.load(ROOT / "view_op.pt", weights_only=True)["logits"]
    return [torch.equal(each, wanted) for each in numbers]


def check_prompt() -> dict[str, str]:
    """What transformers asks where the package is missing, answered with yes and with no."""
    found = {}
    for answer in ("y", "n"):
        builtins.input = lambda text, answer=answer: answer
        found[answer] = attempt(lambda: own_modules(load(ROOT / "view_op"))[0])
    return found


def check_autos() -> dict[str, str]:
    """The ways to a part besides the two Auto classes."""
    config = AutoConfig.from_pretrained(ROOT / "planner", **TRUST)
    found = {
        "config": attempt(lambda: config.planner["name"]),
        "from_config": attempt(lambda: type(AutoModelForImageTextToText.from_config(config, **TRUST)).__name__),
        "image_processor": attempt(lambda: AutoImageProcessor.from_pretrained(ROOT / "planner", **TRUST).planner),
        "pipeline": attempt(lambda: pipeline("image-text-to-text", str(ROOT / "planner"), **TRUST).task),
    }
    config.load_parts(trust_remote_code=True)
    found["load_parts"] = attempt(lambda: type(AutoModelForImageTextToText.from_config(config, **TRUST)).__name__)
    return found


def check_package() -> dict:
    """What depends on the package: classes by name, the user's own import, a class of this script."""
    from typer.testing import CliRunner

    from hires_lmm.cli import app

    own, direct = hires_lmm.HiResLmmImageProcessor, hires_lmm.HiResLmmForConditionalGeneration
    found = {
        "direct": attempt(lambda: own_modules(direct.from_pretrained(ROOT / "view_op", **TRUST))[0]),
        "direct image processor": attempt(lambda: own.from_pretrained(ROOT / "planner", **TRUST).planner),
        "untrusted direct": attempt(lambda: direct.from_pretrained(ROOT / "view_op")),
        "untrusted image processor": attempt(lambda: own.from_pretrained(ROOT / "planner")),
    }
    for trusts in (False, True):
        options = ["--trust-remote-code"] if trusts else []
        done = CliRunner().invoke(app, ["export", str(ROOT / "all"), str(OUT / f"exported-{trusts}"), *options])
        found[f"export {trusts}"] = done.output if done.exit_code else sorted(p.name for p in OUT.glob("exported-*/*"))
        picture = [str(ROOT / "image.png"), "-q", "Why?", "--max-new-tokens", "1"]
        done = CliRunner().invoke(app, ["ask", str(ROOT / "all"), *picture, *options])
        found[f"ask {trusts}"] = done.output if done.exit_code else "answered"
    sys.path.insert(0, str(ROOT / "user"))
    import my_parts

    found["imported"] = [
        type(own_modules(load(ROOT / "view_op"))[0]) is my_parts.AveragePool,
        type(own_modules(load(ROOT / "view_op", **TRUST))[0]) is my_parts.AveragePool,
        AutoProcessor.from_pretrained(ROOT / "planner").image_processor.planner,
    ]
    return found


def main() -> None:
    """Run all checks; the folders come from the package, or from a process that had none."""
    torch.set_num_threads(1)
    cases = sorted(path.stem for path in ROOT.glob("*.pt"))
    found: dict = {"untrusted": {case: attempt(lambda case=case: load(ROOT / case)) for case in cases if SRC != "-"}}
    found["untrusted"]["processor"] = attempt(lambda: AutoProcessor.from_pretrained(ROOT / "planner"))
    found |= {"cases": {}, "autos": check_autos()}
    for case in cases:
        source = ROOT / case if SRC == "-" else Path(sys.argv[4]) / case
        found["cases"][case] = check_case(case, source)
    found["two folders"] = check_two_folders()
    found |= {"prompt": check_prompt()} if SRC == "-" else {"package": check_package()}
    (OUT / "found.json").write_text(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
