"""Checkpoints against kills, damage, full disks and other configs: nothing lost, nothing wrong read."""

import contextlib
import errno
import functools
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sol_jax.errors import UserError
from sol_jax.state import Checkpoints
from sol_jax.update import OptimConfig, TrainState, optimizer

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


# What comes back.


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("abstract", [False, True])
def test_a_state_comes_back_to_the_bit(tmp_path, reference, abstract):
    state = train(first_state(reference=reference), {"position": 0}, 3)
    expected = jax.tree.map(jnp.copy, state)
    with opened(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"position": 9, "fingerprint": 2**48 - 1})
    like = first_state(reference=reference)
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(jax.eval_shape(lambda: like) if abstract else like)
    assert (step, iterator) == (3, {"position": 9, "fingerprint": 2**48 - 1})
    assert_same(found, expected)
    assert isinstance(found, TrainState)
    assert isinstance(found.opt_state, optax.MultiStepsState)
    assert (found.reference is None) != reference


def test_awkward_leaves(tmp_path):
    tree = {
        "nan": jnp.array([jnp.nan, -jnp.nan, -0.0, jnp.inf, 1e-45], jnp.float32),
        "a/b.c": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "a": {"b.c": jnp.array([True, False])},
        "empty": jnp.zeros((0, 3), jnp.bfloat16),
        "scalar": jnp.uint32(4_000_000_000),
        "raw key": jax.random.PRNGKey(5),
        "keys": jax.random.split(jax.random.key(5), 3),
        "rbg": jax.random.key(5, impl="rbg"),
        "on a device": jax.device_put(jnp.ones(3), jax.devices()[0]),
        "none": None,
        "nothing": (),
    }
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, tree, {})
        _, found, _ = checkpoints.restore(tree)
    assert_same(found, tree)


def test_donating_the_state_at_once_does_not_change_what_is_saved(tmp_path):
    scramble = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {"w": jnp.arange(1_000_000, dtype=jnp.float32)}
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        state = scramble(state)
        _, found, _ = checkpoints.restore(state)
    np.testing.assert_array_equal(found["w"], np.arange(1_000_000, dtype=np.float32))


@pytest.mark.parametrize("stop", [3, 4])  # inside and between the optimizer's accumulations
def test_a_resumed_run_ends_with_the_parameters_of_an_uninterrupted_one(tmp_path, stop):
    with opened(tmp_path) as checkpoints:
        train(*start_or_resume(checkpoints), stop, checkpoints, every=stop)
    with opened(tmp_path, CONFIG | {"train.num_updates": 9}) as checkpoints:
        resumed = train(*start_or_resume(checkpoints), 9, checkpoints)
    assert_same(resumed, train(first_state(), {"position": 0}, 9))


def test_a_new_workdir_holds_nothing_and_gets_the_config(tmp_path):
    with opened(tmp_path / "a" / "b") as checkpoints:
        assert checkpoints.restore(first_state()) is None
        assert (checkpoints.steps(), checkpoints.latest_step(), checkpoints.best_step()) == ([], None, None)
    assert json.loads((tmp_path / "a" / "b" / "config.json").read_text()) == CONFIG


def test_a_step_of_choice(tmp_path):
    states = saved(tmp_path)
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(first_state(), step=1)
        with pytest.raises(UserError, match=r"no checkpoint of step 7; the steps are \[1, 2\]"):
            checkpoints.restore(first_state(), step=7)
    assert (step, iterator) == (1, {"position": 10})
    assert_same(found, states[1])


def test_a_step_that_exists_is_not_written_again(tmp_path):
    states = saved(tmp_path, [1])
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first_state(), {"position": 99})
        checkpoints.wait()
        assert_same(checkpoints.restore(first_state())[1], states[1])


# What is kept.


