"""The cases that tests of the CUDA kernels are made of."""

import pathlib

import harness
import numpy as np
from expectation import mismatch
from harness import ASYMMETRIC, FLAT, FLOATING, FOCAL, LOGITS, PROBABILITIES, Array, Case, Operand

TYPE_PAIRS = [("float", "float"), ("double", "double"), ("half", "bool"), ("bfloat16", "float"), ("float", "int64")]
THREADS = 256
# What the losses are called with when nothing is said: alpha, gamma; gamma_neg, gamma_pos, clip, eps, detached.
PARAMETERS = {FOCAL: (0.25, 2.0), ASYMMETRIC: (4.0, 1.0, 0.05, 1e-8, 0.0)}


def vector_size(input_dtype: str, target_dtype: str) -> int:
    return 16 // max(harness.itemsize(input_dtype), harness.itemsize(target_dtype))


def make_input(rng: np.random.Generator, dtype: str, numel: int, formula: int = LOGITS) -> Operand:
    values = rng.normal(0, 4, numel) if formula != PROBABILITIES else rng.uniform(0.01, 0.99, numel)
    return Operand(dtype, FLAT, values)


def make_target(rng: np.random.Generator, dtype: str, numel: int) -> Operand:
    return Operand(dtype, FLAT, rng.uniform(0, 1, numel) if dtype in FLOATING else rng.integers(0, 2, numel))


def weights(rng: np.random.Generator, numel: int) -> Array:
    return rng.uniform(0.5, 2, numel)


def make_case(rng: np.random.Generator, pair: tuple[str, str], sizes: tuple[int, ...], formula: int = LOGITS) -> Case:
    """Loss and gradient as the host code asks for them; in `none` mode too, so that every output is looked at."""
    input_dtype, target_dtype = pair
    numel = int(np.prod(sizes))
    total = np.promote_types("float16" if input_dtype == "bfloat16" else harness.STORAGE[input_dtype], "float16")
    return Case(
        sizes,
        make_input(rng, input_dtype, numel, formula),
        make_target(rng, target_dtype, numel),
        formula=formula,
        parameters=PARAMETERS.get(formula, ()),
        divisor=float(numel),
        loss="float" if (input_dtype, target_dtype) == ("bfloat16", "float") else input_dtype,
        grad_input=input_dtype,
        grad_target=target_dtype if target_dtype in FLOATING else None,
        total="float" if total == np.float16 else str(total).replace("64", "").replace("32", ""),
    )


def check(program: pathlib.Path, cases: list[Case], vectorized: bool | None = None) -> list[harness.Result]:
    results = harness.run(program, cases)
    for case, result in zip(cases, results, strict=True):
        if wrong := mismatch(case, result):
            raise AssertionError(wrong)
        assert vectorized is None or case.numel == 0 or result.vectorized == vectorized
    return results


def sizes_around_everything(pair: tuple[str, str]) -> list[int]:
    """Around the vector, the warp, the block, the tile, and a grid of two blocks that walk several tiles each."""
    vector = vector_size(*pair)
    tile = THREADS * vector * 2
    edges = [vector, 2 * vector, 32, 32 * vector, THREADS, THREADS * vector, tile, 2 * tile, 5 * tile]
    return sorted({max(edge + off, 0) for edge in [0, *edges] for off in (-1, 0, 1)})


# Sizes and strides of the walk for everything that a weight broadcasts from, beside (N, C) and (N, C, H, W) logits.
# Each is more than the tile of every pair of types, so that vectors are read.
LAYOUTS = {
    "classes": ((80, 64), (0, 1)),
    "classes_odd": ((80, 63), (0, 1)),
    "channels": ((6, 14, 64), (0, 1, 0)),
    "channels_odd": ((6, 14, 31), (0, 1, 0)),
    "samples": ((80, 64), (1, 0)),
    "pixels": ((6, 10, 64), (64, 0, 1)),
    "pixels_odd": ((6, 10, 61), (61, 0, 1)),
    "transposed": ((80, 64), (1, 80)),
    "every_other": ((80, 64), (128, 2)),
    "short_rows": ((4001, 1), (1, 0)),
    "four_dimensions": ((4, 6, 8, 16), (8, 0, 1, 0)),
    "four_dimensions_contiguous": ((4, 6, 8, 16), (0, 16, 0, 1)),
}
