"""What the kernels are compared with: the same dense work by the libraries that do it best.

Torch reads the very buffers that JAX made (DLPack).  At decode the query heads of a group share their keys,
so every peer takes them as so many queries of one head, which none of them needs a mask for.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.timing import Chains


def has_torch() -> bool:
    """Whether torch is there and sees a GPU."""
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def torch_chains(
    call: Callable[..., Any], inputs: Sequence[Any], buffers: Sequence[Any]
) -> Callable[[Sequence[Any], Sequence[Any]], Chains]:
    """`timing.compile_chains` for a torch function; its launches are not counted."""
    import torch

    def bind(inputs: Sequence[Any], buffers: Sequence[Any]) -> Chains:
        xs, kept = (to_torch(jax.block_until_ready(list(tree))) for tree in (inputs, buffers))

        def run(length: int) -> Any:
            with torch.inference_mode():
                out = [call(xs[i], kept[i % len(kept)]) for i in range(length)]
            torch.cuda.synchronize()
            return out

        return Chains(lambda: run(len(xs) // 2), lambda: run(len(xs)), len(xs) // 2, None)

    return bind


def to_torch(tree: Any) -> Any:
    """Arrays as torch tensors of the same memory."""
    import torch

    return jax.tree.map(torch.from_dlpack, tree)


def from_torch(tree: Any) -> Any:
    """And back, as copies in numpy's float32."""
    return jax.tree.map(lambda x: x.float().cpu().numpy(), tree)


def heads_last(kv: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Caches [B, H, S, d] in the layout that `jax.nn.dot_product_attention` takes: [B, S, H, d]."""
    return tuple(jnp.swapaxes(x, 1, 2) for x in kv[:2])


def library_attention(implementation: str) -> Callable[..., jax.Array]:
    """`jax.nn.dot_product_attention` of q [B, H, R, d] over caches `heads_last`; "xla" or "cudnn"."""

    def call(q_BxHxRxd: jax.Array, kv: Sequence[jax.Array]) -> jax.Array:
        kind: Any = implementation
        out = jax.nn.dot_product_attention(q_BxHxRxd.swapaxes(1, 2), *kv, implementation=kind)
        return out.swapaxes(1, 2)

    return call


def torch_attention(q_BxHxRxd: Any, kv: Sequence[Any]) -> Any:
    """torch's scaled_dot_product_attention, whichever kernel it picks."""
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q_BxHxRxd, kv[0], kv[1])


def torch_gated(x_NxD: Any, weights: Sequence[Any]) -> Any:
    """The gated half of an MLP by cuBLAS: silu(x @ gate) * (x @ up), all bfloat16."""
    import torch

    return torch.nn.functional.silu(x_NxD @ weights[0]) * (x_NxD @ weights[1])
