"""What the page says in words: hand-made outputs, so that each sentence is known."""

import dataclasses
import types

import numpy as np
import pytest
from small_models import AXES

from sol_jax.axes.base import ActionSpace, Work
from sol_jax.costs.decode_step import StepCost
from sol_jax.generation import shaded_page


def said(monkeypatch, *, spent=(1.0, 1.0), ours=(1, 2, 3), theirs=(1, 2, 3), controller="policy", **fields):
    """The sentences on a text that took `spent` of the dense bytes and operations."""
    monkeypatch.setattr(shaded_page, "text_cost", lambda output, cfg: StepCost(head=Work(*spent)))
    monkeypatch.setattr(shaded_page, "dense_text_cost", lambda output, model: StepCost(head=Work(1.0, 1.0)))
    cfg = {"space": ActionSpace(AXES), "policy": object(), "refresh": True, "lossless": False, "model": None}
    engine = types.SimpleNamespace(controller=controller, cfg=types.SimpleNamespace(**cfg | fields))

    def output(ids):
        return types.SimpleNamespace(
            episodes=[1], mean_cost=lambda costs: np.array([0.25, 0.5, 0.75]),
            request=types.SimpleNamespace(budget=(0.2, 0.5, 0.8)),
            transcript=types.SimpleNamespace(ids=list(ids)),
        )  # fmt: skip

    return shaded_page.in_words(engine, output(ours), output(theirs))


def test_what_was_given_and_what_was_asked(monkeypatch):
    assert said(monkeypatch)[0] == (
        "On average a step used 25% of the earlier text (kappa), 50% of the MLP's input channels (rho) and "
        "75% of the MLP's output bits (eta). Asked for were 20%, 50% and 80%."
    )


def test_an_axis_without_a_choice_is_not_told(monkeypatch):
    kappa, rho, eta = AXES
    space = ActionSpace((kappa, dataclasses.replace(rho, levels=(1.0,), budget=(1.0, 1.0)), eta))
    first = said(monkeypatch, space=space)[0]
    assert "rho" not in first
    assert first.endswith("Asked for were 20% and 80%.")


@pytest.mark.parametrize(
    ("spent", "told"),
    [
        ((0.94, 1.56), "it read 6% fewer bytes and took 56% more operations, compared"),
        ((1.001, 0.5), "it read as many bytes and took 50% fewer operations, compared"),
    ],
)
def test_savings_and_losses_are_both_told(monkeypatch, spent, told):
    line = said(monkeypatch, spent=spent)[1]
    assert line.startswith(
        "With the policy's network and the dense passes between episodes counted in, it read"
    )
    assert told in line
    assert "not timed" in line


def test_only_what_is_there_is_counted_in(monkeypatch):
    assert said(monkeypatch, policy=None)[1].startswith(
        "With the dense passes between episodes counted in, it"
    )
    assert said(monkeypatch, policy=None, refresh=False)[1].startswith("It read")


@pytest.mark.parametrize(
    ("ours", "theirs", "told"),
    [
        ([1, 2, 3], [1, 2, 3], "All 3 tokens are those that the dense model writes."),
        ([1, 2], [1, 2, 3], "All 2 tokens are those that the dense model writes first."),
        ([1, 9, 3], [1, 2, 3], "The first 1 of 3 tokens are those that the dense model writes; from there"),
    ],
)
def test_how_far_the_texts_are_the_same(monkeypatch, ours, theirs, told):
    assert said(monkeypatch, ours=ours, theirs=theirs)[2].startswith(told)


def test_dense_and_lossless_texts_need_no_comparison(monkeypatch):
    assert said(monkeypatch, controller="dense") == [
        "Nothing was left out. This is what the model writes with all of its compute."
    ]
    assert "none stands here that it would not have written" in said(monkeypatch, lossless=True)[2]
