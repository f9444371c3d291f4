"""A user's own part: used by class and by name, saved with its file, loaded by whom the user trusts, else refused.

The parts are those of `docs/adding-a-part.md`, read from the page.
"""

import copy
import importlib
import shutil
import sys

import pytest
import torch

from builders.docs import ROOT
from builders.own_parts import CASES, PARTS, own_config, run_worker, save_cases
from builders.tiny import tiny_config, tiny_model, tiny_processor
from hires_lmm import HiResLmmConfig, HiResLmmImageProcessor
from hires_lmm.modeling import parts_hires_lmm as parts
from hires_lmm.training.settings import set_options


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """The folder of a user, with the file of the page, which is imported."""
    root = tmp_path_factory.mktemp("own")
    (root / "user").mkdir()
    (root / "user" / "my_parts.py").write_text(PARTS, encoding="utf-8")
    sys.path.insert(0, str(root / "user"))
    yield importlib.import_module("my_parts"), root
    sys.path.remove(str(root / "user"))
    sys.modules.pop("my_parts", None)


@pytest.fixture(scope="module")
def saved(user):
    """The checkpoints of all cases."""
    save_cases(user[1])
    return user[1]


@pytest.fixture(scope="module")
def without(saved):
    """A process that cannot import the package."""
    return run_worker(saved, "-")


@pytest.fixture(scope="module")
def with_package(saved, without):
    """A process that imports the package, and loads what the first one saved."""
    return run_worker(saved, str(ROOT / "src"), str(saved / "without"))


