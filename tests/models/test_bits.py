"""How bfloat16 is moved: as bits on a CPU, as it is where that would be a second copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import llama_config

from pallas_kernels import cache
from pallas_kernels.dispatch import tracing_for
from sol_jax.axes.kappa import Quest
from sol_jax.models import llama

CFG = llama_config(dtype="bfloat16")
AXES = (Quest((0.5, 1.0), (0.5, 1.0), 1.0, page_size=4),)


def step(weights, tokens_N):
    _, kv = llama.prefill(weights, tokens_N, CFG)
    prefix = llama.index_cache(kv, AXES).prefix(jnp.int32(len(tokens_N)))
    suffix = llama.empty_suffix(prefix, 4, AXES)
    return llama.decode_step(weights, prefix, suffix, tokens_N[0], jnp.int32(0), jnp.array([0.5]), AXES, CFG)


@pytest.mark.parametrize(("platform", "as_bits"), [("cpu", True), ("tpu", False), ("gpu", False)])
def test_only_a_cpu_moves_bits(platform, as_bits):
    tokens_N = jax.ShapeDtypeStruct((9,), jnp.int32)
    with tracing_for(platform):
        jaxpr = jax.make_jaxpr(lambda *args: step(*args))(llama.abstract_weights(CFG), tokens_N)
    assert ("new_dtype=uint16" in str(jaxpr)) == as_bits
    suffix = jax.tree.leaves(jaxpr.out_avals)
    assert {leaf.dtype for leaf in suffix} == {
        jnp.dtype("float32"),
        jnp.dtype("uint16" if as_bits else CFG.dtype),
    }


def test_both_ways_give_the_same_but_for_rounding():
    """XLA compiles both here; where it sees bfloat16 and no bits, it may leave out a rounding."""
    weights = llama.init_weights(jax.random.key(0), CFG)
    tokens_N = jax.random.randint(jax.random.key(1), (9,), 0, CFG.vocab_size)
    hidden, suffix = jax.jit(lambda *args: step(*args))(weights, tokens_N)
    with tracing_for("tpu"):
        other, plain = jax.jit(lambda *args: step(*args))(weights, tokens_N)
    np.testing.assert_allclose(hidden, other, atol=0.03)
    for bits, numbers in zip(jax.tree.leaves(suffix), jax.tree.leaves(plain), strict=True):
        assert numbers.dtype == jnp.bfloat16
        stored = bits.view(jnp.bfloat16).astype(jnp.float32)
        np.testing.assert_allclose(stored, numbers.astype(jnp.float32), atol=0.03)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "uint16"])
def test_parts_of_arrays(platform, dtype):
    """Any bit pattern is kept, NaNs and what was bits before included."""
    kinds = {2: np.uint16, 4: np.uint32}
    raw = np.random.default_rng(0).integers(0, 1 << 16, (3, 4, 8), dtype=np.uint32)
    x = jnp.asarray(raw.astype(kinds[jnp.dtype(dtype).itemsize])).view(dtype)

    def of(array):
        return np.asarray(array).view(kinds[jnp.dtype(dtype).itemsize])

    with tracing_for(platform):
        np.testing.assert_array_equal(of(cache.take_layer(x, jnp.int32(1))), of(x)[1])
        np.testing.assert_array_equal(of(cache.cut(x, jnp.int32(1), 2)), of(x)[:, 1:3])
        written = of(cache.put(x, x[:, :2], jnp.int32(2)))
    np.testing.assert_array_equal(written[:, 2:], of(x)[:, :2])
    np.testing.assert_array_equal(written[:, :2], of(x)[:, :2])
