"""What somebody meets first: builds, imports and reports say in one sentence what is wrong. No network, nothing is installed or compiled."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import setuptools
import torch

import bce_ext
from bce_ext import __main__ as report
from bce_ext import _binary, _build

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(bce_ext.__file__).parent
MINOR = ".".join(torch.__version__.split(".")[:2])


def run(
    *command: str | Path, directory: Path, environment: Mapping[str, str | Path] | None = None
) -> tuple[int, str, str]:
    """Exit status, standard output and errors of a program that finds no bce_ext but that of its directory."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {name: str(value) for name, value in (environment or {}).items()}
    result = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True, check=False)
    return result.returncode, result.stdout, result.stderr


# ---- importing ----


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A fresh clone, nothing built in it."""
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "_build.py", "__pycache__", "*.egg-info", "tests", "docs")
    return Path(shutil.copytree(ROOT, tmp_path / "clone", ignore=ignored))


def test_a_source_tree_that_is_not_built_says_so(sources: Path) -> None:
    status, _, errors = run(sys.executable, "-c", "import bce_ext", directory=sources)
    assert status == 1
    assert errors.splitlines()[-1] == (
        f"ImportError: bce_ext: {sources} is the source tree and is not built in place: "
        "run `make build` there, or start Python in another directory to import the installed package"
    )
    assert "During handling" not in errors


def test_a_package_without_its_binary_says_so(sources: Path) -> None:
    (sources / "setup.py").unlink()
    _, _, errors = run(sys.executable, "-c", "import bce_ext", directory=sources)
    assert errors.splitlines()[-1].startswith(f"ImportError: bce_ext: {sources / 'bce_ext'} holds no binary: build it")


def built_for(sources: Path, torch_version: str) -> None:
    (sources / "bce_ext" / "_build.py").write_text(
        f"TORCH = {torch_version!r}\nCUDA = {_build.CUDA!r}\nPYTHON = {_build.PYTHON!r}\n"
    )
    for binary in PACKAGE.glob("*.so"):
        (sources / "bce_ext" / binary.name).symlink_to(binary)


USE = "import torch, bce_ext; print(bce_ext.BCEWithLogitsLoss()(torch.zeros(2), torch.zeros(2)).item())"


def test_a_binary_of_another_torch_is_not_loaded(sources: Path) -> None:
    built_for(sources, "2.1.2+cpu")
    status, _, errors = run(sys.executable, "-c", USE, directory=sources)
    assert status == 1
    last = errors.splitlines()[-1]
    assert last.startswith(f"ImportError: bce_ext: the binary in {sources / 'bce_ext'} is built for torch 2.1")
    assert f"but this is torch {MINOR}" in last
    assert "`pip install --no-build-isolation" in last
    assert "BCE_EXT_ANY_TORCH=1" in last


def test_a_binary_of_another_torch_is_tried_where_that_is_wanted(sources: Path) -> None:
    built_for(sources, "2.1.2+cpu")
    status, output, errors = run(sys.executable, "-c", USE, directory=sources, environment={"BCE_EXT_ANY_TORCH": "1"})
    assert status == 0, errors
    assert float(output) == pytest.approx(0.6931472)


def test_the_binary_in_use_knows_its_torch() -> None:
    assert _build.TORCH.split("+")[0] == bce_ext.build_info()["torch"]
    assert bce_ext.build_info()["cuda"] == _build.CUDA
    _binary.check()


def test_another_patch_release_of_torch_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "TORCH", f"{MINOR}.99+xyz")
    _binary.check()


@pytest.mark.parametrize(
    ("built", "installed", "words"),
    [
        ("13.0", None, "with CUDA 13, but this is torch {} without CUDA"),
        ("13.0", "12.9", "with CUDA 13, but this is torch {} with CUDA 12"),
        ("13.0", "13.2", None),
        (None, "13.0", None),  # the CPU's kernels go with any
    ],
)
def test_cuda_must_fit_where_the_binary_has_it(
    built: str | None, installed: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "CUDA", built)
    monkeypatch.setattr(torch.version, "cuda", installed)
    if words is None:
        _binary.check()
        return
    with pytest.raises(ImportError, match=re.escape(words.format(MINOR))):
        _binary.check()


def test_a_binary_of_another_python_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "PYTHON", "cpython-39-x86_64-linux-gnu")
    this = re.escape(sysconfig.get_config_var("SOABI"))
    with pytest.raises(ImportError, match=f"is of cpython-39-x86_64-linux-gnu, but this Python is {this}: build it"):
        _binary.check()


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python is not free-threaded")
def test_importing_leaves_the_gil_off() -> None:
    script = "import torch, sys; before = sys._is_gil_enabled(); import bce_ext; print(before, sys._is_gil_enabled())"
    status, output, _ = run(sys.executable, "-c", script, directory=ROOT, environment={"PYTHONPATH": ROOT})
    assert (status, output.split()) == (0, ["False", "False"])


# ---- building ----


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str | Path]:
    """Variables of an environment where torch cannot be found."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "torch.py").write_text("raise ModuleNotFoundError('No module named torch', name='torch')\n")
    return {"PYTHONPATH": hidden}


def test_the_sdist_needs_no_torch(sources: Path, without_torch: Mapping[str, str | Path], tmp_path: Path) -> None:
    (sources / "bce_ext" / "_build.py").write_text("of a build in place\n")
    (sources / "bce_ext" / "libbce_ext.so").touch()
    command = (sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path)
    status, _, errors = run(*command, directory=sources, environment=without_torch)
    assert status == 0, errors
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"setup.py", "build_extensions.py", "csrc/ops.cpp", "csrc/cuda/launch.cu", "bce_ext/_C.pyi"}
    assert needed <= names
    assert not any(name.endswith((".so", "_build.py")) for name in names)


