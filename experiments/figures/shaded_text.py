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

from matplotlib.figure import Figure

from experiments import FIGURES, RESULTS
from experiments.figures import plots
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import path_argument
from sol_jax.generation.generated_text import GeneratedText, generate_text
from sol_jax.generation.shaded_image import draw_tokens

FILE = pathlib.Path(plots.MODEL) / "shaded_text.csv"


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


def draw(results: pathlib.Path) -> Figure:
    """The committed text over its legend."""
    return draw_tokens(read(results / FILE))


def draw_text(prompt: str, text: GeneratedText) -> Figure:
    """A text that was just written, over its legend."""
    nets = text.costs.mean(-1).tolist()
    return draw_tokens([(prompt, None), *zip(text.pieces, nets, strict=True)])


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
