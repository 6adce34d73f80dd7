"""Plots of the CSV rows, as SVG files that are small and the same for the same data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from report import Row

STYLE = {
    "ours": ("bce_ext", "C3", "-"),
    "compile": ("torch.compile", "C0", "-"),
    "native": ("torch", "C7", "-"),
    "add": ("torch.add(x, t, out=y)", "C2", "--"),
    "copy": ("y.copy_(x)", "C1", ":"),
}


def plot_sweep(directory: Path, rows: Sequence[Row]) -> None:
    """Speed-up and bandwidth of forward and backward together, over the number of elements."""
    rows = [row for row in rows if row["mode"] == "full"]
    _plot_over_size(directory / "speedup.svg", rows, "speedup", "times as fast as torch", ("ours", "compile"))
    _plot_over_size(directory / "bandwidth.svg", rows, "gb_per_s", "GB/s of the bytes one pass moves", tuple(STYLE))


def _plot_over_size(path: Path, rows: Sequence[Row], column: str, label: str, names: Sequence[str]) -> None:
    panels: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panels[_describe(row)][row["implementation"]].append(row)
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, lines) in zip(axes, panels.items(), strict=True):
        for name in names:
            text, colour, dash = STYLE[name]
            x, y = ([row[key] for row in lines[name]] for key in ("numel", column))
            ax.plot(x, y, dash, color=colour, label=text, marker=".")
        ax.set(title=title, xlabel="elements", xscale="log", yscale="log")
        ax.grid(alpha=0.3)
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0].set_ylabel(label)
    axes[0].legend(fontsize=8)
    _save(figure, path)


def plot_memory(directory: Path, rows: Sequence[Row]) -> None:
    """Peak memory as multiples of the logits, a group of bars for each case."""
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        groups[_describe(row)][row["implementation"]] = row["peak_over_logits"]
    names = [name for name in STYLE if all(name in group for group in groups.values())]
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ax: Axes = figure.subplots()
    for i, name in enumerate(names):
        text, colour, _ = STYLE[name]
        heights = [group[name] for group in groups.values()]
        bars = ax.bar([x + i * 0.25 for x in range(len(groups))], heights, 0.23, color=colour, label=text)
        ax.bar_label(bars, fmt="%.2g", fontsize=8)
    labels = [name.replace(", ", "\n") for name in groups]
    ax.set_xticks([x + 0.125 * (len(names) - 1) for x in range(len(groups))], labels)
    ax.set_ylabel("peak memory / logits")
    ax.legend(fontsize=8)
    _save(figure, directory / "memory.svg")


def _describe(row: Row) -> str:
    words = [row["dtype"], *(row[key] for key in ("weights", "mode") if row[key] not in ("none", "full"))]
    if row["reduction"] != "mean":
        words.append(f"reduction {row['reduction']}")
    return ", ".join(words)


def _save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bce_ext"}):
        figure.savefig(path, metadata={"Date": None}, facecolor="white")
