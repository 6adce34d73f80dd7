"""Cuts a release: the changelog's unreleased part gets a version and a date, and the package that version.

python tools/release.py cut 0.2.0      # writes CHANGELOG.md and bce_ext/__init__.py
python tools/release.py check v0.2.0   # fails unless the tag, the version and the changelog agree
python tools/release.py notes 0.2.0    # prints the changelog of that version
"""

from __future__ import annotations

import argparse
import re
from datetime import date
from pathlib import Path

UNRELEASED = "## [Unreleased]\n"
VERSION_LINE = re.compile(r'^__version__ = "(.+)"$', re.M)


def cut(root: Path, version: str, today: date) -> None:
    changelog, module = root / "CHANGELOG.md", root / "bce_ext" / "__init__.py"
    text = changelog.read_text()
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise SystemExit(f"expected a version such as 0.2.0, but got '{version}'")
    if f"## [{version}]" in text:
        raise SystemExit(f"CHANGELOG.md has {version} already")
    if not notes(root, "Unreleased"):
        raise SystemExit("CHANGELOG.md has nothing under [Unreleased]")
    changelog.write_text(text.replace(UNRELEASED, f"{UNRELEASED}\n## [{version}] - {today:%Y-%m-%d}\n", 1))
    module.write_text(VERSION_LINE.sub(f'__version__ = "{version}"', module.read_text()))
    print(f"Commit this, then: git tag -a v{version} -m 'bce_ext {version}' && git push origin v{version}")


def check(root: Path, tag: str) -> None:
    (version,) = VERSION_LINE.findall((root / "bce_ext" / "__init__.py").read_text())
    if tag != f"v{version}":
        raise SystemExit(f"expected the tag v{version}, after the version of the package, but got {tag}")
    if not notes(root, version):
        raise SystemExit(f"CHANGELOG.md says nothing of {version}")


def notes(root: Path, version: str) -> str:
    """The part of the changelog below the heading of this version."""
    parts = re.split(r"^## \[(.+?)\].*\n", (root / "CHANGELOG.md").read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(version, "").strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("cut", "check", "notes"))
    parser.add_argument("version", help="the version; for check the tag")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    if args.command == "cut":
        cut(root, args.version, date.today())
    elif args.command == "check":
        check(root, args.version)
    else:
        print(notes(root, args.version))


if __name__ == "__main__":
    main()
