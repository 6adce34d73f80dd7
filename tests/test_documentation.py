"""The documentation is true: every block of code in it runs, what it links to exists, and it is as short as it promises."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import bce_ext

sybil = pytest.importorskip("sybil", reason="sybil is not installed")
from sybil.document import Document  # noqa: E402
from sybil.parsers.myst import PythonCodeBlockParser  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
GENERATED = {"accuracy.md", "cuda-tables.md"}
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *GUIDES]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.fixture(autouse=True)
def _torch_is_left_as_it_is() -> Iterator[None]:
    yield
    bce_ext.disable()


# ---- code ----


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run_in_order(page: Path) -> None:
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace["__name__"] = page.stem  # torch.jit.script asks where a function is from
    examples = list(document.examples())
    assert len(examples) == len(blocks(page, "python"))
    for example in examples:
        example.evaluate()


BINARIES = {"_C", "libbce_ext"}
MODULES = [f"bce_ext.{each.name}" for each in pkgutil.iter_modules(bce_ext.__path__) if each.name not in BINARIES]


@pytest.mark.parametrize("name", ["bce_ext", *MODULES])
def test_docstring_examples_give_what_they_say(name: str) -> None:
    module = importlib.import_module(name)
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    result = doctest.testmod(module, extraglobs={"bce_ext": bce_ext, "torch": torch}, optionflags=flags)
    assert result.failed == 0


def test_every_public_docstring_has_an_example() -> None:
    finder = doctest.DocTestFinder()
    for name in bce_ext.__all__:
        thing = getattr(bce_ext, name)
        is_exception = isinstance(thing, type) and issubclass(thing, Exception)
        if callable(thing) and not is_exception and thing.__module__ != "bce_ext._C":
            assert any(test.examples for test in finder.find(thing, name)), name


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    modules = {name for name in bce_ext.__all__ if isinstance(getattr(bce_ext, name), type(bce_ext))}
    for name in modules:
        assert f".. automodule:: bce_ext.{name}\n   :members:" in page
    named = set(re.findall(r"^\.\. auto(?:class|function|exception):: (\w+)$", page, re.M))
    assert named == set(bce_ext.__all__) - modules


def test_cpp_blocks_compile(tmp_path: Path) -> None:
    headers = "".join(
        f"#include <{header}>\n"
        for header in ("ATen/ATen.h", "ATen/core/Reduction.h", "ATen/core/dispatch/Dispatcher.h")
    )
    (block,) = (block for page in PAGES for block in blocks(page, "cpp"))
    (tmp_path / "block.cpp").write_text(
        f"{headers}void use(const at::Tensor& logits, const at::Tensor& labels) {{\n{block}}}\n"
    )
    includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    command = ["g++", "-std=c++20", "-fsyntax-only", *includes, tmp_path / "block.cpp"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@every_page
def test_make_targets_in_shell_blocks_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in blocks(page, "sh"):
        assert set(re.findall(r"^make ([a-z-]+)", block, re.M)) <= targets


@every_page
def test_no_block_is_of_a_kind_that_nothing_checks(page: Path) -> None:
    kinds = set(re.findall(r"^```(\S+)$", page.read_text(), re.M))
    directives = {"{toctree}", "{eval-rst}", "{include}", "{literalinclude}"}
    assert {kind for kind in kinds if not kind.startswith("{")} <= {"python", "cpp", "sh", "toml", "text"}
    assert {kind for kind in kinds if kind.startswith("{")} <= directives


# ---- text ----


@every_page
def test_files_of_the_repository_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"`(csrc/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(source:([^)#]+)", text) + re.findall(r"bce_ext/blob/main/([^)#]+)", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"bce-ext\.github\.io/bce_ext/([\w-]+)\.html", text):
        assert (ROOT / "docs" / f"{path}.md").exists(), path
    for path in re.findall(r"raw\.githubusercontent\.com/bce-ext/bce_ext/main/([^)]+)", text):
        assert (ROOT / path).exists(), path


def test_the_readme_is_short_and_has_absolute_links() -> None:
    text = README.read_text()
    assert len(text.split()) <= 600
    assert all(link.startswith("https://") for link in re.findall(r"\]\(([^)]+)\)", text))


@every_page
def test_lines_are_short_outside_of_tables(page: Path) -> None:
    long = [line for line in page.read_text().splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not long
