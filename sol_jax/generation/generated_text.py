"""Text for notebooks and scripts: one call to write it, and an object that knows what each token was given.

text = generate_text("The sea", model, policy="smollm2-135m/sol-j-fl", budget=(0.5, 0.7, 0.5))
print(text)      # what was written
text.costs       # [N, X]: of each token, on each axis
text             # in a notebook: the text, shaded by compute
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sol_jax.errors import UserError, telling_of_memory
from sol_jax.files import path_of
from sol_jax.generation import html_page
from sol_jax.generation.engine import Engine, Output, Request, check_request
from sol_jax.generation.load_engine import open_engine
from sol_jax.generation.sampling import Sampling
from sol_jax.generation.shaded_page import write_page
from sol_jax.generation.terminal import facts, token_costs, write_out
from sol_jax.models.model import Model


@dataclasses.dataclass(frozen=True, eq=False)
class GeneratedText:
    """What a model wrote after a prompt, and what was spent on it."""

    engine: Engine
    output: Output
    tokens_per_second: float  # without the prefill and the first episode, which compile
    model: str = ""  # its name, for titles

    def __str__(self) -> str:
        return self.output.transcript.text

    @property
    def pieces(self) -> list[str]:
        """The characters of each token."""
        return self.output.transcript.pieces

    @property
    def axes(self) -> list[str]:
        """Names of the efficiency axes."""
        return [axis.name for axis in self.engine.cfg.space.axes]

    @property
    def costs(self) -> np.ndarray:
        """What each token was given on each axis, [N, X]; the first comes of the dense prefill."""
        return token_costs(self.output, self.engine.cfg)

    @property
    def realised(self) -> np.ndarray:
        """Mean cost of each axis, [X], over the steps that the controller could control."""
        return self.output.mean_cost(self.engine.cfg.space.costs_AxX)

    @property
    def steps(self) -> np.ndarray:
        """Which step of its episode wrote each token, [N], from 0; -1: the dense prefill."""
        return np.concatenate([[-1], *(np.arange(episode.tokens) for episode in self.output.episodes)])

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """What there is to say about the text, by name: budgets, bytes, operations, likelihood, speed."""
        return dict(facts(self.engine, self.output, self.tokens_per_second))

    def _repr_html_(self) -> str:
        return self.html

    def save_html(self, path: str | pathlib.Path) -> None:
        """Writes a page with the text shaded by compute, beside what the dense model writes."""
        told = list(self.facts.items())
        write_page(path_of(path, "the page"), self.model, self.engine, self.output, told)

    @property
    def html(self) -> str:
        """The text shaded by compute, as a part of a page; whatever the text holds stays text."""
        return html_page.fragment(self.pieces, self.costs, self.axes, self.output.transcript.written())


@telling_of_memory()
def generate_text(
    prompt: str,
    model: Model | str,
    policy: str | None = None,
    *,
    budget: Sequence[float] = (),
    controller: str | None = None,
    max_tokens: int = 128,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> GeneratedText:
    """Continues a prompt under a policy, a schedule or densely.

    Args:
      model: an opened model, or the name of one (see `open_model`).
      policy: a policy's name or folder, or the workdir of a training run.
      budget: requested mean cost of each axis; none for dense decoding.
      controller: policy, fixed, random or dense; default: the policy, if there is one, else dense.
      options: `kernels`, `restate`, `refresh` and `lossless`, as the flags of `sol_jax.generate`.

    Raises `UserError` for whatever is wrong with these.
    """
    asked: list[Request] = []

    def check(engine: Engine) -> None:
        if not prompt:
            raise UserError("the prompt is empty; give at least one character to continue")
        if budget and engine.controller == "dense":
            raise UserError("a budget is for a policy or a schedule; dense decoding spends everything")
        ids = engine.tokenizer.encode(prompt, add_special_tokens=True)
        asked.append(Request(ids, tuple(budget), max_tokens, tuple(stop), seed))
        check_request(asked[0], engine.cfg, engine.controller)

    try:
        sampling = Sampling(temperature, top_k, top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    engine = open_engine(model, policy, controller, check=check, sampling=sampling, **options)
    output, rate = write_out(engine, asked[0], show=False, shaded=False)
    return GeneratedText(engine, output, rate, model.name if isinstance(model, Model) else model)
