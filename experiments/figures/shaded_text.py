"""A text that the model wrote, each token shaded by the compute that it was given: the picture of the README.

    python -m experiments.figures.shaded_text                       # draws what was written before
    python -m experiments.figures.shaded_text --write \\
        --policy smollm2-135m/sol-j-fl --budget 0.5,0.7,0.5 --prompt 'The lighthouse keeper' --max_tokens 90

Reads `shaded_text.csv` of SmolLM2-135M: a line per token with its characters and its cost on each axis; the
first line is the prompt.  `--write` writes that file anew.
"""

import argparse
import csv
import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from experiments import FIGURES, RESULTS
from experiments.figures import plots
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_argument
from sol_jax.generation.generated_text import GeneratedText, generate_text
from sol_jax.generation.html_page import SHADES, shade, visible

FILE = pathlib.Path(plots.MODEL) / "shaded_text.csv"
WIDTH = 92  # characters of a line


def save(path: pathlib.Path, prompt: str, text: GeneratedText) -> None:
    """Writes the prompt and the tokens with their costs."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["token", *text.axes])
        writer.writerow([prompt, *["" for _ in text.axes]])
        for piece, cost_X in zip(text.pieces, text.costs, strict=True):
            writer.writerow([piece, *(f"{cost:.4g}" for cost in cost_X)])


def read(path: pathlib.Path) -> list[tuple[str, float | None]]:
    """Characters and net keep rate of each token; of the prompt None.  `UserError` if there is no file."""
    try:
        with open(path, newline="") as file:
            _, *rows = csv.reader(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); write it with --write") from error
    return [(token, None if "" in costs else sum(map(float, costs)) / len(costs)) for token, *costs in rows]


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


def draw(results: pathlib.Path) -> Figure:
    """The text over its legend."""
    lines = lines_of(read(results / FILE))
    height = 0.3 * (len(lines) + 2)
    figure = plt.figure(figsize=(10, height))
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


@exits_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=path_argument, default=RESULTS, help="folder of the CSVs")
    parser.add_argument("--output", type=path_argument, default=FIGURES / "shaded_text.png")
    parser.add_argument("--write", action="store_true", help="write the text anew")
    parser.add_argument("--policy", default="smollm2-135m/sol-j-fl")
    parser.add_argument("--budget", default="0.5,0.7,0.5")
    parser.add_argument("--prompt", default="The lighthouse keeper")
    parser.add_argument("--max_tokens", type=int, default=90)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.write:
        budget = tuple(float(part) for part in args.budget.split(","))
        drawn = {
            "temperature": args.temperature,
            "top_p": 0.9 if args.temperature else 1.0,
            "seed": args.seed,
        }
        text = generate_text(
            args.prompt, plots.MODEL, args.policy, budget=budget, max_tokens=args.max_tokens, **drawn
        )
        save(args.results / FILE, args.prompt, text)
    print(f"drew {plots.save(draw(args.results), args.output)}")


if __name__ == "__main__":
    main()
