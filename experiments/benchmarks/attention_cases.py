"""The attentions that are measured: Quest's of a decode step, and that of schedules that share a prefix.

Both include the choice of pages, which is also measured alone.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import kernel_peers as peers
from experiments.benchmarks.kernel_cases import (
    KernelCase,
    KernelWork,
    Variant,
    calls_of,
    implementations,
    normals,
)
from pallas_kernels import quest
from pallas_kernels.attention import attend
from pallas_kernels.dispatch import current_platform, without_triton
from pallas_kernels.shapes import Shape

SUFFIX = 16  # entries a schedule has of its own
# How like the queries of a group are: with 0 the heads of a group choose independent pages, with 1 the same.
ALIKE = 0.9


def attention(
    shape: Shape, keeps: Sequence[float], dtype: Any = jnp.bfloat16, smoke: bool = False
) -> KernelCase:
    """One layer's Quest attention of a decode step, choice of pages included."""
    B, H, G, S, d = shape.batch, shape.kv_heads, shape.group_size, shape.context, shape.head_size
    page, P, item = shape.page_size, -(-shape.context // shape.page_size), jnp.dtype(dtype).itemsize
    kv_bytes, small = 2 * B * H * S * d * item, 2 * B * H * G * d * item
    index_bytes = 2 * B * H * P * d * item
    calls, turns = calls_of(kv_bytes, smoke)

    def buffer(i: int) -> tuple[jax.Array, ...]:
        k, v = (normals(10 * i + j, B, H, S, d, dtype=dtype) for j in range(2))
        own = (normals(10 * i + 2 + j, B, H, SUFFIX, d, dtype=dtype) for j in range(2))
        return k, v, bounds_of(k, page), *own

    def sparse(name: str) -> Callable[..., Any]:
        def one(q, k, v, bounds, own_k, own_v, pages):
            keep = choose(q, bounds, pages, without_triton(name))
            seen = jnp.ones((1, 1, SUFFIX), bool)
            length = jnp.int32(S)
            return attend(q, (k, v), (own_k, own_v), keep, seen, length, page, implementation=name)

        def call(x: Any, buffer: Any) -> jax.Array:
            k, v, bounds, own_k, own_v = buffer
            return jax.vmap(one)(x[0], k, v, bounds, own_k, own_v, x[1])

        return call

    def whole(x: Any, buffer: Any) -> jax.Array:
        """What dispatch makes of attention without an axis."""

        def one(q, k, v):
            keep, seen = jnp.ones((1, 1, P), bool), jnp.zeros((1, 1, 1), bool)
            none = (k[:, :1], v[:, :1])
            return attend(q, (k, v), none, keep, seen, jnp.int32(S), page)

        return jax.vmap(one)(x[0], *buffer[:2])

    def masks(x: Any, buffer: Any) -> jax.Array:
        return jax.jit(jax.vmap(lambda q, b, n: choose(q, b, n, "xla")))(x[0], buffer[2], x[1])

    def kept(x: Any, buffer: Any) -> float:
        return float(jnp.mean(jnp.any(masks(x, buffer), 2)))

    def exact(x: Any, buffer: Any, dense: bool) -> np.ndarray:
        k, v = (np.asarray(part[0], np.float64) for part in buffer[:2])
        keep = np.ones((H, G, S), bool)
        if not dense:
            keep = np.repeat(np.asarray(masks(x, buffer)[0]), page, -1)[..., :S]
            k, v = (
                np.concatenate([kv, np.asarray(own[0], np.float64)], 1)
                for kv, own in zip((k, v), buffer[3:], strict=True)
            )
            keep = np.concatenate([keep, np.ones((H, G, SUFFIX), bool)], -1)
        return softmax_attention(np.asarray(x[0][0], np.float64), k, v, keep)

    flops = 4.0 * B * H * G * S * d
    reads_all = KernelWork(kv_bytes + small, flops)

    def work_of(name: str) -> Callable[[float], KernelWork]:
        if name == "xla":
            return lambda share: KernelWork(kv_bytes + index_bytes + small, flops)
        return lambda share: KernelWork(kv_bytes * share + index_bytes * (share < 1) + small, flops * share)

    variants = {name: Variant(sparse(name), work_of(name)) for name in implementations()}
    variants["dense dispatch"] = Variant(whole, lambda share: reads_all, dense=True)
    variants |= dense_attention(reads_all)
    actions = {f"keep={keep}": [query_of(shape, i, keep, dtype) for i in range(calls)] for keep in keeps}
    return KernelCase(
        "attend", str(shape), dtype, actions, [buffer(i) for i in range(turns)], variants, kept, exact
    )


def query_of(shape: Shape, i: int, keep: float, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """The queries of a step, and the pages that each row keeps."""
    B, H, G, d = shape.batch, shape.kv_heads, shape.group_size, shape.head_size
    own, common = (normals(1000 + 2 * i + j, B, H, g, d, dtype=dtype) for j, g in enumerate((G, 1)))
    q = ((1 - ALIKE**2) ** 0.5 * own + ALIKE * common).astype(dtype)
    return q, jnp.full(B, math.ceil(keep * -(-shape.context // shape.page_size)), jnp.int32)


@functools.partial(jax.jit, static_argnums=1)
def bounds_of(k_BxHxSxd: jax.Array, page: int) -> jax.Array:
    every_S = jnp.ones(k_BxHxSxd.shape[2], bool)
    return jax.vmap(lambda k: quest.page_bounds(k, every_S, page, "xla"))(k_BxHxSxd)


def choose(q_HxGxd: jax.Array, bounds: jax.Array, pages: jax.Array, name: str | None) -> jax.Array:
    used_P = jnp.ones(bounds.shape[-2], bool)
    return quest.select_pages(q_HxGxd, (bounds,), (used_P,), pages, implementation=name)[0]


def choice(
    shape: Shape, keeps: Sequence[float], dtype: Any = jnp.bfloat16, smoke: bool = False
) -> KernelCase:
    """Scores and choice of one layer's pages alone: that much of `attention` is not attention."""
    B, H, S, d, page = shape.batch, shape.kv_heads, shape.context, shape.head_size, shape.page_size
    P = -(-S // page)
    index_bytes = 2 * B * H * P * d * jnp.dtype(dtype).itemsize
    calls, turns = calls_of(index_bytes, smoke)
    work = KernelWork(index_bytes, 4.0 * B * H * shape.group_size * P * d)

    def of(name: str) -> Callable[..., Any]:
        return lambda x, bounds: jax.vmap(lambda q, b, n: choose(q, b, n, name))(x[0], bounds, x[1])

    def exact(x: Any, bounds: Any, dense: bool) -> np.ndarray:
        q, (high, low) = (np.asarray(x[0][0], np.float64), np.split(np.asarray(bounds[0], np.float64), 2, -1))
        score_HxGxP = np.maximum(q, 0) @ high.swapaxes(1, 2) + np.minimum(q, 0) @ low.swapaxes(1, 2)
        return score_HxGxP >= np.sort(score_HxGxP, -1)[..., -int(x[1][0]), None]

    def kept(x: Any, bounds: Any) -> float:
        return float(jnp.mean(jnp.any(jax.jit(of("xla"))(x, bounds), 2)))

    variants = {name: Variant(of(name), lambda share: work) for name in ("xla", "pallas")}
    actions = {f"keep={keep}": [query_of(shape, i, keep, dtype) for i in range(calls)] for keep in keeps}
    buffers = [bounds_of(normals(i, B, H, S, d, dtype=dtype), page) for i in range(turns)]
    return KernelCase("select_pages", str(shape), dtype, actions, buffers, variants, kept, exact)


def bounds(shape: Shape, dtype: Any = jnp.bfloat16, smoke: bool = False) -> KernelCase:
    """Quest's page bounds of one layer's keys, which a prefix pays for once."""
    B, H, S, d, page = shape.batch, shape.kv_heads, shape.context, shape.head_size, shape.page_size
    P, k_bytes = -(-S // page), B * H * S * d * jnp.dtype(dtype).itemsize
    calls, turns = calls_of(k_bytes, smoke)
    work = KernelWork(k_bytes * (1 + 2 / page) + B * S, 0.0)

    def of(name: str) -> Callable[..., Any]:
        def one(k_HxSxd: jax.Array, valid_S: jax.Array) -> jax.Array:
            return quest.page_bounds(k_HxSxd, valid_S, page, name)

        return lambda valid_BxS, k: jax.vmap(one)(k, valid_BxS)

    def valid(i: int) -> jax.Array:
        """Two keys of three; none of a page would be infinite bounds."""
        return (jax.random.uniform(jax.random.key(i), (B, S)) < 2 / 3) | (jnp.arange(S) % page == 0)

    def exact(valid_BxS: Any, k: Any, dense: bool) -> np.ndarray:
        whole = ((0, 0), (0, P * page - S), (0, 0))
        k_HxPxpxd = np.pad(np.asarray(k[0], np.float64), whole).reshape(H, P, page, d)
        there = np.pad(np.asarray(valid_BxS[0]), (0, P * page - S)).reshape(P, page, 1)
        high, low = (np.where(there, sign * k_HxPxpxd, -np.inf).max(2) for sign in (1, -1))
        return np.concatenate([high, -low], -1)

    variants = {name: Variant(of(name), lambda share: work) for name in ("xla", "pallas")}
    actions = {"two of three keys": [valid(i) for i in range(calls)]}
    buffers = [normals(i, B, H, S, d, dtype=dtype) for i in range(turns)]
    return KernelCase(
        "page_bounds", str(shape), dtype, actions, buffers, variants, lambda x, buffer: 1.0, exact
    )


def shared_prefix(
    shape: Shape, K: int, keeps: Sequence[float], dtype: Any = jnp.bfloat16, smoke: bool = False
) -> KernelCase:
    """One layer's attention of K schedules of each sequence, which choose pages of their own."""
    B, H, G, S, d = shape.batch, shape.kv_heads, shape.group_size, shape.context, shape.head_size
    page, P, item = shape.page_size, -(-shape.context // shape.page_size), jnp.dtype(dtype).itemsize
    kv_bytes, own_bytes = 2 * B * H * S * d * item, 2 * B * K * H * (G + SUFFIX) * d * item
    index_bytes = 2 * B * H * P * d * item
    calls, turns = calls_of(kv_bytes + own_bytes, smoke)
    flops = 4.0 * B * K * H * G * (S + SUFFIX) * d

    def buffer(i: int) -> tuple[jax.Array, ...]:
        shapes = [(B, H, S, d)] * 2 + [(B, K, H, SUFFIX, d)] * 2
        k, *others = (normals(10 * i + j, *size, dtype=dtype) for j, size in enumerate(shapes))
        return k, *others, bounds_of(k, page)

    def sparse(name: str) -> Callable[..., Any]:
        def one(q, own_k, own_v, pages, k, v, bounds):
            keep = choose(q, bounds, pages, name)
            seen = jnp.ones((1, 1, SUFFIX), bool)
            length = jnp.int32(S)
            return attend(q, (k, v), (own_k, own_v), keep, seen, length, page, implementation=name)

        schedules = jax.vmap(one, in_axes=(0, 0, 0, 0, None, None, None))

        def call(x: Any, buffer: Any) -> jax.Array:
            k, v, own_k, own_v, bounds = buffer
            return jax.vmap(schedules)(x[0], own_k, own_v, x[1], k, v, bounds)

        return call

    @jax.jit
    def masks(x: Any, bounds: jax.Array) -> jax.Array:
        schedules = jax.vmap(lambda q, b, n: choose(q, b, n, "xla"), in_axes=(0, None, 0))
        return jax.vmap(schedules)(x[0], bounds, x[1])

    def kept(x: Any, buffer: Any) -> float:
        return float(jnp.mean(jnp.any(masks(x, buffer[-1]), (1, 3))))

    def exact(x: Any, buffer: Any, dense: bool) -> np.ndarray:
        q, k, v, own_k, own_v = (np.asarray(a[0], np.float64) for a in (x[0], *buffer[:4]))
        keep = np.repeat(np.asarray(masks(x, buffer[-1])[0]), page, -1)[..., :S]
        if dense:
            return np.stack([softmax_attention(q[i], k, v, np.ones_like(keep[i])) for i in range(K)])
        keep = np.concatenate([keep, np.ones((K, H, G, SUFFIX), bool)], -1)
        both = [(np.concatenate([k, own_k[i]], 1), np.concatenate([v, own_v[i]], 1)) for i in range(K)]
        return np.stack([softmax_attention(q[i], *both[i], keep[i]) for i in range(K)])

    def as_rows(x: Any, buffer: Any) -> tuple[Any, Any]:
        return (x[0].swapaxes(1, 2).reshape(B, H, K * G, d),), buffer

    def from_rows(out: Any) -> Any:
        return np.asarray(out[0], np.float32).reshape(H, K, G, d).swapaxes(0, 1)

    def repeated(x: Any, buffer: Any) -> tuple[Any, Any]:
        return (x[0].reshape(B * K, H, G, d),), tuple(jnp.repeat(kv, K, 0) for kv in buffer[:2])

    once = KernelWork(kv_bytes + own_bytes, flops)
    each = KernelWork(kv_bytes * K + own_bytes, flops)

    def work_of(name: str) -> Callable[[float], KernelWork]:
        # "xla" reads every page, whatever the masks say.
        return lambda share: KernelWork(
            kv_bytes * (1 if name == "xla" else share) + index_bytes + own_bytes, flops
        )

    # Triton's lists pages, and schedules have nearly all of them between them.
    variants = {name: Variant(sparse(name), work_of(name)) for name in ("xla", "pallas")}
    variants |= dense_attention(once, as_rows, from_rows)
    variants |= {
        f"{name}, repeated caches": variant
        for name, variant in dense_attention(each, repeated, lambda out: out[:K]).items()
    }
    actions = {
        f"keep={keep}": [
            (
                normals(1000 + i, B, K, H, G, d, dtype=dtype),
                jnp.full((B, K), math.ceil(keep * P), jnp.int32),
            )
            for i in range(calls)
        ]
        for keep in keeps
    }
    name = f"{shape}-K{K}"
    return KernelCase(
        "shared_prefix", name, dtype, actions, [buffer(i) for i in range(turns)], variants, kept, exact
    )


def dense_attention(
    work: KernelWork,
    adapt: Callable[[Any, Any], tuple[Any, Any]] = lambda x, buffer: (x, buffer),
    first: Callable[[Any], Any] = lambda out: out[0],
) -> dict[str, Variant]:
    """Peers over caches [B, H, S, d] and queries [B, H, R, d], which `adapt` puts first of what it gives."""

    def last(x: Any, buffer: Any) -> tuple[Any, Any]:
        x, buffer = adapt(x, buffer)
        return x[0], peers.heads_last(buffer)

    def plain(x: Any, buffer: Any) -> tuple[Any, Any]:
        x, buffer = adapt(x, buffer)
        return x[0], tuple(buffer[:2])

    peer = functools.partial(Variant, work=lambda share: work, dense=True, peer=True, first=first)
    kinds = ("xla", "cudnn") if current_platform() == "gpu" else ("xla",)
    found = {f"jax.nn {kind}": peer(peers.library_attention(kind), adapt=last) for kind in kinds}
    if peers.has_torch():
        found["torch sdpa"] = peer(peers.torch_attention, adapt=plain, compile=peers.torch_chains)
    return found


def softmax_attention(
    q_HxRxd: np.ndarray, k_HxSxd: np.ndarray, v_HxSxd: np.ndarray, keep_HxRxS: np.ndarray
) -> np.ndarray:
    """[H, R, d] in float64."""
    logit = q_HxRxd @ k_HxSxd.swapaxes(1, 2) * q_HxRxd.shape[-1] ** -0.5
    logit = np.where(keep_HxRxS, logit, -np.inf)
    weight = np.exp(logit - logit.max(-1, keepdims=True))
    return weight @ v_HxSxd / weight.sum(-1, keepdims=True)
