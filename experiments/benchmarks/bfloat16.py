"""How far bfloat16 operands move the mean reward, under the same schedules of the same text.

    python -m experiments.benchmarks.bfloat16                    # SmolLM2-135M, Wikipedia text

Prints the mean log-probability of the labels in nats per token under random schedules, in float32 and in
bfloat16 (float32 sums either way), their relative difference, and how far single episodes stray.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from configs import sol_j_3l
from sol_jax.evaluation.scoring import REPLAY, BatchScorer, ControllerSpec
from sol_jax.models.llama import Weights
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig
from sol_jax.runs.session import open_session
from sol_jax.text.blocks import evaluation_batches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=12, help="validation blocks, of four episodes each")
    parser.add_argument("--schedules", type=int, default=16, help="random schedules of every episode")
    parser.add_argument("--source", default="wikipedia", help="text, as config.data.source")
    args = parser.parse_args()
    config = sol_j_3l.get_config("cpu")
    config.data.source, config.episode.episodes_per_prefix = args.source, 4
    session = open_session(RunConfig.from_dict(config.to_dict()))
    batches = list(evaluation_batches(session.split("validation"), 4, args.blocks))
    setup = session.setup
    shape = (sum(len(b.tokens_BxN) for b in batches), 4, args.schedules, setup.episode.horizon)
    action = np.random.default_rng(0).integers(setup.space.num_actions, size=shape).astype(np.int32)
    narrow = setup.with_rules(model=dataclasses.replace(setup.model, dtype="bfloat16"))
    weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), session.weights)

    def rewards(weights: Weights, setup: Setup) -> np.ndarray:
        """Mean of each episode and schedule, [N, W, J]."""
        played, start = [], 0
        for batch in batches:
            count = len(batch.tokens_BxN)
            scorer = BatchScorer(weights, None, batch.tokens_BxN, setup, 4, args.schedules)
            scores = scorer.play(action[start : start + count], ControllerSpec(REPLAY))
            played.append(scores.logp_NxWxJxT.mean(-1))
            start += count
        return np.concatenate(played)

    exact, rounded = rewards(session.weights, setup), rewards(weights, narrow)
    episode = (rounded - exact).mean(-1) / abs(exact.mean())
    print(
        f"mean reward in nats per token: float32 {exact.mean():.4f}, bfloat16 {rounded.mean():.4f} "
        f"({rounded.mean() / exact.mean() - 1:+.2%}); single episodes differ by {episode.std():.1%} "
        f"(standard deviation of {episode.size}, {args.schedules} schedules each)"
    )


if __name__ == "__main__":
    main()
