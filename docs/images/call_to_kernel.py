"""Draws the way from the call to the kernel: `make figures`."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, GREEN, ORANGE, GREY = "#dbe9f6", "#e0f0dc", "#fde8d0", "#eeeeee"


def box(ax: Axes, x: float, y: float, width: float, title: str, text: str, colour: str) -> None:
    ax.text(x, y + 0.16, title, ha="center", va="center", fontsize=10, weight="bold")
    ax.text(x, y - 0.16, text, ha="center", va="center", fontsize=8.5)
    corner = (x - width / 2, y - 0.38)
    ax.add_patch(matplotlib.patches.FancyBboxPatch(corner, width, 0.76, "round,pad=0.04", fc=colour, ec="#555555"))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], label: str = "", side: str = "left") -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    ax.text(x + (0.3 if side == "left" else -0.3), y, label, ha=side, va="center", fontsize=8.5, style="italic")


def main() -> None:
    figure = Figure(figsize=(8.4, 7.6), layout="constrained")
    ax = figure.subplots()
    ax.set(xlim=(0, 8.4), ylim=(-0.6, 7.6), aspect="equal")
    ax.axis("off")
    box(ax, 1.5, 7, 2.6, "Python", "functional, modules, enable()", BLUE)
    box(ax, 4.3, 7, 2.0, "torch.compile", "one node of the graph", BLUE)
    box(ax, 7.0, 7, 2.4, "TorchScript, C++", "libbce_ext.so, no Python", BLUE)
    box(ax, 4.3, 5.6, 4.4, "Operator", "schema of aten, checks of arguments (ops.cpp)", GREEN)
    box(ax, 4.3, 4.2, 4.4, "Autograd", "decides which path applies (autograd.cpp)", GREEN)
    box(ax, 2.3, 2.8, 3.4, "Fast path", "internal operators, loss and gradient", GREEN)
    box(ax, 6.5, 2.8, 3.2, "Formula in ATen operations", "any derivative (composite.cpp)", ORANGE)
    box(ax, 2.3, 1.4, 3.4, "Pass", "tensors become raw pointers (pass.cpp)", GREEN)
    box(ax, 1.1, 0, 1.9, "CPU kernel", "AVX2, AVX-512, ...", GREY)
    box(ax, 3.5, 0, 1.9, "CUDA kernel", "vectors of 16 bytes", GREY)
    arrow(ax, (1.5, 6.58), (3.2, 6.02))
    arrow(ax, (4.3, 6.58), (4.3, 6.02))
    arrow(ax, (7.0, 6.58), (5.4, 6.02))
    arrow(ax, (4.3, 5.18), (4.3, 4.62))
    arrow(ax, (3.4, 3.78), (2.6, 3.22), "training, inference", "right")
    arrow(ax, (5.2, 3.78), (6.2, 3.22), "transforms, second derivatives,\nother devices")
    arrow(ax, (2.3, 2.38), (2.3, 1.82))
    arrow(ax, (1.9, 0.98), (1.3, 0.42))
    arrow(ax, (2.7, 0.98), (3.3, 0.42))
    ax.text(5.0, 0, "Loss and gradient come back the same way.", ha="left", va="center", fontsize=9, style="italic")
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bce_ext"}):
        path = Path(__file__).with_name("call-to-kernel.svg")
        figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main()