@pytest.fixture(params=["without", "with_package"])
def found(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_part_comes_back_with_its_numbers_trains_and_is_saved_again(found, case):
    result = found["cases"][case]
    assert result["same"] and result["tokens"] and result["trained"]
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    assert bool(result["modules"]) == (case != "planner")
    assert ("my_parts.Strips" in result["planner"]) == (case in ("planner", "all"))
    assert "my_parts.py" in result["files"] and "bases_hires_lmm.py" in result["files"]


def test_two_folders_with_different_code_live_in_one_process(found):
    assert found["two folders"] == [True, False, True]


def test_every_auto_class_reads_the_part_of_a_trusted_folder(without, with_package):
    for autos in (without["autos"], with_package["autos"]):
        assert autos["config"] == "my_parts.Strips" and autos["pipeline"] == "image-text-to-text"
        assert autos["load_parts"] == "HiResLmmForConditionalGeneration"
    assert without["autos"]["from_config"] == "HiResLmmForConditionalGeneration"
    assert "my_parts.Strips" in without["autos"]["image_processor"]
    for name in ("from_config", "image_processor"):  # there the library keeps the trust for itself
        assert "The part my_parts." in with_package["autos"][name] and "import my_parts" in with_package["autos"][name]


def test_the_prompt_decides_where_the_package_is_missing(without):
    assert without["prompt"]["y"].startswith("AveragePool") and "trust_remote_code=True" in without["prompt"]["n"]
    assert "trust_remote_code=True" in without["untrusted"]["processor"]


def test_without_trust_a_part_is_refused_by_name_though_the_package_is_there(with_package, saved):
    refused, package = with_package["untrusted"], with_package["package"]
    names = {"planner": "Strips", "view_op": "AveragePool", "adapter": "Bottleneck", "token_op": "MarkCrops"}
    names |= {"layer_op": "ScaleVisual", "processor": "Strips"}
    for case, name in names.items():
        assert refused[case].startswith(f"ValueError: The part my_parts.{name} is no part of hires_lmm"), case
        assert "trust_remote_code=True" in refused[case] and str(saved) in refused[case]
    for way, name in {"direct": "AveragePool", "image processor": "Strips"}.items():
        assert f"my_parts.{name}" in package[f"untrusted {way}"]
    assert package["direct"].startswith("AveragePool") and "Strips" in package["direct image processor"]


def test_the_users_own_import_stands_in_where_nothing_is_trusted(with_package):
    assert with_package["package"]["imported"] == [True, False, {"name": "my_parts.Strips", "strips": 3}]


def test_the_command_line_runs_and_exports_trusted_parts(with_package):
    package = with_package["package"]
    for refused in (package["export False"], package["ask False"]):
        assert "my_parts." in refused and "on the command line with --trust-remote-code" in refused
    assert "my_parts.py" in package["export True"] and package["ask True"] == "answered"


# ---- in this process


OTHERS = """from hires_lmm.modeling.bases_hires_lmm import HiResLmmHead, HiResLmmPositionPlan

class Head(HiResLmmHead):
    pass

class Plan(HiResLmmPositionPlan):
    pass
"""


@pytest.mark.parametrize("slot", parts.SLOTS)
def test_every_slot_takes_a_class_and_reads_it_from_the_folder(user, write, tmp_path, slot):
    others, own = write("others_of_test", OTHERS), user[0]
    classes = {"adapter": own.Bottleneck, "token_ops": own.MarkCrops, "layer_ops": own.ScaleVisual}
    part = {**classes, "position_plan": others.Plan, "heads": others.Head}.get(slot, own.AveragePool)
    spec = {"part": part, **({"token_id": 3} if slot == "heads" else {})}
    setting = [spec] if slot.endswith("_ops") else {"mine": spec} if slot == "heads" else spec
    given = tiny_config("llava_next", connector_config={slot: setting})
    name = f"{part.__module__}.{part.__name__}"
    assert name in given.to_json_string() and copy.deepcopy(given).token_layout() == given.token_layout()
    assert HiResLmmConfig(**given.to_dict()).token_layout() == given.token_layout()
    given.save_pretrained(tmp_path / "new")
    read = HiResLmmConfig.from_pretrained(tmp_path / "new")
    assert read.token_layout() == given.token_layout()  # by the import
    read.load_parts(trust_remote_code=True, source=tmp_path / "new")
    found = [each.part for each in read.part_names() if each == name]
    assert len(found) == 1 and found[0].__module__.startswith("transformers_modules.new.")


def test_a_class_of_a_notebook_works_and_is_refused_before_anything_is_written(user, tmp_path, monkeypatch):
    own = type("AveragePool", (user[0].AveragePool,), {"__module__": "__main__"})
    monkeypatch.setattr(sys.modules["__main__"], "AveragePool", own, raising=False)
    for part in (own, "__main__.AveragePool"):
        model = tiny_model(tiny_config("llava_next", connector_config={"view_ops": [{"part": part}]}))
        assert type(model.model.connector.view_ops[0]) is own
        for thing in (model, model.config):
            with pytest.raises(ValueError, match=r"__main__\.AveragePool cannot be saved.*my_parts\.py"):
                thing.save_pretrained(tmp_path / "new")
    planner = type("Strips", (user[0].Strips,), {"__module__": "__main__"})
    config = tiny_config("llava_next", planner={"name": planner})
    for thing in (tiny_processor(config), tiny_processor(config).image_processor):
        with pytest.raises(ValueError, match=r"__main__\.Strips cannot be saved"):
            thing.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match=r"The planner __main__\.Planner has no static method plan"):
        HiResLmmImageProcessor(planner=type("Planner", user[0].Strips.__bases__, {"__module__": "__main__"}))


def test_set_options_reaches_an_own_part(user, monkeypatch):
    monkeypatch.setattr(user[0].Bottleneck, "switches", ("rank",), raising=False)
    monkeypatch.setattr(user[0].Bottleneck, "rank", 8, raising=False)
    model = tiny_model(own_config("adapter"))
    set_options(model, {"connector.adapter.rank": 4})
    assert model.model.connector.adapter.rank == 4 == model.config.connector_config.adapter["rank"]
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        set_options(model, {"connector.adapter.rank": 0})