@pytest.mark.parametrize(
    ("keep", "scores", "kept", "best"),
    [
        (2, [None, None, None, None], [3, 4], None),
        (1, [0.5, 0.1, 0.2, 0.3], [1, 4], 1),
        (2, [-3.0, -1.0, None, -2.0, None], [2, 4, 5], 2),
        (1, [0.5, None, 0.5, None], [3, 4], 3),  # of equals the later
        (1, [0.5, float("nan"), float("inf"), 0.4], [1, 4], 1),  # not finite: no score
        (3, [0.1, 0.2], [1, 2], 2),
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_the_latest_and_the_best_are_kept(tmp_path, keep, scores, kept, best, restart):
    checkpoints = Checkpoints(tmp_path, CONFIG, keep)
    for step, score in enumerate(scores, 1):
        checkpoints.save(step, {"w": jnp.ones(2)}, {}, score)
        if restart:  # scores are then read from the disk
            checkpoints.close()
            checkpoints = Checkpoints(tmp_path, CONFIG, keep)
    checkpoints.wait()
    assert checkpoints.steps() == kept
    assert (checkpoints.latest_step(), checkpoints.best_step()) == (len(scores), best)
    checkpoints.close()


# Damage.


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_no_damaged_file_leads_to_a_wrong_state(tmp_path, damage, caplog):
    states = saved(tmp_path / "good")
    step_2 = tmp_path / "good" / "checkpoints" / "2"
    fell_back = set()
    for number, file in enumerate(p.relative_to(step_2) for p in sorted(step_2.rglob("*")) if p.is_file()):
        workdir = tmp_path / str(number)
        shutil.copytree(tmp_path / "good", workdir)
        damage(workdir / "checkpoints" / "2" / file)
        caplog.clear()
        with opened(workdir) as checkpoints:
            step, found, iterator = checkpoints.restore(first_state())
            assert_same(found, states[step])
            assert iterator == {"position": 10 * step}
            told = [record.getMessage() for record in caplog.records if record.name == "absl"]
            if step == 1:
                fell_back.add(file.name)
                assert listing(workdir) == ["1", "damaged-2"]
                assert len(told) == 1
                assert "the checkpoint of step 2 is damaged (" in told[0]
                assert "kept as damaged-2; that of step 1 is used" in told[0]
                checkpoints.save(2, states[2], {"position": 20})  # the number is free again
                assert_same(checkpoints.restore(first_state())[1], states[2])
            else:
                assert told == []
    assert {"metadata", "manifest.ocdbt"} <= fell_back
    assert any(len(name) == 32 for name in fell_back)  # the arrays themselves


def test_a_bit_that_flips_in_an_array_is_noticed(tmp_path, caplog):
    """Orbax reads such an array without complaint."""
    weights = np.random.default_rng(0).bytes(4000)  # incompressible, so stored as it is
    first, second = ({"w": jnp.array(np.frombuffer(weights, np.uint8) + n)} for n in (0, 1))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first, {})
        checkpoints.save(2, second, {})
    needle = np.asarray(second["w"]).tobytes()[1000:1100]
    files = [
        p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file() and needle in p.read_bytes()
    ]
    assert files
    for file in files:
        content = bytearray(file.read_bytes())
        content[content.index(needle)] ^= 1
        file.write_bytes(content)
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        read = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state["['w']"]
    assert (read != second["w"]).sum() == 1
    with opened(tmp_path) as checkpoints:
        step, found, _ = checkpoints.restore(first)
    assert step == 1
    assert_same(found, first)
    assert "its content does not match its sha256" in caplog.text


def test_several_damaged_steps_are_passed_over_and_all_are_kept(tmp_path, caplog):
    states = saved(tmp_path, [1, 2, 3])
    for attempt in range(2):
        for step in (2, 3):
            (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")
        with opened(tmp_path) as checkpoints:
            step, found, _ = checkpoints.restore(first_state())
            assert step == 1
            assert_same(found, states[1])
            if attempt == 0:
                checkpoints.save(2, states[2], {})
                checkpoints.save(3, states[3], {})
    names = ["damaged-2", "damaged-2-again", "damaged-3", "damaged-3-again"]
    assert listing(tmp_path) == ["1", *names]
    assert len(caplog.records) == 4


def test_if_all_are_damaged_nothing_is_moved_and_the_run_does_not_start_over(tmp_path):
    saved(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{}")
    for _ in range(2):
        with opened(tmp_path) as checkpoints, pytest.raises(UserError) as error:
            checkpoints.restore(first_state())
        assert "step 2 is damaged (" in str(error.value)
        assert "step 1 is damaged (" in str(error.value)
        assert "no other is left" in str(error.value)
        assert "\n" not in str(error.value)
    assert listing(tmp_path) == ["1", "2"]


def test_a_damaged_step_of_choice_is_an_error_and_the_best_is_another(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, first_state(), {}, score=1.0)
        checkpoints.save(2, first_state(), {}, score=2.0)
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    with opened(tmp_path) as checkpoints:
        assert checkpoints.best_step() == 1
        with pytest.raises(UserError, match=r"step 2 is damaged \(.*\); the steps are \[1, 2\]"):
            checkpoints.restore(first_state(), step=2)
    assert listing(tmp_path) == ["1", "2"]


# Other runs.


def test_settings_that_do_not_change_what_is_learned_may_change(tmp_path):
    states = saved(tmp_path)
    config = CONFIG | {"train.num_updates": 80, "eval.every": 1, "memory.head_rows": 2, "data.cache_dir": "x"}
    del config["eval.every"]
    with opened(tmp_path, config | {"train.new": 1}) as checkpoints:
        assert_same(checkpoints.restore(first_state())[1], states[2])
    assert json.loads((tmp_path / "config.json").read_text()) == config | {"train.new": 1}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"grpo.gamma": 0.9}, "grpo.gamma was 0.85 and is now 0.9;"),
        ({"axes.kappa.levels": [0.1, 0.5]}, r"axes.kappa.levels was \[0.1, 1.0\] and is now \[0.1, 0.5\];"),
        ({"grpo.new": 1}, "grpo.new was 'absent' and is now 1;"),
        ({"data.source": None}, "data.source was 'wikipedia' and is now 'absent';"),
        (
            {f"grpo.f{n}": n for n in range(7)},
            "grpo.f4 was 'absent' and is now 4 and 2 more; use another workdir",
        ),
    ],
)
def test_a_checkpoint_of_another_config_is_refused_and_left_alone(tmp_path, change, told):
    saved(tmp_path)
    config = {name: value for name, value in (CONFIG | change).items() if value is not None}
    before = tree_of(tmp_path)
    with (
        opened(tmp_path, config) as checkpoints,
        pytest.raises(UserError, match=f"step 2 is of another config: .*{told}"),
    ):
        checkpoints.restore(first_state())
    assert tree_of(tmp_path) == before


