"""The page of a text that was written: what stands on it, in words for people who do not know the project.

`html_page` says how it looks.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from sol_jax.axes.base import ActionSpace, held_full
from sol_jax.generation import html_page
from sol_jax.generation.engine import Engine, Output
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.generation.terminal import facts, token_costs, write_out

_HEADINGS = {
    "policy": "Under the policy",
    "fixed": "Under a fixed schedule",
    "random": "Under a random schedule",
    "dense": "Dense: nothing left out",
}
_LEADS = {
    "policy": "Before each token a small network, the policy, chose how much compute the step was given: "
    "the stronger the blue, the more.",
    "fixed": "The compute of each token follows a fixed schedule, which does not look at the text.",
    "random": "How much compute each token was given was drawn at random, to meet a budget.",
    "dense": "Every token was given all of the compute.",
}


def write_page(
    path: pathlib.Path,
    model: str,
    engine: Engine,
    output: Output,
    told: Sequence[tuple[str, str]],
    message: str = "",
) -> None:
    """Writes a page with the text, and beside it what the dense model writes to the same prompt.

    A `message` that a chat template has made the prompt of stands in its place.  Of the model's name only the
    last part is told: a page is sent to others, and folders are nobody's business.
    """
    space = engine.cfg.space
    dense_output = None
    sides = []
    if engine.controller != "dense":
        full = engine.cfg.with_rules(space=ActionSpace(held_full(space.axes)))
        cfg = dataclasses.replace(full, policy=None, refresh=False, lossless=False)
        dense = Engine(engine.weights, engine.tokenizer, cfg)
        dense_output, rate = write_out(dense, output.request, show=False, shaded=False)
        sides.append(_side("dense", dense_output, cfg, facts(dense, dense_output, rate), ()))
    words = in_words(engine, output, dense_output)
    sides.insert(0, _side(engine.controller, output, engine.cfg, told, words))
    prompt = f"{message}\n\n" if message else engine.tokenizer.decode(list(output.request.prompt))
    axes = {axis.name: axis.kept for axis in space.axes}
    name = pathlib.PurePath(model.removeprefix("hub:")).name
    title = f"A text by {name}, shaded by compute" if name else "A text, shaded by compute"
    html_page.write(path, html_page.render(title, prompt, axes, sides, _LEADS[engine.controller]))


def in_words(engine: Engine, output: Output, dense: Output | None) -> list[str]:
    """What a text was given and what that saved, in sentences; `dense` is the dense model's own text."""
    cfg, controller = engine.cfg, engine.controller
    if controller == "dense":
        return ["Nothing was left out. This is what the model writes with all of its compute."]
    if not output.episodes:
        return ["The text is one token long, and the first token is always dense."]
    mean_X = output.mean_cost(cfg.space.costs_AxX)
    varied = [x for x, axis in enumerate(cfg.space.axes) if len(axis.levels) > 1]
    each = _listed([f"{mean_X[x]:.0%} of {_plain(cfg, x)}" for x in varied])
    asked = _listed([f"{output.request.budget[x]:.0%}" for x in varied])
    said = [f"On average a step used {each}. Asked for were {asked}."]
    spent, full = text_cost(output, cfg).total, dense_text_cost(output, cfg.model).total
    counted = [("policy's network", cfg.policy is not None), ("dense passes between episodes", cfg.refresh)]
    beside = _listed([f"the {name}" for name, there in counted if there])
    bytes_, operations = _beside_all(spent.bytes / full.bytes), _beside_all(spent.flops / full.flops)
    said.append(
        f"{f'With {beside} counted in, it' if beside else 'It'} read {bytes_} bytes and took {operations} "
        "operations, compared with dense decoding of the same tokens. That is counted, not timed: what it is "
        "worth in seconds depends on the machine."
    )
    if cfg.lossless:
        said.append(
            "The dense model has checked every token: none stands here that it would not have written."
        )
    elif dense is not None:
        said.append(_shared(output.transcript.ids, dense.transcript.ids))
    return said


def _side(
    name: str, output: Output, cfg: Decoder, told: Sequence[tuple[str, str]], words: Sequence[str]
) -> html_page.Side:
    text = output.transcript
    costs_NxX = token_costs(output, cfg)
    return html_page.Side(name, text.pieces, costs_NxX, told, text.written(), _HEADINGS[name], words)


def _plain(cfg: Decoder, x: int) -> str:
    axis = cfg.space.axes[x]
    return f"{axis.kept} ({axis.name})" if axis.kept and not axis.level_costs else axis.name


def _beside_all(share: float) -> str:
    """A share of the dense cost in words, to stand before its unit."""
    if abs(share - 1) < 0.005:
        return "as many"
    return f"{abs(1 - share):.0%} {'fewer' if share < 1 else 'more'}"


def _shared(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """How far two texts are the same."""
    same = next(
        (n for n, (one, other) in enumerate(zip(ours, theirs, strict=False)) if one != other),
        min(len(ours), len(theirs)),
    )
    if same == len(ours):
        first = "" if same == len(theirs) else " first"
        return f"All {same} tokens are those that the dense model writes{first}."
    told = f"The first {same} of {len(ours)} tokens are those that the dense model writes"
    return f"{told}; from there on the texts part."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
