"""Meshes of devices, and how a model's weights lie on them: `data` x `model`.

Every row of the mesh (its `model` devices) holds one copy of the weights, cut by the names of their
dimensions; the rows share out the blocks of a batch.  Which function runs how on a mesh is told where it is
called: see `shared_out`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sol_jax.errors import UserError
from sol_jax.models.llama import LlamaConfig, ParamSpec, Weights, weight_specs

DATA, MODEL = "data", "model"  # axes of a mesh
# Dimension of a weight -> axis of the mesh that cuts it; all others are whole everywhere.
RULES = {"vocab": MODEL, "heads": MODEL, "kv_heads": MODEL, "ffn": MODEL}


def make_mesh(data: int = -1, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `data` rows of `model` devices; several slices are joined along `data`, whose traffic is
    small.

    Args:
      data: -1 for as many rows as there are devices for.
      model: neighbouring devices, which share a copy of the weights.
      devices: by default all, of all processes.

    Raises `UserError` if there are not so many devices, or if a process would be left without one.
    """
    found = list(jax.devices() if devices is None else devices)
    rows = len(found) // model if data == -1 else data
    if rows * model > len(found) or not rows:
        asked = f"config.mesh.data = {data} and config.mesh.model = {model}"
        raise UserError(f"{asked} need {max(rows, 1) * model} devices, and there are {len(found)}")
    processes = {device.process_index for device in found}
    if rows * model < len(found) and len(processes) > 1:
        raise UserError(
            f"config.mesh.data = {rows} times config.mesh.model = {model} must be all {len(found)} devices "
            f"of the {len(processes)} processes; leave config.mesh.data at -1"
        )
    found = found[: rows * model]
    slices = len({getattr(device, "slice_index", 0) for device in found})
    if slices > 1:
        if rows % slices:
            raise UserError(
                f"config.mesh.data = {rows} cannot be divided among {slices} slices; use a multiple, or a "
                "config.mesh.model that fits into a slice"
            )
        grid = mesh_utils.create_hybrid_device_mesh((rows // slices, model), (slices, 1), found)
    else:
        grid = mesh_utils.create_device_mesh((rows, model), found, allow_split_physical_axes=True)
    return Mesh(grid, (DATA, MODEL))


def check_divides(cfg: LlamaConfig, mesh: Mesh) -> None:
    """Raises `UserError` if the model's dimensions cannot be cut as the mesh says."""
    parts = mesh.shape[MODEL]
    sizes = {
        "attention heads": cfg.num_heads,
        "key/value heads": cfg.num_kv_heads,
        "MLP channels": cfg.ffn_size,
        "tokens of the vocabulary": cfg.vocab_size,
    }
    for name, size in sizes.items():
        if size % parts:
            raise UserError(f"config.mesh.model is {parts}; it must divide the model's {size} {name}")


def weight_shardings(cfg: LlamaConfig, mesh: Mesh) -> Weights:
    """The sharding of every weight of `weight_specs(cfg)`.  Raises `UserError` as `check_divides` does."""
    check_divides(cfg, mesh)

    def sharding(spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(RULES.get(name or "") for name in spec.axes)))

    return jax.tree.map(sharding, weight_specs(cfg), is_leaf=lambda node: isinstance(node, ParamSpec))


def mesh_of(weights: Weights) -> Mesh | None:
    """The mesh that weights lie on; None for those on a single device."""
    sharding = getattr(jax.tree.leaves(weights)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.size > 1 else None


def num_rows(weights: Weights) -> int:
    """Rows of the mesh that weights lie on; batches that are shared out are multiples of it."""
    mesh = mesh_of(weights)
    return 1 if mesh is None else mesh.shape[DATA]


def shared_out(function: Callable[..., Any], mesh: Mesh, whole: int) -> Callable[..., Any]:
    """`function` with its work shared out among the rows of the mesh; to be traced by `jax.jit`.

    Each row runs it by itself on its part of all arrays that lead with the batch; nothing passes between
    rows. With one device in a row that is all; with more, XLA cuts what a row does as the weights are cut.

    Args:
      function: its results lead with the batch.
      whole: so many arguments, the first, are the same for all rows.
    """
    # Kernels refuse to be cut by XLA, so where a row is one device it is manual along both axes.
    manual = {DATA} if mesh.shape[MODEL] > 1 else {DATA, MODEL}

    def run(*args: Any) -> Any:
        specs = tuple(PartitionSpec() if n < whole else PartitionSpec(DATA) for n in range(len(args)))
        cut = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=specs,
            out_specs=PartitionSpec(DATA),
            axis_names=manual,
            check_vma=False,
        )
        return cut(*args)

    return run


class Row(NamedTuple):
    """One row of a mesh, as a mesh of its own."""

    number: int
    mesh: Mesh

    def of(self, tree: Any) -> Any:
        """This row's copy of arrays that are the same for all rows, such as weights; nothing is moved."""
        devices = set(self.mesh.devices.flat)

        def view(leaf: jax.Array) -> jax.Array:
            assert isinstance(leaf.sharding, NamedSharding)
            own = [shard.data for shard in leaf.addressable_shards if shard.device in devices]
            sharding = NamedSharding(self.mesh, leaf.sharding.spec)
            return jax.make_array_from_single_device_arrays(leaf.shape, sharding, own)

        return jax.tree.map(view, tree)

    def put(self, tree: Any) -> Any:
        """Arrays of the host or of one device, on all devices of the row."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))


@functools.cache
def rows_here(mesh: Mesh) -> tuple[Row, ...]:
    """The rows of a mesh that have devices of this process."""
    here = set(mesh.local_devices)
    grid = enumerate(mesh.devices)
    return tuple(Row(n, Mesh(row[None], mesh.axis_names)) for n, row in grid if here.intersection(row))


def from_rows(parts: Sequence[Any], mesh: Mesh) -> Any:
    """What the rows of this process gave, in order, as arrays that lie along `data`."""
    rows = rows_here(mesh)

    def join(*leaves: jax.Array) -> jax.Array:
        count, *rest = leaves[0].shape
        placed = [
            shard.data
            for row, leaf in zip(rows, leaves, strict=True)
            for shard in row.put(leaf).addressable_shards
        ]
        shape = mesh.shape[DATA] * count, *rest
        return jax.make_array_from_single_device_arrays(
            shape, NamedSharding(mesh, PartitionSpec(DATA)), placed
        )

    return jax.tree.map(join, *parts)


def jit_by_row(
    whole: int, static: Sequence[str], donate: Sequence[int] = ()
) -> Callable[..., Callable[..., Any]]:
    """Decorator: `jax.jit`, and `shared_out` where the first argument, the weights, lies on several devices.

    Args:
      whole: so many arguments, the first, are the same for all rows; the others lead with the batch, in a
        multiple of `num_rows`, and come from the host (the same in all processes) or from another such
        function.
      static: names of arguments that are compiled in.
      donate: places of arguments whose memory the results may take.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        alone = jax.jit(function, static_argnames=static, donate_argnums=donate)
        signature = inspect.signature(function)

        @functools.cache
        def on_mesh(mesh: Mesh, **chosen: Any) -> Callable[..., Any]:
            run = shared_out(functools.partial(function, **chosen), mesh, whole)
            return jax.jit(run, donate_argnums=donate)

        @functools.wraps(function)
        def call(weights: Weights, *args: Any, **kwargs: Any) -> Any:
            mesh = mesh_of(weights)
            if mesh is None:
                return alone(weights, *args, **kwargs)
            given = signature.bind(weights, *args, **kwargs)
            given.apply_defaults()
            chosen = {name: given.arguments.pop(name) for name in static}
            arrays = list(given.arguments.values())
            placed = [everywhere(tree, mesh) for tree in arrays[1:whole]]
            placed += [spread(tree, mesh) for tree in arrays[whole:]]
            return on_mesh(mesh, **chosen)(weights, *placed)

        for name in ("lower", "trace", "_cache_size"):  # of one device
            setattr(call, name, getattr(alone, name))
        return call

    return decorate


def spread(tree: Any, mesh: Mesh) -> Any:
    """Arrays of the host, the same in all processes, on the mesh: their first axis along `data`."""
    sharding = NamedSharding(mesh, PartitionSpec(DATA))

    def place(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if _is_key(leaf):
            return jax.random.wrap_key_data(place(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return jax.device_put(leaf, sharding)
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays of this process' first device or of the host, the same in all processes, on every device."""
    sharding = NamedSharding(mesh, PartitionSpec())

    def place(leaf: Any) -> jax.Array:
        if mesh.size == 1 or (isinstance(leaf, jax.Array) and not leaf.is_fully_addressable):
            return leaf
        copies = [jax.device_put(leaf, device) for device in mesh.local_devices]
        return jax.make_array_from_single_device_arrays(np.shape(leaf), sharding, copies)

    return jax.tree.map(place, tree)


def here(tree: Any, mesh: Mesh) -> Any:
    """Arrays that lie along `data`, whole, on this process' first device of the mesh."""
    first = mesh.local_devices[0]

    def local(leaf: jax.Array) -> jax.Array:
        return next(shard.data for shard in leaf.addressable_shards if shard.device == first)

    return jax.tree.map(local, tree if mesh.size == 1 else _replicate(mesh)(tree))


def fetch(tree: Any) -> Any:
    """Arrays as NumPy's, whole, in every process; each must ask for the same ones."""

    def host(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.asarray(leaf)
        assert isinstance(leaf.sharding, NamedSharding)
        return np.asarray(_replicate(leaf.sharding.mesh)(leaf))

    return jax.tree.map(host, tree)


@functools.cache
def _replicate(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
