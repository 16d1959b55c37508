"""What a policy that learned on given text does when the model writes its own.

    python -m experiments.transfer --policies smollm2-135m/sol-j-fl-t16 --document_start '^ = [^=].* = $' \\
        --source data/wikitext2/wiki.test.raw.gz --output experiments/results/transfer.csv

Each document's beginning is continued densely, under each policy and by the fixed schedule of the cost that
the policy realised on that prompt; with and without the dense refresh of the cache after each episode, and
in lossless mode.  One row per policy, budget, mode and controller: the dense model's log-probability of the
text, the share of 4-grams that were there before, the token at which the text leaves the dense greedy one,
how far the hidden states that the controller saw are from the dense model's on the same text (1 - cosine),
and the tokens that an episode adds.  Intervals are 95 %, bootstrapped over prompts.

Source: sol.md section 8.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sol_jax import budgets, results
from sol_jax.axis import ActionSpace, held_full
from sol_jax.corpus import read_documents
from sol_jax.engine import Engine, Output, Request, dense_logp, generate, input_drift
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.load import EMBEDDED
from sol_jax.metrics import progress
from sol_jax.opening import open_engine
from sol_jax.session import commit
from sol_jax.statistics import document_bootstrap

NGRAM = 4
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


def measures(engine: Engine, outputs: Sequence[Output], dense: Sequence[Output]) -> dict[str, np.ndarray]:
    """Each measure of each prompt's text."""
    weights, model = engine.weights, engine.cfg.model
    texts = [output.transcript.ids for output in outputs]
    pairs = list(zip(texts, (output.transcript.ids for output in dense), strict=True))
    added = [np.mean([e.tokens for e in o.episodes]) if o.episodes else 0.0 for o in outputs]
    return {
        "logp": np.array([dense_logp(weights, output, model).mean() for output in outputs]),
        "repetition": np.array([repetition(text) for text in texts]),
        "divergence": np.array([divergence(*pair) for pair in pairs], float),
        "drift": np.array([input_drift(weights, output, model).mean() for output in outputs]),
        "tokens_per_episode": np.array(added, float),
        "net": np.array([output.mean_cost(engine.cfg.space.costs_AxX).mean() for output in outputs]),
    }


def summarise(of: dict[str, np.ndarray], policy: dict[str, np.ndarray] | None) -> dict[str, Any]:
    """Means with intervals over prompts, and the policy's log-probability less this one's, paired."""
    row: dict[str, Any] = {}
    for name, value_P in of.items():
        estimate = document_bootstrap(value_P, np.arange(len(value_P)))
        row |= dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))
    if policy is not None:
        gain = document_bootstrap(policy["logp"] - of["logp"], np.arange(len(of["logp"])))
        row |= dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True))
    else:
        row |= dict.fromkeys(("gain", "gain_low", "gain_high"), "")
    return row


def rows_of_policy(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one policy."""
    opened = open_engine(args.model, name, "policy", args.dtype)
    space, T = opened.cfg.space, opened.cfg.horizon
    asked = budgets.parse(args.budgets, space, "--budgets")
    plain = dataclasses.replace(opened.cfg, policy=None)
    prompts = prompts_of(opened, args.source, args.document_start, args.num_prompts, args.prompt_length)
    full = dataclasses.replace(plain, space=ActionSpace(held_full(space.axes)), refresh=False)
    dense = Engine(opened.weights, opened.tokenizer, full)
    nothing_PxX = np.ones((len(prompts), len(space.axes)))
    texts = answer(dense, prompts, nothing_PxX, args)
    about = {"policy": name, "horizon": T, "prompts": len(prompts), "prompt": args.prompt_length,
             "max_tokens": args.max_tokens, "commit": commit()}  # fmt: skip

    def row(mode: str, controller: str, budget: Sequence[float], found: dict[str, Any]) -> dict[str, Any]:
        requested = {f"requested_{a.name}": cost for a, cost in zip(space.axes, budget, strict=True)}
        return {**about, "mode": mode, "controller": controller, **requested, **found}

    rows = [row("plain", "dense", (1.0,) * len(space.axes), summarise(measures(dense, texts, texts), None))]
    bar = progress(len(asked) * len(args.modes), 0, name)
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
            rows.append(row(mode, "policy", budget, summarise(ours, None)))
            rows.append(row(mode, "fixed", budget, summarise(theirs, ours)))
            bar.update(1)
    bar.close()
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
    parser.add_argument("--output", type=pathlib.Path, required=True)
    for option, default in {
        "num_prompts": 32,
        "prompt_length": 128,
        "max_tokens": 64,
        "batch_size": 16,
    }.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for name in args.policies:
        rows += rows_of_policy(name, args)
        results.write(
            args.output, [results.texts(row) for row in rows]
        )  # after each, so that what is there stays


if __name__ == "__main__":
    main()
