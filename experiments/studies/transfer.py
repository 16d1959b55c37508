"""What a policy that learned on given text does when the model writes its own.

    python -m experiments.studies.transfer --policies smollm2-135m/sol-j-fl \\
        --source data/wikitext2/wiki.test.raw.gz --document_start '^ = [^=].* = $' \\
        --output experiments/results/transfer.csv

Each document's beginning is continued densely, under each policy and by the fixed schedule of the cost that
the policy realised on that prompt; with and without the dense refresh of the cache after each episode, and
in lossless mode.  The CSV has one row per policy, budget, mode and controller, with these measures of each
prompt's text:

    logp          the dense model's log-probability, per token
    repetition    share of the 4-grams that were there before
    divergence    the token at which it leaves the dense greedy text
    drift         how far the hidden states that the controller saw are from the dense model's (1 - cosine)
    net           realised keep rate, the mean over the axes
    kept          share of an episode's T tokens that stay: in lossless mode what the dense model accepts
    bytes, flops  of steps, policy and refresh or check, as shares of dense decoding of the same tokens: in
                  lossless mode 1 / bytes is the tokens accepted for the bytes of one dense step

Intervals are 95 %, bootstrapped over prompts.  A second CSV beside the output, `NAME-prompts.csv`, has the
measures of every prompt, by which `experiments.studies.paired` compares policies on the same prompts.
Policies that the output has already are not run again.

Source: docs/method.md, "Generation".
"""

import argparse
import csv
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sol_jax.axes.base import ActionSpace, Work, held_full
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.evaluation import budget_grid as budgets
from sol_jax.evaluation import results_csv as results
from sol_jax.evaluation.statistics import document_bootstrap
from sol_jax.files import path_argument
from sol_jax.generation.engine import Engine, Output, Request, dense_logp, generate, input_drift
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.load_engine import open_engine, show_log
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.models.weights import EMBEDDED
from sol_jax.runs.metrics import progress
from sol_jax.runs.session import commit
from sol_jax.text.documents import read_documents

NGRAM = 4
MEASURES = ("logp", "repetition", "divergence", "drift", "net", "kept", "bytes", "flops")
Measures = dict[str, np.ndarray]  # of each prompt's text
MODES: dict[str, dict[str, Any]] = {  # options of the decoder
    "refresh": {"refresh": True},
    "no_refresh": {"refresh": False},
    "lossless": {"lossless": True},
}


def repetition(tokens: Sequence[int], n: int = NGRAM) -> float:
    """Share of the n-grams of a text that occur in it before; 0 for a text shorter than that."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def divergence(tokens: Sequence[int], dense: Sequence[int]) -> int:
    """Tokens before the first that is not the dense text's; the length of the shorter if there is none."""
    pairs = zip(tokens, dense, strict=False)
    return next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(tokens), len(dense)))


def prompts_of(engine: Engine, source: str, document_start: str, count: int, length: int) -> list[list[int]]:
    """The first `length` tokens of the first `count` documents that have more; `UserError` if too few do."""
    found = []
    for document in read_documents(source, document_start):
        tokens = engine.tokenizer.encode(document.text[: 20 * length])  # a token has fewer characters
        if len(tokens) > length:
            found.append(list(tokens[:length]))
        if len(found) == count:
            return found
    raise UserError(
        f"{source} has {len(found)} documents of more than {length} tokens; --num_prompts={count}"
    )


def answer(
    engine: Engine, prompts: Sequence[Sequence[int]], budget_PxX: np.ndarray, args: argparse.Namespace
) -> list[Output]:
    """Texts after the prompts, `args.batch_size` at a time, each at its own budget."""
    requests = [
        Request(prompt, tuple(map(float, budget_X)), args.max_tokens, seed=p)
        for p, (prompt, budget_X) in enumerate(zip(prompts, budget_PxX, strict=True))
    ]
    size = args.batch_size
    batches = [generate(engine, requests[i : i + size]) for i in range(0, len(requests), size)]
    return [output for batch in batches for output in batch]


def measures(engine: Engine, outputs: Sequence[Output], dense: Sequence[Output]) -> Measures:
    """The measures of each prompt's text; NaN where a text has none."""
    weights, model = engine.weights, engine.cfg.model
    texts = [output.transcript.ids for output in outputs]
    pairs = list(zip(texts, (output.transcript.ids for output in dense), strict=True))
    spent = [text_cost(output, engine.cfg).total for output in outputs]
    whole = [dense_text_cost(output, model).total for output in outputs]
    return {
        "logp": np.array([dense_logp(weights, output, model).mean() for output in outputs]),
        "repetition": np.array([repetition(text) for text in texts]),
        "divergence": np.array([divergence(*pair) for pair in pairs], float),
        "drift": np.array([_mean(input_drift(weights, output, model)) for output in outputs]),
        "net": np.array([output.mean_cost(engine.cfg.space.costs_AxX).mean() for output in outputs]),
        "kept": np.array([_mean(kept(output, engine.cfg)) for output in outputs]),
        "bytes": np.array([_share(*pair, "bytes") for pair in zip(spent, whole, strict=True)]),
        "flops": np.array([_share(*pair, "flops") for pair in zip(spent, whole, strict=True)]),
    }


def _share(spent: Work, whole: Work, unit: str) -> float:
    """NaN of a text without a step."""
    return getattr(spent, unit) / getattr(whole, unit) if getattr(whole, unit) else float("nan")


