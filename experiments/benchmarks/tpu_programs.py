"""What `tpu_check` compiles: kernels at the named shapes, and the programs of training and generation.

`once` has besides what a program makes by its nature (the caches that a prefill fills) what XLA copies on a
TPU for want of another way: see `turned`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax

from experiments.benchmarks.compile_check import Check, Program
from experiments.benchmarks.kernel_steps import HORIZON, MODELS
from experiments.benchmarks.plans import config_of
from experiments.benchmarks.program_cases import (
    SCHEDULES,
    STAGES,
    attended,
    bounded,
    caches,
    chosen,
    decode_step,
    generation,
    kernels,
    size_of,
)
from sol_jax.models import llama
from sol_jax.planning.known_models import architecture
from sol_jax.planning.plan import shares_of
from sol_jax.planning.programs import learn_program, play_program, row_on
from sol_jax.planning.sizes import Shares, cache_bytes, played_bytes, weight_bytes
from sol_jax.planning.topology import Topology, parse_topology
from sol_jax.runs.config import RunConfig

LITTLE = 64 << 20  # bytes: what a policy takes while it learns
LANES = 128  # of a TPU


def checks() -> list[Check]:
    """All of them, those of kernels first."""
    edges = [Check(name, make, quick=True) for name, make in _edges()]
    return [*kernels(), *edges, *steps(), *updates(), *generations()]


def _edges() -> list[tuple[str, Callable[[], Program]]]:
    """The largest blocks that `pallas_kernels.tuning.TABLE` lets a kernel have."""
    found: list[tuple[str, Callable[[], Program]]] = []
    for rows in (16, 512):
        for page, d, dtype in ((64, 128, "float32"), (256, 256, "float32"), (256, 256, "bfloat16")):
            name = f"attend {rows} rows, pages of {page}, {d} channels {dtype}"
            found.append((name, functools.partial(attended, rows, page, d, dtype)))
    for pages, rows in ((32768, 16), (4096, 128), (1024, 512)):
        found.append((f"select_pages {pages} pages, {rows} rows", functools.partial(chosen, pages, rows)))
    found.append(("page_bounds pages of 256, 256 channels float32", functools.partial(bounded, 256, 256)))
    return found


# --- decode steps -------------------------------------------------------------------------------


def turned(channels: int, size: int) -> int:
    """Bytes of a copy of caches of so many bytes with the channels of a head innermost; 0 if none is needed.

    JAX keeps heads of fewer channels than a TPU has lanes with the tokens innermost.  Turned around, as
    kernels read them and a token is written, their channels are padded to all lanes.
    """
    return size * LANES // channels if channels < LANES else 0


def turned_operands(args: Any) -> int:
    """Bytes of such copies of a kernel's operands: of arrays [sequence, head, token, channel]."""
    leaves = [leaf for leaf in jax.tree.leaves(args) if leaf.ndim >= 4]
    # A twentieth more: what is known by page has other tiles, too.
    return int(1.05 * sum(turned(leaf.shape[-1], size_of(leaf)) for leaf in leaves))


def steps() -> list[Check]:
    """Decode steps of one sequence, of several, and of schedules that share a prefix."""
    small, one, three, eight = (name for name in MODELS if name != "tiny")
    loads = [(eight, 1, 1, 8192), (eight, 2, SCHEDULES, 1024), (three, 4, 1, 1024), (one, 8, SCHEDULES, 1024)]
    found = []
    for name, batch, K, context in [*loads, (small, 8, SCHEDULES, 1024)]:
        for implementation in ("xla", "pallas"):
            make = functools.partial(decode_step, name, batch, K, context, implementation)
            prefix = size_of(caches(name, batch, context))
            never = min(size_of(llama.abstract_weights(MODELS[name])), prefix)
            # Suffixes come and go in JAX's layout, and are read in another: rollouts have them in that one.
            once = 2 * turned(MODELS[name].head_size, size_of(caches(name, batch * K, HORIZON)))
            if implementation == "pallas":
                once += turned(MODELS[name].head_size, prefix)
            label = f"decode_step {name} {batch}x{K}x{context} {implementation}"
            found.append(Check(label, make, once=once, never=never, quick=name == three))
    return found


# --- updates ------------------------------------------------------------------------------------


def updates() -> list[Check]:
    """Both programs of an update on a mesh: rows of one device, and an 8B model on rows of two."""
    found = []
    for name, model in (("sol_j_fl:1b", 1), ("sol_j_fl:8b", 2)):
        fields = {"model.dtype": "bfloat16", "mesh.model": model, "mesh.chunk": 1}
        config = config_of(name).with_fields(fields)

        def shares(topology: Topology, config: RunConfig = config) -> Shares:
            return shares_of(config, topology, architecture(config.model.path, config.model.dtype))

        def playing(topology: Topology, shares: Any = shares) -> Program:
            return *play_program(shares(topology), row_on(topology, shares(topology))), ()

        def learning(topology: Topology, shares: Any = shares) -> Program:
            return *learn_program(shares(topology), row_on(topology, shares(topology))), (0,)

        setup = shares(parse_topology("v5e:2x2")).setup
        label = f"{name} bfloat16, model {model}"
        caches, weights = int(cache_bytes(setup) / model), int(weight_bytes(setup, model))
        found.append(Check(f"play {label}", on=playing, once=caches, never=weights, quick=model == 2))
        # Besides what was played: a minibatch in the policy, and gradients.
        played = int(played_bytes(setup))
        # The policy's gradient takes the compiler minutes: nothing for CI.
        found.append(Check(f"learn {label}", on=learning, once=LITTLE, never=played))
    return found


# --- generation ---------------------------------------------------------------------------------


def generations() -> list[Check]:
    """The three programs of generation: a prompt, an episode with its refresh, and a late refresh."""
    found = []
    for name, batch, prompt in (("llama-3.1-8b", 1, 4096), ("llama-3.2-1b", 8, 1024)):
        weights = size_of(llama.abstract_weights(MODELS[name]))
        held = size_of(caches(name, batch, prompt + 16 * HORIZON))
        for implementation in ("xla", "pallas"):
            for stage in STAGES:
                make = functools.partial(generation, name, batch, prompt, implementation, stage)
                label = f"generate {stage} {name} {batch}x{prompt} {implementation}"
                # The scores of a prompt, in float32, as weights and rounded, are there at once.
                once = held + 10 * MODELS[name].num_heads * prompt**2 if stage == "start" else 0
                once += turned(MODELS[name].head_size, held)
                found.append(Check(label, make, once=once, never=min(weights, held)))
    return found