def test_a_state_of_another_shape_is_refused_and_left_alone(tmp_path):
    saved(tmp_path)
    before = tree_of(tmp_path)
    with opened(tmp_path) as checkpoints:
        with pytest.raises(
            UserError, match=r"model or version: .*'float32\[3, 5\]' and is now 'float32\[3, 6\]'"
        ):
            checkpoints.restore(first_state(width=6))
        with pytest.raises(UserError, match="was 'absent'"):
            checkpoints.restore(first_state(reference=True))
        with pytest.raises(UserError, match=r"\.key was 'key<fry>\[\]' and is now 'uint32\[2\]'"):
            checkpoints.restore(first_state()._replace(key=jax.random.PRNGKey(0)))
    assert tree_of(tmp_path) == before


def test_reading_only_changes_nothing(tmp_path, caplog):
    states = saved(tmp_path)
    (tmp_path / "checkpoints" / "2" / "meta" / "metadata").write_text("{")
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()  # of a save that goes on elsewhere
    before = tree_of(tmp_path)
    with opened(tmp_path, CONFIG | {"train.num_updates": 1}, read_only=True) as checkpoints:
        step, found, _ = checkpoints.restore(first_state())
    assert step == 1
    assert_same(found, states[1])
    assert "kept as 2; that of step 1 is used" in caplog.text
    assert tree_of(tmp_path) == before
    with opened(tmp_path / "nowhere", read_only=True) as checkpoints:
        assert checkpoints.restore(first_state()) is None
    assert not (tmp_path / "nowhere").exists()


# Places that cannot be written to.


def test_a_workdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be used as a workdir: (not a directory|file exists)"):
        Checkpoints(tmp_path / "file", CONFIG, 1)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux' /proc, where nobody can write")
def test_a_workdir_where_nobody_can_write():
    with pytest.raises(UserError, match="/proc/self/x: cannot be used as a workdir: "):
        Checkpoints("/proc/self/x", CONFIG, 1)


def test_a_workdir_that_has_become_read_only(tmp_path, monkeypatch):
    saved(tmp_path)
    monkeypatch.setattr(pathlib.Path, "write_text", raising(OSError(errno.EROFS, "Read-only file system")))
    with opened(tmp_path) as checkpoints, pytest.raises(UserError, match=r"workdir: read-only file system$"):
        checkpoints.restore(first_state())


def raising(error):
    def function(*_args, **_kwargs):
        raise error

    return function


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def noise(step):
    return {"w": jax.random.normal(jax.random.key(step), (300_000,))}  # 1.2 MB that do not compress


