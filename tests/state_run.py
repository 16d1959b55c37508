"""A training run in small, for the tests of checkpoints; as a program, one to be killed or starved."""

import contextlib
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sol_jax.errors import UserError
from sol_jax.rl.config import OptimConfig
from sol_jax.rl.learn import TrainState, optimizer
from sol_jax.runs.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = {
    "seed": 0,
    "grpo.gamma": 0.85,
    "axes.kappa.levels": [0.1, 1.0],
    "train.num_updates": 40,
    "eval.every": 5,
    "memory.head_rows": 256,
    "data.cache_dir": "",
    "data.source": "wikipedia",
}
TX = optimizer(OptimConfig(learning_rate=0.01, accumulate=2, warmup=3))


def first_state(width=5, reference=False):
    kernel_key, run_key = jax.random.split(jax.random.key(0))
    params = {
        "dense": {"kernel": jax.random.normal(kernel_key, (3, width)), "bias": jnp.zeros(width, jnp.bfloat16)}
    }
    copy = jax.tree.map(jnp.copy, params) if reference else None
    return TrainState(jnp.int32(0), run_key, params, TX.init(params), copy)


@functools.partial(jax.jit, donate_argnums=0)
def update(state, position):
    key = jax.random.fold_in(state.key, state.step)
    grads = jax.tree.map(
        lambda p: jnp.sin(position + p + jax.random.normal(key, p.shape, p.dtype)), state.params
    )
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    return state._replace(
        step=state.step + 1, params=optax.apply_updates(state.params, updates), opt_state=opt_state
    )


def train(state, iterator, last, checkpoints=None, every=1, done=lambda step: None):
    """What `sol_jax.train` does, in small: the iterator's position enters every update."""
    for step in range(int(state.step) + 1, last + 1):
        state = update(state, jnp.float32(iterator["position"]))
        iterator = {"position": iterator["position"] + 3}
        if checkpoints is not None and step % every == 0:
            checkpoints.save(step, state, iterator)
            done(step)
    return state


def start_or_resume(checkpoints, width=5):
    state = first_state(width)
    found = checkpoints.restore(state)
    return (state, {"position": 0}) if found is None else found[1:]


@contextlib.contextmanager
def opened(workdir, config=CONFIG, keep=3, **options):
    checkpoints = Checkpoints(workdir, config, keep, **options)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def assert_same(state, expected):
    """Equal treedef, and equal leaves: type, dtype, shape and bytes (a NaN equals itself, not -NaN)."""
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert (type(leaf), leaf.dtype, leaf.shape) == (type(other), other.dtype, other.shape)
        assert leaf.committed == other.committed
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        assert leaf.weak_type == other.weak_type  # or the resumed run would compile, and round, differently
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


def saved(workdir, steps=(1, 2), **options):
    """The states that were saved at these steps."""
    state, states = first_state(), {}
    with opened(workdir, **options) as checkpoints:
        for step in steps:
            state = update(state, jnp.float32(step))
            states[step] = jax.tree.map(jnp.copy, state)
            checkpoints.save(step, state, {"position": 10 * step})
    return states


def listing(workdir):
    """Names in the checkpoint directory."""
    return sorted(path.name for path in (pathlib.Path(workdir) / "checkpoints").iterdir())


def tree_of(folder):
    """Everything about the files below a folder but when they were read."""
    paths = sorted(pathlib.Path(folder).rglob("*"))
    return [(str(p), p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else None) for p in paths]


def main(workdir, last, width, limit_step=None):
    """A run that saves after every update; from `limit_step` on no file may grow beyond 100 kB."""
    import resource

    checkpoints = Checkpoints(workdir, CONFIG, keep=2)
    state, iterator = start_or_resume(checkpoints, int(width))
    print(f"resumed at {int(state.step)}", flush=True)

    def done(step):
        checkpoints.wait()
        print(f"finished {step}", flush=True)
        if limit_step is not None and step == int(limit_step) - 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    try:
        train(state, iterator, int(last), checkpoints, done=done)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
