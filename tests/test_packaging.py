"""What a release consists of: versions come from one place, tools have the same versions everywhere, the changelog is cut by a command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from datetime import date
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import bce_ext

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").exists():
    pytest.skip("the tests run without the sources", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))
import release  # noqa: E402


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "bce_ext").mkdir()
    (tmp_path / "bce_ext" / "__init__.py").write_text('"""A package."""\n\n__version__ = "0.1.0"\n\nX = 1\n')
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n### Added\n\n- A thing.\n\n## [0.1.0] - 2026-01-02\n\n- The first.\n"
    )
    return tmp_path


def test_a_release_is_cut(tree: Path) -> None:
    release.cut(tree, "0.2.0", date(2026, 12, 1))
    assert (tree / "CHANGELOG.md").read_text() == (
        "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n### Added\n\n- A thing.\n\n"
        "## [0.1.0] - 2026-01-02\n\n- The first.\n"
    )
    assert (tree / "bce_ext" / "__init__.py").read_text() == '"""A package."""\n\n__version__ = "0.2.0"\n\nX = 1\n'
    release.check(tree, "v0.2.0")
    assert release.notes(tree, "0.2.0") == "### Added\n\n- A thing."
    assert release.notes(tree, "0.1.0") == "- The first."


def test_a_release_is_not_cut_twice_or_empty_or_without_a_version(tree: Path) -> None:
    before = (tree / "CHANGELOG.md").read_text()
    with pytest.raises(SystemExit, match=re.escape("expected a version such as 0.2.0, but got '0.2'")):
        release.cut(tree, "0.2", date.today())
    with pytest.raises(SystemExit, match=re.escape("CHANGELOG.md has 0.1.0 already")):
        release.cut(tree, "0.1.0", date.today())
    assert (tree / "CHANGELOG.md").read_text() == before
    release.cut(tree, "0.2.0", date.today())
    with pytest.raises(SystemExit, match="nothing under"):
        release.cut(tree, "0.3.0", date.today())


def test_a_tag_must_be_that_of_the_version(tree: Path) -> None:
    release.check(tree, "v0.1.0")
    with pytest.raises(
        SystemExit, match=re.escape("expected the tag v0.1.0, after the version of the package, but got v0.2.0")
    ):
        release.check(tree, "v0.2.0")


def test_the_changelog_is_one_that_can_be_cut() -> None:
    assert release.UNRELEASED in (ROOT / "CHANGELOG.md").read_text()
    assert release.VERSION_LINE.findall((ROOT / "bce_ext" / "__init__.py").read_text()) == [bce_ext.__version__]


def test_a_released_wheel_says_which_torch_it_is_for(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "build", "*.so", "__pycache__", "*.egg-info", "tests", "docs")
    sources = shutil.copytree(ROOT, tmp_path / "sources", ignore=ignored)
    script = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('metadata')"
    (sources / "metadata").mkdir()
    environment = os.environ | {"BCE_EXT_RELEASE": "1", "BCE_EXT_FORCE_CUDA": "0"}
    subprocess.run([sys.executable, "-c", script], cwd=sources, env=environment, check=True, capture_output=True)
    (metadata,) = sources.glob("metadata/*.dist-info/METADATA")
    minor = ".".join(torch.__version__.split(".")[:2])
    assert f"\nVersion: {bce_ext.__version__}+pt{minor.replace('.', '')}cpu\n" in metadata.read_text()
    assert f"\nRequires-Dist: torch=={minor}.*\n" in metadata.read_text()


@pytest.mark.parametrize("tool", ["ruff", "clang-format"])
def test_hooks_have_the_versions_of_lint(tool: str) -> None:
    (pinned,) = re.findall(rf"^{tool}==\S+", (ROOT / "requirements-dev.txt").read_text(), re.M)
    hooks = re.findall(rf"\b{tool}==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks
    assert set(hooks) == {pinned}


@pytest.mark.parametrize("isolated", [True, False], ids=["without pytest-xdist", "as it is here"])
def test_the_suite_is_distributed_where_it_can_be(isolated: bool) -> None:
    command = [sys.executable, *(["-S"] if isolated else []), str(ROOT / "tests" / "environment.py"), "--distribute"]
    options = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert bool(options) == (not isolated and find_spec("xdist") is not None)
