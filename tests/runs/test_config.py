"""Every config builds and passes its own checks, its train step lowers; no field is there for nothing."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
import tiny
from ml_collections import ConfigDict
from other_values import APART, OTHER

from configs import (
    counterfactual,
    default,
    demo,
    horizon,
    reasoning,
    single_axis,
    sol_j_2l,
    sol_j_3l,
    sol_j_fl,
)
from pallas_kernels.cost_model import TERMS, CostModel
from sol_jax.costs.decode_step import in_unit
from sol_jax.errors import UserError
from sol_jax.models import llama
from sol_jax.models.llama import LlamaConfig, RopeScaling
from sol_jax.rl import train_step as update
from sol_jax.rl.setup import Setup
from sol_jax.runs.config import RunConfig, read_config

CONFIGS = pathlib.Path(default.__file__).parent
SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192)
# From the models' own config.json.
MODELS = {
    "smollm2-135m": LlamaConfig(49152, 576, 1536, 30, 9, 3, 64, 8192, 100000.0, 1e-5, True),
    "hub:meta-llama/Llama-3.2-1B": LlamaConfig(
        128256, 2048, 8192, 16, 32, 8, 64, 131072, 500000.0, 1e-5, True, SCALING
    ),
    "hub:meta-llama/Llama-3.2-3B": LlamaConfig(
        128256, 3072, 8192, 28, 24, 8, 128, 131072, 500000.0, 1e-5, True, SCALING
    ),
    "hub:meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        128256, 4096, 14336, 32, 32, 8, 128, 131072, 500000.0, 1e-5, False,
        dataclasses.replace(SCALING, factor=8.0),
    ),
}  # fmt: skip
MODELS["hub:deepseek-ai/DeepSeek-R1-Distill-Llama-8B"] = MODELS["hub:meta-llama/Llama-3.1-8B-Instruct"]
MODULES = {
    "default": default, "demo": demo, "horizon": horizon, "reasoning": reasoning, "single_axis": single_axis,
    "sol_j_2l": sol_j_2l, "sol_j_3l": sol_j_3l, "sol_j_fl": sol_j_fl, "counterfactual": counterfactual,
}  # fmt: skip
# (module, variants, joint actions)
RUNS = [
    ("default", "", 8),
    ("demo", "", 8),
    *(("sol_j_2l", v, 8) for v in ("", "smoke", "cpu", "1b")),
    *(("sol_j_3l", v, 27) for v in ("", "cpu")),
    *(("sol_j_fl", v, 1560) for v in ("", "cpu", "cpu,fast,anywhere", "quest", "1b", "3b", "8b")),
    ("sol_j_fl", "rho,cpu", 13),
    ("sol_j_fl", "kappa,fast,cpu", 10),
    *(("horizon", v, 336) for v in ("t4", "t16", "t64", "cpu,t4")),
    *(("single_axis", v, 2) for v in (*single_axis.LEVELS, "kappa-0.1,cpu")),
    *(("reasoning", v, 11) for v in ("", "anywhere")),
    *(("counterfactual", *run) for run in (("cpu,quest", 1560), ("kappa", 10), ("rho,cpu", 13), ("eta", 12))),
]
RUN_IDS = [f"{name}:{variants}" for name, variants, _ in RUNS]
# Tracing a train step takes seconds: of configs that differ in numbers alone one is lowered.
LOWERED = (
    "default:", "sol_j_2l:1b", "sol_j_3l:cpu", "sol_j_fl:8b", "sol_j_fl:cpu,fast,anywhere", "sol_j_fl:quest",
    "horizon:t64", "single_axis:kappa-0.1,cpu", "single_axis:rho-0.5", "single_axis:eta-5-10",
    "reasoning:anywhere", "counterfactual:cpu,quest", "counterfactual:rho,cpu",
)  # fmt: skip


def setup_of(given: ConfigDict) -> Setup:
    config = RunConfig.from_dict(given.to_dict())
    model = dataclasses.replace(MODELS[config.model.path], dtype=config.model.dtype)
    return config.setup(model)


def traced(setup: Setup, batch_size: int):
    state = abstract_state(setup)
    tokens_BxN = jax.ShapeDtypeStruct((batch_size, setup.episode.block_length), jnp.int32)
    weights = llama.abstract_weights(setup.model)
    return update.jit_train_step.trace(state, weights, tokens_BxN, setup=setup)


@functools.cache
def operations(setup: Setup, stage: str, played_by: Setup | None = None) -> str:
    """Those of a stage of a train step on two blocks, with the numbers of its code but not its tables.

    Names of Python's functions hold their addresses, which differ each time.  What is learned from has the
    shapes of `played_by`.
    """
    if stage == "learn":
        learn = functools.partial(update.learn, setup=setup)
        return without_addresses(learn, abstract_state(setup), *played(played_by or setup))
    if stage == "play":
        return without_addresses(functools.partial(update.play, setup=setup), *before_play(setup))
    return without_addresses(functools.partial(update.draw, jax.random.key(0), jnp.int32(0), 2, setup))


@functools.cache
def abstract_state(setup: Setup):
    return jax.eval_shape(lambda key: update.init_state(key, setup), jax.random.key(0))


def before_play(setup: Setup):
    drawn = jax.eval_shape(lambda key: update.draw(key, jnp.int32(0), 2, setup), jax.random.key(0))
    tokens_BxN = jax.ShapeDtypeStruct((2, setup.episode.block_length), jnp.int32)
    return abstract_state(setup).params, llama.abstract_weights(setup.model), tokens_BxN, drawn


@functools.cache
def played(setup: Setup):
    given = before_play(setup)
    return jax.eval_shape(functools.partial(update.play, setup=setup), *given), given[-1]


def without_addresses(function, *args) -> str:
    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(function)(*args)))


@functools.cache
def program(setup: Setup) -> str:
    """The same with tables; takes half as long again."""
    return traced(setup, 2).lower().as_text()


def test_every_file_and_variant_is_tried():
    files = {path.stem for path in CONFIGS.glob("*.py")} - {"__init__"}
    assert files == set(MODULES) == {name for name, _, _ in RUNS}
    tried = {variant for _, variants, _ in RUNS for variant in variants.split(",")}
    assert set(default.VARIANTS) | set(single_axis.LEVELS) | set(sol_j_fl.ALONE) <= tried


@pytest.mark.parametrize(("name", "variants", "num_actions"), RUNS, ids=RUN_IDS)
def test_every_config_has_its_actions(name, variants, num_actions):
    setup = setup_of(MODULES[name].get_config(variants))
    assert setup.space.num_actions == num_actions
    assert hash(setup) == hash(setup_of(MODULES[name].get_config(variants)))


@pytest.mark.parametrize("run", LOWERED)
def test_configs_lower_their_train_step(run):
    name, variants = run.split(":")
    config = MODULES[name].get_config(variants)
    setup = setup_of(config)
    text = traced(setup, config.grpo.batch_size).lower().as_text()
    assert "callback" not in text
    wanted = {"float32": "f32", "bfloat16": "bf16"}[config.model.dtype]
    assert f"{setup.model.vocab_size}x{setup.model.hidden_size}x{wanted}" in text


def test_anywhere_means_any_place_in_a_page():
    setup = setup_of(reasoning.get_config("anywhere"))
    assert (setup.policy.page_size, setup.policy.config.page_input) == (16, True)
    assert (setup.episode.jitter, setup.policy.config.restate) == (15, True)
    assert not setup_of(reasoning.get_config()).policy.config.page_input


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_unknown_variants_are_refused(module):
    with pytest.raises(ValueError, match="'none-such'"):
        module.get_config("none-such")


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_the_command_in_the_docstring_names_the_file_and_its_variants(module):
    name = module.__name__.removeprefix("configs.")
    commands = [line for line in module.__doc__.splitlines() if "-m sol_jax.train" in line]
    assert commands
    for command in commands:
        file, _, variants = command.split("--config configs/")[1].split()[0].partition(":")
        assert file == f"{name if name != 'default' else 'sol_j_fl'}.py"
        MODULES[file.removesuffix(".py")].get_config(variants)


# --- a field nobody reads ------------------------------------------------------------------------------


def test_every_field_is_listed(tiny_folder):
    assert set(OTHER) == set(tiny.config_for(tiny_folder).flat())


# Beside a changed field, before and after: budgets that both can meet, and what the field matters for.
PREDICTS = {"policy.predict_losses": True}
BESIDE = {
    "learner": PREDICTS,
    "policy.restate_steps": {"policy.restate": True},
    "policy.one_budget": PREDICTS,
    "grpo.credit": {"policy.factored_head": True},
    "counterfactual.target": PREDICTS | {"learner": "counterfactual"},
    "counterfactual.floor": PREDICTS | {"learner": "counterfactual"},
    "counterfactual.count_after": PREDICTS | {"learner": "counterfactual"},
    "counterfactual.price_memory": PREDICTS | {"learner": "counterfactual"},
    "axes.kappa.levels": {"axes.kappa.budget": (0.2, 1.0)},
    "axes.rho.levels": {"axes.rho.budget": (0.5, 1.0)},
}


@pytest.mark.parametrize("field", [f for f, value in OTHER.items() if value not in (None, APART)])
def test_a_changed_field_changes_the_train_step(field, tiny_session, tiny_folder):
    """Not only the setup: the program must be another one."""
    config, model = tiny.config_for(tiny_folder, **BESIDE.get(field, {})), tiny_session.setup.model
    before = config.setup(model)
    changed = config.with_fields({field: OTHER[field]})
    after = changed.setup(dataclasses.replace(model, dtype=changed.model.dtype))
    # Tracing takes seconds: what an option is likely to change comes first.
    of_learning = field.startswith(("grpo", "optim", "policy")) or field.endswith("penalty")
    for stage in ("learn", "draw", "play") if of_learning else ("draw", "play", "learn"):
        if operations(after, stage, before) != operations(before, stage):
            return
    assert program(after) != program(before)


def test_an_unchanged_train_step_is_traced_to_the_same_operations(tiny_session):
    """Else the test above would show nothing."""
    setup = tiny_session.setup
    first = [operations(setup, stage) for stage in ("draw", "play", "learn")]
    operations.cache_clear()
    jax.clear_caches()
    assert [operations(setup, stage) for stage in ("draw", "play", "learn")] == first


def test_a_jitter_that_leaves_no_prefix_is_refused(tiny_folder, tiny_session):
    config = tiny.config_for(tiny_folder, **{"episode.jitter": 32})
    with pytest.raises(UserError, match=r"config\.episode\.jitter = 32 must be less than prefix_len, 32"):
        config.setup(tiny_session.setup.model)


def test_an_axis_of_one_level_is_asked_for_that_level(tiny_folder, tiny_session):
    """Whatever the config's budgets say of it, in evaluations as in training."""
    config = tiny.config_for(
        tiny_folder, **{"axes.kappa.levels": (0.5,), "eval.budgets": ((0.25, 0.6, 0.7),)}
    )
    space = config.setup(tiny_session.setup.model).space
    assert config.requested(space) == ((0.5, 0.6, 0.7),)
    assert space.axes[0].budget == (0.5, 0.5)


