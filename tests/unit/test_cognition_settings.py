"""Cognition alignment from the plain values of a recipe."""

import numpy as np
import pytest

from builders.training import conversation
from hires_lmm.training import get_plan
from hires_lmm.training.data.cognition import (
    TASK_KEYS,
    CodebookTask,
    CognitionTransform,
    PixelTask,
    build_cognition,
    cache_codes,
)


class Levels:
    """Eight grey levels on 2 x 2 cells."""

    num_codes, grid = 8, (2, 2)

    def __call__(self, images):
        return np.stack([np.asarray(image.convert("L").resize((2, 2)), dtype=np.int64) // 32 for image in images])


def test_settings_build_the_same_transform(tmp_path):
    rows = [conversation(number) for number in range(12)]
    cache = cache_codes(Levels(), [row["images"] for row in rows], tmp_path, show_progress=False)
    settings = {
        "pixels": {"rate": 0.7, "grid": [2, 3]},
        "codebook": {"rate": 0.6, "cache": str(tmp_path), "block": [1, 2]},
        "seed": 5,
        "places": "after",
    }
    direct = CognitionTransform({PixelTask((2, 3)): 0.7, CodebookTask(cache, (1, 2)): 0.6}, seed=5, places="after")
    built = build_cognition(settings)
    found = [built(row)["messages"] for row in rows]
    assert found == [direct(row)["messages"] for row in rows]
    assert found != [build_cognition({**settings, "seed": 6})(row)["messages"] for row in rows]
    assert {len(messages) for messages in found} == {2, 4, 6}


def test_the_rates_of_a_stage_go_before_those_of_the_settings(tmp_path):
    rows = [conversation(number) for number in range(3)]
    settings = {"pixels": {"rate": 0.0, "grid": [1, 1]}, "codebook": {"cache": "nowhere"}}
    built = build_cognition(settings, rates={"pixels": 1.0})
    expected = CognitionTransform({PixelTask((1, 1)): 1.0})
    assert [built(row) for row in rows] == [expected(row) for row in rows] != rows
    assert [task.grid for task in build_cognition({}, rates={"pixels": 0.5}).rates] == [(4, 4)]
    for stage in get_plan("vlsa") + get_plan("vlsa_cognition", "llama3_8b"):
        assert set(stage.cognition or {}) <= set(TASK_KEYS)
    with pytest.raises(ValueError, match="name either cache"):
        build_cognition({}, rates={"codebook": 0.5})
    with pytest.raises(ValueError, match="unknown key 'colour'; keys are pixels, codebook"):
        build_cognition({}, rates={"colour": 0.5})
