"""The two programs of an update, abstract, and compiled for TPUs that are not here.

All rows of a mesh play by the same program, so that of the first row stands for them all.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from pallas_kernels.dispatch import tracing_for
from sol_jax.models.llama import abstract_weights
from sol_jax.models.sharding import make_mesh, weight_shardings
from sol_jax.planning.compiled import Compiled
from sol_jax.planning.sizes import Shares, abstract_state
from sol_jax.planning.topology import Topology
from sol_jax.planning.tpu import compile_for_tpu, devices
from sol_jax.rl.sharded_update import learn_from, play_chunk
from sol_jax.rl.train_step import Drawn, draw

Program = tuple[Any, tuple[Any, ...]]  # a function, and its abstract arguments where they lie


def row_on(topology: Topology, shares: Shares) -> Mesh:
    """The first row of a run's mesh on TPUs.  Raises `UserError` where there can be no such mesh."""
    return row_of(devices(topology), shares)


def row_of(devices: Sequence[Any], shares: Shares) -> Mesh:
    """The same on any devices."""
    mesh = make_mesh(shares.rows, shares.model, devices)
    return Mesh(mesh.devices[:1], mesh.axis_names)


def _placed(tree: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _drawn(shares: Shares, as_data: bool) -> Drawn:
    """What is drawn for a batch, with keys or with their data."""

    def drawn() -> Drawn:
        setup = shares.setup
        found = draw(jax.random.key(0), jnp.int32(0), setup.grpo.batch_size, setup)
        keys = found.key_BxWxK
        return found if keys is None or not as_data else found._replace(key_BxWxK=jax.random.key_data(keys))

    return jax.eval_shape(drawn)


def play_program(shares: Shares, row: Mesh) -> Program:
    """`play_chunk` on a row of the mesh."""
    setup = shares.setup
    everywhere = NamedSharding(row, PartitionSpec())
    weights = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_weights(setup.model),
        weight_shardings(setup.model, row),
    )
    seen = abstract_state(setup).params, _drawn(shares, as_data=True)
    tokens = jax.ShapeDtypeStruct((shares.chunk, setup.episode.block_length), jnp.int32)
    places = jax.ShapeDtypeStruct((shares.chunk,), jnp.int32)
    # Without its jit, which would reuse what it traced for another platform.
    unjitted: Any = play_chunk
    play = functools.partial(unjitted.__wrapped__, setup=setup)
    return play, (_placed(seen, everywhere), weights, *_placed((tokens, places), everywhere))


def learn_program(shares: Shares, row: Mesh, platform: str = "tpu") -> Program:
    """`learn_from` on the first device, of what all rows played."""
    setup, first = shares.setup, SingleDeviceSharding(np.ravel(row.devices)[0])
    play, args = play_program(shares, row)
    with tracing_for(platform):
        part = jax.eval_shape(lambda *args: play(*args), *args)
    batch = setup.grpo.batch_size
    played = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), part)
    unjitted: Any = learn_from
    learn = functools.partial(unjitted.__wrapped__, setup=setup)
    return learn, _placed((abstract_state(setup), played, _drawn(shares, as_data=False)), first)


def compile_update(topology: Topology, shares: Shares) -> tuple[Compiled, Compiled]:
    """The program that plays and the one that learns."""
    row = row_on(topology, shares)
    play, learn = play_program(shares, row), learn_program(shares, row)
    return compile_for_tpu(play[0], *play[1]), compile_for_tpu(learn[0], *learn[1], donate=(0,))
