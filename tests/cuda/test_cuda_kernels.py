"""The CUDA kernels, executed without a GPU: the very same headers, compiled as C++ against the shim of this folder."""

import dataclasses
import itertools
import pathlib
import re
import shutil
import subprocess

import harness
import numpy as np
import pytest
from cases import (
    LAYOUTS,
    TYPE_PAIRS,
    check,
    make_case,
    sizes_around_everything,
    weights,
)
from harness import ABSENT, FLAT, FLOATING, LOGITS, PROBABILITIES, SCALAR, STRIDED, Case, Operand


@pytest.mark.parametrize("pair", TYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize("weighted", [False, True])
def test_sizes(program: pathlib.Path, pair: tuple[str, str], weighted: bool) -> None:
    rng = np.random.default_rng(0)
    cases = []
    for numel in sizes_around_everything(pair):
        case = dataclasses.replace(make_case(rng, pair, (numel,)), max_blocks=2)
        if weighted:
            case.weight = Operand(pair[0], FLAT, weights(rng, numel))
        cases.append(case)
    check(program, cases, vectorized=True)


def test_sizes_of_the_generic_kernel(program: pathlib.Path) -> None:
    rng = np.random.default_rng(1)
    check(
        program,
        [
            dataclasses.replace(make_case(rng, ("float", "int16"), (numel,)), max_blocks=2)
            for numel in sizes_around_everything(("half", "half"))
        ],
        vectorized=False,
    )


@pytest.mark.parametrize("formula", [LOGITS, PROBABILITIES])
def test_all_dtype_pairs(program: pathlib.Path, formula: int) -> None:
    rng = np.random.default_rng(2)
    pairs = itertools.product(FLOATING, harness.DTYPES)
    check(program, [make_case(rng, pair, (2500,), formula) for pair in pairs])


@pytest.mark.parametrize("name", ["weight", "pos_weight", "grad_output"])
def test_all_weight_dtypes(program: pathlib.Path, name: str) -> None:
    rng = np.random.default_rng(3)
    cases = []
    for input_dtype, dtype, layout in itertools.product(FLOATING, harness.DTYPES, (SCALAR, FLAT)):
        case = make_case(rng, (input_dtype, "float"), (2500,))
        values = rng.integers(0, 2, 2500) if dtype == "bool" else rng.integers(1, 4, 2500)
        setattr(case, name, Operand(dtype, layout, values[: 1 if layout == SCALAR else None]))
        cases.append(case)
    check(program, cases)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["weight", "pos_weight", "grad_output"])
def test_weight_layouts(program: pathlib.Path, layout: str, name: str) -> None:
    rng = np.random.default_rng(4)
    sizes, strides = LAYOUTS[layout]
    length = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    cases = []
    for pair in TYPE_PAIRS:
        for dtype in {pair[0], "double" if pair[0] == "double" else "float"}:
            case = make_case(rng, pair, sizes)
            for misaligned in (False, True):
                cases.append(dataclasses.replace(case))
                setattr(cases[-1], name, Operand(dtype, STRIDED, weights(rng, length), strides, misaligned=misaligned))
    check(program, cases, vectorized=not layout.startswith("four_dimensions"))


def test_all_weights_at_once(program: pathlib.Path) -> None:
    rng = np.random.default_rng(5)
    sizes = (12, 10, 24)
    broadcasts = [
        Operand("float", ABSENT),
        Operand("float", SCALAR, weights(rng, 1)),
        Operand("float", FLAT, weights(rng, 2880)),
        Operand("float", STRIDED, weights(rng, 24), (0, 0, 1)),
        Operand("float", STRIDED, weights(rng, 10), (0, 1, 0)),
        Operand("float", STRIDED, weights(rng, 12), (1, 0, 0)),
    ]
    cases = []
    for weight, pos_weight, grad_output in itertools.product(broadcasts, repeat=3):
        case = make_case(rng, ("float", "float"), sizes)
        cases.append(dataclasses.replace(case, weight=weight, pos_weight=pos_weight, grad_output=grad_output))
    check(program, cases, vectorized=True)


