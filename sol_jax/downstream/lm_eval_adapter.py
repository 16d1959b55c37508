"""The lm-evaluation-harness with our models: its command line, with a model named `sol_jax`.

    python -m sol_jax.lm_eval_adapter --model sol_jax --tasks arc_easy --batch_size 32 \\
        --model_args path=smollm2-135m,policy=smollm2-135m/sol-j-fl,budget=0.5:0.7:0.5,output=costs.jsonl

`controller` is policy (if there is one), dense, fixed or random; schedules meet `budget` over the levels of
the policy or, without one, of SOL-J-FL.  Given continuations are scored as `teacher_forced` says; free ones
are written as in generation.  `output` gets a line per request with what was spent on it: the nominal keep
rate of each axis, and the bytes read and operations after the prefill as shares of dense decoding's.

Needs the extra `lm_eval`.  How texts are split into tokens, what is cut and what ends an answer follows the
harness' own Hugging Face backend, 0.4.13.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sol_jax import hosts
from sol_jax.axes.base import Work
from sol_jax.downstream.continuations import (
    Continuation,
    ContinuationScore,
    mean_cost,
    score,
    shares,
    truncated,
    work,
)
from sol_jax.errors import UserError, exits_on_user_error
from sol_jax.files import LineFile, path_of
from sol_jax.generation import engine as engine_lib
from sol_jax.generation.engine import Engine, Output, Request, check_request
from sol_jax.generation.episodes import Decoder
from sol_jax.generation.load_engine import open_engine
from sol_jax.generation.output_cost import dense_text_cost, text_cost
from sol_jax.generation.sampling import Sampling
from sol_jax.models.chat_template import conversation
from sol_jax.runs.metrics import progress

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as missing:
    NEEDS = f"sol_jax.lm_eval_adapter needs its package ({missing}): pip install 'lm_eval==0.4.13'"
    raise ImportError(NEEDS) from None

MAX_NEW_TOKENS = 256  # of the harness, where a task names none

Scored = tuple[Continuation, ContinuationScore]


@register_model("sol_jax")
class SolJax(TemplateLM):
    """A model under a controller, for the harness.

    Args:
      path: what `load.resolve` takes.
      policy: a policy's name or folder, or the workdir of a training run.
      controller: policy, dense, fixed or random.
      budget: mean cost per axis, with colons between: 0.5:0.7:0.5.
      output: a file to add a line of JSON per request to.
      max_length: tokens of a text at most; default: the model's context.
      device: not used; JAX's default device is.
      add_bos_token: whether texts begin with special tokens; default: what the tokenizer's file says.
    """

    def __init__(
        self,
        path: str,
        policy: str | None = None,
        controller: str | None = None,
        budget: str | float | None = None,
        dtype: str = "float32",
        kernels: str = "auto",
        output: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        batch_size: int | str = 32,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        hosts.refuse_several("lm_eval with sol_jax")  # each would write the harness' results
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size={batch_size}: it must be a number, at least 1")
        self.batch_size = min(int(batch_size), max_batch_size or int(batch_size))
        self._add_bos = add_bos_token
        self._output = _Output(path_of(output, "output")) if output else None
        self._budget = _budget(budget)

        def check(engine: Engine) -> None:
            check_request(Request((0,), self._budget, max_tokens=1), engine.cfg, engine.controller)
            if self._budget and engine.controller == "dense":
                raise UserError("budget is for a policy or a schedule; dense decoding spends everything")

        self._engine = open_engine(path, policy, controller, dtype, kernels, check)
        self.tokenizer = self._engine.tokenizer
        self._max_length = min(max_length or np.inf, self._engine.cfg.model.max_position)

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        return int(self._max_length)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            begun = string.startswith(self.tokenizer.token(self.prefix_token_id))
            add_special_tokens = not begun and self._add_bos is not False
        return self.tokenizer.encode(string, add_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        # Without a prompt for the answer the last message is its beginning (`gen_prefix` of a task).
        return conversation(
            self.tokenizer, chat_history, "--apply_chat_template", begun=not add_generation_prompt
        )

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        self._asked = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list, **kwargs: Any) -> list[tuple[float, bool]]:
        scored = self._score([(context, tokens) for _, context, tokens in requests], "continuations")
        self._lines(self._asked, (self._spent([one]) for one in scored))
        answers = [(float(one.logp_N.sum(dtype=np.float64)), bool(one.greedy_N.all())) for _, one in scored]
        for (text, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", text, answer)
        return answers

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        windows, owner = [], []
        for r, request in enumerate(requests):
            (text,) = request.args
            rolling = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            mine = [utils.make_disjoint_window(window) for window in rolling]
            windows += mine
            owner += [r] * len(mine)
        scored = self._score(windows, "windows")
        by_request = [
            [one for one, r in zip(scored, owner, strict=True) if r == n] for n in range(len(requests))
        ]
        self._lines(requests, map(self._spent, by_request))
        answers = [float(sum(one.logp_N.sum(dtype=np.float64) for _, one in mine)) for mine in by_request]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return answers

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], label: str) -> list[Scored]:
        asked = [truncated(context, tokens, self.max_length) for context, tokens in pairs]
        bar, done = progress(len(asked), 0, label), [0]

        def tell(count: int) -> None:
            done[0] += count
            bar.update(done[0])

        try:
            found = score(self._engine, asked, self._budget, batch_size=self.batch_size, progress=tell)
        finally:
            bar.close()
        return list(zip(asked, found, strict=True))

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        by_rule: dict[Sampling, list[tuple[int, Request]]] = {}
        for r, request in enumerate(requests):
            context, given = request.args
            rule, asked = self._request(context, given, seed=r)
            by_rule.setdefault(rule, []).append((r, asked))
        answers, bar, done = [""] * len(requests), progress(len(requests), 0, "answers"), 0
        for rule, mine in by_rule.items():
            engine = dataclasses.replace(
                self._engine, cfg=dataclasses.replace(self._engine.cfg, sampling=rule)
            )
            mine.sort(key=lambda one: (-len(one[1].prompt), one[0]))
            for start in range(0, len(mine), self.batch_size):
                batch = mine[start : start + self.batch_size]
                outputs = engine_lib.generate(engine, [asked for _, asked in batch])
                for (r, _), output in zip(batch, outputs, strict=True):
                    answers[r] = output.transcript.text
                    self.cache_hook.add_partial("generate_until", requests[r].args, answers[r])
                self._lines([requests[r] for r, _ in batch], map(self._spent_writing, outputs))
                done += len(batch)
                bar.update(done)
        bar.close()
        return answers

    def _request(self, context: str, given: dict[str, Any], seed: int) -> tuple[Sampling, Request]:
        """A request for the engine, and how its tokens are drawn.

        Seeds differ, since the harness asks for samples by repeating a request.
        """
        kwargs = normalize_gen_kwargs(given, MAX_NEW_TOKENS)
        until, longest = kwargs.pop("until"), int(kwargs.pop("max_gen_toks"))
        drawn = kwargs.pop("do_sample")
        temperature = float(kwargs.pop("temperature", 1.0 if drawn else 0.0))
        try:
            rule = Sampling(
                temperature if drawn else 0.0, int(kwargs.pop("top_k", 0)), float(kwargs.pop("top_p", 1.0))
            )
        except ValueError as error:
            raise UserError(f"gen_kwargs: {error}") from None
        if kwargs:
            raise UserError(f"gen_kwargs: {', '.join(kwargs)} cannot be honoured; leave it away")
        room = self.max_length - longest
        if room < 1:
            raise UserError(
                f"gen_kwargs: {longest} tokens to generate leave nothing of the context of {self.max_length}"
            )
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        return rule, Request(self.tok_encode(context)[-room:], self._budget, longest, stops, seed)

    def _spent(self, scored: Sequence[Scored]) -> dict[str, Any]:
        """What scoring one request took."""
        cfg, asked, found = self._engine.cfg, [one for one, _ in scored], [one for _, one in scored]
        cost_X = mean_cost(found, cfg.space.costs_AxX)
        return spent(cfg, cost_X, *work(asked, found, cfg), sum(len(one.tokens) for one in asked))

    def _spent_writing(self, output: Output) -> dict[str, Any]:
        """What writing one answer took."""
        cfg, tokens = self._engine.cfg, len(output.transcript.ids)
        cost_X = output.mean_cost(cfg.space.costs_AxX)
        works = text_cost(output, cfg).total, dense_text_cost(output, cfg.model).total
        return spent(cfg, cost_X, *works, tokens)

    def _lines(self, requests: Sequence[Any], told: Iterable[dict[str, Any]]) -> None:
        """What was spent on some requests, added to the output."""
        if self._output is None:
            return
        names = [axis.name for axis in self._engine.cfg.space.axes]
        self._output.write(
            [
                {
                    "task": request.task_name,
                    "doc": request.doc_id,
                    "request": request.idx,
                    "kind": request.request_type,
                    "controller": self._engine.controller,
                    "requested": dict(zip(names, self._budget, strict=False)),
                    **one,
                }
                for request, one in zip(requests, told, strict=True)
            ],
        )


def spent(cfg: Decoder, cost_X: np.ndarray, work: Work, dense: Work, tokens: int) -> dict[str, Any]:
    """What one request took: nominally, by axis, and as shares of dense decoding's bytes and operations."""
    names = [axis.name for axis in cfg.space.axes]
    realised = {name: float(x) for name, x in zip(names, cost_X, strict=True)}
    return {"realised": realised, **shares(work, dense), "tokens": tokens}


def _budget(given: str | float | None) -> tuple[float, ...]:
    if given is None:
        return ()
    try:
        return tuple(float(part) for part in str(given).split(":"))
    except ValueError:
        raise UserError(
            f"budget={given}: it must be numbers with colons between, such as 0.5:0.7:0.5"
        ) from None


class _Output:
    """Lines of JSON, added to a file.  Raises `UserError` if that cannot be written."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self.write([])

    def write(self, records: Sequence[dict[str, Any]]) -> None:
        try:
            file = LineFile(self._path)  # opened each time, for the harness does not say when it ends
            for record in records:
                file.add(json.dumps(record))
            file.close()
        except OSError as error:
            raise UserError(
                f"output={self._path} cannot be written: {(error.strerror or str(error)).lower()}"
            ) from None


@exits_on_user_error
def main() -> None:
    """The harness' own command line, with our model registered."""
    cli_evaluate()
