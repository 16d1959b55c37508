"""Self-Optimizing Language Models (arXiv 2605.10875) in JAX.

Array names end in their shape, one letter an axis, read from this table:

    B   sequences of a batch               D    hidden size of the LLM
    W   episodes that share one prefill    H    query heads, Hkv key/value heads
    K   schedules of one episode           d    size of one head
    T   decode steps of an episode         F    width of the MLP
    S   tokens in the prefix               V    vocabulary
    P   pages of the KV cache              L    decoder layers
    A   joint actions                      X    efficiency axes (three as shipped)
    N   any length                         E    width of the policy

so `logits_KxTxA` has one row of action logits per schedule and step.  Functions are written for one
sequence and one schedule wherever they can be, and batched by `jax.vmap`.

A notebook needs what is named in `__all__`:

    import sol_jax

    model = sol_jax.open_model("smollm2-135m")
    text = sol_jax.generate_text("The sea", model, policy="smollm2-135m/sol-j-fl", budget=(0.5, 0.7, 0.5))
    rows = sol_jax.evaluate_policy("smollm2-135m/sol-j-fl", source="wiki.test.raw.gz", output="wiki.csv")
    workdir = sol_jax.train_policy("configs/sol_j_fl.py:cpu", "runs/fl", {"train.num_updates": 100})

Start to read with `axes` (what an action is), then `models.llama` (how it acts on a decode step),
`rl.rollout` (one episode), `rl.train_step` (one update) and `training.loop`; docs/architecture.md has the
map.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

from sol_jax.jax_version import installed, newer_jax

if TYPE_CHECKING:
    from sol_jax.errors import UserError
    from sol_jax.evaluation.report import evaluate_policy
    from sol_jax.generation.generated_text import GeneratedText, generate_text
    from sol_jax.models.model import Model, open_model
    from sol_jax.processes import run_program
    from sol_jax.runs.config import RunConfig
    from sol_jax.runs.policy_files import known_policies
    from sol_jax.training.from_config import load_config, train_policy

# Where each name is; imported at its first use, since the parts below must not import those above them.
_HOME = {
    "GeneratedText": "generation.generated_text",
    "Model": "models.model",
    "RunConfig": "runs.config",
    "UserError": "errors",
    "evaluate_policy": "evaluation.report",
    "generate_text": "generation.generated_text",
    "known_policies": "runs.policy_files",
    "load_config": "training.from_config",
    "open_model": "models.model",
    "run_program": "processes",
    "train_policy": "training.from_config",
}
__all__ = [
    "GeneratedText",
    "Model",
    "RunConfig",
    "UserError",
    "evaluate_policy",
    "generate_text",
    "known_policies",
    "load_config",
    "open_model",
    "run_program",
    "train_policy",
]

# Before anything of JAX is imported, which may be what fails.
if _told := newer_jax(installed()):
    warnings.warn(_told, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sol_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sol_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
