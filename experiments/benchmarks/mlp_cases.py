"""The parts of the MLP that are measured: the pruned gate and up, and rounding with what follows it."""

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
from pallas_kernels import gated_mlp, prune, quantize
from pallas_kernels.dispatch import without_triton
from pallas_kernels.norm import rms_norm
from pallas_kernels.shapes import Shape

EPS = 1e-5


def pruned_mlp(
    shape: Shape, rows: int, keeps: Sequence[float], dtype: Any = jnp.bfloat16, smoke: bool = False
) -> KernelCase:
    """Norm, pruning and the gated half of one layer's MLP."""
    D, F, item = shape.hidden, shape.ffn, jnp.dtype(dtype).itemsize
    weight_bytes, small = 2 * D * F * item, rows * (4 * D + 4 * F)
    calls, turns = calls_of(weight_bytes, smoke)
    flops = 4.0 * rows * D * F

    def buffer(i: int) -> tuple[jax.Array, ...]:
        gate, up = ((normals(10 * i + j, D, F) * D**-0.5).astype(dtype) for j in range(2))
        return gate, up, 1 + 0.1 * normals(10 * i + 2, D, dtype=jnp.float32)

    def pruned(x: Any, gain_D: jax.Array, name: str | None) -> jax.Array:
        return jax.vmap(lambda x, keep: prune.norm_prune(x, gain_D, EPS, keep, name).x_D)(x[0], x[1])

    def hidden(x_NxD: jax.Array, buffer: Any, name: str) -> jax.Array:
        return jax.vmap(lambda x_D: gated_mlp.gated_hidden(x_D, buffer[0], buffer[1], name))(x_NxD)

    def sparse(name: str) -> Callable[..., Any]:
        return lambda x, buffer: hidden(pruned(x, buffer[2], without_triton(name)), buffer, name)

    def apart(x: Any, buffer: Any) -> jax.Array:
        """Norm and pruning one after the other."""
        return hidden(prune.keep_channels(rms_norm(x[0], buffer[2], EPS), x[1], "pallas"), buffer, "pallas")

    def normed(x: Any, buffer: Any) -> jax.Array:
        return rms_norm(x[0], buffer[2], EPS).astype(dtype)

    def dense(x: Any, buffer: Any) -> jax.Array:
        return gated_mlp.gated_hidden(normed(x, buffer), buffer[0], buffer[1], "xla")

    def inputs_of(x: Any, buffer: Any, dense: bool) -> jax.Array:
        return normed(x, buffer) if dense else jax.jit(pruned, static_argnums=2)(x, buffer[2], "xla")

    def kept(x: Any, buffer: Any) -> float:
        return float(jnp.mean(jnp.any(inputs_of(x, buffer, False) != 0, 0)))

    def exact(x: Any, buffer: Any, dense: bool) -> np.ndarray:
        first = np.asarray(inputs_of(x, buffer, dense).astype(dtype)[0], np.float64)
        opened, up = (first @ np.asarray(w, np.float64) for w in buffer[:2])
        return opened / (1 + np.exp(-opened)) * up

    whole = KernelWork(weight_bytes + small, flops)

    def work_of(name: str) -> Callable[[float], KernelWork]:
        if name == "xla" or rows > gated_mlp.MAX_ROWS["pallas"]:  # with more than one, Triton's is Pallas'
            return lambda share: whole
        return lambda share: KernelWork(weight_bytes * share + small, flops * share)

    variants = {name: Variant(sparse(name), work_of(name)) for name in implementations()}
    variants["pallas, norm apart"] = Variant(apart, work_of("pallas"))
    variants["dense xla"] = Variant(dense, lambda share: whole, True, True)
    if peers.has_torch():
        # Without its norm, which flatters it.
        variants["torch cublas"] = Variant(
            peers.torch_gated,
            lambda share: whole,
            True,
            True,
            adapt=lambda x, buffer: (normed(x, buffer), tuple(buffer[:2])),
            compile=peers.torch_chains,
        )
    actions = {
        f"keep={keep}": [
            (normals(1000 + i, rows, D, dtype=jnp.float32), jnp.full(rows, keep, jnp.float32))
            for i in range(calls)
        ]
        for keep in keeps
    }
    name = f"{shape.name}-{rows} rows"
    return KernelCase(
        "gated_hidden", name, dtype, actions, [buffer(i) for i in range(turns)], variants, kept, exact
    )


def rounding(shape: Shape, rows: int, bits: Sequence[int], smoke: bool = False) -> KernelCase:
    """Quantise, residual add and the next norm, float32; the dense peer adds and norms only."""
    D = shape.hidden
    calls, turns = calls_of(16 * rows * D, smoke)
    work = KernelWork(16.0 * rows * D, 0.0)

    def fused(name: str) -> Callable[..., Any]:
        def call(x: Any, gain_D: jax.Array) -> Any:
            def one(y, residual, bits):
                return quantize.quantize_residual(y, bits, residual, gain_D, EPS, name)

            return jax.vmap(one)(*x)

        return call

    def plain(x: Any, gain_D: jax.Array) -> Any:
        stream = x[0] + x[1]
        return stream, rms_norm(stream, gain_D, EPS)

    def apart(x: Any, gain_D: jax.Array) -> Any:
        """Rounding alone by a kernel."""
        y, residual, bits = x
        return plain((quantize.fake_quantize(y, bits, "pallas"), residual), gain_D)

    def exact(x: Any, gain_D: Any, dense: bool) -> np.ndarray:
        y, residual, bits = (np.asarray(part[0]) for part in x)
        if not dense and bits < quantize.MAX_BITS:
            # The steps are float32's by definition; only sums are wider here.
            top = np.float32(2 ** (int(bits) - 1) - 1)
            scale = np.maximum(np.abs(y).max(), np.float32(1e-8)) / top
            y = np.clip(np.rint(y / scale), -top, top) * scale
        stream = residual.astype(np.float64) + y
        return stream / np.sqrt(np.mean(stream**2) + EPS) * np.asarray(gain_D, np.float64)

    def normed(out: Any) -> Any:
        return out[1][0]

    variants = {name: Variant(fused(name), lambda share: work, first=normed) for name in ("xla", "pallas")}
    variants["pallas, norm apart"] = Variant(apart, lambda share: work, first=normed)
    variants["dense xla"] = Variant(plain, lambda share: work, True, True, first=normed)

    def one(i: int, bits: int) -> Any:
        y, residual = (normals(1000 + 2 * i + j, rows, D, dtype=jnp.float32) for j in range(2))
        return y, residual, jnp.full(rows, bits, jnp.int32)

    actions = {f"bits={b}": [one(i, b) for i in range(calls)] for b in bits}
    gains = [1 + 0.1 * normals(i, D, dtype=jnp.float32) for i in range(turns)]
    name = f"{shape.name}-{rows} rows"
    return KernelCase(
        "quantize_residual", name, "float32", actions, gains, variants, lambda x, buffer: 1.0, exact
    )
