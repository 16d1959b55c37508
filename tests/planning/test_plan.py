"""Plans by arithmetic: what fits, what would, and what cannot be planned."""

import dataclasses
import functools

import pytest
from in_process import run_program

from configs import reasoning, sol_j_fl
from sol_jax.errors import UserError
from sol_jax.planning import plan as planning
from sol_jax.planning import report, tpu
from sol_jax.planning.chips import CHIPS
from sol_jax.planning.plan import changes, make_plan, remedies
from sol_jax.planning.topology import parse_topology
from sol_jax.runs.config import RunConfig


def config(variants: str = "", **fields) -> RunConfig:
    made = RunConfig.from_dict(sol_j_fl.get_config(variants).to_dict())
    return made.with_fields({name.replace("__", "."): value for name, value in fields.items()})


@functools.cache
def planned(topology: str, variants: str = "", **fields) -> planning.Plan:
    return make_plan(config(variants, **fields), parse_topology(topology), compiling=False)


def test_an_8b_model_in_bfloat16_by_hand():
    """8.03 billion weights of two bytes, halved on rows of two; 16 GiB leave too little beside them."""
    weights = 2 * 8_030_261_248
    alone, halved = (planned("v5e:2x4", "8b", model__dtype="bfloat16", mesh__model=m) for m in (1, 2))
    assert alone.sizes.weights == weights
    assert halved.sizes.weights == pytest.approx(weights / 2, rel=1e-4)  # norms are whole everywhere
    assert not alone.fits
    assert halved.fits
    assert (halved.shares.rows, halved.shares.model, halved.shares.chunk) == (4, 2, 1)
    # Its weights alone would go in: what is refused is the rest, or that it is so near.
    assert weights < alone.topology.chip.memory < alone.needs / planning.FILLED
    assert "it may not fit" in report.text(alone) or alone.needs > alone.topology.chip.memory


@pytest.mark.parametrize(
    ("topology", "fields"),
    [
        ("v5e:2x4", {}),  # weights of 30 GiB
        # and scores of 27, of eight blocks at once
        ("h100:8", {"mesh__chunk": 8, "memory__prefill_batch": 8, "episode__prefix_len": 3072}),
    ],
)
def test_what_would_fit_does(topology, fields):
    """Each remedy is a plan of its own, with nothing but its flags changed."""
    plan = planned(topology, "8b", grpo__batch_size=8, **fields)
    assert not plan.fits
    found = remedies(plan)
    assert found
    for flags, other in found:
        assert other.needs < plan.needs
        given = dict(flag.removeprefix("--config.").split("=") for flag in flags.split())
        differing = {
            name: str(value)
            for name, value in other.config.flat().items()
            if value != plan.config.flat()[name]
        }
        assert {**given, **differing} == given  # nothing besides
        assert other.fits


def test_changes_that_cost_least_come_first():
    names = [tuple(change) for change in changes(planned("v5e:2x4", "1b"))]
    assert names[0] == ("memory.prefill_batch",)
    assert names.index(("memory.prefill_batch", "memory.head_rows")) < names.index(
        ("mesh.model", "mesh.data")
    )
    assert ("model.dtype",) in names
    assert all("model.dtype" not in change for change in changes(planned("v5e:2x4", model__dtype="bfloat16")))


def test_seconds_by_hand():
    """One block on one device: its operations over the chip's rate, and its weights read at every step."""
    plan = planned("v5e:1x1", "1b", grpo__batch_size=1, model__dtype="bfloat16", optim__minibatch_steps=64)
    layers = 2 * 16 * (2 * 2048 * 64 * (32 + 8) + 3 * 2048 * 8192)
    # 32 rows of 16 steps are few: a step waits for the weights.
    cache = 2 * 2 * 16 * 8 * 64 * 1024
    assert plan.seconds.rollout == pytest.approx(16 * (layers + cache) / 819e9, rel=0.01)
    assert plan.seconds.links == plan.seconds.network == 0
    twice = planned("v5e:1x1", "1b", grpo__batch_size=2, model__dtype="bfloat16", optim__minibatch_steps=64)
    assert twice.seconds.prefill == pytest.approx(2 * plan.seconds.prefill)


def test_more_slices_send_over_the_network():
    one, two = planned("v5e:4x4", grpo__batch_size=32), planned("v5e:4x4*2", grpo__batch_size=32)
    assert two.shares.rows == 2 * one.shares.rows
    assert two.seconds.network > 10 * one.seconds.network
    assert two.seconds.learn == one.seconds.learn  # one device learns, however many play


def test_rows_without_blocks_are_told():
    text = report.text(planned("v5e:4x4"))
    assert "8 of 16 rows play copies: 8 blocks fill 8; --config.grpo.batch_size=16 would fill all" in text
    assert "play copies" not in report.text(planned("v5e:2x4"))


