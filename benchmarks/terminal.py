"""Tables and progress on the terminal: by rich where it is installed, plain text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

try:
    from rich.console import Console
    from rich.progress import track as _track
    from rich.table import Table
except ModuleNotFoundError:
    _console = None
else:
    _console = Console(width=None if sys.stdout.isatty() else 180, markup=False, highlight=False)

T = TypeVar("T")


def say(line: str) -> None:
    if _console is None:
        print(line, flush=True)
    else:
        _console.print(line)


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Passes the items on and shows how many there are to come."""
    if _console is not None:
        yield from _track(items, description, total, console=_console)
        return
    say(f"{description} ...")
    yield from items


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    cells = [[_format(cell) for cell in row] for row in rows]
    if _console is None:
        lines = [list(columns), *cells] if any(columns) else cells
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        say("\n".join([title, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), ""]))
        return
    table = Table(title=title, title_justify="left", title_style="bold", show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if column and i else "left")
    for row in cells:
        table.add_row(*row)
    _console.print(table)


def _format(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
