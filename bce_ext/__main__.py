"""``python -m bce_ext``: a report for questions and bug reports. Exit status 1 if the self-check fails."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bce_ext
from bce_ext.override import is_enabled

REDUCTIONS = ("none", "mean", "sum")
SHAPE = (1003, 67)  # odd, and several blocks of work for several threads


def main() -> int:
    for name, fact in report():
        print(f"{name:>16}  {fact}")
    failures = 0
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()) if has_cuda_kernels())]
    for device in devices:
        start = time.monotonic()
        count = 0
        for case, failure in self_check(device):
            count += 1
            if failure is not None:
                failures += 1
                print(f"      self-check  FAILED on {device}: {case}: {failure}")
        print(f"      self-check  {device}: {count} cases compared with torch in {time.monotonic() - start:.1f} s")
    print(f"          result  {f'{failures} cases FAILED' if failures else 'everything agrees with torch'}")
    return 1 if failures else 0


def has_cuda_kernels() -> bool:
    return bce_ext.build_info()["cuda"] is not None or torch.version.hip is not None


def report() -> Iterator[tuple[str, object]]:
    """Names and facts: versions, the binary, the machine, the state of the process."""
    yield "bce_ext", f"{bce_ext.__version__} in {Path(bce_ext.__file__).parent}"
    yield "torch", f"{torch.__version__} in {Path(torch.__file__).parent}"
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    yield "system", platform.platform()
    for name, fact in bce_ext.build_info().items():
        yield f"built: {name}" if name != "cpu_capability" else "CPU code in use", fact
    yield "CPU", f"{_cpu_model()}, {os.cpu_count()} cores"
    if torch.version.cuda is None and torch.version.hip is None:
        yield "GPU", "torch is a CPU build"
    elif not torch.cuda.is_available():
        yield "GPU", f"torch has CUDA {torch.version.cuda}, but sees no device"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        kernels = "" if has_cuda_kernels() else ", without kernels of bce_ext"
        yield f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}{kernels}"
    yield "threads", torch.get_num_threads()
    for variable in (
        "OMP_NUM_THREADS",
        "ATEN_CPU_CAPABILITY",
        "CUDA_VISIBLE_DEVICES",
        "BCE_EXT_ANY_TORCH",
        "BCE_EXT_CACHE_MIB",
    ):
        if variable in os.environ:
            yield variable, os.environ[variable]
    yield "enable()", "active" if is_enabled() else "not active"


def self_check(device: str) -> Iterator[tuple[str, str | None]]:
    """Loss and gradient against torch's operators in float64, which `enable()` does not route: each case, and what is wrong with it."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator) * 3
    target = torch.rand(SHAPE, generator=generator)
    pos_weight = torch.rand(SHAPE[-1], generator=generator) + 0.5
    for dtype, reduction in product((torch.float64, torch.float32, torch.bfloat16, torch.float16), REDUCTIONS):
        x, q, y, p = (each.to(device, dtype) for each in (logits, logits.sigmoid(), target, pos_weight))
        cases: dict[str, tuple[Any, Any, tuple[Tensor | None, ...]]] = {
            "logits": (bce_ext.functional.binary_cross_entropy_with_logits, "binary_cross_entropy_with_logits", (x, y)),
            "logits, pos_weight": (
                partial(bce_ext.functional.binary_cross_entropy_with_logits, pos_weight=p),
                "binary_cross_entropy_with_logits",
                (x, y, None, p),
            ),
            "probabilities": (bce_ext.functional.binary_cross_entropy, "binary_cross_entropy", (q, y)),
        }
        for name, (ours, native, arguments) in cases.items():
            found = _loss_and_gradient(partial(ours, reduction=reduction), arguments[:2])
            expected = _loss_and_gradient(
                partial(getattr(torch.ops.aten, native), reduction=REDUCTIONS.index(reduction)),
                [argument if argument is None else argument.double() for argument in arguments],
            )
            yield (
                f"{name}, {dtype}, {reduction}",
                _difference(found, expected, 1 / x.numel() if reduction == "mean" else 1),
            )


def _loss_and_gradient(function: Callable[..., Tensor], arguments: Sequence[Tensor | None]) -> list[Tensor]:
    assert arguments[0] is not None
    input = arguments[0].detach().requires_grad_()
    loss = function(input, *arguments[1:])
    (gradient,) = torch.autograd.grad(loss, input, torch.ones_like(loss))
    return [loss.detach(), gradient]


def _difference(found: list[Tensor], expected: list[Tensor], scale: float) -> str | None:
    """What is wrong, in one line. A gradient is a difference of numbers of the size of `scale`, each with a rounding error."""
    for name, ours, truth in zip(("loss", "gradient"), found, expected, strict=True):
        finfo = torch.finfo(ours.dtype)
        tolerance = 8 * finfo.eps
        smallest = finfo.smallest_normal * finfo.eps
        try:
            torch.testing.assert_close(ours, truth.to(ours.dtype), rtol=tolerance, atol=tolerance * scale + smallest)
        except AssertionError as error:
            return f"{name}: {' '.join(str(error).split())}"
    return None


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


if __name__ == "__main__":
    sys.exit(main())