def test_misaligned(program: pathlib.Path) -> None:
    """Pointers that are off by one element, each alone and all together."""
    rng = np.random.default_rng(6)
    cases = []
    for pair in TYPE_PAIRS:
        for off in [{"input"}, {"target"}, {"weight"}, {"outputs"}, {"input", "target", "weight", "outputs"}]:
            case = make_case(rng, pair, (9001,))
            case.weight = Operand(pair[0], FLAT, weights(rng, 9001))
            for name in off - {"outputs"}:
                getattr(case, name).misaligned = True
            case.misaligned_outputs = "outputs" in off
            cases.append(case)
    check(program, cases, vectorized=True)


def test_strided_operands(program: pathlib.Path) -> None:
    """Transposed, sliced, reversed and broadcast inputs and targets."""
    rng = np.random.default_rng(7)
    cases = []
    for first, strides in [(0, (1, 30)), (0, (80, 2)), (899, (-30, -1)), (0, (1, 0)), (0, (0, 1))]:
        for pair in TYPE_PAIRS:
            case = make_case(rng, pair, (30, 30))
            case.target = Operand(pair[1], STRIDED, rng.integers(0, 2, 3000), strides, first)
            cases.append(case)
            case = make_case(rng, pair, (30, 30))
            case.input = Operand(pair[0], STRIDED, rng.normal(0, 4, 3000), strides, first)
            cases.append(case)
    check(program, cases, vectorized=False)
    sizes = (2, 3, 2, 3, 2, 3, 2, 3)
    case = make_case(rng, ("float", "float"), sizes)
    case.target = Operand("float", STRIDED, rng.uniform(0, 1, 1296), (648, 1, 324, 3, 162, 9, 81, 27))
    check(program, [case], vectorized=False)


@pytest.mark.parametrize("dtype", FLOATING)
def test_infinite_and_extreme_logits(program: pathlib.Path, dtype: str) -> None:
    logits = np.array(
        [np.inf, -np.inf, np.nan, 0.0, -0.0, 1e4, -1e4, 104, -104, 88, -88, 20, -20, 17, -17, 1e-30, -1e-30]
    )
    x, y = (grid.ravel() for grid in np.meshgrid(logits, [0.0, 1.0]))
    cases = []
    for target in (dtype, "bool", "int8"):
        case = Case((x.size,), Operand(dtype, FLAT, x), Operand(target, FLAT, y), reduce=False)
        cases.append(dataclasses.replace(case, loss=dtype, grad_input=dtype))
        cases.append(dataclasses.replace(cases[-1], input=Operand(dtype, FLAT, x, misaligned=True)))
    check(program, cases)


@pytest.mark.parametrize("dtype", FLOATING)
def test_probabilities_at_the_ends(program: pathlib.Path, dtype: str) -> None:
    x, y = (grid.ravel() for grid in np.meshgrid([0.0, 1.0, 0.5, 2.0**-10, 1 - 2.0**-7], [0.0, 1.0, 0.25]))
    case = Case((x.size,), Operand(dtype, FLAT, x), Operand(dtype, FLAT, y), formula=PROBABILITIES, reduce=False)
    check(program, [dataclasses.replace(case, loss=dtype, grad_input=dtype)])


@pytest.mark.parametrize("target", ["float", "int16"])
@pytest.mark.parametrize("bad", [1.5, -0.25, np.nan])
def test_values_that_are_no_probabilities_stop_the_kernel(program: pathlib.Path, target: str, bad: float) -> None:
    rng = np.random.default_rng(8)
    for position in (0, 2999):
        case = make_case(rng, ("float", target), (3000,), PROBABILITIES)
        case.input.values[position] = bad
        with pytest.raises(harness.KernelError, match="device-side assert"):
            harness.run(program, [case])


def test_any_byte_but_zero_is_true(program: pathlib.Path) -> None:
    x = np.linspace(-3, 3, 256)
    case = Case(
        (256,), Operand("float", FLAT, x), Operand("bool", FLAT, np.arange(256)), loss="float", grad_input="float"
    )
    for target in (case.target, Operand("bool", STRIDED, np.arange(256), (1,))):
        check(program, [dataclasses.replace(case, target=target)])


