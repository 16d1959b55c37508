"""How long compression outlives itself in the KV cache (the paper's figure 7).

    python -m experiments.studies.pollution --source data/wikitext2/wiki.test.raw.gz \\
        --document_start '^ = [^=].* = $' --output experiments/results/pollution.csv

One axis is compressed for a few steps after a dense prefill, then all is dense again.  Whatever those later
steps lose, they lose to the entries that the compressed ones left behind.  The program writes one row per
axis and level, and the change at each later step to a second CSV, `NAME-curves.csv`.  It takes about 5
minutes on two CPU cores (SmolLM2-135M).

Protocol: docs/method.md, "Comparisons".  An end-of-text token ends each document of the text.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sol_jax.axes.base import ActionSpace
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest
from sol_jax.axes.rho import ChannelPruning
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.scoring import BatchScorer, ControllerSpec
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.files import path_argument
from sol_jax.models import weights as load
from sol_jax.models.llama import LlamaConfig, Weights
from sol_jax.models.tokenizer import Tokenizer, load_tokenizer
from sol_jax.rl.config import EpisodeConfig
from sol_jax.rl.policy import PolicySpec
from sol_jax.rl.rollout import EpisodeRules
from sol_jax.rl.setup import Setup
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import commit
from sol_jax.text.documents import read_documents

AXES = ("kappa", "rho", "eta")


@dataclasses.dataclass(frozen=True)
class PollutionProtocol:
    """Lengths in tokens, and the levels tried on each axis (the top ones are dense and left out)."""

    prefix: int = 512
    compressed: int = 4
    tail: int = 64
    kappa: tuple[float, ...] = (0.3, 0.5, 0.7)
    rho: tuple[float, ...] = (0.5, 0.7, 0.9)
    bits: tuple[float, ...] = (6, 8, 12)
    page_size: int = 8

    @property
    def window(self) -> int:
        """Tokens of a window: prefix, steps, and the label of the last one."""
        return self.prefix + self.compressed + self.tail + 1

    @property
    def columns(self) -> list[tuple[str, float]]:
        """What is tried, axis and level."""
        levels = zip(AXES, (self.kappa, self.rho, self.bits), strict=True)
        return [(axis, float(level)) for axis, tried in levels for level in tried]

    def setup(self, model: LlamaConfig) -> Setup:
        """These lengths and levels as a run's."""
        full = (1.0, 1.0, 16.0)
        tried = (self.kappa, self.rho, self.bits)
        kappa, rho, eta = (
            (*map(float, sorted(levels)), top) for levels, top in zip(tried, full, strict=True)
        )
        space = ActionSpace(
            (
                Quest(kappa, (kappa[0], 1.0), 0.0, page_size=self.page_size),
                ChannelPruning(rho, (rho[0], 1.0), 0.0),
                OutputQuantization(eta, (eta[0] / 16, 1.0), 0.0),
            )
        )
        episode = EpisodeConfig(self.prefix, self.compressed + self.tail)
        policy = PolicySpec(model.hidden_size, space.num_actions, episode.horizon)
        return Setup(EpisodeRules(model, space, episode), policy)

    def actions(self, space: ActionSpace) -> np.ndarray:
        """Schedules [1 + columns, T]: all dense, then each column's."""
        steps = self.compressed + self.tail
        action = np.full((1 + len(self.columns), steps), space.dense, np.int32)
        for c, (axis, level) in enumerate(self.columns, start=1):
            levels = [len(one.levels) - 1 for one in space.axes]
            x = AXES.index(axis)
            levels[x] = space.axes[x].levels.index(level)
            action[c, : self.compressed] = int(space.join(np.array(levels)))
        return action


def sample_windows(length: int, window: int, count: int, seed: int) -> np.ndarray:
    """Where windows start in a stream of `length` tokens, as the authors draw it."""
    if length <= window:
        raise UserError(f"the text has {length} tokens, not more than one window of {window}; use more text")
    return np.random.default_rng(seed).integers(0, length - window, size=count)


def measure(
    weights: Weights,
    model: LlamaConfig,
    token_NxM: np.ndarray,
    protocol: PollutionProtocol,
    batch_size: int,
    progress: Callable[[int], None] = lambda entries: None,
) -> np.ndarray:
    """Negative log-probabilities of the labels, [N, 1 + columns, T]; the first column is dense."""
    setup = protocol.setup(model)
    action = protocol.actions(setup.space)
    found = []
    for start in range(0, len(token_NxM), batch_size):
        rows = token_NxM[start : start + batch_size].astype(np.int32)
        scorer = BatchScorer(weights, None, rows, setup, batch_size, num_parallel=len(action))
        given = np.broadcast_to(action, (len(rows), 1, *action.shape))
        found.append(-scorer.play(given, ControllerSpec(), progress=progress).logp_NxWxJxT[:, 0])
    return np.concatenate(found)


def _percent(nats: np.ndarray) -> np.ndarray:
    """Change of perplexity."""
    return 100 * (np.exp(nats) - 1)


