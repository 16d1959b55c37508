"""A sample episode of the policy on held-out text, shaded by compute, for people who watch a run."""

import warnings
from typing import NamedTuple

import numpy as np

from sol_jax.evaluation.scoring import POLICY, BatchScorer, ControllerSpec
from sol_jax.generation.shaded_image import draw_tokens, pixels
from sol_jax.models.tokenizer import Tokenizer
from sol_jax.rl.learn import TrainState
from sol_jax.runs.session import Session
from sol_jax.text.blocks import evaluation_batches

CONTEXT = 48  # tokens of the prefix that are shown before the episode


class Sample(NamedTuple):
    """One episode: the tokens before it, and those that its steps predicted with what was spent on each."""

    before: str
    pieces: list[str]
    cost_TxX: np.ndarray
    budget: tuple[float, ...]

    @property
    def text(self) -> str:
        """In Markdown: the text, and what was asked for and spent.  Words of the text are no markup."""
        spent = " / ".join(f"{cost:.3f}" for cost in self.cost_TxX.mean(0))
        asked = " / ".join(f"{cost:.3f}" for cost in self.budget)
        text = "".join(self.pieces)
        indented = "\n".join(f"    {line}" for line in f"...{self.before}[{text}]".splitlines())
        return f"asked for {asked}, spent {spent} on the text in brackets\n\n{indented}"

    def image(self) -> np.ndarray:
        """The text with its tokens shaded, [height, width, 3] bytes."""
        tokens = [(self.before, None), *zip(self.pieces, self.cost_TxX.mean(-1).tolist(), strict=True)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of characters that no font here has
            return pixels(draw_tokens(tokens))


def sample_episode(session: Session, state: TrainState) -> Sample:
    """The first episode of the first validation block, under the policy at the middle budget of the
    evaluations.

    Played with all of them, as the validation does, so that nothing new is compiled.
    """
    cfg, setup = session.config.eval, session.setup
    batch = next(iter(evaluation_batches(session.split("validation"), cfg.batch_size, cfg.num_blocks)))
    asked = np.array(session.config.requested(setup.space), np.float32)
    tokens_BxN = batch.tokens_BxN
    parallel = setup.grpo.num_schedules
    scorer = BatchScorer(session.weights, state.params, tokens_BxN, setup, len(tokens_BxN), parallel)
    shape = (len(tokens_BxN), setup.episode.episodes_per_prefix, *asked.shape)
    scores = scorer.play(np.broadcast_to(asked, shape), ControllerSpec(POLICY))
    j = len(asked) // 2
    first, length = setup.episode.prefix_len + 1, setup.episode.horizon
    before, pieces = split_text(session.tokenizer, tokens_BxN[0], first, length)
    cost_TxX = setup.space.costs_AxX[scores.action_NxWxJxT[0, 0, j]]
    return Sample(before, pieces, cost_TxX, tuple(asked[j].tolist()))


def split_text(tokenizer: Tokenizer, tokens_N: np.ndarray, first: int, length: int) -> tuple[str, list[str]]:
    """The text of the tokens before `first`, of the last `CONTEXT` of them, and what each of the next adds.

    A token that only begins a character adds nothing yet; what is not UTF-8 by the end stays out.
    """
    ids = [int(token) for token in tokens_N[max(0, first - CONTEXT) : first + length]]
    start = len(ids) - length
    before = known = tokenizer.decode(ids[:start])
    pieces = []
    for end in range(start + 1, len(ids) + 1):
        now = tokenizer.decode(ids[:end]).rstrip("\ufffd")
        pieces.append(now[len(known) :])
        known = now if len(now) > len(known) else known
    return before, pieces