def test_infinities_of_half_precision_outputs(program: pathlib.Path) -> None:
    """A loss beyond the range of half is infinite, as in native; the sum in float32 is not."""
    x = np.full(64, 6e4)
    case = Case(
        (64,), Operand("half", FLAT, x), Operand("half", FLAT, np.zeros(64)), Operand("float", SCALAR, np.full(1, 2.0))
    )
    result = check(program, [dataclasses.replace(case, loss="half", total="float")])[0]
    assert np.isinf(result["loss"]).all()
    assert np.isfinite(result["total"]).all()


@pytest.mark.parametrize(("dtype", "places"), [("bfloat16", 8), ("half", 11)])
def test_float64_is_rounded_once(program: pathlib.Path, dtype: str, places: int) -> None:
    """A little above the middle between two numbers, which is what is nearest to it in float32."""
    middle, above = 1 + 2.0**-places, 1 + 2 * 2.0**-places
    weight = Operand("double", FLAT, np.full(1, (middle + 2.0**-40) / 64))
    zero = Operand("double", FLAT, np.zeros(1))
    case = Case((1,), Operand(dtype, FLAT, np.full(1, 64.0)), zero, weight, loss=dtype, grad_input=dtype, total=dtype)
    result = harness.run(program, [case])[0]
    assert (result["loss"][0], result["total"][0], result["grad_input"][0]) == (above, above, above / 64)


@pytest.mark.parametrize("pair", [("float", "float"), ("bfloat16", "bool"), ("float", "int16")], ids="-".join)
def test_bit_identical_over_repeats_schedules_and_outputs(program: pathlib.Path, pair: tuple[str, str]) -> None:
    """The order in which threads, warps and blocks run, and whether a gradient is wanted beside the sum, changes no bit."""
    rng = np.random.default_rng(9)
    for reference in [make_case(rng, pair, (20011,)), make_case(rng, pair, (311, 64))]:
        reference.total, reference.loss, reference.grad_target = "double", None, None
        if len(reference.sizes) == 2:
            reference.pos_weight = Operand("float", STRIDED, weights(rng, 64), (0, 1))
        schedules = [
            (harness.FORWARD, 0),
            (harness.FORWARD, 0),
            (harness.REVERSE, 0),
            *((harness.RANDOM, seed) for seed in range(4)),
        ]
        cases = [dataclasses.replace(reference, order=order, seed=seed) for order, seed in schedules]
        cases += [dataclasses.replace(reference, grad_input=None)]
        results = check(program, cases)
        for result in results:
            for name, data in result.raw.items():
                assert data == results[0].raw[name]


@pytest.mark.parametrize("dtype", FLOATING)
def test_scale_grad(program: pathlib.Path, dtype: str) -> None:
    rng = np.random.default_rng(10)
    cases = []
    for factor, by, numel, misaligned in itertools.product(
        (1.0, 0.5, 3.0, np.nan, np.inf), FLOATING, (0, 1, 15, 16, 17, 5003), (False, True)
    ):
        operand = Operand(dtype, FLAT, rng.normal(size=numel))
        case = Case((numel,), operand, grad_output=Operand(by, SCALAR, np.array([factor])), grad_input=dtype)
        cases.append(dataclasses.replace(case, task=harness.SCALE, misaligned_outputs=misaligned, max_blocks=2))
    for case, result in zip(cases, harness.run(program, cases), strict=True):
        grad = case.input.gather(case.sizes)
        factor = case.grad_output.values[0]
        if factor == 1:
            assert result.raw["grad_input"] == harness.encode(grad, dtype)
        else:
            np.testing.assert_array_equal(
                result["grad_input"], harness.decode(harness.encode(factor * grad, dtype), dtype)
            )


def test_divider(tmp_path: pathlib.Path) -> None:
    subprocess.run([harness.build(tmp_path, harness.SANITIZE, source="check_divider.cpp")], check=True)