@pytest.mark.parametrize("unit", ["bytes", "time"])
def test_budgets_in_another_unit(unit, tiny_folder, tiny_session, tmp_path):
    """The axes of the run are those of `costs.in_unit`, and keep rates are translated for evaluation."""
    prices = CostModel("none", 1e-12, 0.0, 0.0)
    prices.save(tmp_path / "prices.json")
    fields = {"axes.rho.levels": (0.4, 0.41, 1.0), "eval.budgets": ((0.5, 0.41, 0.6),)}
    fields |= {"axes.budget_unit": unit, "axes.prices": str(tmp_path / "prices.json")}
    config = tiny.config_for(tiny_folder, **fields)
    space = config.setup(tiny_session.setup.model).space
    keys = config.episode.prefix_len + config.episode.horizon // 2
    model = tiny_session.setup.model
    nominal = config.axes.build(config.axis_context)
    assert space.axes == tuple(in_unit(a, unit, model, keys, prices) for a in nominal)
    rho = space.axes[1]
    assert rho.cost(0.41) != pytest.approx(0.41)
    assert config.requested(space)[0][1] == pytest.approx(rho.cost(0.41))


def test_a_cost_model_is_known_by_what_it_holds(tiny_folder, tmp_path):
    def identity(file, unit="time", **prices):
        CostModel("none", **{name: prices.get(name, 1e-12) for name in TERMS}).save(file)
        return tiny.config_for(tiny_folder, **{"axes.budget_unit": unit, "axes.prices": str(file)}).identity()

    first = identity(tmp_path / "a.json")
    assert identity(tmp_path / "b.json") == first
    assert identity(tmp_path / "a.json", seconds_per_byte=2e-12) != first
    assert identity(tmp_path / "a.json", "bytes") == {}


def test_a_config_survives_its_file(tiny_folder, tmp_path):
    config = tiny.config_for(tiny_folder)
    (tmp_path / "config.json").write_text(json.dumps(config.flat()))
    again = read_config(tmp_path)
    assert again.flat() == config.flat()
    assert again == config
    model = MODELS["smollm2-135m"]
    assert again.setup(model) == config.setup(model)


@pytest.mark.parametrize("shown", [False, True])
def test_logits_are_shown_to_policies_that_look_at_them(shown, tiny_folder, tiny_session):
    config = tiny.config_for(tiny_folder, **{"policy.logit_input": shown})
    setup = config.setup(tiny_session.setup.model)
    assert setup.rules.shows_logit == shown
    if shown:
        with pytest.raises(ValueError, match="looks at the token's logit, and the rules do not show it"):
            dataclasses.replace(setup, rules=dataclasses.replace(setup.rules, shows_logit=False))
