"""The card of a policy, in Markdown, with metadata for the hub."""

import json
from collections.abc import Mapping
from typing import Any

from sol_jax.models.weights import EMBEDDED, EMBEDDED_HUB_ID
from sol_jax.runs.config import RunConfig

LICENSE = "apache-2.0"  # of this project, and of a policy unless its trainer says otherwise
TAGS = ("sol_jax", "jax", "flax", "adaptive-computation", "efficient-inference", "arxiv:2605.10875")
_HOW = {"grpo": "GRPO", "counterfactual": "counterfactuals: every level of a step tried"}


def card(config: RunConfig, about: Mapping[str, Any], size: int, picture: bool) -> str:
    """The whole card; `size` is the weights' in bytes, `picture` whether `sample.png` is beside it."""
    levels = {name: axis.levels for name, axis in config.axes.each().items()}
    name = about.get("hub") or about["title"]
    given = f"hub:{name}" if about.get("hub") else name
    model = config.model.path if hub_id(config.model.path) else "FOLDER"
    budget = ",".join(f"{cost:g}" for cost in middle_budget(config))
    lines = [
        *front_matter(metadata(config, about)),
        f"# {name}",
        "",
        f"A policy that picks the compute of each decode step of {about['model']}, frozen: "
        f"`--policy {given}`.",
        "",
        *(["![A text written under the policy, each token shaded by its compute](sample.png)", ""]
          if picture else []),
        "```",
        f"python -m sol_jax.generate --model {model} --policy {given} --prompt 'The sea' --budget {budget} "
        "--html sea.html",
        "```",
        "",
        "| | |",
        "|---|---|",
        f"| language model | {about['model']}, {config.model.dtype} |",
        *(f"| levels of {axis} | {', '.join(f'{x:g}' for x in found)} |" for axis, found in levels.items()),
        f"| episode | {config.episode.prefix_len} tokens of prefix, {config.episode.horizon} steps |",
        f"| learned by | {_HOW[config.learner]} |",
        f"| trained on | {config.data.source}, {len(about['documents'])} documents |",
        f"| command | `{about['command']}` |",
        f"| updates, seed, commit | {about['updates']}, {about['seed']}, {about['commit']} |",
        f"| file | {size / 1e6:.2f} MB, bfloat16 (trained in float32) |",
        "",
    ]  # fmt: skip
    if about.get("results"):
        lines += [
            "Measured (perplexity; gain over the fixed schedule of the same cost, nats per token, with its "
            "95 % interval over documents):",
            "",
            "| text | requested cost | net keep rate | policy | fixed | gain |",
            "|---|---|---|---|---|---|",
            *about["results"],
            "",
        ]
    lines.append(
        "It knows only what its training text taught it; with another language model, other levels or longer "
        "episodes it means nothing. Bytes and operations that it saves are counted, not timed."
    )
    return "\n".join(lines) + "\n"


def metadata(config: RunConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """What the hub reads of a card; `about` may give `license`, `base_model` and `datasets`.

    What is not known is left out: a folder's name is no model of the hub.
    """
    base = about.get("base_model") or hub_id(config.model.path)
    given = [name for name in about.get("datasets", ()) if name] or _datasets(config.data.source)
    known = {
        "license": about.get("license") or LICENSE,
        "library_name": "sol_jax",
        "base_model": base,
        "base_model_relation": "adapter" if base else "",
        "tags": [*TAGS, config.learner],
        "datasets": given,
        "metrics": ["perplexity"],
    }
    return {name: value for name, value in known.items() if value}


def front_matter(fields: Mapping[str, Any]) -> list[str]:
    """Metadata as the YAML that begins a card: JSON is YAML, and quotes what must be quoted."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, list):
            lines += [f"{name}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{name}: {json.dumps(value)}")
    return [*lines, "---", ""]


def hub_id(path: str) -> str:
    """The hub's name of a model by its path, where the path says it."""
    if path == EMBEDDED:
        return EMBEDDED_HUB_ID
    return path.removeprefix("hub:") if path.startswith("hub:") else ""


def middle_budget(config: RunConfig) -> tuple[float, ...]:
    """A budget of the config's own, neither the lowest nor the highest."""
    budgets = sorted(config.eval.budgets)
    return budgets[len(budgets) // 2]


def _datasets(source: str) -> list[str]:
    if source == "wikipedia":
        return ["wikipedia"]
    return [source.split(":")[1]] if source.startswith("tfds:") else []
