"""Rows cut from and put into caches on a CPU: the kernels' against XLA's, and what neither may copy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import native
from pallas_kernels.cache import cut, put, take_rows

built = pytest.mark.skipif(native.problem() is not None, reason=f"no library: {native.problem()}")
B, H, N, M, D = 3, 2, 11, 4, 5
WAYS = ("xla", pytest.param("native", marks=built))


def numbers(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape).astype(jnp.bfloat16)


def begin(start):
    """Where a slice of M begins, as JAX has it: negative from the end, and moved inside."""
    return min(max(start + N if start < 0 else start, 0), N - M)


starts = st.lists(st.integers(-2 * N, 2 * N), min_size=B, max_size=B)
# Which of x, what is put, and the start differ from row to row of a batch.
shared = st.tuples(st.booleans(), st.booleans(), st.booleans()).filter(any)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(starts, shared)
def test_cut_and_put(way, starts, differ):
    start_B = jnp.array(starts, jnp.int32)
    x_B, new_B = numbers(0, B, H, N, D), numbers(1, B, H, M, D)
    given_B = [leaf if own else leaf[0] for leaf, own in zip((x_B, new_B, start_B), differ, strict=True)]
    axes = tuple(0 if own else None for own in differ)
    was = np.array(x_B)
    got = jax.vmap(lambda x, new, start: put(x, new, start, way), axes)(*given_B)
    taken = None
    if differ[0] or differ[2]:
        of_each = jax.vmap(lambda x, start: cut(x, start, M, way), (axes[0], axes[2]))
        taken = of_each(given_B[0], given_B[2])
    for b in range(B):
        x, new = (np.array(leaf[b if own else 0]) for leaf, own in ((x_B, differ[0]), (new_B, differ[1])))
        at = begin(starts[b if differ[2] else 0])
        if taken is not None:
            np.testing.assert_array_equal(np.array(taken[b]), x[:, at : at + M])
        x[:, at : at + M] = new
        np.testing.assert_array_equal(np.array(got[b]), x)
    np.testing.assert_array_equal(np.array(x_B), was)  # it was not given away


@pytest.mark.parametrize("way", WAYS)
def test_rows_of_a_table(way):
    table, row = numbers(0, N, D), jnp.array([[1, 0], [N - 1, 7]])
    np.testing.assert_array_equal(np.array(take_rows(table, row, way)), np.array(table)[np.array(row)])
    of_each = jax.vmap(lambda i: take_rows(table, i, way))(row[0])
    np.testing.assert_array_equal(np.array(of_each), np.array(table)[[1, 0]])


def arrays_like(text, *shape):
    """The instructions of a program that make such an array, besides kernels, which may do so in place."""
    made = re.findall(rf"= (?:bf16|u16|f32)\[{','.join(map(str, shape))}\]\S* ([\w-]+)\(", text)
    return [name for name in made if name not in ("parameter", "custom-call", "bitcast", "get-tuple-element")]


@built
def test_what_moves_is_all_that_is_written():
    """As decoding does with one text: embeddings are read in a loop, entries put at its end."""
    table, cache, layers = numbers(0, 97, D), numbers(1, 3, H, N, D), numbers(2, 3, H, M, D)

    def play(cache, token, start, way):
        def step(token, _):
            row = take_rows(table, token, way)
            return jnp.int32(jnp.abs(row).sum()) % 97, row

        token, rows = jax.lax.scan(step, token, None, 5)
        return jax.vmap(lambda x, new: put(x, new, start, way))(cache, layers), rows

    lowered = jax.jit(play, static_argnums=3, donate_argnums=0)
    one = jnp.int32(1)
    text, other = (lowered.lower(cache, one, one, way).compile().as_text() for way in ("auto", "xla"))
    assert not arrays_like(text, 3, H, N, D)
    assert not arrays_like(text, 97, D)
    assert arrays_like(other, 3, H, N, D)  # or this test could not fail
    assert arrays_like(other, 97, D)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_named_kernels_of_other_chips_move_by_xla(dtype):
    x = numbers(0, H, N, D).astype(dtype)
    for way in ("pallas", "triton", "native", "auto", None)[: None if native.problem() is None else 2]:
        np.testing.assert_array_equal(np.array(cut(x, jnp.int32(2), M, way)), np.array(x)[:, 2 : 2 + M])