# A fault, the file and the text that is replaced, and what stands there instead.
FAULTS = {
    "missing barrier": ("block_reduce.cuh", "  __syncthreads();\n", ""),
    "wrong shuffle width": ("block_reduce.cuh", "int offset = C10_WARP_SIZE / 2;", "int offset = C10_WARP_SIZE / 4;"),
    "shared memory that nobody wrote": ("block_reduce.cuh", "lane < num_warps ?", "lane < num_warps + 1 ?"),
    "dropped partial sum": ("small_kernels.cuh", "i < num_partials;", "i < num_partials - 1;"),
    "tail too long": ("vector_kernel.cuh", "i < arguments.numel; i +=", "i <= arguments.numel; i +="),
    "tail too short": ("vector_kernel.cuh", "i < arguments.numel; i +=", "i + 1 < arguments.numel; i +="),
    "last elements in vectors": (
        "vector_kernel.cuh",
        "arguments.numel / Pass::N : 0",
        "(arguments.numel + Pass::N - 1) / Pass::N : 0",
    ),
    "alignment ignored": ("vector_kernel.cuh", "arguments.aligned ? arguments.numel", "true ? arguments.numel"),
    "planes dropped": ("factor.cuh", "plane * factor.outer_stride", "0 * plane * factor.outer_stride"),
    "barrier in a branch": (
        "block_reduce.cuh",
        "  value = block_sum(value);",
        "  if (threadIdx.x != 77) value = block_sum(value);",
    ),
}


def cases_for_faults() -> list[Case]:
    rng = np.random.default_rng(11)
    cases = []
    for numel in (1, 1023, 1025, 5000):
        case = make_case(rng, ("float", "float"), (numel,))
        cases.append(dataclasses.replace(case, max_blocks=3))
        cases.append(dataclasses.replace(case, order=harness.REVERSE))
        cases.append(dataclasses.replace(case, input=dataclasses.replace(case.input, misaligned=True)))
    sizes, strides = LAYOUTS["pixels_odd"]
    weight = Operand("float", STRIDED, weights(rng, 366), strides)
    cases.append(dataclasses.replace(make_case(rng, ("float", "float"), sizes), weight=weight))
    return cases


def plant(fault: str | None, csrc: pathlib.Path) -> None:
    """A copy of the kernels with a fault in it."""
    shutil.copytree(harness.CSRC, csrc)
    if fault is not None:
        name, text, replacement = FAULTS[fault]
        source = (csrc / "cuda" / name).read_text()
        assert source.count(text) == 1
        (csrc / "cuda" / name).write_text(source.replace(text, replacement))
    # What the cases need: logits and targets of float32. A tenth of the kernels, and half of the time to compile.
    solve = (csrc / "cuda" / "solve.cuh").read_text()
    solve, cut = re.subn(r"(try_targets<Formula, float, float), [\w, ]+>", r"\1>", solve)
    assert cut == 1
    for others in (r"try_targets<Formula, (?!float, float>)", "launch_pass<(?!WithLogits>)"):
        solve, cut = re.subn(rf"    case [\w:]+:\n      return {others}[^;]*;\n", "", solve)
        assert cut == 3
    (csrc / "cuda" / "solve.cuh").write_text(solve)


@pytest.fixture(scope="module")
def faulty_programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, pathlib.Path]:
    flags = ["-O0", "-fsanitize=alignment", "-fno-sanitize-recover=all"]
    builds = {}
    for fault in (None, *FAULTS):
        directory = tmp_path_factory.mktemp("fault")
        plant(fault, directory / "csrc")
        builds[fault] = (directory, flags, directory / "csrc")
    return harness.build_all(builds)


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_planted_faults_are_found(fault: str | None, faulty_programs: dict[str | None, pathlib.Path]) -> None:
    """Each of these mistakes must make the checks above fail."""
    if fault is None:
        check(faulty_programs[fault], cases_for_faults())
    else:
        with pytest.raises((AssertionError, harness.KernelError)):
            check(faulty_programs[fault], cases_for_faults())
