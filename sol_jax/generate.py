"""Continues a prompt under a policy, a schedule or densely, and says what each token was given.

    python -m sol_jax.generate --model smollm2-135m --policy NAME --prompt "Once upon a time" \\
        --budget 0.5,0.7,0.5 --show-compute --html story.html

`--policy` is a committed policy's name, a folder that holds one, or the workdir of a training run.
`--controller fixed` (or random) replays a schedule at the same budget, over the policy's levels or, without
one, all those of SOL-J-FL; `dense` compresses nothing.  The text goes to standard output; what was spent
on it, and how likely the dense model finds it, to standard error.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from pallas_kernels.dispatch import IMPLEMENTATIONS
from sol_jax.axes.base import ActionSpace, held_full
from sol_jax.errors import UserError, exits_on_user_error, parse_flags
from sol_jax.generation import html_page as page
from sol_jax.generation import load_engine as opening
from sol_jax.generation.engine import CONTROLLERS, Engine, Output, Request, check_request, dense_logp, stream
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.generation.sampling import Sampling
from sol_jax.models import weights as load
from sol_jax.models.chat_template import chat_prompt
from sol_jax.models.tokenizer import Tokenizer


def paint(piece: str, net: float) -> str:
    """A token for a terminal, on the background that its net keep rate has on the page."""
    red, green, blue = bytes.fromhex(page.SHADES[page.shade(net)][1:])
    colour = f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m"
    # The colour ends with the line, or terminals would fill the rest of it.
    return "\n".join(f"{colour}{part}\x1b[0m" if part else "" for part in piece.split("\n"))


def token_costs(output: Output, cfg: Decoder) -> np.ndarray:
    """What each token was given, per axis [N, X]."""
    action_N, _ = output.token_actions(cfg.space.dense)
    return cfg.space.costs_AxX[action_N]


def run(engine: Engine, request: Request, show: bool, shaded: bool) -> tuple[Output, float]:
    """Answers one request, printing it as it grows; returns it and the tokens per second.

    The rate leaves out the prefill and the first episode, which compile, unless there is no other.
    """
    printed, marks = 0, []
    output = None
    for (output,) in stream(engine, [request]):
        marks.append((time.perf_counter(), len(output.transcript.ids)))
        settled = output.transcript.settled()
        pieces = [page.visible(piece) for piece in output.transcript.pieces[printed:settled]]
        if shaded:
            net_N = token_costs(output, engine.cfg)[printed:settled].mean(-1)
            pieces = [paint(piece, net) for piece, net in zip(pieces, net_N, strict=True)]
        if show:
            print("".join(pieces), end="", flush=True)
        printed = settled
    if show:
        print(flush=True)
    assert output is not None
    (begin, before), (end, after) = marks[min(1, max(len(marks) - 2, 0))], marks[-1]
    return output, (after - before) / (end - begin) if after > before else 0.0


def facts(engine: Engine, output: Output, rate: float) -> list[tuple[str, str]]:
    """What there is to say about a text, by name."""
    cfg, names = engine.cfg, [axis.name for axis in engine.cfg.space.axes]
    mean_X = output.mean_cost(cfg.space.costs_AxX)
    logp_N = dense_logp(engine.weights, output, cfg.model)
    tokens = len(output.transcript.ids)
    told = [("controller", engine.controller + (", lossless" if cfg.lossless else ""))]
    if engine.controller != "dense":
        told.append(("requested", _by_axis(names, output.request.budget)))
    told += [("realised", _by_axis(names, mean_X)), ("net keep rate", f"{mean_X.mean():.3f}")]
    if output.episodes:
        spent, dense = text_cost(output, cfg), dense_text_cost(output, cfg.model).total
        each = tokens - 1  # the first is the prefill's
        for name, part, unit in (("bytes read", "bytes", "MB"), ("operations", "flops", "M")):
            whole, refresh, full = (getattr(work, part) for work in (spent.total, spent.refresh, dense))
            share = f"{whole / full:.3f} of dense, the refresh {refresh / full:.3f}"
            told.append((name, f"{whole / each / 1e6:.1f} {unit} a token, {share}"))
    if cfg.lossless and output.episodes:
        kept = f"{(tokens - 1) / len(output.episodes):.2f} tokens an episode"
        told.append(("accepted", f"{kept}, of {cfg.horizon} drafted and one of the dense model's"))
    logp = f"{logp_N.sum():.2f} nats, {logp_N.mean():.3f} a token"
    told += [
        ("log-probability", f"{logp} (dense model)"),
        ("tokens", f"{tokens}, ended by {output.transcript.finish}"),
        ("tokens per second", f"{rate:.1f}"),
    ]
    return told


def side(name: str, output: Output, cfg: Decoder, told: Sequence[tuple[str, str]]) -> page.Side:
    """A text for the page."""
    text = output.transcript
    return page.Side(name, text.pieces, token_costs(output, cfg), told, text.written())


def _by_axis(names: Sequence[str], values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))


def _define_flags() -> None:
    flags.DEFINE_string("model", load.EMBEDDED, "A folder, a .gguf file, hub:OWNER/NAME or smollm2-135m.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights, caches and matmul operands.")
    flags.DEFINE_enum("kernels", "auto", ["auto", *IMPLEMENTATIONS], "How decode steps run.")
    flags.DEFINE_string("policy", None, "A policy's name or folder, or the workdir of a training run.")
    flags.DEFINE_enum("controller", None, CONTROLLERS, "Who picks the actions; the policy, if there is one.")
    flags.DEFINE_string("budget", None, "Mean cost per axis, such as 0.5,0.7,0.5.")
    flags.DEFINE_string("prompt", None, "The text to continue.", required=True)
    flags.DEFINE_bool("chat", False, "The prompt is a user's message: apply the model's chat template.")
    flags.DEFINE_string("system", "", "A system message before it.")
    flags.DEFINE_integer("max_tokens", 128, "Tokens to generate at most.")
    flags.DEFINE_multi_string("stop", [], "A text before which to stop; can be repeated.")
    flags.DEFINE_float("temperature", 0.0, "0: always the most likely token.")
    flags.DEFINE_integer("top_k", 0, "Draw from the k most likely tokens; 0: from all.")
    flags.DEFINE_float("top_p", 1.0, "Draw from the most likely tokens that have this much probability.")
    flags.DEFINE_integer("seed", 0, "Of what is drawn.")
    flags.DEFINE_bool("restate", None, "Ask the policy for what is left of the budget; default: as trained.")
    flags.DEFINE_bool("refresh", True, "Replace compressed cache entries by dense ones after each episode.")
    flags.DEFINE_bool("lossless", False, "Keep only tokens that the dense model accepts.")
    flags.DEFINE_bool("show_compute", False, "Shade each token by what was spent on it.")
    flags.DEFINE_string("html", None, "A page to write: the text shaded by compute, beside the dense one.")


def _budget(text: str | None, controller: str) -> tuple[float, ...]:
    if text is None and controller != "dense":
        raise UserError(f"the controller {controller} needs a --budget, one number per axis: 0.5,0.7,0.5")
    if text is not None and controller == "dense":
        raise UserError("--budget is for a policy or a schedule; dense decoding spends everything")
    try:
        return tuple(float(part) for part in (text or "").split(",") if text)
    except ValueError:
        raise UserError(
            f"--budget={text}: it must be numbers with commas between, such as 0.5,0.7,0.5"
        ) from None


def _prompt(args: Any, tokenizer: Tokenizer) -> list[int]:
    if not args["prompt"].value:
        raise UserError("--prompt is empty; give at least one character to continue")
    if args["chat"].value:
        return chat_prompt(tokenizer, args["prompt"].value, args["system"].value)
    if args["system"].value:
        raise UserError("--system is part of a conversation; it needs --chat")
    return tokenizer.encode(args["prompt"].value, add_special_tokens=True)


def open_engine(args: Any) -> tuple[Engine, Request]:
    """Everything that the flags name, checked before the weights are loaded."""
    controller = args["controller"].value or ("policy" if args["policy"].value else "dense")
    if controller == "policy" and not args["policy"].value:
        raise UserError("the controller policy needs a --policy")
    budget = _budget(args["budget"].value, controller)
    found: list[Request] = []

    def check(engine: Engine) -> None:
        prompt, stops = _prompt(args, engine.tokenizer), tuple(args["stop"].value)
        found.append(Request(prompt, budget, args["max_tokens"].value, stops, args["seed"].value))
        check_request(found[0], engine.cfg, controller)

    try:
        sampling = Sampling(args["temperature"].value, args["top_k"].value, args["top_p"].value)
    except ValueError as error:
        raise UserError(str(error)) from None
    engine = opening.open_engine(
        args["model"].value,
        args["policy"].value,
        controller,
        args["dtype"].value,
        args["kernels"].value,
        check,
        args["restate"].value,
        sampling=sampling,
        refresh=args["refresh"].value,
        lossless=args["lossless"].value,
    )
    return engine, found[0]


@exits_on_user_error
def main(argv: Sequence[str]) -> None:
    del argv
    args: Any = flags.FLAGS
    out = pathlib.Path(args["html"].value) if args["html"].value else None
    if out:
        page.check_writable(out)
    engine, request = open_engine(args)
    output, rate = run(engine, request, show=True, shaded=args["show_compute"].value)
    told = facts(engine, output, rate)
    print("\n".join(f"{name:18} {value}" for name, value in told), file=sys.stderr)
    if out is None:
        return
    sides = [side(engine.controller, output, engine.cfg, told)]
    if engine.controller != "dense":
        space = ActionSpace(held_full(engine.cfg.space.axes))
        cfg = dataclasses.replace(engine.cfg, space=space, policy=None, refresh=False, lossless=False)
        dense = Engine(engine.weights, engine.tokenizer, cfg)
        other, rate = run(dense, request, show=False, shaded=False)
        sides.append(side("dense", other, cfg, facts(dense, other, rate)))
    names = [axis.name for axis in engine.cfg.space.axes]
    title = f"{args['model'].value}: compute per token"
    page.write(out, page.render(title, engine.tokenizer.decode(list(request.prompt)), names, sides))


if __name__ == "__main__":
    _define_flags()
    app.run(main, flags_parser=parse_flags)
