"""Random choices that follow from a seed and the number of a case alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw(random.Random):
    def __init__(self, seed: int, number: int) -> None:
        super().__init__(f"{seed}/{number}")  # a string is hashed as a whole, so that neighbours have nothing in common

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return self.choice(options)

    def weighted(self, weights: dict[T, float]) -> T:
        return self.choices(list(weights), list(weights.values()))[0]
