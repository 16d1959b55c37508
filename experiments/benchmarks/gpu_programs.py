"""What `gpu_compile_check` compiles: kernels at the named shapes, decode steps, generation and updates."""

import dataclasses
import functools

from experiments.benchmarks.compile_check import Check, Program
from experiments.benchmarks.kernel_steps import MODELS
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
from sol_jax.planning.gpu import device
from sol_jax.planning.known_models import architecture
from sol_jax.planning.plan import shares_of
from sol_jax.planning.programs import learn_program, play_program, row_of
from sol_jax.planning.sizes import cache_bytes, played_bytes, weight_bytes
from sol_jax.planning.topology import Topology, parse_topology

ONE, EIGHT = "llama-3.2-1b", "llama-3.1-8b"
SMALL, LARGE = "smollm2-135m-1x1024-p8", f"{EIGHT}-8x1024-p8"
LITTLE = 64 << 20  # bytes: what a policy takes while it learns


# What CI compiles: each kernel of the smallest and the largest model, both types, and a decode step.
QUICK = (
    f"attend {SMALL}", f"shared_prefix {SMALL}", f"attend {LARGE}", f"shared_prefix {LARGE}",
    f"page_bounds {LARGE}", f"gated_hidden {EIGHT} 1 rows", f"gated_hidden {EIGHT} 3 rows",
    f"quantize_residual {EIGHT} 1 rows", "attend 16 rows, 256 channels float32",
    f"decode_step {ONE} 8x{SCHEDULES}x1024 pallas",
)  # fmt: skip


def checks() -> list[Check]:
    """All of them, those of kernels first."""
    found = [*kernels(), *_edges(), *_steps(), *_updates(), *_generations()]
    return [dataclasses.replace(check, quick=check.name.startswith(QUICK)) for check in found]


def _edges() -> list[Check]:
    """The largest blocks that `pallas_kernels.tuning.TABLE` lets a kernel have."""
    found = []
    for rows in (16, 32, 64, 128):
        for d, dtype in ((128, "float32"), (256, "float32"), (256, "bfloat16")):
            name = f"attend {rows} rows, {d} channels {dtype}"
            found.append(Check(name, functools.partial(attended, rows, 64, d, dtype)))
    for pages, rows in ((32768, 16), (4096, 128), (1024, 512)):
        found.append(
            Check(f"select_pages {pages} pages, {rows} rows", functools.partial(chosen, pages, rows))
        )
    name = "page_bounds pages of 256, 256 channels float32"
    found.append(Check(name, functools.partial(bounded, 256, 256)))
    return found


def _steps() -> list[Check]:
    """Decode steps of one sequence, of several, and of schedules that share a prefix."""
    found = []
    for name, batch, K, context in (
        (ONE, 8, SCHEDULES, 1024),
        (EIGHT, 1, 1, 8192),
        (EIGHT, 2, SCHEDULES, 1024),
    ):
        for kernel in ("xla", "pallas"):
            never = min(size_of(llama.abstract_weights(MODELS[name])), size_of(caches(name, batch, context)))
            make = functools.partial(decode_step, name, batch, K, context, kernel)
            label = f"decode_step {name} {batch}x{K}x{context} {kernel}"
            found.append(Check(label, make, never=never))
    return found


def _generations() -> list[Check]:
    """The three programs of generation: a prompt, an episode with its refresh, and a late refresh."""
    found = []
    for name, batch, prompt in ((ONE, 8, 1024), (EIGHT, 1, 4096)):
        weights = size_of(llama.abstract_weights(MODELS[name]))
        held = size_of(caches(name, batch, prompt + 256))
        for kernel in ("xla", "pallas"):
            for stage in STAGES:
                make = functools.partial(generation, name, batch, prompt, kernel, stage)
                # The scores of a prompt, in float32, as weights and rounded, are there at once.
                once = held + 10 * MODELS[name].num_heads * prompt**2 if stage == "start" else 0
                label = f"generate {stage} {name} {batch}x{prompt} {kernel}"
                found.append(Check(label, make, once=once, never=min(weights, held)))
    return found


def _updates() -> list[Check]:
    """Both programs of an update, on one GPU."""
    found = []
    for name in ("sol_j_fl:1b", "sol_j_fl:8b"):
        fields = {"model.dtype": "bfloat16", "mesh.model": 1, "mesh.chunk": 1}
        config = config_of(name).with_fields(fields)
        model = architecture(config.model.path, config.model.dtype)
        shares = shares_of(config, parse_topology("h200:1"), model)

        def playing(topology: Topology, shares=shares) -> Program:
            return *play_program(shares, row_of([device(topology.chip.name)], shares)), ()

        def learning(topology: Topology, shares=shares) -> Program:
            return *learn_program(shares, row_of([device(topology.chip.name)], shares), "gpu"), (0,)

        setup = shares.setup
        cached, weights = int(cache_bytes(setup)), int(weight_bytes(setup, 1))
        found.append(Check(f"play {name} bfloat16", on=playing, once=cached, never=weights))
        # Besides what was played: a minibatch in the policy, and gradients.
        found.append(
            Check(f"learn {name} bfloat16", on=learning, once=LITTLE, never=int(played_bytes(setup)))
        )
    return found
