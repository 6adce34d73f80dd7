"""The losses of the family on the CUDA kernels: focusing formulas, adjusted targets, a divisor on the device."""

import dataclasses
import itertools
import pathlib

import harness
import numpy as np
import pytest
from cases import PARAMETERS, TYPE_PAIRS, check, make_case, sizes_around_everything, weights
from harness import ASYMMETRIC, DTYPES, FLAT, FLOATING, FOCAL, LOGITS, PROBABILITIES, SCALAR, STRIDED, Case, Operand

FOCUSING = pytest.mark.parametrize("formula", [FOCAL, ASYMMETRIC], ids=["focal", "asymmetric"])
ALL = pytest.mark.parametrize(
    "formula", [LOGITS, PROBABILITIES, FOCAL, ASYMMETRIC], ids=["logits", "probabilities", "focal", "asymmetric"]
)
IGNORED = -100.0

# Powers that have a path of their own, ones that have none, no power at all; alpha at its ends and away.
FOCAL_PARAMETERS = list(itertools.product((-1.0, 0.0, 0.25, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0, 5.0)))
ASYMMETRIC_PARAMETERS = [
    (gamma_neg, gamma_pos, clip, eps, detached)
    for gamma_neg, gamma_pos in ((4.0, 1.0), (0.0, 0.0), (2.0, 0.0), (0.5, 1.5))
    for clip, eps in ((0.05, 1e-8), (0.0, 1e-8), (0.3, 1e-3))
    for detached in (0.0, 1.0)
]


@FOCUSING
@pytest.mark.parametrize("pair", TYPE_PAIRS, ids="-".join)
def test_sizes(program: pathlib.Path, pair: tuple[str, str], formula: int) -> None:
    rng = np.random.default_rng(20)
    sizes = sizes_around_everything(pair)
    check(program, [dataclasses.replace(make_case(rng, pair, (n,), formula), max_blocks=2) for n in sizes], True)


@FOCUSING
def test_all_dtype_pairs(program: pathlib.Path, formula: int) -> None:
    rng = np.random.default_rng(21)
    check(program, [make_case(rng, pair, (2500,), formula) for pair in itertools.product(FLOATING, DTYPES)])


@pytest.mark.parametrize("target", ["float", "double", "int64", "int16"])
@FOCUSING
def test_parameters(program: pathlib.Path, formula: int, target: str) -> None:
    rng = np.random.default_rng(22)
    cases = []
    for parameters in FOCAL_PARAMETERS if formula == FOCAL else ASYMMETRIC_PARAMETERS:
        case = make_case(rng, ("double" if target == "double" else "float", target), (1500,), formula)
        cases.append(dataclasses.replace(case, parameters=parameters))
    check(program, cases)


@ALL
def test_all_operands_and_options_at_once(program: pathlib.Path, formula: int) -> None:
    rng = np.random.default_rng(23)
    sizes = (20, 4, 16)
    broadcasts = [
        Operand("float", SCALAR, weights(rng, 1)),
        Operand("float", FLAT, weights(rng, 1280)),
        Operand("float", STRIDED, weights(rng, 4), (0, 1, 0)),
    ]
    cases = []
    for pair, weight, pos_weight, grad_output in itertools.product(
        [("float", "float"), ("bfloat16", "bool"), ("half", "half")], *[broadcasts] * 3
    ):
        case = make_case(rng, pair, sizes, formula)
        case.label_smoothing, case.ignore_index = 0.1, 1.0
        if pair[1] != "bool":
            case.target.values[::5] = 1.0  # what is ignored
        case.normalizer = Operand("float", SCALAR, np.array([37.0]))
        cases.append(dataclasses.replace(case, weight=weight, grad_output=grad_output))
        if formula != PROBABILITIES:
            cases[-1].pos_weight = pos_weight
    check(program, cases, vectorized=True)


@FOCUSING
def test_each_output_alone(program: pathlib.Path, formula: int) -> None:
    rng = np.random.default_rng(24)
    case = make_case(rng, ("float", "float"), (2500,), formula)
    whole = check(program, [case])[0]
    for name in ("loss", "grad_input", "grad_target"):
        wanted = {other: "float" if other == name else None for other in ("loss", "grad_input", "grad_target")}
        result = check(program, [dataclasses.replace(case, **wanted)])[0]
        assert result.raw[name] == whole.raw[name]


SPECIAL = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e4, -1e4, 104, -104, 88, -88, 20, -20, 17, -17, 1e-30, -1e-30])


@FOCUSING
@pytest.mark.parametrize("dtype", FLOATING)
def test_infinite_and_extreme_logits(program: pathlib.Path, dtype: str, formula: int) -> None:
    x, y = (grid.ravel() for grid in np.meshgrid(SPECIAL, [0.0, 1.0, 0.25]))
    cases = []
    for parameters in FOCAL_PARAMETERS if formula == FOCAL else ASYMMETRIC_PARAMETERS:
        case = Case((x.size,), Operand(dtype, FLAT, x), Operand(dtype, FLAT, y), formula=formula, reduce=False)
        cases.append(dataclasses.replace(case, parameters=parameters, loss=dtype, grad_input=dtype))
    check(program, cases)