def kept(output: Output, cfg: Decoder) -> list[float]:
    """Of each episode that the text's end did not cut, the share of its T drafted tokens that stayed.

    In lossless mode an episode adds one token more than it keeps: the dense model's own.
    """
    whole = output.episodes[:-1] if output.transcript.finish else output.episodes
    return [(episode.tokens - cfg.lossless) / cfg.horizon for episode in whole]


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """NaN, without a warning, of a text that ended before there was anything to measure."""
    return float(np.mean(values)) if len(values) else float("nan")


def summarise(of: Measures, policy: Measures | None) -> dict[str, Any]:
    """Means with intervals over prompts, and the policy's log-probability less this one's, paired."""
    row: dict[str, Any] = {}
    for name, value_P in of.items():
        value_P = value_P[np.isfinite(value_P)]  # a text of one token has no drift
        estimate = document_bootstrap(value_P, np.arange(len(value_P))) if len(value_P) else (np.nan,) * 3
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    if policy is not None:
        gain = document_bootstrap(policy["logp"] - of["logp"], np.arange(len(of["logp"])))
        row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    else:
        row |= dict.fromkeys(("gain", "gain_low", "gain_high"), "")
    return row


def rows_of_policy(name: str, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All rows of one policy, and the measures of every prompt behind them."""
    opened = open_engine(args.model, name, "policy", args.dtype)
    space, T = opened.cfg.space, opened.cfg.horizon
    asked = budgets.parse(args.budgets, space, "--budgets")
    plain = dataclasses.replace(opened.cfg, policy=None)
    prompts = prompts_of(opened, args.source, args.document_start, args.num_prompts, args.prompt_length)
    full = dataclasses.replace(plain.with_rules(space=ActionSpace(held_full(space.axes))), refresh=False)
    dense = Engine(opened.weights, opened.tokenizer, full)
    nothing_PxX = np.ones((len(prompts), len(space.axes)))
    texts = answer(dense, prompts, nothing_PxX, args)
    about = {"policy": name, "horizon": T, **settings(args), "commit": commit()}
    rows: list[dict[str, Any]] = []
    by_prompt: list[dict[str, Any]] = []

    def add(
        mode: str, controller: str, budget: Sequence[float], found: Measures, ours: Measures | None
    ) -> None:
        requested = {f"requested_{a.name}": cost for a, cost in zip(space.axes, budget, strict=True)}
        which = {"mode": mode, "controller": controller, **requested}
        rows.append({**about, **which, **summarise(found, ours)})
        for p in range(len(prompts)):
            of_prompt = {measure: float(value_P[p]) for measure, value_P in found.items()}
            by_prompt.append({"policy": name, **which, "index": p, **of_prompt})

    add("plain", "dense", (1.0,) * len(space.axes), measures(dense, texts, texts), None)
    bar, done = progress(len(asked) * len(args.modes), 0, name), 0
    for budget in asked:
        for mode in args.modes:
            policy = dataclasses.replace(opened, cfg=dataclasses.replace(opened.cfg, **MODES[mode]))
            outputs = answer(policy, prompts, np.tile(budget, (len(prompts), 1)), args)
            ours = measures(policy, outputs, texts)
            spent_PxX = np.stack([output.mean_cost(space.costs_AxX) for output in outputs])
            fixed = dataclasses.replace(
                policy, cfg=dataclasses.replace(plain, **MODES[mode]), controller="fixed", params=None
            )
            theirs = measures(fixed, answer(fixed, prompts, spent_PxX, args), texts)
            add(mode, "policy", budget, ours, None)
            add(mode, "fixed", budget, theirs, ours)
            done += 1
            bar.update(done)
    bar.close()
    return rows, by_prompt


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What rows of one file have in common."""
    return {"prompts": args.num_prompts, "prompt": args.prompt_length, "max_tokens": args.max_tokens}


def earlier(path: pathlib.Path, args: argparse.Namespace) -> list[dict[str, str]]:
    """The rows of an earlier run; `UserError` if they are of other settings."""
    if not path.exists():
        return []
    try:
        rows = list(csv.DictReader(path.read_text().splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--output={path} cannot be read ({error}); name another") from None
    for name, value in settings(args).items():
        if any(row.get(name, str(value)) != str(value) for row in rows):
            raise UserError(f"--output={path} has results of other {name} than {value}; name another")
    return rows


@exits_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policies", nargs="+", required=True, help="names, folders or workdirs")
    parser.add_argument("--model", default=EMBEDDED)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--source", required=True, help="text whose documents' beginnings are continued")
    parser.add_argument("--document_start", default="", help="where the documents of a text file begin")
    parser.add_argument("--budgets", default="0.4,0.6,0.5;0.7,0.8,0.75")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--output", type=path_argument, required=True)
    for option, default in {
        "num_prompts": 32,
        "prompt_length": 128,
        "max_tokens": 64,
        "batch_size": 16,
    }.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    show_log()
    beside = args.output.with_name(f"{args.output.stem}-prompts.csv")
    rows, by_prompt = earlier(args.output, args), earlier(beside, args)
    for name in args.policies:
        if any(row["policy"] == name for row in rows):
            continue
        found, prompts = rows_of_policy(name, args)
        rows += [results.texts(row) for row in found]
        by_prompt += [results.texts(row) for row in prompts]
        results.write(beside, by_prompt)  # after each policy, so that what is there stays
        results.write(args.output, rows)


if __name__ == "__main__":
    main()
