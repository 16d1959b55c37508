"""Updates, evaluations and texts on meshes of virtual devices: equal to one device, and truly shared out."""

import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import pytest

from sol_jax.errors import UserError
from sol_jax.models import sharding
from sol_jax.models.llama import LlamaConfig, weight_specs

HERE = pathlib.Path(__file__).parent
LEARNERS = ("grpo", "counterfactual", "stratified")


@pytest.fixture(scope="module")
def found():
    """What `eight_devices` found."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "PYTHONPATH": path}
    run = [sys.executable, str(HERE / "eight_devices.py")]
    done = subprocess.run(run, capture_output=True, text=True, env=env, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("learner", LEARNERS)
def test_parameters_are_equal_on_any_number_of_devices(found, learner):
    """Bit for bit; five blocks, so that the last chunks are filled up."""
    names = found[learner]["names"]
    assert len(names) > 1
    assert len(set(names.values())) == 1, names
    assert found[learner]["start"] not in names.values()


@pytest.mark.parametrize("learner", LEARNERS)
def test_they_are_those_of_the_one_program(found, learner):
    """To rounding: chunks of one block are other products than all blocks at once."""
    assert found[learner]["from one program"] < 1e-4 * found[learner]["size"]


def test_rows_of_several_devices_are_equal_among_each_other_and_near_one_device(found):
    names, off = found["model"]["names"], found["model"]["off"]
    assert names["1x2"] == names["3x2"]
    assert max(off.values()) < 3e-5


def test_operations_of_a_device_fall_with_the_devices_of_its_row(found):
    """What is repeated on every device is the policy and the draws; nothing is replicated in silence."""
    one, two, four = (found["flops"][n] for n in ("1", "2", "4"))
    assert two < 0.7 * one
    assert four < 0.55 * one


def test_nothing_passes_between_rows(found):
    assert found["collectives"]["1"] == []
    assert "all-reduce" in found["collectives"]["4"]


@pytest.mark.parametrize("mesh", ["3x1", "2x4"])
def test_an_evaluation_shared_out_is_the_same(found, mesh):
    for name, off in found["evaluation"][mesh].items():
        assert off < 1e-5, name


@pytest.mark.parametrize("mesh", ["3x1", "2x4"])
def test_texts_and_scores_of_tasks_shared_out_are_the_same(found, mesh):
    told = found["texts"]
    assert told[mesh]["tokens"] == told["alone"]["tokens"]
    assert told[mesh]["logp"] == pytest.approx(told["alone"]["logp"], abs=1e-4)


def test_weights_are_read_part_by_part(found):
    """Each part once, whatever the number of rows that hold it, and equal to what is read whole."""
    assert found["weights"] == {"off": 0.0, "read": 1.0, "held": 0.5}


MODEL = LlamaConfig(64, 32, 60, 2, 8, 4, 8, 256, 1e4, 1e-5, tie_embeddings=False)


@pytest.mark.parametrize(
    ("data", "model", "message"),
    [
        (2, 1, r"config.mesh.data = 2 and config.mesh.model = 1 need 2 devices, and there are 1"),
        (-1, 4, r"config.mesh.data = -1 and config.mesh.model = 4 need 4 devices, and there are 1"),
    ],
)
def test_a_mesh_of_more_devices_than_there_are(data, model, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(data, model, jax.devices()[:1])


class Device(types.SimpleNamespace):
    """A made-up device of a slice."""

    __hash__ = object.__hash__


def test_several_slices_are_joined_along_data():
    """A row lies within a slice, in whatever order the devices come."""
    devices = [
        Device(id=n, process_index=n // 2, slice_index=n % 2, device_kind="made up", platform="gpu")
        for n in range(8)
    ]
    rows = [{device.id for device in row} for row in sharding.make_mesh(-1, 2, devices).devices]
    assert rows == [{0, 2}, {4, 6}, {1, 3}, {5, 7}]
    with pytest.raises(UserError, match=r"config.mesh.data = 1 cannot be divided among 2 slices"):
        sharding.make_mesh(-1, 8, devices)
    with pytest.raises(UserError, match=r"must be all 8 devices of the 4 processes"):
        sharding.make_mesh(2, 2, devices)


@pytest.mark.parametrize(
    ("parts", "message"), [(8, "the model's 4 key/value heads"), (3, "the model's 8 attention heads")]
)
def test_a_mesh_that_does_not_divide_the_model(parts, message):
    mesh = jax.sharding.AbstractMesh((1, parts), (sharding.DATA, sharding.MODEL))
    with pytest.raises(UserError, match=f"config.mesh.model is {parts}; it must divide {message}"):
        sharding.check_divides(MODEL, mesh)


def test_every_large_weight_is_cut():
    """A weight that no rule cuts would be whole on every device of a row."""
    specs = weight_specs(MODEL)
    for spec in (specs["embed"], specs["lm_head"], *specs["layers"].values()):
        cut = [name for name in spec.axes if name in sharding.RULES]
        assert len(cut) == (1 if spec.stddev else 0), spec
