"""A text on a terminal as it grows, shaded by compute, and what there is to say about it afterwards."""

import time
from collections.abc import Sequence

import numpy as np

from sol_jax.generation import html_page
from sol_jax.generation.engine import Engine, Output, Request, dense_logp, stream
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.output_cost import dense_text_cost, text_cost


def paint(piece: str, net: float) -> str:
    """A token for a terminal, on the background that its net keep rate has on the page."""
    red, green, blue = bytes.fromhex(html_page.SHADES[html_page.shade(net)][1:])
    colour = f"\x1b[38;2;0;0;0;48;2;{red};{green};{blue}m"
    # The colour ends with the line, or terminals would fill the rest of it.
    return "\n".join(f"{colour}{part}\x1b[0m" if part else "" for part in piece.split("\n"))


def token_costs(output: Output, cfg: Decoder) -> np.ndarray:
    """What each token was given, per axis [N, X]."""
    action_N, _ = output.token_actions(cfg.space.dense)
    return cfg.space.costs_AxX[action_N]


def write_out(engine: Engine, request: Request, show: bool, shaded: bool) -> tuple[Output, float]:
    """Answers one request, printing it as it grows; returns it and the tokens per second.

    The rate leaves out the prefill and the first episode, which compile, unless there is no other.
    """
    printed, marks = 0, []
    output = None
    for (output,) in stream(engine, [request]):
        marks.append((time.perf_counter(), len(output.transcript.ids)))
        settled = output.transcript.settled()
        pieces = [html_page.visible(piece) for piece in output.transcript.pieces[printed:settled]]
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


def _by_axis(names: Sequence[str], values: Sequence[float] | np.ndarray) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in zip(names, values, strict=True))
