"""What all tests of kernels run under."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from pallas_kernels import attention, dispatch, gated_mlp


@pytest.fixture(autouse=True)
def exact_products(request: pytest.FixtureRequest):
    """A GPU's matrix product of float32 would round its operands to tensor floats.

    What is lowered keeps the precision that users have.
    """
    with jax.default_matmul_precision(None if "lower" in request.node.nodeid else "highest"):
        yield


@pytest.fixture
def jax_triton(monkeypatch):
    """A machine that has jax-triton, where calls of its kernels are those of a Pallas kernel by its name."""

    def call(name: str, *shapes: tuple[int, ...]):
        out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        return pl.pallas_call(lambda *refs: None, out, name=name)()

    def attend(layer, q_BxHxRxd, *others):
        (*before, R, d) = q_BxHxRxd.shape
        return call("triton_attend", (*before, 1, R, d), (*before, 1, R), (*before, 1, R))

    def gated_hidden(x_1xD, layer, gate_LxDxF, up_LxDxF):
        return call("triton_gemv", (1, gate_LxDxF.shape[-1]))[0]

    monkeypatch.setattr(dispatch, "triton_problem", lambda: None)
    monkeypatch.setattr(attention.triton, "attend", attend)
    kernels = types.SimpleNamespace(gated_hidden=gated_hidden)  # the module itself imports triton
    monkeypatch.setattr(gated_mlp, "triton", kernels, raising=False)
