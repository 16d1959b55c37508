"""What was spent on a text that was written, beside what the same tokens would have taken densely.

Steps and passes are counted as `costs` says.
"""

from sol_jax.costs.decode_step import StepCost, dense_pass, dense_step, step_cost
from sol_jax.generation.engine import Output
from sol_jax.generation.episodes import Decoder
from sol_jax.models.llama import LlamaConfig


def text_cost(output: Output, cfg: Decoder) -> StepCost:
    """All that was spent on a text after its prefill.

    In lossless mode that includes the steps whose tokens were refused, and the logits of the checking pass.
    An episode in which the text ended needs no refresh.
    """
    total, every, ended = StepCost(), cfg.refresh_every, bool(output.transcript.finish)
    for e, episode in enumerate(output.episodes):
        for t, action in enumerate(episode.action_T[: episode.steps]):
            values_X = cfg.space.values_AxX[action]
            total += step_cost(values_X, episode.start + 1 + t, cfg.model, cfg.space.axes, cfg.policy)
        if cfg.lossless:
            checked = dense_pass(cfg.horizon + 1, episode.start, cfg.model, with_head=True)
            total += StepCost(refresh=checked)
        elif cfg.refresh and (e + 1) % every == 0 and not (e + 1 == len(output.episodes) and ended):
            first = output.episodes[e + 1 - every].start
            total += StepCost(refresh=dense_pass(every * cfg.horizon, first, cfg.model))
    return total


def dense_text_cost(output: Output, cfg: LlamaConfig) -> StepCost:
    """What the same tokens would have taken densely, one step each after the prefill's own."""
    total, prompt = StepCost(), len(output.request.prompt)
    for n in range(1, len(output.transcript.ids)):
        total += dense_step(prompt + n, cfg)
    return total
