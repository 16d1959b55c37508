"""Axes declare which parts of a step they act on; an effect that is not declared would be passed by."""

import jax.numpy as jnp
import numpy as np
import pytest

from sol_jax.axes.base import METHODS, ActionSpace, Axis, acting, mlp_input, mlp_output
from sol_jax.axes.eta import OutputQuantization
from sol_jax.axes.kappa import Quest, Recency, Relevancy
from sol_jax.axes.rho import ChannelPruning


def shipped(kind: type[Axis] = Axis) -> set[type[Axis]]:
    """The axis and all that are made of it, in `sol_jax`."""
    below = set().union(*map(shipped, kind.__subclasses__()))
    return below | ({kind} if kind.__module__.startswith("sol_jax.") else set())


def act(self: Axis, value, given, *rest, **named):
    """In place of any of the methods."""
    return given


def overridden(kind: type[Axis]) -> set[str]:
    """The effects whose methods are not those of `Axis`, which do nothing."""
    return {
        effect
        for effect, methods in METHODS.items()
        if any(getattr(kind, method) is not getattr(Axis, method) for method in methods)
    }


def test_shipped_axes_are_found():
    assert shipped() == {Axis, Quest, Recency, Relevancy, ChannelPruning, OutputQuantization}


@pytest.mark.parametrize("kind", sorted(shipped(), key=lambda kind: kind.__name__))
def test_declared_effects_are_the_overridden_methods(kind):
    assert kind.effects == overridden(kind)
    assert bool(kind.effects) == (kind is not Axis)


@pytest.mark.parametrize(
    ("effect", "method"), [(effect, method) for effect, methods in METHODS.items() for method in methods]
)
def test_an_effect_that_is_not_declared_is_refused(effect, method):
    told = rf"Silent has a method {method}.*add '{effect}' to its `effects`"
    with pytest.raises(TypeError, match=told):
        type("Silent", (Axis,), {method: act})
    with pytest.raises(TypeError, match=told):  # the others do not help
        type("Silent", (Axis,), {method: act, "effects": frozenset(METHODS) - {effect}})
    declared = type("Declared", (Axis,), {method: act, "effects": frozenset({effect})})
    assert overridden(declared) == declared.effects == {effect}


def test_an_axis_made_of_a_shipped_one_has_its_effects_and_must_declare_more():
    own = type("OwnQuest", (Quest,), {"select": act})
    assert own.effects == {"keys"}
    with pytest.raises(TypeError, match="OwnQuest has a method mlp_output"):
        type("OwnQuest", (Quest,), {"mlp_output": act})
    both = frozenset({"keys", "mlp_output"})
    assert type("OwnQuest", (Quest,), {"mlp_output": act, "effects": both}).effects == both


def test_only_axes_that_declare_an_effect_are_asked_for_it():
    """Each of the paper's three acts on one part of a step, at its own level; an idle axis on none."""
    axes = ActionSpace(
        (
            Quest((0.2, 1.0), (0.2, 1.0), 1.0),
            Axis((0.3, 1.0), (0.3, 1.0), 1.0),
            ChannelPruning((0.4, 1.0), (0.4, 1.0), 1.0),
            OutputQuantization((5.0, 16.0), (0.3, 1.0), 1.0),
        )
    ).axes
    level_X = jnp.array([0.2, 0.3, 0.4, 5.0])
    for effect, place in (("keys", 0), ("mlp_input", 2), ("mlp_output", 3)):
        ((x, axis, value),) = acting(axes, level_X, effect)
        assert (x, axis, float(value)) == (place, axes[place], float(level_X[place]))
    x_D, y_D, gain_D = (np.random.default_rng(i).normal(size=8).astype(np.float32) for i in range(3))
    both = mlp_input(axes, level_X, x_D, gain_D, 1e-5), mlp_output(axes, level_X, y_D, x_D, gain_D, 1e-5)
    alone = (
        mlp_input(axes[2:3], level_X[2:3], x_D, gain_D, 1e-5),
        mlp_output(axes[3:], level_X[3:], y_D, x_D, gain_D, 1e-5),
    )
    np.testing.assert_array_equal(both[0], alone[0])
    for found, expected in zip(both[1], alone[1], strict=True):
        np.testing.assert_array_equal(found, expected)
