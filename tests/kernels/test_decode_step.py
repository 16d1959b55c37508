"""Which kernels a decode step calls, and that the fused effects of axes are the plain ones in turn."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks.kernel_steps import HORIZON, MODELS, axes
from kernels.interpreted import kernel_calls
from pallas_kernels.norm import rms_norm
from sol_jax.axes.base import Axis, mlp_input, mlp_output
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.rho import ChannelPruning
from sol_jax.models import llama
from sol_jax.models.llama import KVCache

EPS = 1e-5


def kernels_of_a_step(platform: str, kernels: str, model: str, batch: int, K: int, context: int) -> set[str]:
    """Names of the kernels in one step of K schedules of each of `batch` sequences."""
    cfg, using = dataclasses.replace(MODELS[model], kernels=kernels), axes(kernels)

    def step(weights, cache_B, token_BxK, action_BxKxX):
        def sequence(cache, token_K, action_KxX):
            prefix = llama.index_cache(cache, axes("xla")).prefix(jnp.int32(context))
            suffix = llama.empty_suffix(prefix, HORIZON, axes("xla"))

            def schedule(token, action_X):
                return llama.decode_step(weights, prefix, suffix, token, 0, action_X, using, cfg)

            return jax.vmap(schedule)(token_K, action_KxX)

        return jax.vmap(sequence)(cache_B, token_BxK, action_BxKxX)

    size = (batch, cfg.num_layers, cfg.num_kv_heads, context, cfg.head_size)
    cache = jax.ShapeDtypeStruct(size, jnp.bfloat16)
    token = jax.ShapeDtypeStruct((batch, K), jnp.int32)
    action = jax.ShapeDtypeStruct((batch, K, len(using)), jnp.float32)
    weights = llama.abstract_weights(cfg)
    return set(kernel_calls(step, weights, KVCache(cache, cache), token, action, platform=platform))


CHOICE = {"page_scores", "own_page_scores", "select_pages"}
PAGED = {"list_pages", "attend_pages"}
GATHERED = {"compact", "gather_gemv"}
MLP = {"norm_prune", "quantize_residual"}


@pytest.mark.parametrize(
    ("platform", "kernels", "load", "expected"),
    [
        # Generation: several users, and one.
        ("gpu", "pallas", ("llama-3.1-8b", 8, 1, 32768), CHOICE | PAGED | MLP),
        ("gpu", "pallas", ("llama-3.1-8b", 1, 1, 1024), CHOICE | PAGED | GATHERED | MLP),
        (
            "tpu",
            "pallas",
            ("llama-3.1-8b", 1, 1, 1024),
            {"own_page_scores", "select_pages", "attend_pages", "gather_gemv"} | MLP,
        ),
        # Training: sixteen schedules read the prefix once, in order.
        ("gpu", "pallas", ("llama-3.2-1b", 8, 16, 1024), CHOICE | {"attend_pages"} | MLP),
        ("gpu", "xla", ("llama-3.1-8b", 1, 1, 32768), set()),
        # Nothing that was not measured.
        ("gpu", "auto", ("llama-3.1-8b", 1, 1, 32768), set()),
        ("tpu", "auto", ("llama-3.1-8b", 1, 1, 32768), set()),
        ("cpu", "auto", ("llama-3.1-8b", 1, 1, 32768), set()),
    ],
)
def test_kernels_of_a_step(platform, kernels, load, expected):
    assert kernels_of_a_step(platform, kernels, *load) == expected


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        (("llama-3.1-8b", 1, 1, 32768), {"triton_attend", "triton_gemv"}),
        (("llama-3.2-1b", 3, 1, 1024), {"triton_attend"} | GATHERED),
        # Training, where heads of a group times schedules are 64 rows: lists of pages are for 16 at most.
        (("llama-3.2-1b", 8, 16, 1024), {"attend_pages"}),
    ],
)
def test_triton_is_pallas_where_it_has_no_kernel(load, expected, jax_triton):
    assert kernels_of_a_step("gpu", "triton", *load) == CHOICE | MLP | expected


# --- effects on the MLP -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shift(Axis):
    """An axis of one's own, with plain effects only: adds its level before and after the MLP."""

    name: str = dataclasses.field(default="shift", init=False)
    effects = frozenset({"mlp_input", "mlp_output"})

    def mlp_input(self, value: jax.Array, x_D: jax.Array) -> jax.Array:
        return x_D + value

    def mlp_output(self, value: jax.Array, y_D: jax.Array) -> jax.Array:
        return y_D + value


def made(kind: type[Axis], *levels: float, kernels: str = "xla") -> Axis:
    return kind(levels, (0.0, 1.0), 1.0, kernels=kernels)


NOTHING = made(Axis, 0.3)
PRUNE, ROUND, SHIFT = made(ChannelPruning, 0.3, 1.0), made(OutputQuantization, 3.0, 16.0), made(Shift, 0.25)
X, Y, GAIN = (np.random.default_rng(i).normal(size=40).astype(np.float32) for i in range(3))


@pytest.mark.parametrize(
    "axes",
    [(), (NOTHING, PRUNE, ROUND), (PRUNE, SHIFT, ROUND), (SHIFT, PRUNE), (ROUND, SHIFT)],
)
def test_effects_act_in_turn(axes):
    levels = jnp.array([axis.levels[0] for axis in axes])
    x = rms_norm(X, GAIN, EPS)
    y = jnp.asarray(Y)
    for axis, level in zip(axes, levels, strict=True):
        x, y = axis.mlp_input(level, x), axis.mlp_output(level, y)
    np.testing.assert_array_equal(mlp_input(axes, levels, X, GAIN, EPS), x)
    stream, normed = mlp_output(axes, levels, Y, X, GAIN, EPS)
    np.testing.assert_array_equal(stream, X + y)
    np.testing.assert_array_equal(normed, rms_norm(X + y, GAIN, EPS))


def test_fused_effects_are_the_plain_ones():
    """Through the kernels, where an axis without effects stands between."""
    plain, levels = (PRUNE, NOTHING, ROUND), jnp.array([0.3, 0.3, 3.0])
    fused = tuple(dataclasses.replace(axis, kernels="pallas") for axis in plain)
    assert set(kernel_calls(lambda x: mlp_input(fused, levels, x, GAIN, EPS), X)) == {"norm_prune"}
    assert set(kernel_calls(lambda y: mlp_output(fused, levels, y, X, GAIN, EPS), Y)) == {"quantize_residual"}
    got, expected = (mlp_input(using, levels, X, GAIN, EPS) for using in (fused, plain))
    np.testing.assert_array_equal(np.flatnonzero(got), np.flatnonzero(expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    got, expected = (mlp_output(using, levels, Y, X, GAIN, EPS) for using in (fused, plain))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