HEAD = "from hires_lmm.modeling.bases_hires_lmm import HiResLmmTokenOp\n"
CLASS = "class Mine(HiResLmmTokenOp):\n    def forward(self, tokens, question):\n        return tokens, question\n"
FILES = {  # what stands in the file -> what the refusal says
    "import hires_lmm\n": r"line 1 of (\w+)\.py has `import hires_lmm`; write `from hires_lmm\.modeling\.file import",
    "import hires_lmm.modeling.bases_hires_lmm as b\n": "`import hires_lmm.modeling.bases_hires_lmm as b`; write",
    "from hires_lmm import HiResLmmConfig\n": "`from hires_lmm import HiResLmmConfig`; write",
    "from hires_lmm.modeling import bases_hires_lmm\n": "`from hires_lmm.modeling import bases_hires_lmm`; write",
    "def f():\n    from hires_lmm.training import Stage\n": "line 2 of .*from hires_lmm.training import Stage",
    "x = 1; from hires_lmm.modeling.geometry_hires_lmm import Kind\n": "on a line of its own",
    "import helper_of_test\n": "`import helper_of_test`; write `from file import name`",
    "import package_of_test.helpers\n": r"line 1 of mine_of_test\.py has `import package_of_test\.helpers`; 'pack",
    "from package_of_test import helpers\n": "'package_of_test' is no installed package.*`from .file import name`",
    "from package_of_test.sub.h import f\n": "`from package_of_test.sub.h import f`; .* or install it as a package",
    '"""\nfrom .nowhere import x\n"""\n': r"a line `from \.nowhere import`, but there is no nowhere\.py",
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes modules of a user's and imports them for the time of a test."""
    monkeypatch.syspath_prepend(tmp_path / "user")

    def write_module(name: str, text: str):
        file = tmp_path / "user" / f"{name.replace('.', '/')}.py"
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(text, encoding="utf-8")
        importlib.invalidate_caches()
        monkeypatch.setitem(sys.modules, name, None)  # what is there afterwards is taken out again
        del sys.modules[name]
        return importlib.import_module(name)

    return write_module


def config_of(*parts) -> HiResLmmConfig:
    return tiny_config("llava_next", connector_config={"token_ops": [{"part": part} for part in parts]})


@pytest.mark.parametrize("line", FILES)
def test_a_file_that_could_not_be_read_elsewhere_is_refused(tmp_path, write, line):
    for name in ("helper_of_test", "package_of_test.helpers", "package_of_test.sub.h"):
        write(name, "f = 1\n")
    module = write(
        "package_of_test.mine_of_test" if "package_of_test" in line else "mine_of_test", line + HEAD + CLASS
    )
    with pytest.raises(ValueError, match=r"The part mine_of_test\.Mine cannot be saved") as caught:
        config_of(module.Mine).save_pretrained(tmp_path / "new")
    assert caught.match(FILES[line]) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("package", ["", "package_of_test."])
def test_files_beside_the_part_come_along(tmp_path, write, package):
    write(f"{package}helper_of_test", "from hires_lmm.modeling.geometry_hires_lmm import Kind\n")
    write(f"{package}mine_of_test", f"from {package}helper_of_test import Kind\n{HEAD}{CLASS}")
    config_of(f"{package}mine_of_test.Mine").save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "mine_of_test.py").read_text() == (
        "from .helper_of_test import Kind\nfrom .bases_hires_lmm import HiResLmmTokenOp\n" + CLASS
    )
    assert (tmp_path / "new" / "helper_of_test.py").read_text() == "from .geometry_hires_lmm import Kind\n"
    assert (tmp_path / "new" / "geometry_hires_lmm.py").is_file()


def test_imports_of_installed_packages_stay(tmp_path, write):
    lines = "import os.path, torch.nn\nfrom numpy import ndarray\nfrom huggingface_hub.dataclasses import strict\n"
    config_of(write("mine_of_test", f"{lines}{HEAD}{CLASS}").Mine).save_pretrained(tmp_path / "new")
    assert (tmp_path / "new" / "mine_of_test.py").read_text().startswith(lines)


