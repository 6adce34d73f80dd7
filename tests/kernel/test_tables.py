"""The tables of csrc/tables.h, against float64."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCE = (CSRC / "tables.h").read_text()
PLACE_OF_ONE = int(re.search(r"kPlaceOfOne = (\d+)", SOURCE)[1])
# The end of the interval at each place, of numbers from sqrt(1/2) to sqrt(2).
ENDS = [(1 + (place + 14) / 32) / 2 if place < PLACE_OF_ONE else 1 + (place - PLACE_OF_ONE) / 32 for place in range(32)]


def table(name: str) -> np.ndarray:
    """The float32 numbers of a table, exactly, as float64."""
    numbers = re.search(rf"Table {name} = \{{(.*?)\}}", SOURCE, re.DOTALL)[1]
    return np.array([np.float32(number.strip().removesuffix("f")) for number in numbers.split(",")], dtype=np.float64)


def test_powers_are_rounded_from_float64() -> None:
    assert table("kPowers").tolist() == [float(np.float32(2 ** (j / 32))) for j in range(32)]


def test_every_number_is_near_the_one_that_stands_for_its_interval() -> None:
    begins = [ENDS[place] - (1 / 64 if place <= PLACE_OF_ONE else 1 / 32) for place in range(32)]
    rest = np.abs(np.multiply([begins, ENDS], table("kReciprocals")) - 1)
    assert rest.max() <= 1 / 64


def test_logarithms_are_those_of_the_reciprocals() -> None:
    reciprocals, logs = table("kReciprocals"), table("kLogs")
    errors = np.abs(np.log(reciprocals) + logs)
    after_one = PLACE_OF_ONE + 1  # its interval begins at 1, where what counts is the absolute error
    assert errors[after_one] <= 2**-30
    assert np.all(np.delete(errors, after_one) <= 2**-28 * np.abs(np.delete(logs, after_one)))


def test_logarithms_add_to_those_of_powers_of_two_without_rounding() -> None:
    # kLn2High is a multiple of 2^-15, and float32 has 24 bits: multiples of 2^-17 up to 128
    assert np.all(table("kLogs") * 2**17 % 1 == 0)
    high = float(np.float32(re.search(r"float kLn2High = ([\d.]+)f", (CSRC / "number.h").read_text())[1]))
    assert high * 2**15 % 1 == 0
    assert 149 * high + 0.35 < 128  # the least number with a logarithm is 2^-149


def test_the_logarithm_of_one_is_zero() -> None:
    assert (table("kReciprocals")[PLACE_OF_ONE], table("kLogs")[PLACE_OF_ONE]) == (1, 0)