@ALL
@pytest.mark.parametrize("target", ["float", "half", "int64", "int16", "uint8"])
def test_ignored_elements_have_no_say_whatever_they_hold(program: pathlib.Path, formula: int, target: str) -> None:
    """Logits and weights of ignored elements are NaN and infinite; no probability, either."""
    rng = np.random.default_rng(25)
    numel = 3001  # not a whole number of vectors
    ignored = rng.random(numel) < 0.3
    bad = rng.choice([np.nan, np.inf, -np.inf], numel)
    label = 255.0 if target == "uint8" else IGNORED
    cases = []
    for name, smoothing in itertools.product(("input", "weight", "pos_weight", "grad_output"), (0.0, 0.2)):
        case = make_case(rng, ("float", target), (numel,), formula)
        case.target.values = np.where(ignored, label, case.target.values)
        case.label_smoothing, case.ignore_index = smoothing, label
        if name != "input":
            setattr(case, name, Operand("float", FLAT, weights(rng, numel)))
        operand = getattr(case, name)
        operand.values = np.where(ignored, bad, operand.values)
        cases.append(case)
    for result in check(program, cases):
        for name in {"loss", "grad_input", "grad_target"} & result.raw.keys():
            assert not result[name][ignored].any()
        assert np.isfinite(result["total"]).all()


@ALL
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing(program: pathlib.Path, formula: int, smoothing: float) -> None:
    rng = np.random.default_rng(26)
    cases = []
    for pair in [*TYPE_PAIRS, ("bfloat16", "bfloat16"), ("float", "int16"), ("half", "uint8")]:
        case = make_case(rng, pair, (2500,), formula)
        cases.append(dataclasses.replace(case, label_smoothing=smoothing))
    check(program, cases)


@ALL
def test_a_normalizer_of_any_dtype_divides_sum_and_gradients(program: pathlib.Path, formula: int) -> None:
    rng = np.random.default_rng(27)
    cases = []
    for pair, dtype in itertools.product([("float", "float"), ("bfloat16", "int8"), ("double", "double")], DTYPES):
        case = make_case(rng, pair, (2500,), formula)
        value = 1.0 if dtype == "bool" else 7.0
        cases.append(dataclasses.replace(case, divisor=1.0, normalizer=Operand(dtype, SCALAR, np.array([value]))))
    check(program, cases)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_normalizer_that_is_no_number_to_divide_by(program: pathlib.Path, value: float) -> None:
    """The number of valid elements can be 0: a mean of none is NaN or infinite, and nothing stops."""
    case = make_case(np.random.default_rng(28), ("float", "float"), (2500,))
    case.normalizer = Operand("float", SCALAR, np.array([value]))
    check(program, [case])
    case.target.values, case.ignore_index = np.full(2500, IGNORED), IGNORED
    assert np.isnan(harness.run(program, [case])[0]["total"]).all() == (value != np.inf)


@ALL
@pytest.mark.parametrize("target", ["uint8", "int64", "int16"])
@pytest.mark.parametrize("position", [0, 2999])
def test_an_integer_label_that_is_none_stops_the_kernel(
    program: pathlib.Path, formula: int, target: str, position: int
) -> None:
    rng = np.random.default_rng(29)
    bad = 2.0 if target == "uint8" else -1.0
    case = make_case(rng, ("float", target), (3000,), formula)
    case.target.values[position] = bad
    for ignore_index in (None, bad + 1 if target == "uint8" else bad - 1):
        with pytest.raises(harness.KernelError, match="device-side assert"):
            harness.run(program, [dataclasses.replace(case, ignore_index=ignore_index)])
    check(program, [dataclasses.replace(case, ignore_index=bad)])


def test_labels_of_other_types_may_be_any_number(program: pathlib.Path) -> None:
    """A floating target is a number, a bool one true for any byte but 0."""
    case = make_case(np.random.default_rng(30), ("float", "float"), (3000,))
    case.target.values[7] = 3.0
    check(program, [case, dataclasses.replace(case, target=Operand("bool", FLAT, np.arange(3000) % 256))])


@FOCUSING
@pytest.mark.parametrize("target", ["float", "int16"])
def test_bit_identical_over_schedules(program: pathlib.Path, formula: int, target: str) -> None:
    reference = make_case(np.random.default_rng(31), ("float", target), (20011,), formula)
    schedules = [(harness.FORWARD, 0), (harness.REVERSE, 0), (harness.RANDOM, 1), (harness.RANDOM, 2)]
    cases = [dataclasses.replace(reference, order=order, seed=seed, total="double") for order, seed in schedules]
    results = check(program, cases)
    assert all(result.raw == results[0].raw for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_elements_that_are_not_ignored(program: pathlib.Path, dtype: str) -> None:
    """Over vectors and what is left of them, in a grid of two blocks; NaN is a number of no element."""
    rng = np.random.default_rng(33)
    cases = []
    for numel, misaligned in itertools.product(sizes_around_everything((dtype, dtype)), (False, True)):
        values = rng.integers(0, 3, numel).astype(float)
        if dtype in FLOATING:
            values[::7] = np.nan
        target = Operand(dtype, FLAT, values, misaligned=misaligned)
        case = Case((numel,), Operand(), target, ignore_index=1.0, task=harness.COUNT, total="double", max_blocks=2)
        cases += [case, dataclasses.replace(case, ignore_index=-1.0, order=harness.REVERSE)]
    for case, result in zip(cases, harness.run(program, cases), strict=True):
        assert result["total"] == np.sum(case.target.gather(case.sizes) != case.ignore_index)


def test_each_parameter_reaches_the_kernel(program: pathlib.Path) -> None:
    rng = np.random.default_rng(32)
    for formula, parameters in PARAMETERS.items():
        case = make_case(rng, ("float", "float"), (100,), formula)
        result = harness.run(program, [case])[0]
        for i in range(len(parameters)):
            changed = [*parameters]
            changed[i] = {(ASYMMETRIC, 3): 0.5, (ASYMMETRIC, 4): 1.0}.get((formula, i), changed[i] + 0.01)
            other = harness.run(program, [dataclasses.replace(case, parameters=tuple(changed))])[0]
            assert other.raw != result.raw
