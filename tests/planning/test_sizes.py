"""Memory of an update: by hand, and beside what compilers allot."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from small_models import COUNTED, llama_config

from experiments.benchmarks.kernel_steps import MODELS
from experiments.benchmarks.plans import config_of
from experiments.benchmarks.tpu_check import TABLE, TOPOLOGIES
from sol_jax.models import llama
from sol_jax.models.weights import EMBEDDED, load_config
from sol_jax.planning import known_models
from sol_jax.planning.plan import FILLED
from sol_jax.planning.plan import shares_of as shares_on
from sol_jax.planning.sizes import Shares, abstract_state, cache_bytes, size_of, sizes, weight_bytes
from sol_jax.planning.topology import parse_topology
from sol_jax.rl.train_step import init_state, jit_train_step
from sol_jax.runs.config import RunConfig


def shares_of(rows: int = 1, model: int = 1, chunk: int = 1, llama=COUNTED, **fields) -> Shares:
    config = RunConfig().with_fields(
        {"episode.prefix_len": 8, "episode.horizon": 4, "policy.d_model": 8, **fields}
    )
    return Shares(config.setup(llama), rows, model, chunk)


def test_weights_by_hand():
    """D 4, F 8, two heads of 2 on one key/value head, V 10, two layers, float32; norms are not cut."""
    cut = 10 * 4 + 2 * (2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8)
    norms = 2 * 2 * 4 + 4
    assert weight_bytes(shares_of().setup, 1) == 4 * (cut + norms)
    assert weight_bytes(shares_of().setup, 2) == 4 * (cut / 2 + norms)


def test_caches_by_hand():
    """k and v of 8 tokens, 2 layers, 1 head of 2; bounds of 2 pages; and of 4 tokens of 3 schedules."""
    setup = shares_of(**{"grpo.num_schedules": 3, "axes.kappa.page_size": 4}).setup
    prefix, bounds, own = 2 * 2 * 1 * 8 * 2, 2 * 1 * 2 * 4, 2 * 2 * 1 * 2 * 3 * 4
    assert cache_bytes(setup) == 4 * (prefix + bounds + own)


def test_what_was_played_is_the_batch_filled_up():
    """Five blocks on two rows by two: two calls of four, and one device keeps all that they give."""
    fields = {"grpo.batch_size": 5}
    two, one = shares_of(2, chunk=2, **fields), shares_of(1, chunk=5, **fields)
    assert (two.calls, two.busy_rows, one.calls) == (2, 2, 1)
    assert sizes(two, "gpu").played == pytest.approx(8 / 5 * sizes(one, "gpu").played)
    assert shares_of(8, **fields).busy_rows == 5
    assert sizes(two, "gpu").total == max(sizes(two, "gpu").playing, sizes(two, "gpu").learning)


@pytest.mark.parametrize(
    ("field", "wide"),
    [("memory.prefill_batch", {"max_position": 256}), ("memory.head_rows", {"vocab_size": 5000})],
)
def test_less_at_once_takes_less(field, wide):
    """Long prompts, whose scores count, or a large vocabulary."""
    length = 200 if "max_position" in wide else 8
    few, many = (
        sizes(
            shares_of(
                chunk=8,
                llama=dataclasses.replace(COUNTED, **wide),
                **{"episode.prefix_len": length, field: count},
            ),
            "gpu",
        ).play_temporaries
        for count in (1, 64)
    )
    assert few < many


def test_published_architectures():
    """Of the embedded model beside its file; the others beside the shapes that kernels are measured at."""
    assert known_models.architecture(EMBEDDED, "bfloat16") == load_config(EMBEDDED, "bfloat16")
    for path, name in {
        "hub:meta-llama/Llama-3.2-1B": "llama-3.2-1b",
        "hub:meta-llama/Llama-3.2-3B": "llama-3.2-3b",
        "hub:meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    }.items():
        ours, theirs = known_models.architecture(path, "bfloat16"), MODELS[name]
        for field in ("vocab_size", "hidden_size", "ffn_size", "num_layers", "num_heads", "num_kv_heads",
                      "head_size", "rope_theta", "tie_embeddings"):  # fmt: skip
            assert getattr(ours, field) == getattr(theirs, field), (path, field)


MEASURED = llama_config(
    vocab_size=32768, hidden_size=256, ffn_size=1024, num_layers=8, num_heads=8, num_kv_heads=4, head_size=64,
    max_position=4096,
)  # fmt: skip
CASES = {
    # caches and prefill
    "prefix": {"grpo.batch_size": 2, "episode.prefix_len": 1024, "grpo.num_schedules": 4},
    # what schedules write
    "schedules": {"grpo.batch_size": 4, "episode.prefix_len": 64, "grpo.num_schedules": 32},
    # logits
    "logits": {"grpo.batch_size": 2, "episode.prefix_len": 64, "memory.head_rows": 2048},
}


@pytest.mark.parametrize("case", CASES)
def test_a_cpu_takes_what_the_arithmetic_says(case):
    """What XLA allots to a whole update there, besides weights, policy and tokens.

    What the process takes was too unsteady to be a test: freed memory stays with it, more or less of it.
    """
    config = RunConfig().with_fields({"policy.d_model": 64, "kernels": "xla", **CASES[case]})
    setup = config.setup(dataclasses.replace(MEASURED, dtype="float32"))
    planned = sizes(Shares(setup, 1, 1, setup.grpo.batch_size), "cpu")
    state = jax.eval_shape(lambda: init_state(jax.random.key(1), setup))
    tokens = jax.ShapeDtypeStruct((setup.grpo.batch_size, setup.episode.block_length), jnp.int32)
    program = jit_train_step.lower(state, llama.abstract_weights(setup.model), tokens, setup=setup).compile()
    allotted = program.memory_analysis().temp_size_in_bytes
    counted = planned.total - planned.weights - planned.state
    assert 0.7 < allotted / counted < 1.4, (allotted / 2**20, counted / 2**20)


def test_a_tpu_takes_what_the_arithmetic_says():
    """What libtpu allots to the program that plays, as `tpu_check` wrote it down: no more than is counted.

    Nor is it so much less that the margin which plans leave would not hold the difference.
    """
    played = {key: row for key, row in TABLE.read().items() if key[0].startswith("play ")}
    assert played
    for (name, chip), row in played.items():
        _, config, dtype, _, model = name.replace(",", "").split()
        fields = {"model.dtype": dtype, "mesh.model": int(model), "mesh.chunk": 1}
        made, topology = config_of(config).with_fields(fields), parse_topology(TOPOLOGIES[chip])
        shares = shares_on(made, topology, known_models.architecture(made.model.path, dtype))
        parts = sizes(shares, "tpu")
        counted = parts.weights + size_of(abstract_state(shares.setup).params)
        counted += parts.caches + parts.play_temporaries
        allotted = 2**20 * (float(row["arguments_mib"]) + float(row["temporaries_mib"]))
        spare = (counted - allotted) / topology.chip.memory
        assert -0.002 < spare < 1 - FILLED, (name, chip, counted / 2**20, allotted / 2**20)


def test_keys_have_a_size():
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    assert size_of((keys, jnp.zeros((2, 3), jnp.bfloat16))) == 3 * 8 + 12