def test_a_plan_that_does_not_fit_says_what_would():
    text = report.text(planned("v5e:2x4", "8b"))
    assert "it does not fit" in text
    assert "It would fit, by arithmetic, with any of these" in text
    made = report.row("8b", planned("v5e:2x4", "8b"))
    assert set(made) == set(report.COLUMNS)
    assert (made["fits"], made["compiled"]) == ("no", "no")
    assert made["would_fit"].startswith("--config.")


def test_nothing_that_is_tried_makes_a_giant_fit():
    """A prefix of 100,000 tokens for each of 64 schedules' blocks at once."""
    made = RunConfig.from_dict(reasoning.get_config().to_dict())
    plan = make_plan(
        made.with_fields({"episode.prefix_len": 130_000, "grpo.num_schedules": 4096}),
        parse_topology("v5e:1x1"),
        compiling=False,
    )
    assert not plan.fits
    assert "Nothing that this program tries makes it fit" in report.text(plan)


def test_the_compilers_temporaries_count(monkeypatch):
    """A program that takes more than the estimate is told as it is, and remedies are held to that."""
    by_arithmetic = planned("v5e:2x4")
    room = CHIPS["v5e"].memory - by_arithmetic.needs
    play = planning.Compiled(0, 0, int(by_arithmetic.sizes.caches + room), 0, 2.0, {"all-reduce": (3, 2**30)})
    learn = planning.Compiled(0, 8, 100, 0, 1.0, {})
    monkeypatch.setattr(planning, "compile_update", lambda topology, shares: (play, learn))
    plan = make_plan(config(), parse_topology("v5e:2x4"))
    assert plan.sizes.play_temporaries == pytest.approx(room, abs=1)
    assert plan.sizes.learn_temporaries == 108 + plan.sizes.played
    assert plan.compile_seconds == 3
    assert plan.collectives == {"all-reduce": (3, 2**30)}
    assert "3 all-reduce (1 GiB)" in report.text(plan)


@pytest.mark.parametrize(
    "refused",
    [
        "Ran out of memory in memory space hbm. Used 16.61G of 15.75G hbm. Exceeded hbm capacity by 1G.",
        "the total memory required for HLO temporaries (16.61G) exceeds available HBM (15.75G).",
    ],
)
def test_what_the_compiler_refuses_does_not_fit(refused, monkeypatch):
    def refuse(topology, shares):
        raise planning.jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {refused}")

    monkeypatch.setattr(planning, "compile_update", refuse)
    plan = make_plan(config(), parse_topology("v5e:2x4"))
    assert not plan.fits
    assert plan.needs == pytest.approx(16.61 * 2**30)
    assert "the compiler needs 16.61G of 15.75G" in report.text(plan)


def test_other_faults_of_the_compiler_are_not_about_memory(monkeypatch):
    def fail(topology, shares):
        raise planning.jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(planning, "compile_update", fail)
    with pytest.raises(planning.jax.errors.JaxRuntimeError, match="something else"):
        make_plan(config(), parse_topology("v5e:2x4"))


@pytest.mark.parametrize(
    ("topology", "fields", "said"),
    [
        ("v5e:4x4", {"mesh__model": 3}, r"^config.mesh.model is 3; it must divide the 16 devices of a slice"),
        (
            "v5e:4x4",
            {"mesh__model": 2},
            r"^config.mesh.model is 2; it must divide the model's 9 attention heads$",
        ),
        ("v5e:2x2*2", {"mesh__model": 8}, r"it must divide the 4 devices of a slice of v5e:2x2\*2$"),
        ("v5e:2x2", {"mesh__data": 5}, r"need 5 devices, and v5e:2x2 has 4$"),
    ],
)
def test_meshes_that_cannot_be(topology, fields, said):
    with pytest.raises(UserError, match=said):
        planned(topology, **fields)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "give --config configs/X.py and --topology NAME, such as v5e:4x4"),
        (("--config=configs/sol_j_fl.py",), "give --config configs/X.py and --topology NAME"),
        (("--config=configs/sol_j_fl.py", "--topology=v9:2x2"), "--topology: 'v9:2x2' names none of v4"),
        (("--config=configs/sol_j_fl.py", "--topology=v5e:4"), "v5e takes 2 numbers, such as v5e:4x4"),
        (("--config=configs/sol_j_fl.py", "--topology=v5e:4x4"), "which is not installed: pip install"),
    ],
)
def test_the_programs_refusals(args, said, monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    tpu.devices.cache_clear()
    done = run_program("sol_jax.plan", *args)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_program():
    done = run_program(
        "sol_jax.plan", "--config=configs/sol_j_fl.py:1b", "--topology=h100:8", "--workdir=/nowhere"
    )
    assert done.returncode == 0, done.stderr
    assert "hub:meta-llama/Llama-3.2-1B in float32 on h100:8: 8 devices, mesh data 8 x model 1" in done.stdout
    assert "it fits" in done.stdout
    assert dataclasses.asdict(planned("h100:8", "1b").seconds)["learn"] > 0