def summarize_tail(delta_NxT: np.ndarray) -> dict[str, float]:
    """Statistics over windows of what the tail's log-probabilities lost, in per cent of perplexity."""
    mean_N = np.sort(_percent(delta_NxT.mean(1)))
    peak_N = _percent(delta_NxT).max(1)
    worst = -(-len(mean_N) // 10)
    return {
        "mean_tail_pct": float(mean_N.mean()),
        "worst10_mean_tail_pct": float(mean_N[-worst:].mean()),
        "peak_tail_pct_p90": float(np.quantile(peak_N, 0.90)),
        "peak_tail_pct_p95": float(np.quantile(peak_N, 0.95)),
    }


def tail_curves(delta_NxT: np.ndarray) -> dict[str, np.ndarray]:
    """The same per later step: median and the 10th and 90th percentile over windows, [T] each."""
    percent_NxT = _percent(delta_NxT)
    return {
        "curve_median_pct": np.median(percent_NxT, 0),
        "curve_p90_pct": np.quantile(percent_NxT, 0.9, 0),
        "curve_p10_pct": np.quantile(percent_NxT, 0.1, 0),
    }


def rows_of(
    nll_NxCxT: np.ndarray, document_N: np.ndarray, protocol: PollutionProtocol
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """A CSV row per column, and one per column and later step.  Intervals are over documents."""
    rows, curve_rows = [], []
    for c, (axis, level) in enumerate(protocol.columns, start=1):
        delta_NxT = nll_NxCxT[:, c] - nll_NxCxT[:, 0]
        direct_N = _percent(delta_NxT[:, : protocol.compressed].mean(1))
        tail_NxT = delta_NxT[:, protocol.compressed :]
        row: dict[str, object] = {"axis": axis, "level": level}
        for name, value_N in (("direct_pct", direct_N), ("tail_pct", _percent(tail_NxT.mean(1)))):
            estimate = document_bootstrap(value_N, document_N)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
        row |= summarize_tail(tail_NxT)
        rows.append(results.texts(row))
        curves = tail_curves(tail_NxT)
        for t in range(tail_NxT.shape[1]):
            point = {"axis": axis, "level": level, "step": t + 1}
            here = {name: float(curve[t]) for name, curve in curves.items()}
            curve_rows.append(results.texts(point | here))
    return rows, curve_rows


def token_stream(source: str, document_start: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a text, an end-of-text token after each document, and which document each is of."""
    documents = read_documents(source, document_start)
    pieces = [[*tokenizer.encode(document.text), tokenizer.eos_id] for document in documents]
    index = np.repeat(np.arange(len(pieces)), [len(piece) for piece in pieces])
    return np.concatenate([np.array(piece, np.int32) for piece in pieces]), index


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=load.EMBEDDED, help="as config.model.path")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--source", required=True, help="text, as config.data.source")
    parser.add_argument("--document_start", default="", help="as config.data.document_start")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=123)
    parser.add_argument(
        "--prefix", type=int, default=PollutionProtocol.prefix, help="tokens of dense prefill"
    )
    parser.add_argument(
        "--tail", type=int, default=PollutionProtocol.tail, help="dense steps after compressed ones"
    )
    parser.add_argument("--output", type=path_argument, required=True, help="CSV to write")
    args = parser.parse_args(argv)
    protocol = PollutionProtocol(prefix=args.prefix, tail=args.tail)
    path = load.resolve(args.model)
    model, tokenizer = load.load_config(path, args.dtype), load_tokenizer(path)
    stream_M, document_M = token_stream(args.source, args.document_start, tokenizer)
    start_N = sample_windows(len(stream_M), protocol.window, args.windows, args.seed)
    token_NxM = stream_M[start_N[:, None] + np.arange(protocol.window)]
    columns = 1 + len(protocol.columns)
    bar, done = progress(-(-args.windows // args.batch_size) * columns, 0, "compressed, then dense"), [0]

    def tell(count: int) -> None:
        done[0] += count
        bar.update(done[0])

    nll = measure(load.load_weights(path, model), model, token_NxM, protocol, args.batch_size, tell)
    bar.close()
    document_N = document_M[start_N + protocol.prefix]
    about = {
        "model": pathlib.PurePath(args.model).name, "dtype": args.dtype, "windows": args.windows,
        "documents": len(np.unique(document_N)), "prefix": protocol.prefix, "compressed": protocol.compressed,
        "tail": protocol.tail, "dense_nats": float(nll[:, 0].mean()), "seed": args.seed,
        "text": pathlib.PurePath(args.source).name, "device": jax.devices()[0].device_kind,
        "commit": commit(),
    }  # fmt: skip
    rows, curve_rows = rows_of(nll, document_N, protocol)
    results.write(args.output, [row | results.texts(about) for row in rows])
    results.write(args.output.with_name(f"{args.output.stem}-curves.csv"), curve_rows)
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
