"""The two programs of an update, compiled for a mesh of TPUs that is not here."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.dispatch import tracing_for
from sol_jax.models.llama import abstract_weights
from sol_jax.models.sharding import DATA, make_mesh, weight_shardings
from sol_jax.planning.compiled import Compiled
from sol_jax.planning.sizes import Shares, abstract_state
from sol_jax.planning.topology import Topology
from sol_jax.planning.tpu import compile_for_tpu, devices
from sol_jax.rl.sharded_update import learn_from, play_chunks


def mesh_on(topology: Topology, shares: Shares) -> Mesh:
    """The mesh of a run on a topology.  Raises `UserError` where there can be none."""
    return make_mesh(shares.rows, shares.model, devices(topology))


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def play_program(shares: Shares, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """`play_chunks` as a function, and its abstract arguments on the mesh."""
    setup = shares.setup
    state = abstract_state(setup)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    seen = _placed((state.params, key, state.step), NamedSharding(mesh, PartitionSpec()))
    weights = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        abstract_weights(setup.model),
        weight_shardings(setup.model, mesh),
    )
    blocks = mesh.shape[DATA] * shares.chunk
    along = NamedSharding(mesh, PartitionSpec(DATA))
    tokens = jax.ShapeDtypeStruct((blocks, setup.episode.block_length), jnp.int32, sharding=along)
    place = jax.ShapeDtypeStruct((blocks,), jnp.int32, sharding=along)
    # Without its jit, which would reuse what it traced for another platform.
    unjitted: Any = play_chunks
    return functools.partial(unjitted.__wrapped__, setup=setup, mesh=mesh), (seen, weights, tokens, place)


def learn_program(shares: Shares, mesh: Mesh) -> tuple[Any, tuple[Any, ...]]:
    """`learn_from` as a function of what all calls of `play_chunks` gave, on the mesh's first device."""
    setup, one = shares.setup, SingleDeviceSharding(np.ravel(mesh.devices)[0])
    play, args = play_program(shares, mesh)
    with tracing_for("tpu"):
        part = jax.eval_shape(lambda *args: play(*args), *args)
    state = abstract_state(setup)
    unjitted: Any = learn_from
    learn = functools.partial(unjitted.__wrapped__, setup=setup)
    return learn, _placed((state, [part] * shares.calls), one)


def compile_update(topology: Topology, shares: Shares) -> tuple[Compiled, Compiled]:
    """The program that plays and the one that learns."""
    mesh = mesh_on(topology, shares)
    play, learn = play_program(shares, mesh), learn_program(shares, mesh)
    return (
        compile_for_tpu(play[0], *play[1]),
        compile_for_tpu(learn[0], *learn[1], donate=(0,)),
    )