def test_a_class_whose_name_does_not_lead_to_its_file_is_refused(tmp_path, write, monkeypatch):
    monkeypatch.setitem(sys.modules, "init_of_test", None)
    del sys.modules["init_of_test"]
    write("init_of_test.__init__", HEAD + CLASS)
    module = sys.modules["init_of_test"]
    with pytest.raises(ValueError, match=r"init_of_test\.Mine cannot be saved: its class stands in __init__\.py"):
        config_of(module.Mine).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_two_files_of_one_name_are_refused(tmp_path, write):
    parts = [
        write(f"{folder}.mine_of_test", f"# {folder}\n{HEAD}{CLASS}").Mine for folder in ("a_of_test", "b_of_test")
    ]
    with pytest.raises(ValueError, match=r"two different files would be saved as mine_of_test\.py; rename one"):
        config_of(*parts).save_pretrained(tmp_path / "new")
    with pytest.raises(ValueError, match=r"mine_of_test\.Mine is no part of hires_lmm"):  # which of the two?
        config_of("mine_of_test.Mine").load_parts()


BAD_SETTINGS = {  # a token op -> what the refusal says
    "my_parts.AveragePool": r"The part my_parts\.AveragePool does not fit here: derive it from HiResLmmTokenOp",
    "my_parts.Strips": r"The part my_parts\.Strips does not fit here",
    "owner/name--my_parts.MarkCrops": "names no part of your own: give the class, or the name of its file and class",
    "a.b.my_parts.MarkCrops": "names no part of your own",
    "../my_parts.MarkCrops": "names no part of your own",
    "routers_hires_lmm.HiResLmmRouter": "does not end in _hires_lmm",
    "mark_crops": "names the unknown part 'mark_crops'; known parts of this slot: router, .*or a class of your",
    torch.nn.Linear: r"linear\.Linear is no part: derive it from",
    3: "names the unknown part 3",
}


@pytest.mark.parametrize("part", BAD_SETTINGS)
def test_what_is_no_part_of_the_slot_is_refused_when_the_configuration_is_made(user, part):
    with pytest.raises(ValueError, match=BAD_SETTINGS[part]):
        config_of(part)


def test_a_name_that_is_nowhere_is_refused_when_it_is_asked_for(tmp_path):
    config = config_of("no_such_file.Part")  # its folder may bring it
    for ask in (config.token_layout, config.load_parts, lambda: tiny_model(config), lambda: tiny_processor(config)):
        with pytest.raises(ValueError, match=r"The part no_such_file\.Part is no part of hires_lmm"):
            ask()
    with pytest.raises(ValueError, match=r"no_such_file\.Part"):
        config.save_pretrained(tmp_path / "new")
    for source, words in ((tmp_path, "There is no such file"), (None, "import no_such_file first")):
        with pytest.raises(ValueError, match=words):
            config.load_parts(trust_remote_code=True, source=source)
    (tmp_path / "no_such_file.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"The part no_such_file\.Part cannot be read from .* correct the file"):
        config.load_parts(trust_remote_code=True, source=tmp_path)
    config.save_pretrained(tmp_path)  # where its file is
    for planner in ("no_such_file.Part", {"name": "no_such_file.Part"}):
        with pytest.raises(ValueError, match=r"The part no_such_file\.Part is no part of hires_lmm"):
            HiResLmmImageProcessor(planner=planner)


def test_a_processor_saved_alone_carries_its_planner(user, tmp_path):
    config = own_config("planner")
    processor = tiny_processor(config)
    assert processor.image_processor.image_tokens(100, 180, planner=user[0].Strips) != processor.image_tokens(100, 180)
    for name, thing in {"whole": processor, "images": processor.image_processor}.items():
        thing.save_pretrained(tmp_path / name)
        assert "from .planners_hires_lmm import" in (tmp_path / name / "my_parts.py").read_text()
        again = HiResLmmImageProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert again.image_tokens(100, 180) == processor.image_tokens(100, 180)
        assert type(again.planner["name"].part) is type and again.planner["name"].part is not user[0].Strips


@pytest.mark.parametrize("push", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_sends_what_is_saved(user, hub, tmp_path, push):
    config = own_config("all")
    processor = tiny_processor(config)
    for number, thing in enumerate((tiny_model(config), config, processor, processor.image_processor)):
        if push == "push_to_hub":
            thing.push_to_hub("someone/tiny")
        else:
            thing.save_pretrained(str(tmp_path / str(number)), push_to_hub=True, repo_id="someone/tiny")
        assert (hub / "my_parts.py").read_text().count("from .") == 3
        shutil.rmtree(hub)
        hub.mkdir()