BACKEND = "from setuptools import build_meta; build_meta."


def test_the_metadata_needs_no_torch(sources: Path, without_torch: Mapping[str, str | Path], tmp_path: Path) -> None:
    script = f"{BACKEND}prepare_metadata_for_build_wheel({str(tmp_path)!r})"
    status, _, errors = run(sys.executable, "-c", script, directory=sources, environment=without_torch)
    assert status == 0, errors
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert f"\nVersion: {bce_ext.__version__}\n" in text
    assert "\nRequires-Dist: torch>=2.11\n" in text


def test_a_build_without_torch_says_so(sources: Path, without_torch: Mapping[str, str | Path]) -> None:
    status, _, errors = run(sys.executable, "setup.py", "-q", "build", directory=sources, environment=without_torch)
    assert status == 1
    assert errors == (
        "bce_ext: it is compiled against the torch that it will run with, and there is none: "
        "install torch first, then run `pip install --no-build-isolation .`\n"
    )


def test_an_isolated_build_says_that_it_is_isolated(
    sources: Path, without_torch: Mapping[str, str | Path], tmp_path: Path
) -> None:
    # As build tools do it: a temporary directory with the build requirements comes first.
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    for package in ("setuptools", "_distutils_hack"):
        (overlay / package).symlink_to(Path(setuptools.__file__).parents[1] / package)
    path = os.pathsep.join([str(overlay), str(without_torch["PYTHONPATH"])])
    script = f"{BACKEND}build_wheel({str(tmp_path)!r})"
    environment = {"PYTHONPATH": path, "TMPDIR": tmp_path}
    status, _, errors = run(sys.executable, "-c", script, directory=sources, environment=environment)
    assert status == 1
    assert errors.splitlines()[-1] == (
        "bce_ext: it is compiled against the torch that it will run with, and this build is isolated from whatever is "
        "installed: with torch installed, run `pip install --no-build-isolation .`"
    )


def test_a_missing_compiler_is_named_before_anything_is_done(sources: Path) -> None:
    command = (sys.executable, "setup.py", "build")
    status, output, errors = run(*command, directory=sources, environment={"CXX": "/nowhere/g++ -m64"})
    assert status == 1
    assert output.splitlines() == ["running build"]
    assert errors.splitlines()[-1] == (  # a torch with CUDA, but without a GPU, has a line of its own before
        "bce_ext: a C++ compiler is needed, but there is no /nowhere/g++ on PATH: "
        "install one, for example by `apt-get install g++`, or name one in the variable CXX"
    )


def test_an_old_setuptools_is_named(sources: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "sitecustomize.py").write_text("import setuptools\nsetuptools.__version__ = '65.5.0'\n")
    command = (sys.executable, "setup.py", "--quiet", "sdist")
    status, _, errors = run(*command, directory=sources, environment={"PYTHONPATH": old})
    assert status == 1
    assert errors == "bce_ext: setuptools 77 or newer is needed, but this is 65.5.0: pip install -U setuptools\n"


def test_native_is_the_architectures_of_the_gpus_that_are_present(sources: Path) -> None:
    script = """
import torch
capabilities = [(9, 0), (7, 5), (9, 0)]
torch.cuda.device_count = lambda: len(capabilities)
torch.cuda.get_device_capability = capabilities.__getitem__
import build_extensions
print(build_extensions.native_arch_list())
capabilities.clear()
print(build_extensions.native_arch_list())
"""
    status, output, errors = run(sys.executable, "-c", script, directory=sources)
    assert status == 0, errors
    assert output.splitlines() == ["7.5;9.0", ""]


# ---- an environment that is there ----


def test_make_installs_nothing_in_an_environment_that_is_there() -> None:
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ("make", "--dry-run", "--always-make", "test", f"ENV={sys.executable}")
    status, output, errors = run(*command, directory=ROOT)
    assert status == 0, errors
    assert f"{sys.executable} setup.py build_ext --inplace" in output
    assert f"{sys.executable} -m pytest tests" in output
    assert "pip" not in re.sub(r"\S+/", "", output)  # the interpreter's own path aside


def test_an_environment_that_lacks_something_is_told_what() -> None:
    # -S hides all packages that are installed.
    status, output, errors = run(sys.executable, "-S", ROOT / "tests" / "environment.py", directory=ROOT)
    assert status == 1
    assert "has no ninja: one compiler runs at a time" in output
    assert "lacks what is needed: torch, " in errors


# ---- the report ----


def test_the_report_names_what_matters_and_checks_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    with bce_ext.fused():
        assert report.main() == 0
    output = capsys.readouterr().out
    for fact in (
        f"bce_ext  {bce_ext.__version__} in {PACKAGE}",
        f"torch  {torch.__version__} in",
        f"CPU code in use  {bce_ext.build_info()['cpu_capability']}",
        f"threads  {torch.get_num_threads()}",
        "enable()  active",
        "self-check  cpu: 36 cases compared with torch in",
        "result  everything agrees with torch",
    ):
        assert fact in output


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_the_report_fails_where_a_loss_is_wrong(
    factor: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = bce_ext.functional.binary_cross_entropy
    monkeypatch.setattr(bce_ext.functional, "binary_cross_entropy", lambda *a, **k: right(*a, **k) * factor)
    assert report.main() == 1
    output = capsys.readouterr().out
    assert "FAILED on cpu: probabilities, torch.float32, mean: loss: " in output
    assert "FAILED on cpu: logits" not in output


def test_the_report_is_a_program() -> None:
    status, output, errors = run(sys.executable, "-m", "bce_ext", directory=ROOT, environment={"PYTHONPATH": ROOT})
    assert status == 0, errors
    assert "enable()  not active" in output
