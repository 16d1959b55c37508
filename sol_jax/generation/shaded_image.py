"""A picture of a text whose tokens are shaded by the compute that they were given."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sol_jax.generation.html_page import SHADES, shade, visible

WIDTH = 92  # characters of a line


def lines_of(tokens: Sequence[tuple[str, float | None]]) -> list[list[tuple[str, float | None]]]:
    """The tokens cut into lines of at most WIDTH characters, at their ends."""
    lines: list[list[tuple[str, float | None]]] = [[]]
    column = 0
    for token, net in tokens:
        first, *rest = token.split("\n")
        if column + len(first) > WIDTH:
            lines, column = [*lines, []], 0
            first = first.lstrip(" ")
        lines[-1].append((first, net))
        column += len(first)
        for part in rest:
            lines, column = [*lines, [(part, net)]], len(part)
    return [line for line in lines if any(part for part, _ in line)]


def draw_tokens(tokens: Sequence[tuple[str, float | None]]) -> Figure:
    """Tokens on the shades of their net keep rates, the prompt in bold, over a legend."""
    lines = lines_of(tokens)
    height = 0.3 * (len(lines) + 2)
    figure = Figure(figsize=(10, height))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, WIDTH + 1), ylim=(len(lines) + 2, 0))
    axes.set_axis_off()
    style: dict[str, Any] = {"family": "monospace", "fontsize": 12, "va": "center"}
    for y, line in enumerate(lines):
        x = 0
        for part, net in line:
            colour = "none" if net is None else SHADES[shade(net)]
            axes.add_patch(Rectangle((x, y + 0.08), len(part), 0.84, facecolor=colour, edgecolor="none"))
            weight = "bold" if net is None else "normal"
            for i, character in enumerate(visible(part)):
                axes.text(x + i + 0.5, y + 0.5, character, ha="center", weight=weight, **style)
            x += len(part)
    axes.text(
        0, len(lines) + 1.3, "prompt in bold; net keep rate of each token up to", fontsize=9, va="center"
    )
    for i, colour in enumerate(SHADES):
        left = 47 + 4.5 * i
        axes.add_patch(Rectangle((left, len(lines) + 0.9), 4.3, 0.8, facecolor=colour, edgecolor="#767676"))
        middle = left + 2.15, len(lines) + 1.3
        axes.text(*middle, f"{(i + 1) / 10:.1f}", fontsize=9, ha="center", va="center")
    return figure


def pixels(figure: Figure) -> np.ndarray:
    """A figure as an array [height, width, 3] of bytes."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
