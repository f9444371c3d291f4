"""Recipes speak of activation checkpointing, whatever the installed transformers calls it."""

import warnings
from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from hires_lmm.training.arguments import build_arguments


RECIPES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))
ON_CPU = {"use_cpu": True, "bf16": False}
OLD_NAME = "gradient_checkpointing"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_arguments_of_every_recipe_are_known_and_none_is_deprecated(path, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    assert OLD_NAME not in path.read_text()
    for values in [{}, *recipe.get("stage_arguments", {}).values()]:
        asked = {**recipe.get("arguments", {}), **values}
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)
            args = build_arguments(tmp_path, **{**asked, **ON_CPU})
        name = "activation_checkpointing" if hasattr(args, "activation_checkpointing") else OLD_NAME
        assert getattr(args, name) == asked.get("activation_checkpointing", False)
        wanted = {"use_reentrant": False} if "activation_checkpointing" in asked else None
        assert getattr(args, f"{name}_kwargs") == wanted


def test_other_fields_are_passed_as_they_are(tmp_path):
    args = build_arguments(tmp_path, learning_rate=0.5, use_cpu=True)
    assert isinstance(args, TrainingArguments) and args.learning_rate == 0.5 and not args.remove_unused_columns
    with pytest.raises(TypeError, match="no_such_field"):
        build_arguments(tmp_path, no_such_field=1)
