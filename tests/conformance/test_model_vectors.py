"""Decoding under mixed actions against the authors' patched model: what each step saw, kept and predicted.

Pages, channels and quantisation steps are chosen by thresholds: where a score lies within rounding of one,
the authors' float32 and ours may choose differently, and each choice changes what follows.  Where that can
be is measured (`golden.disturbed`): a comparison is as strict as our own answer is steady.
"""

import dataclasses
import json
from typing import Any, NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax import llama
from sol_jax.axes import ActionSpace, Axis, ChannelPruning, OutputQuantization, Quest, Recency, Relevancy
from sol_jax.load import load_model
from sol_jax.rollout import EpisodeConfig, cut_episodes, replay, rollout

TOLERANCE = 2e-4
UNSTEADY = 5 * TOLERANCE  # disturbed runs this far apart made different choices
UNCONTROLLED = 4 + 2 + 1  # sinks, window, current token


@dataclasses.dataclass(frozen=True)
class _RecordingQuest(Quest):
    """Quest that also appends the pages kept in each layer of each step to `log`."""

    log: list = dataclasses.field(default_factory=list, compare=False)

    def keep_pages(self, *args: Any) -> tuple[jax.Array, jax.Array]:
        masks = super().keep_pages(*args)
        shapes = jax.tree.map(lambda mask: jax.ShapeDtypeStruct(mask.shape, mask.dtype), masks)
        # Through the result of the call, one layer waits for the other: the log is in order.
        return jax.pure_callback(self._record, shapes, masks, vmap_method="expand_dims")

    def _record(self, masks: tuple) -> tuple:
        self.log.append(tuple(map(np.array, masks)))
        return self.log[-1]


class Case(NamedTuple):
    """One case of a file: B rows of S + T + 1 tokens, and what the authors' model made of them."""

    name: str
    vectors: golden.Vectors
    weights: llama.Weights
    cfg: llama.LlamaConfig

    def __getitem__(self, key: str) -> np.ndarray:
        return self.vectors[f"{self.name}/{key}"]

    def __contains__(self, key: str) -> bool:
        return f"{self.name}/{key}" in self.vectors