def test_a_full_disk_loses_nothing_and_is_survived(small_disk, caplog):
    (small_disk / "other").write_bytes(bytes(1_500_000))
    checkpoints = Checkpoints(small_disk, CONFIG, keep=1)
    checkpoints.save(1, noise(1), {})
    checkpoints.save(2, noise(2), {})  # with room for two at a time
    checkpoints.wait()
    (small_disk / "more").write_bytes(bytes(1_000_000))
    checkpoints.save(3, noise(3), {})
    with pytest.raises(UserError) as error:
        checkpoints.close()
    assert str(error.value) == (
        f"{small_disk}/checkpoints: step 3 could not be saved (no space left on device); "
        "the newest good checkpoint is of step 2"
    )
    assert caplog.records == []  # one sentence, no tracebacks
    assert set(listing(small_disk)) > {"2"}
    (small_disk / "more").unlink()
    with opened(small_disk, keep=1) as checkpoints:
        step, found, _ = checkpoints.restore(noise(0))
        assert step == 2
        assert_same(found, noise(2))
        checkpoints.save(3, noise(3), {})
        checkpoints.wait()
        assert listing(small_disk) == ["3"]  # also rid of the half-written one


def test_a_disk_that_is_full_from_the_start(small_disk):
    with contextlib.suppress(OSError):
        (small_disk / "other").write_bytes(bytes(9_000_000))
    with pytest.raises(UserError, match=r"/disk: cannot be used as a workdir: no space left on device$"):
        Checkpoints(small_disk, CONFIG, keep=1)


def test_the_error_of_a_failed_save_comes_with_the_next_one(small_disk):
    checkpoints = Checkpoints(small_disk, CONFIG, keep=9)
    with pytest.raises(
        UserError, match=r"step 4 could not be saved \(no space left on device\); .* of step 3$"
    ):
        save_noise(checkpoints, range(1, 9))
    shutil.rmtree(small_disk / "checkpoints" / "1")  # somebody makes room: the same process can go on
    checkpoints.save(5, noise(5), {})
    checkpoints.close()
    assert complete(small_disk) == ["2", "3", "5"]


def save_noise(checkpoints, steps):
    for step in steps:
        checkpoints.save(step, noise(step), {})


def complete(workdir):
    return [name for name in listing(workdir) if name.isdecimal()]


def run_loop(workdir, *args):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, str(workdir), *map(str, args)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_file_that_may_not_grow_is_told_in_one_line_and_nothing_else_is_printed(tmp_path):
    """A limit on the size of files needs no rights, and fails a write in the same way as a full disk."""
    process = run_loop(tmp_path, 9, 40_000, 5)  # 0.5 MB a state; none to be written from step 5 on
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors == (
        f"{tmp_path}/checkpoints: step 5 could not be saved (file too large); "
        "the newest good checkpoint is of step 4\n"
    )
    with opened(tmp_path) as checkpoints:
        step, found, iterator = checkpoints.restore(first_state(40_000))
    assert (step, iterator) == (4, {"position": 12})
    assert_same(found, train(first_state(40_000), {"position": 0}, 4))


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    """Each restart must find at least what was finished; the parent and the child print and check that."""
    rng, width, finished, hit_a_save = random.Random(0), 40_000, 0, 0
    for attempt in range(3):
        process = run_loop(tmp_path, 10_000, width)  # saves 0.5 MB after every update
        lines = [process.stdout.readline(), process.stdout.readline()]
        time.sleep(rng.uniform(0, 0.3))
        while attempt % 2 and not half_written(tmp_path):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate(timeout=60)
        assert errors == ""
        assert int(lines[0].removeprefix("resumed at ")) >= finished
        whole_lines = ("".join(lines[1:]) + rest).split("\n")[:-1]
        finished = int(whole_lines[-1].removeprefix("finished "))
        hit_a_save += half_written(tmp_path)
        assert len(complete(tmp_path)) <= 4  # 2 are kept, one may be new, and one half deleted
    assert hit_a_save
    with opened(tmp_path, keep=2) as checkpoints:
        state, iterator = start_or_resume(checkpoints, width)
        step = int(state.step)
        assert step >= finished
        assert iterator == {"position": 3 * step}
        resumed = train(state, iterator, step + 2, checkpoints)
    assert len(complete(tmp_path)) == len(listing(tmp_path)) == 2  # the remains of killed saves are gone
    assert_same(resumed, train(first_state(width), {"position": 0}, step + 2))


def half_written(workdir):
    return any(not name.isdecimal() for name in listing(workdir))


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
