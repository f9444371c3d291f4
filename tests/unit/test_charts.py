"""What a model wrote about a chart against what its head read."""

import json
import math

import pytest
import torch

from hires_lmm.charts import check_numbers, read_numbers


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({"a": 3, "b": 4.5, "c": -1}, [3.0, 4.5, -1.0]),
        ({"2019": {"x": "12.5%", "y": "$1,200"}, "2020": {"x": "7 [1]", "y": "-3"}}, [12.5, 1200.0, 7.0, -3.0]),
        ({"a": "none", "b": "-", "c": ""}, []),
        ({"a": [1, 2], "b": 3}, []),
        ({"a": None}, []),
    ],
)
def test_numbers_stand_in_the_order_of_the_answer(values, numbers):
    answer = {"title": "Ferries 2024", "values": values}
    assert read_numbers(answer) == read_numbers(json.dumps(answer)) == numbers


@pytest.mark.parametrize("answer", ["{", "[1, 2]", "3", "", {"title": "x"}, {"values": 3}])
def test_an_answer_of_another_form_has_none(answer):
    assert read_numbers(answer) == []


def test_the_distance_is_that_of_normalised_numbers():
    """(2, 8, 5) lies at (0, 1, 1/2)."""
    near = torch.tensor([0.1, 0.9, 0.5, 33.0])
    found = check_numbers([2, 8, 5], near)
    assert found.distance == pytest.approx(0.2 / 3, abs=1e-6) and found.reliable
    assert not check_numbers([2, 8, 5], near + 0.2).reliable
    assert check_numbers([2, 8, 5], near + 0.02, threshold=0.01).reliable is False
    assert check_numbers([4, 4], torch.zeros(4)) == (0.0, True)  # no range: all at 0
    assert check_numbers([0, 1, 3], [0.0, 0.3333, 1.0]).distance < 1e-9  # four digits
    assert check_numbers([0.3], torch.tensor([0.5])).distance == pytest.approx(0.2)  # one number stays as it is


def test_what_cannot_be_compared_is_not_reliable():
    found = check_numbers([], torch.zeros(4))
    assert math.isnan(found.distance) and not found.reliable
    assert not check_numbers([1.0, 2.0], torch.tensor([float("nan"), 1.0])).reliable


def test_the_first_hundred_numbers_count():
    numbers, read = [float(n % 7) for n in range(130)], torch.tensor([(n % 7) / 6 for n in range(256)])
    assert check_numbers(numbers, read).distance < 1e-4
    read[100:] = 9.0
    assert check_numbers(numbers, read).distance < 1e-4
    assert check_numbers(numbers, read[:50]).reliable  # a head of fewer slots


def test_powers_of_ten_missing_values_and_the_token_of_the_head():
    assert read_numbers('<Number> {"values": {"a": "-3.5e2", "b": null, "c": "n/a", "d": "12.5%"}}') == [-350.0, 12.5]
